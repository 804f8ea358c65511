"""Arrays in a folder that are made once, whole or not at all: mapped into memory, or in a bucket, read by parts.

An entry is one .npy file per column and an index, a JSON object with its own checksum that tells each column's length
and checksums. The index is written last: without it, and with columns that are not as it says, there is no entry.

Columns grow on this machine's disk. Those of a folder in a bucket are uploaded when they are whole; the index tells
their stamps too, so that who opens the entry knows without reading them that they are the ones.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from etils import epath

from ling_jax.data.remote import Column, DamagedCorpus, find
from ling_jax.files import buckets, paths
from ling_jax.files.cache import cache_folder, can_write
from ling_jax.files.one_writer import HOLDER, OneWriter
from ling_jax.files.whole import checksum, read_sealed, sealed

log = logging.getLogger(__name__)

BLOCK = 1 << 26  # bytes of a column that share a checksum
CHECKED_BLOCKS = 16  # of a column are compared when it is opened: all of 1 GiB, evenly spread ones of more
AT_ONCE = 1 << 20  # entries of a column that are in memory together
UPLOADED, PARTS = 16 << 20, 9000  # bytes uploaded at a time; more where an object would take more requests than that
HINT = "set --data.cache-dir to a folder of this machine that can be written, or to one in a bucket"


@dataclass(frozen=True)
class Kept:
    """A whole entry.

    Attributes:
      columns: mapped into memory, or in a bucket.
      facts: what its maker said of it.
      checksum: follows from the columns' contents alone.
    """

    columns: dict[str, np.ndarray | Column]
    facts: dict[str, Any]
    checksum: str

    def __getitem__(self, column: str) -> np.ndarray:
        """A column mapped into memory; one in a bucket is read into it."""
        values = self.columns[column]
        return values if isinstance(values, np.ndarray) else np.asarray(values)

    def in_memory(self) -> "Kept":
        return replace(self, columns={name: self[name] for name in self.columns})


class _Column:
    """One file that grows; its blocks' checksums are taken from memory."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self.dtype, self.bytes = path, dtype, 0
        self.checksums: list[str] = []
        self._file: IO[bytes] = path.open("wb")
        self._file.write(_header(dtype, 0))
        self._block = xxhash.xxh3_64()

    def append(self, values: np.ndarray) -> None:
        data = memoryview(np.ascontiguousarray(values, self.dtype)).cast("B")
        self._file.write(data)
        while len(data):
            room = BLOCK - self.bytes % BLOCK
            self._block.update(data[:room])
            self.bytes += len(data[:room])
            data = data[room:]
            if self.bytes % BLOCK == 0:
                self._end_block()

    def _end_block(self) -> None:
        self.checksums.append(self._block.hexdigest())
        self._block = xxhash.xxh3_64()

    def seal(self, to: epath.Path) -> dict[str, Any]:
        """Gives the file, safe on the disk, its name, or uploads it; returns its part of the index."""
        if self.bytes % BLOCK:
            self._end_block()
        self._file.seek(0)
        self._file.write(_header(self.dtype, self.bytes // self.dtype.itemsize))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        told = {"bytes": self.bytes, "checksums": self.checksums}
        if paths.is_bucket(to):
            _upload(self.path, to)
            found = find(to)
            return told | {"stamp": found.stamp if found else ""}
        self.path.replace(to)
        return told

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk, which has been met before
            self._file.close()


class Columns:
    """The columns of an entry that is being made.

    Args:
      room: a local folder.
      name: begins the names of their files there.
    """

    def __init__(self, room: Path, name: str):
        self._room, self._name = room, name
        self._columns: dict[str, _Column] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        """Adds values to the end of a column, whose dtype its first values decide."""
        if name not in self._columns:
            path = self._room / f"{self._name}.{name}.{uuid.uuid4().hex}.tmp"
            self._columns[name] = _Column(path, values.dtype.newbyteorder("<"))
        if len(values):
            self._columns[name].append(values)

    def seal(self, folder: epath.Path, key: str, facts: dict[str, Any]) -> None:
        """Puts the entry into its folder, the index last."""
        columns = {name: column.seal(column_file(folder, key, name)) for name, column in self._columns.items()}
        index = json.dumps(sealed({"columns": columns, "facts": facts}))
        if paths.is_bucket(folder):
            paths.write_whole(_index(folder, key), index)
            return
        temporary = self._room / f"{self._name}.{uuid.uuid4().hex}.tmp"
        with temporary.open("w") as file:
            file.write(index)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(_index(folder, key))

    def close(self) -> None:
        for column in self._columns.values():
            column.close()


def keep(folder: paths.Path, key: str, what: str, build: Callable[[Columns], dict[str, Any]]) -> Kept:
    """The entry `key` of a folder, made by `build` if it is not there whole; other processes wait meanwhile.

    Args:
      folder: local, or in a bucket.
      key: follows from everything that the entry depends on.
      what: is being made, for the log and for errors.
      build: appends to the columns and returns the entry's facts, a JSON object.
    Raises:
      ValueError: where the folder takes no more; half an entry is never left behind.
    """
    folder = epath.Path(folder)
    if (found := _open(folder, key)) is not None:
        return found
    with OneWriter(folder, f"{key}.{HOLDER}", wait=True):
        if (found := _open(folder, key)) is not None:  # another process has just made it
            return found
        room = room_of(folder)
        name = checksum(f"{folder}/{key}".encode()) if paths.is_bucket(folder) else key
        _sweep(room, name)  # after a process that was killed
        _index(folder, key).unlink(missing_ok=True)
        log.info("%s, into %s", what, folder)
        columns = Columns(room, name)
        try:
            columns.seal(folder, key, build(columns))
        except OSError as error:
            if error.filename is not None and not str(error.filename).startswith(str(room)):
                raise  # a file of the corpus
            other = "name another folder with " + (
                "--data.cache-dir (of a preparation: --target)" if str(room) == str(folder) else "XDG_CACHE_HOME"
            )
            raise ValueError(
                f"{what} failed: {room} does not take it ({error.strerror or error}); make room there, or {other}, and "
                "run the same command again"
            ) from error
        finally:
            columns.close()
            _sweep(room, name)
    found = _open(folder, key)
    if found is None:
        raise ValueError(f"{what} failed: what was written to {folder} is not what is there now; look at that disk")
    return found


def room_of(folder: paths.Path) -> Path:
    """Where what grows before it belongs to a folder is kept: there, but for a folder in a bucket on this machine."""
    if not paths.is_bucket(folder):
        return Path(folder)
    own = cache_folder()
    return own if can_write(own) else Path(tempfile.gettempdir())


def _sweep(room: Path, name: str) -> None:
    for left in room.glob(f"{name}.*.tmp"):
        left.unlink(missing_ok=True)


def _index(folder: epath.Path, key: str) -> epath.Path:
    return folder / f"{key}.json"


def column_file(folder: epath.Path, key: str, name: str) -> epath.Path:
    return folder / f"{key}.{name}.npy"


def _open(folder: epath.Path, key: str) -> Kept | None:
    """The entry that an earlier run left, if it did and all of it is whole."""
    file = _index(folder, key)
    if not (find(file) if paths.is_bucket(folder) else file.exists()):
        return None
    try:
        return read_entry(folder, key)
    except DamagedCorpus as error:
        log.warning("%s; it is made anew", error)
        return None


def read_entry(folder: epath.Path, key: str) -> Kept:
    """An entry that must be there; DamagedCorpus, naming the file, where it is not whole."""
    index = read_index(folder, key)
    columns = {name: open_column(column_file(folder, key, name), told) for name, told in index["columns"].items()}
    contents = {name: [told["bytes"], told["checksums"]] for name, told in index["columns"].items()}
    return Kept(columns, index["facts"], checksum(json.dumps(contents, sort_keys=True).encode()))


def read_index(folder: epath.Path, key: str) -> dict[str, Any]:
    """An entry's `facts`, and under `columns` what `open_column` is told of each; DamagedCorpus as `read_entry`."""
    try:
        return read_sealed(_index(folder, key))
    except buckets.Unreachable:
        raise
    except (ValueError, OSError) as error:
        raise DamagedCorpus(str(error)) from error


def _header(dtype: np.dtype, count: int) -> bytes:
    """The beginning of a .npy file; it leaves room for any count."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": (count,)})
    return header.getvalue()


def open_column(file: epath.Path, told: dict[str, Any], check: bool = True) -> np.ndarray | Column:
    """A column as its entry's index tells it; DamagedCorpus where it is not so.

    Args:
      check: compare its checksums too, not its length alone.
    """
    return _remote(file, told, check) if paths.is_bucket(file) else _mapped(file, told, check)


def _mapped(file: epath.Path, told: dict[str, Any], check: bool) -> np.ndarray:
    try:
        values = np.load(file, mmap_mode="r" if told["bytes"] else None)  # nothing can't be mapped
    except (ValueError, OSError, EOFError) as error:
        raise DamagedCorpus(f"{file} is damaged ({error})") from error
    if values.nbytes != told["bytes"]:
        raise DamagedCorpus(f"{file} is damaged: it has {values.nbytes} bytes of values, not {told['bytes']}")
    sums = told["checksums"] if check else []
    data = memoryview(values).cast("B") if sums else memoryview(b"")
    for block in _checked(sums):
        if checksum(data[block * BLOCK : (block + 1) * BLOCK]) != sums[block]:
            raise DamagedCorpus(f"{file} is damaged: it does not have the checksum it was written with")
    return values


def _remote(file: epath.Path, told: dict[str, Any], check: bool) -> Column:
    found = find(file)
    if found is None:
        raise DamagedCorpus(f"{file} is missing")
    column = Column(file, found.size, told, BLOCK)
    if check and found.stamp != told.get("stamp"):  # copied, or changed
        for _ in column.blocks(_checked(told["checksums"])):
            pass
    return column


def _checked(sums: list[str]) -> range:
    """The blocks of a column that are compared when it is opened."""
    return range(0, len(sums), max(1, len(sums) // CHECKED_BLOCKS))


def _upload(file: Path, to: epath.Path) -> None:
    """Copies a file to a bucket, some of it at a time; it appears there whole, or not at all."""
    block = max(UPLOADED, (file.stat().st_size // PARTS // UPLOADED + 1) * UPLOADED)
    with file.open("rb") as source:
        target = buckets.file_system(to).open(os.fspath(to), "wb", block_size=block)
        try:
            shutil.copyfileobj(source, target, 1 << 20)
            target.close()
        except BaseException:
            with contextlib.suppress(Exception):
                target.discard()
            target.closed = True  # or its end would make an object of what has arrived
            raise


def cache_dir(wanted: str, run_dir: epath.Path | None = None) -> epath.Path:
    """The folder for entries: the one that is `wanted`, or one in the run's folder if that cannot be written.

    Raises:
      ValueError: if neither can be, or `wanted` is in a bucket that is not there.
    """
    folder = paths.at(wanted)
    if paths.is_bucket(folder):
        paths.check_bucket(folder)
        return folder
    if can_write(Path(folder)):
        return folder
    if run_dir is None or paths.is_bucket(run_dir) or not can_write(Path(run_dir) / "cache"):
        raise ValueError(f"data.cache_dir = {wanted!r} cannot be written: {HINT}")
    own = run_dir / "cache"
    log.info("%s cannot be written: tokens are kept in %s; --data.cache-dir names another place", folder, own)
    return own


def parts(count: int) -> Iterator[slice]:
    """Slices of at most AT_ONCE entries that cover range(count)."""
    for start in range(0, count, AT_ONCE):
        yield slice(start, min(start + AT_ONCE, count))


def stable_order(count: int, seed: int, salt: str, folder: paths.Path) -> Iterator[np.ndarray]:
    """A shuffle of range(count) that no library's version can change, as int64 arrays in a row.

    It is the order of the SHA-256 of seed, salt and number. Eight bytes a number lie in a file in `room_of(folder)`
    meanwhile, and in memory at most some AT_ONCE of them at a time.
    """

    def digest(i: int) -> bytes:
        return hashlib.sha256(f"{seed}:{salt}:{i}".encode()).digest()

    if not count:
        return
    with tempfile.TemporaryFile(dir=room_of(folder)) as file:
        for part in parts(count):
            file.write(b"".join([digest(i)[:8] for i in range(part.start, part.stop)]))
        file.flush()
        keys = np.memmap(file, ">u8", "r")
        for numbers in by_range(count, lambda part: keys[part].astype(np.uint64)):
            values = keys[numbers].astype(np.uint64)
            order = np.argsort(values, kind="stable")
            ranked, values = numbers[order], values[order]
            if np.any(values[1:] == values[:-1]):  # once in thousands of corpora of 100 million documents
                ranked = np.array(sorted(ranked.tolist(), key=digest))
            yield ranked


def by_range(count: int, keys: Callable[[slice], np.ndarray]) -> Iterator[np.ndarray]:
    """Numbers below `count`, ascending, whose keys fall into one range of uint64 after the other.

    Args:
      keys: uint64 of a slice of numbers, evenly spread, so that some AT_ONCE numbers share a range.
    """
    ranges = -(-count // AT_ONCE)
    for i in range(ranges):
        low, high = i * 2**64 // ranges, (i + 1) * 2**64 // ranges - 1
        found = []
        for part in parts(count):
            values = keys(part)
            found.append(part.start + np.flatnonzero((values >= np.uint64(low)) & (values <= np.uint64(high))))
        numbers = np.concatenate(found)
        if len(numbers):
            yield numbers
