"""Safetensors files, local or in a bucket: a strict reader, and a writer that fills a file from its front to its end.

The package `safetensors` gives numpy no float8 and writes a file only from tensors that are all in memory. The format
is eight bytes with the size of a JSON header, the header, and the tensors' bytes in C order, little endian.
"""

import contextlib
import json
import math
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from ling_jax.files.buckets import file_system, is_bucket
from ling_jax.files.paths import BLOCK, Ranges, entry

DTYPES: dict[str, np.dtype] = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
OTHER_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4}
OTHER_SIZES |= {"I64": 8, "U64": 8, "F64": 8}
SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | OTHER_SIZES  # bytes
MAX_HEADER = 100_000_000  # bytes, as in the package
FIRST_READ = 1 << 19  # bytes of a bucket's file that are asked for first: the header of most
UPLOAD_BYTES = 32 << 20  # of a part of an object that is uploaded, and held in memory until it is full
SLICE_BYTES = 8 << 20  # written at a time: a part in memory is not larger than both together
SYNC_BYTES = 64 << 20  # of a local file, after which the disk is set to work on them

Read = Callable[[], Any]  # waits for bytes that are being read, and gives them as a buffer
Write = Callable[[memoryview], Any]


class TensorInfo(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    begin: int  # offset in the file, bytes
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands in its header twice")
    return table


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _entry(name: str, entry: Any, start: int) -> TensorInfo:
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    values: list[Any] = [fields.get(key) for key in ("dtype", "shape", "data_offsets")]
    dtype, shape, offsets = values
    lists = isinstance(shape, list) and isinstance(offsets, list)
    if not lists or len(offsets) != 2 or dtype not in SIZES or not all(map(_whole, [*shape, *offsets])):
        raise ValueError(f"its header's entry for {name!r} is not one of a tensor")
    begin, end = offsets
    if end - begin != math.prod(shape) * SIZES[dtype]:
        raise ValueError(
            f"{name!r} has {end - begin} bytes, but {dtype} {shape} takes {math.prod(shape) * SIZES[dtype]}"
        )
    return TensorInfo(dtype, tuple(shape), start + begin, start + end)


def _parse(header: bytes, start: int, size: int) -> dict[str, TensorInfo]:
    """The tensors of a header, which must cover the rest of a file of `size` bytes, each byte once."""
    try:
        entries = json.loads(header.decode(), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(entries, dict):
        raise ValueError("its header is not a JSON object")
    entries.pop("__metadata__", None)
    tensors = {name: _entry(name, entry, start) for name, entry in entries.items()}
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if tensor.begin != at:
            raise ValueError(f"the bytes of {name!r} do not follow the tensor before")
        at = tensor.end
    if at != size:
        raise ValueError(f"its header speaks of {at} bytes, the file has {size}")
    return tensors


class TensorFile:
    """An open safetensors file, of which only its header has been read.

    A local file is mapped: its tensors are views of it. Of one in a bucket each part is read by requests for ranges.

    Args:
      size: of a file in a bucket, in bytes, where it is known.
    Raises:
      ValueError: on opening, for whatever is not exactly a safetensors file; OSError if it cannot be read.
    """

    def __init__(self, path: epath.Path, size: int | None = None):
        self.path = path
        if is_bucket(path):
            size = entry(path).size if size is None else size
            self._start = _in_bucket(Ranges(path))
        else:
            size, self._start = _mapped(path)
        first = bytes(self._start(0, min(size, FIRST_READ))())
        length = int.from_bytes(first[:8], "little")
        fits = size >= 8 and length <= min(MAX_HEADER, size - 8)
        rest = bytes(self._start(len(first), 8 + length)()) if fits and len(first) < 8 + length else b""
        try:
            if not fits:
                raise ValueError(f"its header takes {length} bytes of a file of {size}")
            self.tensors = _parse((first + rest)[8 : 8 + length], 8 + length, size)
        except ValueError as error:
            raise ValueError(f"{path} is damaged or truncated ({error}); download it again") from None

    def start(self, name: str, index: tuple[slice, ...] = ()) -> Callable[[], np.ndarray]:
        """Begins to read a part of a tensor, of a dtype in DTYPES; the call, which is made once, gives it, read-only.

        Args:
          index: a start and a stop for the first dims; () for all. Of a bucket's file all columns of the rows are read.
        """
        info = self.tensors[name]
        rows = index[0] if index else slice(0, info.shape[0] if info.shape else 1)
        row = info.nbytes // max(info.shape[0], 1) if info.shape else info.nbytes
        read = self._start(info.begin + rows.start * row, info.begin + rows.stop * row)
        shape = (rows.stop - rows.start, *info.shape[1:]) if info.shape else ()

        def values() -> np.ndarray:
            found = np.frombuffer(read(), DTYPES[info.dtype]).reshape(shape)
            return found[(slice(None), *index[1:])] if index else found

        return values

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        return self.start(name, index)()


def _mapped(path: epath.Path) -> tuple[int, Callable[[int, int], Read]]:
    """(size, how to read) of a local file."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
    return size, lambda begin, end: lambda: data[begin:end]


def _in_bucket(ranges: Ranges) -> Callable[[int, int], Read]:
    def start(begin: int, end: int) -> Read:
        reads = deque(ranges.start(at, min(at + BLOCK, end)) for at in range(begin, end, BLOCK))

        def joined() -> Any:
            if len(reads) < 2:
                return reads.popleft()() if reads else b""
            out, at = np.empty(end - begin, np.uint8), 0
            while reads:
                block = np.frombuffer(reads.popleft()(), np.uint8)
                out[at : at + block.size] = block
                at += block.size
            return out.data

        return joined

    return start


# Writing.


def write_tensors(
    path: epath.Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    parts: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes a safetensors file front to back; when it returns, the file is on the disk, or the object is there.

    Args:
      tensors: (dtype, shape) of each, in the order in which they are to lie.
      metadata: the header's "__metadata__".
      parts: (name, rows) of all tensors, in the same order; each tensor in one part or several.
    Raises:
      OSError: if the disk has no room for all of them. An object does not appear then, nor after any other error.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start at multiples of 8
    size = 8 + len(header) + at
    with _upload(path, size) if is_bucket(path) else _local_file(path, size) as write:
        write(memoryview(len(header).to_bytes(8, "little") + header))
        done = 0
        for name, rows in parts:
            begin, end = entries[name]["data_offsets"]
            data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
            assert begin <= done and done + len(data) <= end, f"{name} at {done}: it lies at {begin} to {end}"
            for start in range(0, len(data), SLICE_BYTES):
                write(data[start : start + SLICE_BYTES])
            done += len(data)
        assert done == at, f"{done} of {at} bytes were written"


@contextlib.contextmanager
def _upload(path: epath.Path, size: int) -> Iterator[Write]:
    """Uploads `size` bytes that are written in parts of UPLOAD_BYTES; the object appears at the end, and not after an
    error."""
    file = file_system(path).open(os.fspath(path), "wb", block_size=UPLOAD_BYTES)
    try:
        yield file.write
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            file.discard()
        file.closed = True  # or it would be uploaded as it is when it is collected
        raise
    try:
        file.close()
    except Exception:
        file.closed = True
        if not _is_there(path, size):  # an answer may be lost, and whoever asks again is told of no such upload
            raise


def _is_there(path: epath.Path, size: int) -> bool:
    try:
        return entry(path).size == size
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _local_file(path: epath.Path, size: int) -> Iterator[Write]:
    """A file of `size` bytes, which the disk writes while it grows."""
    with open(path, "wb") as file, ThreadPoolExecutor(1) as pool:
        os.posix_fallocate(file.fileno(), 0, size)
        synced, syncing = 0, None

        def write(data: memoryview) -> None:
            nonlocal synced, syncing
            file.write(data)
            if file.tell() - synced >= SYNC_BYTES and (syncing is None or syncing.done()):
                synced, syncing = file.tell(), pool.submit(os.fdatasync, file.fileno())

        yield write
        file.flush()
        os.fsync(file.fileno())
