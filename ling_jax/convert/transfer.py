"""The work of a conversion: pieces copied by threads, a journal to resume from, and the record of every tensor.

On a disk a target grows in TARGET.partial, which is renamed at the end. In a bucket it grows in its place, and is taken
for whole by nobody before its last object is there; meanwhile TARGET.partial has the journal, and goes at the end.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import json
import logging
import math
import os
import pathlib
import re
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ling_jax.checkpoint import COMMIT
from ling_jax.convert.mapping import ArrayPath, TensorStack
from ling_jax.convert.tensorfile import DTYPES, NAMES
from ling_jax.convert.weights import INDEX, PICKLES, PIECE_BYTES, some
from ling_jax.files.arrays import Index
from ling_jax.files.buckets import bucket_of, file_system, is_bucket, scheme_of
from ling_jax.files.lines import cut_lines, open_lines, parts_of, read_lines
from ling_jax.files.one_writer import HOLDER, OneWriter
from ling_jax.files.paths import at, check_bucket, entries, entry, write_whole
from ling_jax.files.progress import ByteProgress

log = logging.getLogger(__name__)

JOURNAL = "conversion.jsonl"  # of an unfinished target
AUDIT_FILE = "conversion_audit.json"  # of a finished one
PARTIAL = ".partial"  # after a target's name until it is finished
NOT_CARRIED = (".safetensors", ".gguf", ".onnx", ".h5", ".msgpack", *PICKLES)  # weights of any kind
CONFIG = "config.json"
MADE_ANEW = (CONFIG, INDEX, AUDIT_FILE, "README.md", HOLDER)
# Memory: a piece of PIECE_BYTES is there at most three times, as blocks from a bucket, joined and in its array. So
# THREADS pieces that become chunks take 3 * 3 * 64 = 576 MB at most, the two of a file that is written 256 MB and its
# upload 40 MB (two parts of it in s3fs); the interpreter with its libraries some 250 MB, what malloc keeps as much.
THREADS = 3
JOURNAL_SECONDS = 5.0  # between two lines of the journal that wait until they are on the disk, or in the bucket
STAMPED = 16  # files asked about at a time
OF_SHARD = re.compile(r"-\d+-of-\d+(?=\.json)")  # what `Shard.own` adds to a name
SCAN = 1 << 16  # elements looked at together: they stay in a core's cache
# How to see NaN and infinities in the bits: the unsigned integer, the exponent's bits (for FP8, all of a NaN's).
EXPONENTS = {"F8_E4M3": (np.uint8, 0x7F), "BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00)}
EXPONENTS["F32"] = (np.uint32, 0x7F800000)


class Shard(NamedTuple):
    """One of `count` processes that make one target together, `number` counting from 1."""

    number: int = 1
    count: int = 1

    def own(self, name: str) -> str:
        """The name of this process's own file, where a process that works alone calls its file `name`."""
        stem, dot, suffix = name.partition(".")
        return name if self.count == 1 else f"{stem}-{self.number}-of-{self.count}{dot}{suffix}"


ALONE = Shard()


class Piece(NamedTuple):
    """The parts of one array that a thread copies at a time, in order; together they make whole tensors."""

    path: ArrayPath
    parts: tuple[Index, ...]

    def nbytes(self, itemsize: int) -> int:
        return sum(size_of(part) for part in self.parts) * itemsize

    @property
    def key(self) -> str:
        first, last = self.parts[0], self.parts[-1]
        return ".".join(self.path) + str([(a.start, b.stop) for a, b in zip(first, last, strict=True)])


def size_of(part: Index) -> int:
    """The numbers in a part of an array."""
    return math.prod(s.stop - s.start for s in part)


def strides(stack: TensorStack, chunk: Sequence[int], itemsize: int, block: int = 1) -> tuple[int, ...]:
    """How an array is cut: names at a time for each of their dims, then rows, a multiple of `block` where a tensor is
    cut. They are those of its files' chunks, but less where a chunk is not of whole rows."""
    depth = stack.names.ndim
    row = math.prod(stack.shape[1:]) * itemsize
    limit = max(PIECE_BYTES, math.prod(chunk) * itemsize)
    outer, rows = list(chunk[:depth]), chunk[depth]
    for dim in range(depth):
        while outer[dim] > 1 and math.prod(outer) * rows * row > limit:
            outer[dim] = -(-outer[dim] // 2)
    rows = min(rows, max(limit // row, 1))
    return (*outer, rows if rows == stack.shape[0] else max(rows // block, 1) * block)


def pieces(path: ArrayPath, stack: TensorStack, strides: Sequence[int]) -> Iterator[Piece]:
    """An array cut into pieces, and they into parts, of these `strides`."""
    rows = strides[-1]
    inner = [slice(0, size) for size in stack.shape[1:]]
    grids = [range(0, size, step) for size, step in zip(stack.names.shape, strides[:-1], strict=True)]
    for starts in np.ndindex(*map(len, grids)):
        outer = tuple(
            slice(grid[i], min(grid[i] + grid.step, grid.stop)) for grid, i in zip(grids, starts, strict=True)
        )
        cuts = (slice(row, min(row + rows, stack.shape[0])) for row in range(0, stack.shape[0], rows))
        yield Piece(path, tuple((*outer, cut, *inner) for cut in cuts))


def tensors_in(stack: TensorStack, part: Index, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(name, its rows) of each tensor in a part of an array."""
    names = np.array(stack.names[part[: stack.names.ndim]], object).reshape(-1)
    return zip(map(str, names), values.reshape(len(names), *values.shape[stack.names.ndim :]), strict=True)


# What is known of each tensor when it has been copied.


@dataclasses.dataclass
class TensorRecord:
    """One HF tensor: as it is in HF's file (that was read, or that was written)."""

    dtype: str
    shape: list[int]
    crc32: int = 0
    not_finite: int = 0  # elements that are NaN or infinite
    cast: str | None = None  # "F32 -> BF16" where our array has other numbers than this tensor

    def add(self, part: np.ndarray) -> None:
        """Counts the next rows of the tensor."""
        flat = np.ascontiguousarray(part).reshape(-1)
        self.crc32 = zlib.crc32(flat.view(np.uint8).data, self.crc32)
        self.not_finite += count_not_finite(flat)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def count_not_finite(flat: np.ndarray) -> int:
    unsigned, mask = EXPONENTS[NAMES[flat.dtype]]
    bits = flat.view(unsigned)
    found = 0
    for start in range(0, bits.size, SCAN):
        exponents = bits[start : start + SCAN] & unsigned(mask)
        if exponents.max() == mask:
            found += int((exponents == mask).sum())
    return found


class Done(NamedTuple):
    """The record of a piece that has been copied."""

    records: dict[str, TensorRecord]
    files: dict[str, str] = {}  # checksums of the files that it is in, where they have any


class Journal:
    """Which pieces are on the disk or in the bucket for good, so that an interrupted conversion, one that had `begun`,
    goes on.

    Args:
      name: of its file; processes that work together have one each, with the same `fingerprint`.
    Raises:
      ValueError: if one of the folder tells of another conversion than `fingerprint`.
    """

    def __init__(self, folder: epath.Path, fingerprint: Any, name: str = JOURNAL):
        file, header = folder / name, json.dumps(fingerprint).encode()
        found = _journals(folder)
        if not found and not all(_unsharded(other).startswith(HOLDER) for other in _inside(folder)):
            raise self._of_another(folder)
        cut_lines(file, lambda line: True)  # a kill may have cut the last one
        if not all(header.startswith(next(read_lines(one), (b"", False))[0]) for one in found):
            raise self._of_another(folder)
        self.done = done_in(file)
        self.begun = any(True for _ in read_lines(file))
        self._lines, self._flushed = open_lines(file), -math.inf
        if not self.begun:
            self._append(header)

    @staticmethod
    def _of_another(folder: epath.Path) -> ValueError:
        return ValueError(
            f"{folder} is an unfinished conversion of other files or with other settings: remove it, or run the "
            "command that began it"
        )

    def add(self, piece: str, done: Done) -> None:
        self.done[piece] = done
        records = {name: dataclasses.asdict(record) for name, record in done.records.items()}
        self._append(json.dumps({"piece": piece, "records": records, "files": done.files}).encode())

    def close(self) -> None:
        self._lines.close()

    def _append(self, line: bytes) -> None:
        self._lines.append(line)
        if time.monotonic() - self._flushed > JOURNAL_SECONDS:
            self._lines.flush()
            self._flushed = time.monotonic()


def done_in(file: epath.Path) -> dict[str, Done]:
    """The pieces that a journal names; the last line may be half written."""
    done = {}
    for line, more in itertools.islice(read_lines(file), 1, None):
        try:
            told = json.loads(line)
        except ValueError:
            if more:
                raise
            break
        records = {name: TensorRecord(**values) for name, values in told["records"].items()}
        done[told["piece"]] = Done(records, told["files"])
    return done


def _journals(folder: epath.Path) -> list[epath.Path]:
    """The journals in a folder: one, or one for each of the processes that work together."""
    return [file for file in _inside(folder) if _unsharded(file) == JOURNAL]


def _unsharded(file: epath.Path) -> str:
    return OF_SHARD.sub("", file.name)


class Conversion:
    """One conversion: its pieces, and the `folder` in which the target grows. A context manager, for one process at a
    time, or for one of each shard.

    Args:
      place: the target, which does not exist.
      fingerprint: JSON that tells this conversion from others: an unfinished one of another kind is not gone on with.
      sizes: of all pieces, in bytes, by their names in the journal.
      shard: which of the pieces this process copies.
    Raises:
      ValueError: for a disk with too little room, on making it; on entering, if another process is at it, or the folder
        is of another conversion; on leaving, for an error of the disk.
    """

    def __init__(self, place: epath.Path, fingerprint: Any, sizes: Mapping[str, int], shard: Shard = ALONE):
        self._partial = _partial(place)
        self.folder = place if is_bucket(place) else self._partial
        self._place, self._fingerprint, self._sizes = place, fingerprint, sizes
        self._shard, self._mine = shard, list(sizes)[shard.number - 1 :: shard.count]
        if shard != ALONE:
            self._fingerprint = [fingerprint, shard.count]
        self._start = time.monotonic()
        self._check_space(sum(sizes.values()))

    def __enter__(self) -> "Conversion":
        alone = self._shard == ALONE
        try:
            self._writer = OneWriter(self._partial, self._shard.own(HOLDER)).__enter__()
        except OSError as error:
            raise self._failed(error) from error
        try:
            _check_new(self._place)  # or a process that has just ended has made it
            with contextlib.nullcontext() if alone else OneWriter(self._partial, wait=True):
                self._journal = Journal(self._partial, self._fingerprint, self._shard.own(JOURNAL))
            if self._journal.begun and alone:  # the others of several may be at work
                _abort_uploads(self.folder)
        except BaseException as error:
            self._writer.__exit__()
            _remove_empty(self._partial)
            raise self._failed(error) from error if isinstance(error, OSError) else error
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:  # finish() has let go of all
            self._journal.close()
            self._writer.__exit__()
        if isinstance(error, OSError) or "No space left" in str(error):
            raise self._failed(error) from error

    def _failed(self, error: BaseException | None) -> ValueError:
        reason = str(error).splitlines()[0]
        room = "" if is_bucket(self.folder) else "make room, and "
        hint = f"What is copied is kept: {room}run the same command to go on"
        return ValueError(f"writing {self.folder} failed: {reason}. {hint}")

    @property
    def done(self) -> dict[str, Done]:
        return self._journal.done

    @property
    def records(self) -> dict[str, TensorRecord]:
        return {name: record for done in self.done.values() for name, record in done.records.items()}

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def left(self) -> list[str]:
        """The pieces that this process has still to copy."""
        return [piece for piece in self._mine if piece not in self.done]

    def run(self, copy: Callable[[str, Callable[[int], None]], Done], threads: int) -> None:
        """Copies every piece that the journal has not: `copy` is given its name, and what to tell of bytes that are
        copied. An error ends it at the next piece; what is done stays done."""
        left = self.left()
        total = sum(self._sizes[piece] for piece in self._mine)
        done = total - sum(self._sizes[piece] for piece in left)
        if done:
            log.info("going on after %.2f of %.2f GB", done / 1e9, total / 1e9)
        with ByteProgress(total, done) as progress, ThreadPoolExecutor(threads) as pool:
            futures = {pool.submit(copy, piece, progress.advance): piece for piece in left}
            try:
                for future in as_completed(futures):
                    self._journal.add(futures[future], future.result())
                    _give_back_memory()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def gather(self) -> bool:
        """Whether this process is to `finish` the target, once it has copied its pieces. Of several processes it is the
        first that finds all pieces there, and from now on no other one writes; `done` has the pieces of all then."""
        if self._shard == ALONE:
            return True
        self._journal.close()
        self._writer.__exit__()
        self._writer = OneWriter(self._partial, wait=True).__enter__()
        there = _is_made(self._place)
        for journal in _journals(self._partial):
            self.done.update(done_in(journal))
        left = len(self._sizes.keys() - self.done.keys())
        if not there and not left:
            return True
        self._writer.__exit__()
        if there:
            _remove_empty(self._partial)
        told = (
            f"{left:,} of {len(self._sizes):,} pieces are left to the others, the last of which completes {self._place}"
        )
        log.info("shard %d of %d is done: %s", *self._shard, f"{self._place} is complete" if there else told)
        return False

    def finish(self, audit: str, last: Callable[[], None]) -> None:
        """All is copied: `last` makes what completes the target, and it appears."""
        if bad := {name: record.not_finite for name, record in self.records.items() if record.not_finite}:
            log.warning("%d numbers are NaN or infinite: %s", sum(bad.values()), some(list(bad)))
        write_whole(self.folder / AUDIT_FILE, audit + "\n")
        last()
        self._journal.close()
        if is_bucket(self._place):
            _remove_journal(self._partial)
            self._writer.__exit__()
            return
        _sync(self.folder)
        self._writer.move(self._place)
        _sync(self._place.parent, inside=False)
        _remove_journal(self._place)  # only now: without it nobody could tell what an unfinished folder is

    def _check_space(self, size: int) -> None:
        if is_bucket(self._place):
            return
        have = sum(map(_bytes_on_disk, pathlib.Path(self.folder).rglob("*")))
        parent = next(folder for folder in self._place.parents if folder.exists())
        free = shutil.disk_usage(parent).free
        if size > free + have:
            sizes = f"{self._place} takes {size / 1e6:,.1f} MB and {parent} has {(free + have) / 1e6:,.1f} MB free"
            raise ValueError(f"{sizes}: make room")


def _bytes_on_disk(file: pathlib.Path) -> int:
    try:
        return file.stat().st_blocks * 512
    except FileNotFoundError:  # another process renames and removes its own
        return 0


def in_order(make: Callable[[Any], Any], jobs: Iterable[tuple[Any, int]]) -> Iterator[Any]:
    """Yields `make(job)` for each (job, bytes that it takes), in order. The one that is used and those ahead of it take
    2 * PIECE_BYTES, or are a single larger one."""
    waiting: deque[tuple[Future, int]] = deque()
    size = 0
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for job, more in jobs:
                while waiting and size + more > 2 * PIECE_BYTES:
                    made, less = waiting.popleft()
                    yield made.result()
                    _give_back_memory()
                    size -= less
                waiting.append((pool.submit(make, job), more))
                size += more
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _give_back_memory() -> None:
    """Tells glibc to give freed memory back: blocks of a bucket's answers come from many threads, each of which would
    keep its own."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


# Where a target is.


def new_place(target: str) -> epath.Path:
    """The path of a target; ValueError if something is there. What a killed conversion that had ended left beside it
    is removed."""
    place = at(target) if is_bucket(target) else at(target).absolute()
    if is_bucket(place):
        if os.fspath(place) == bucket_of(place):
            raise ValueError(f"{place} is a bucket: name a folder in it by --target")
        check_bucket(place)
        partial = _partial(place)
        if _is_whole(place) and entries(partial):
            with OneWriter(partial):
                _remove_journal(partial)
    _check_new(place)
    return place


def _check_new(place: epath.Path) -> None:
    if _is_made(place) or (is_bucket(place) and place.exists() and not _journals(_partial(place))):
        raise ValueError(f"{place} exists: choose another --target, or move it away; nothing is ever overwritten")


def _is_made(place: epath.Path) -> bool:
    """Whether a target is there, and is not one that grows in a bucket."""
    if is_bucket(place):
        return _is_whole(place)
    return place.exists() or pathlib.Path(place).is_symlink()


def _is_whole(place: epath.Path) -> bool:
    """Whether the last object of a conversion into a bucket is there: a checkpoint's, or a HF folder's."""
    return (place / COMMIT).exists() or (place / CONFIG).exists()


def _partial(place: epath.Path) -> epath.Path:
    return place.parent / (place.name + PARTIAL)


def _remove_journal(folder: epath.Path) -> None:
    """Removes what told of the conversion's work, and of the processes that were at it."""
    for journal in _journals(folder):
        for part in reversed(parts_of(journal)):  # its first line goes last
            part.unlink()
    for file in _inside(folder):
        if file.name != HOLDER and _unsharded(file) == HOLDER:  # of a shard's process that found nothing to do
            file.unlink(missing_ok=True)


def _remove_empty(folder: epath.Path) -> None:
    if not is_bucket(folder):
        with contextlib.suppress(OSError):  # it is not empty, or gone
            os.rmdir(folder)


def _abort_uploads(folder: epath.Path) -> None:
    """Ends the uploads to a folder that a killed process left: Amazon keeps their parts, and charges for them."""
    if scheme_of(folder) != "s3":
        return
    bucket, _, name = os.fspath(folder).partition("://")[2].partition("/")
    files = file_system(folder)
    try:
        for upload in files.list_multipart_uploads(bucket):
            if upload["Key"].startswith(f"{name}/"):
                files.abort_mpu(bucket, upload["Key"], upload["UploadId"])
    except (OSError, ValueError) as error:  # a right that nothing else here needs
        log.warning("parts of unfinished uploads to %s may be left: %s", folder, error)


def _inside(folder: epath.Path) -> list[epath.Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _sync(folder: epath.Path, inside: bool = True) -> None:
    """Returns when a local folder, and what is inside, is on the disk."""
    for path in [folder, *(pathlib.Path(folder).rglob("*") if inside else ())]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def stamps(files: Iterable[epath.Path]) -> list[list[Any]]:
    """A value that changes when one of the files does: names, sizes, times of change or a bucket's marks."""

    def stamp(file: epath.Path) -> list[Any]:
        if is_bucket(file):
            return [os.fspath(file), entry(file).stamp]
        found = file.stat()
        return [os.fspath(file), found.length, found.mtime]

    with ThreadPoolExecutor(STAMPED) as pool:
        return list(pool.map(stamp, files))


def carry(folders: Iterable[epath.Path], target: epath.Path) -> list[str]:
    """Copies what else lies in HF folders (tokenizer, chat template, generation settings, the model's own code, which
    is never run) to `target`, a later folder's files over an earlier one's; returns their names."""
    found: dict[str, epath.Path] = {}
    for folder in folders:
        for file in sorted(_inside(folder)):
            hidden = file.name.startswith(".") or file.suffix in NOT_CARRIED or file.name in MADE_ANEW
            if not hidden and file.is_file():
                found[file.name] = file
    target.mkdir(parents=True, exist_ok=True)
    for name, file in found.items():
        write_whole(target / name, file.read_bytes())
    return sorted(found)
