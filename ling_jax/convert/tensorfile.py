"""Safetensors files: a strict reader, and a writer that fills a file tensor by tensor.

The package `safetensors` gives numpy no float8 and writes a file only from tensors that are all in memory. The format
is eight bytes with the size of a JSON header, the header, and the tensors' bytes in C order, little endian.
"""

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

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
    """An open safetensors file. Its tensors are views of the mapped file: nothing is read until they are.

    Raises:
      ValueError: on opening, for whatever is not exactly a safetensors file; OSError if it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(MAX_HEADER, size - 8):
                    raise ValueError(f"its header takes {length} bytes of a file of {size}")
                self.tensors = _parse(file.read(length), 8 + length, size)
            except ValueError as error:
                raise ValueError(f"{path} is damaged or truncated ({error}); download it again") from None
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def view(self, name: str) -> np.ndarray:
        """A read-only array over the file; of a dtype in DTYPES."""
        info = self.tensors[name]
        count = math.prod(info.shape)
        return np.frombuffer(self._bytes, DTYPES[info.dtype], count, info.begin).reshape(info.shape)


class TensorFileWriter:
    """Makes a safetensors file whose tensors are then written in any order, from any thread.

    Args:
      path: made, or continued where an earlier writer of the same tensors stopped.
      tensors: (dtype, shape) of each, in the order in which they are to lie.
      metadata: the header's "__metadata__".
    Raises:
      OSError: if the disk has no room for all of them.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]):
        entries: dict[str, Any] = {"__metadata__": dict(metadata)}
        at = 0
        for name, (dtype, shape) in tensors.items():
            end = at + math.prod(shape) * SIZES[dtype]
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
            at = end
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # tensors start at multiples of 8
        start = 8 + len(header)
        self._begin = {name: start + entry["data_offsets"][0] for name, entry in _tensors(entries)}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.posix_fallocate(self._file, 0, start + at)
        _write(self._file, len(header).to_bytes(8, "little") + header, 0)

    def write(self, name: str, offset: int, data: np.ndarray) -> None:
        """Puts `data`, in C order, `offset` bytes into a tensor."""
        _write(self._file, np.ascontiguousarray(data).reshape(-1).view(np.uint8).data, self._begin[name] + offset)

    def flush(self) -> None:
        """Returns once all that was written is on the disk."""
        os.fdatasync(self._file)

    def close(self) -> None:
        os.fsync(self._file)
        os.close(self._file)


def _tensors(entries: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    return ((name, entry) for name, entry in entries.items() if name != "__metadata__")


def _write(file: int, data: Any, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, at)
        view, at = view[done:], at + done
