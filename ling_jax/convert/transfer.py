"""The work of a conversion: pieces copied by threads, a journal to resume from, and the record of every tensor."""

import dataclasses
import json
import logging
import math
import os
import pathlib
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ling_jax.convert.mapping import Path, Stack
from ling_jax.convert.tensorfile import DTYPES, NAMES
from ling_jax.convert.weights import INDEX, PICKLES, Index, some
from ling_jax.files.one_writer import HOLDER, OneWriter
from ling_jax.files.progress import ByteProgress

log = logging.getLogger(__name__)

JOURNAL = "conversion.jsonl"  # of an unfinished target
AUDIT_FILE = "conversion_audit.json"  # of a finished one
PARTIAL = ".partial"  # after a target's name until it is finished
NOT_CARRIED = (".safetensors", ".gguf", ".onnx", ".h5", ".msgpack", *PICKLES)  # weights of any kind
MADE_ANEW = ("config.json", INDEX, AUDIT_FILE, "README.md", HOLDER)
THREADS = 2  # pieces at a time, each held in memory once or twice
PIECE_BYTES = 128 << 20  # of a piece at most, where its files allow that
SCAN = 1 << 16  # elements looked at together: they stay in a core's cache
# How to see NaN and infinities in the bits: the unsigned integer, the exponent's bits (for FP8, all of a NaN's).
EXPONENTS = {"F8_E4M3": (np.uint8, 0x7F), "BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00)}
EXPONENTS["F32"] = (np.uint32, 0x7F800000)


class Piece(NamedTuple):
    """What one thread copies at a time: parts of one array, in order, that make whole tensors together."""

    path: Path
    parts: tuple[Index, ...]

    def nbytes(self, itemsize: int) -> int:
        return sum(math.prod(s.stop - s.start for s in part) for part in self.parts) * itemsize

    @property
    def key(self) -> str:
        first, last = self.parts[0], self.parts[-1]
        return ".".join(self.path) + str([(a.start, b.stop) for a, b in zip(first, last, strict=True)])


def pieces(path: Path, stack: Stack, chunk: Sequence[int], itemsize: int, block: int) -> Iterator[Piece]:
    """An array cut along its files' chunks into pieces of some PIECE_BYTES, parts that begin at whole FP8 blocks."""
    depth = stack.names.ndim
    tensor = math.prod(stack.shape) * itemsize
    steps = list(chunk[:depth])
    for dim in range(depth):
        while steps[dim] > 1 and math.prod(steps) * tensor > PIECE_BYTES:
            steps[dim] = -(-steps[dim] // 2)
    rows = stack.shape[0]
    if tensor > PIECE_BYTES:
        rows = min(rows, max(chunk[depth] // block, 1) * block)
    inner = [slice(0, size) for size in stack.shape[1:]]
    grids = [range(0, size, step) for size, step in zip(stack.names.shape, steps, strict=True)]
    for starts in np.ndindex(*map(len, grids)):
        outer = tuple(
            slice(grid[i], min(grid[i] + grid.step, grid.stop)) for grid, i in zip(grids, starts, strict=True)
        )
        cuts = (slice(row, min(row + rows, stack.shape[0])) for row in range(0, stack.shape[0], rows))
        yield Piece(path, tuple((*outer, cut, *inner) for cut in cuts))


def tensors_in(stack: Stack, part: Index, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(name, its rows) of each tensor in a part of an array."""
    names = np.array(stack.names[part[: stack.names.ndim]], object).reshape(-1)
    return zip(map(str, names), values.reshape(len(names), *values.shape[stack.names.ndim :]), strict=True)


# What is known of each tensor when it has been copied.


@dataclasses.dataclass
class Record:
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


class Journal:
    """Which pieces are on the disk for good, so that an interrupted conversion goes on. `fresh` until `begin`.

    Raises:
      ValueError: if it tells of another conversion than `fingerprint`.
    """

    def __init__(self, folder: pathlib.Path, fingerprint: Any):
        self.records: dict[str, Record] = {}
        self._done: set[str] = set()
        if not (folder / JOURNAL).exists() and any(file.name != HOLDER for file in folder.iterdir()):
            raise self._of_another(folder)
        self._file = (folder / JOURNAL).open("a+")
        self._file.seek(0)
        text = self._file.read()
        lines = text[: text.rfind("\n") + 1].splitlines()  # a kill may have cut the last one
        self._file.truncate(len(text[: text.rfind("\n") + 1].encode()))
        self._header, self.fresh = json.dumps(fingerprint), not lines
        if lines and lines[0] != self._header:
            self._file.close()
            raise self._of_another(folder)
        for line in lines[1:]:
            entry = json.loads(line)
            self._done.add(entry["piece"])
            self.records |= {name: Record(**values) for name, values in entry["records"].items()}

    @staticmethod
    def _of_another(folder: pathlib.Path) -> ValueError:
        return ValueError(
            f"{folder} is an unfinished conversion of other files or with other settings: remove it, or run the "
            "command that began it"
        )

    def begin(self) -> None:
        """The folder is prepared."""
        self._write(self._header)
        self.fresh = False

    def has(self, piece: Piece) -> bool:
        return piece.key in self._done

    def add(self, piece: Piece, records: Mapping[str, Record]) -> None:
        self.records |= records
        values = {name: dataclasses.asdict(record) for name, record in records.items()}
        self._write(json.dumps({"piece": piece.key, "records": values}))

    def close(self) -> None:
        self._file.close()

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


class Work:
    """One conversion: its pieces, and the folder TARGET.partial in which it grows until it is renamed to TARGET. A
    context manager, for one process at a time.

    Args:
      place: the target, which does not exist.
      fingerprint: JSON that tells this conversion from others: an unfinished one of another kind is not gone on with.
      itemsizes: of each array that is copied, in bytes.
      prepare: fills the folder, which is there, before the first piece; again, if it was killed in the middle.
    Raises:
      ValueError: for a disk with too little room, on making it; on entering, if another process is at it, or the folder
        is of another conversion; on leaving, for an error of the disk.
    """

    def __init__(
        self,
        place: pathlib.Path,
        fingerprint: Any,
        todo: Sequence[Piece],
        itemsizes: Mapping[Path, int],
        prepare: Callable[[pathlib.Path], None],
    ):
        self.folder = place.with_name(place.name + PARTIAL)
        self._place, self._fingerprint, self._todo, self._prepare = place, fingerprint, todo, prepare
        self._sizes = {piece.key: piece.nbytes(itemsizes[piece.path]) for piece in todo}
        self._start = time.monotonic()
        self._check_space(sum(self._sizes.values()))

    def __enter__(self) -> "Work":
        try:
            self._writer = OneWriter(epath.Path(self.folder)).__enter__()
        except OSError as error:
            raise self._failed(error) from error
        try:
            new_place(str(self._place))  # or a process that has just ended has made it
            self._journal = Journal(self.folder, self._fingerprint)
            if self._journal.fresh:
                self._prepare(self.folder)
                self._journal.begin()
        except BaseException as error:
            self._writer.__exit__()
            raise self._failed(error) from error if isinstance(error, OSError) else error
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._journal.close()
        self._writer.__exit__()
        if isinstance(error, OSError) or "No space left" in str(error):
            raise self._failed(error) from error

    def _failed(self, error: BaseException | None) -> ValueError:
        reason = str(error).splitlines()[0]
        hint = "What is copied is kept: make room, and run the same command to go on"
        return ValueError(f"writing {self.folder} failed: {reason}. {hint}")

    @property
    def records(self) -> dict[str, Record]:
        return self._journal.records

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def run(self, copy: Callable[[Piece], dict[str, Record]]) -> None:
        """Copies every piece that the journal has not. An error ends it at the next piece; what is done stays done."""
        left = [piece for piece in self._todo if not self._journal.has(piece)]
        total = sum(self._sizes.values())
        done = total - sum(self._sizes[piece.key] for piece in left)
        if done:
            log.info("going on after %.2f of %.2f GB", done / 1e9, total / 1e9)
        with ByteProgress(total, done) as progress, ThreadPoolExecutor(THREADS) as pool:
            futures = {pool.submit(copy, piece): piece for piece in left}
            try:
                for future in as_completed(futures):
                    self._journal.add(futures[future], future.result())
                    progress.advance(self._sizes[futures[future].key])
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def finish(self, audit: str) -> None:
        """All is copied: the target appears."""
        if bad := {name: record.not_finite for name, record in self.records.items() if record.not_finite}:
            log.warning("%d numbers are NaN or infinite: %s", sum(bad.values()), some(list(bad)))
        (self.folder / AUDIT_FILE).write_text(audit + "\n")
        _sync(self.folder)
        self._writer.move(epath.Path(self._place))
        _sync(self._place.parent, inside=False)
        (self._place / JOURNAL).unlink()  # only now: without it nobody could tell what an unfinished folder is

    def _check_space(self, size: int) -> None:
        have = sum(file.stat().st_blocks * 512 for file in self.folder.rglob("*")) if self.folder.exists() else 0
        parent = next(folder for folder in self._place.parents if folder.exists())
        free = shutil.disk_usage(parent).free
        if size > free + have:
            sizes = f"{self._place} takes {size / 1e6:,.1f} MB and {parent} has {(free + have) / 1e6:,.1f} MB free"
            raise ValueError(f"{sizes}: make room")


def _sync(folder: pathlib.Path, inside: bool = True) -> None:
    """Returns when a folder, and what is inside, is on the disk."""
    for path in [folder, *(folder.rglob("*") if inside else ())]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def new_place(target: str) -> pathlib.Path:
    """The path of a target; ValueError if something is there."""
    if "://" in target:
        raise ValueError(f"{target}: conversions write to a local folder; copy it from there")
    place = pathlib.Path(target).expanduser().absolute()
    if place.exists() or place.is_symlink():
        raise ValueError(f"{place} exists: choose another --target, or move it away; nothing is ever overwritten")
    return place


def stamps(files: Iterable[pathlib.Path | epath.Path]) -> list[Any]:
    """What changes when one of the files does: names, sizes, times of change."""
    found = [(str(file), epath.Path(file).stat()) for file in files]
    return [[name, stat.length, stat.mtime] for name, stat in found]


def carry(folders: Iterable[Any], target: pathlib.Path | epath.Path) -> list[str]:
    """Copies what else lies in HF folders (tokenizer, chat template, generation settings, the model's own code, which
    is never run) to `target`, a later folder's files over an earlier one's; returns their names."""
    found: dict[str, Any] = {}
    for folder in folders:
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            hidden = file.name.startswith(".") or file.suffix in NOT_CARRIED or file.name in MADE_ANEW
            if not hidden and file.is_file():
                found[file.name] = file
    target.mkdir(parents=True, exist_ok=True)
    for name, file in found.items():
        epath.Path(file).copy(epath.Path(target / name), overwrite=True)
    return sorted(found)
