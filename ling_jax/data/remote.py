"""A corpus in a bucket, read in parts: some way ahead of their use, and never much of it at a time."""

import bisect
import functools
import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np
from etils import epath

from ling_jax.files import paths
from ling_jax.files.whole import checksum

SMALL = paths.BLOCK  # bytes up to which a file is read whole, before its turn
SMALL_AHEAD, FILES_AHEAD = 64 << 20, 32  # bytes of such files, and files, that are on their way at a time
SPAN_AHEAD, HELD = 2, 10  # blocks of a parquet file on their way for each column that is read, and in memory
PIECES = 8  # requests for the next parts of a column that is read whole, under way at a time
LONGEST_HEADER = 4096  # bytes of a .npy file before its values


def openers(folder: epath.Path, names: Sequence[str], sizes: Sequence[int]) -> Iterator[Callable[[], IO[bytes]]]:
    """Yields a function that opens each file of a folder in a bucket, in turn; the small ones that come next are on
    their way meanwhile.

    Args:
      sizes: in bytes.
    """
    begun: deque[Callable[[], IO[bytes]]] = deque()
    ahead = 0
    for i, size in enumerate(sizes):
        while (at := i + len(begun)) < len(sizes) and len(begun) <= FILES_AHEAD:
            if begun and ahead + _ahead(sizes[at]) > SMALL_AHEAD:
                break
            begun.append(_begin(folder / names[at], sizes[at]))
            ahead += _ahead(sizes[at])
        ahead -= _ahead(size)
        yield begun.popleft()


def _ahead(size: int) -> int:
    """How many bytes of a file are read before its turn."""
    return size if size <= SMALL else 0


def _begin(file: epath.Path, size: int) -> Callable[[], IO[bytes]]:
    if size > SMALL:
        return lambda: paths.open_to_read(file, size)
    if not size:
        return io.BytesIO
    reading = paths.Ranges(file).start(0, size)
    return lambda: io.BytesIO(reading())


class Spans(paths.ObjectFile):
    """The wanted spans of an object as a file. Their blocks are read once each, some of the next ones ahead.

    There may be several places at which the reading goes on by turns, as with the columns of a parquet file. What is
    read of the rest of the object is read by itself.
    """

    def __init__(self, file: epath.Path, size: int, spans: Sequence[tuple[int, int]]):
        super().__init__(file, size)
        self._blocks = [
            (at, min(at + paths.BLOCK, end)) for begin, end in _joined(spans) for at in range(begin, end, paths.BLOCK)
        ]
        self._held: dict[int, bytes | Callable[[], bytes]] = {}  # by block; the one not used for longest is the first

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if self._at >= end:
            return 0
        i = bisect.bisect_right(self._blocks, (self._at, self._size)) - 1
        if i >= 0 and self._at < self._blocks[i][1]:
            data = memoryview(self._block(i))[self._at - self._blocks[i][0] :][: len(buffer)]
        else:
            data = self._ranges.read(self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _block(self, i: int) -> bytes:
        for j in range(i, min(i + 1 + SPAN_AHEAD, len(self._blocks))):
            if j not in self._held:
                self._held[j] = self._ranges.start(*self._blocks[j])
        block = self._held.pop(i)
        block = self._held[i] = block if isinstance(block, bytes) else block()
        while len(self._held) > HELD:
            del self._held[next(iter(self._held))]
        return block


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


class DamagedCorpus(ValueError):
    """A file that is not as its index says; the message names it."""


class Column:
    """The values of a .npy file of one dimension in a bucket: read by slices, or all of them by `np.asarray`.

    Args:
      size: of the file, in bytes.
      told: `bytes` of the values, and `checksums` of their blocks.
      block: bytes of a block.
    """

    def __init__(self, file: epath.Path, size: int, told: dict[str, Any], block: int):
        self._file, self._ranges, self._told, self._block = file, paths.Ranges(file), told, block
        self._begin = size - told["bytes"]
        if not 0 < self._begin <= LONGEST_HEADER:
            raise DamagedCorpus(f"{file} is damaged: it has {size} bytes, of which {told['bytes']} should be values")

    @functools.cached_property
    def dtype(self) -> np.dtype:
        header = io.BytesIO(self._ranges.read(0, self._begin))
        try:
            np.lib.format.read_magic(header)
            return np.lib.format.read_array_header_1_0(header)[2]
        except ValueError as error:
            raise DamagedCorpus(f"{self._file} is damaged ({error})") from error

    def __len__(self) -> int:
        return self._told["bytes"] // self.dtype.itemsize

    def start(self, begin: int, end: int) -> Callable[[], np.ndarray]:
        """Begins to read values begin .. end - 1; the call gives them."""
        width, dtype = self.dtype.itemsize, self.dtype
        if begin == end:
            return lambda: np.empty(0, dtype)
        reading = self._ranges.start(self._begin + begin * width, self._begin + end * width)
        return lambda: np.frombuffer(reading(), dtype)

    def __getitem__(self, part: slice) -> np.ndarray:
        begin, end, step = part.indices(len(self))
        assert step == 1
        return self.start(begin, max(begin, end))()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = np.empty(self._told["bytes"], np.uint8)
        for block, data in self.blocks(range(len(self._told["checksums"]))):
            values[block * self._block :][: len(data)] = data
        return values.view(self.dtype) if dtype is None else values.view(self.dtype).astype(dtype)

    def blocks(self, wanted: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(number, bytes) of the wanted blocks, each compared with its checksum: Damaged if it is another."""
        pieces = [
            (block, at, min(at + paths.BLOCK, (block + 1) * self._block, self._told["bytes"]))
            for block in wanted
            for at in range(block * self._block, min((block + 1) * self._block, self._told["bytes"]), paths.BLOCK)
        ]
        begun: deque[Callable[[], bytes]] = deque()
        found: list[np.ndarray] = []
        for i, (block, _, _) in enumerate(pieces):
            for _, begin, end in pieces[i + len(begun) : i + PIECES]:
                begun.append(self._ranges.start(self._begin + begin, self._begin + end))
            found.append(np.frombuffer(begun.popleft()(), np.uint8))
            if i + 1 == len(pieces) or pieces[i + 1][0] != block:
                data, found = np.concatenate(found), []
                if checksum(data) != self._told["checksums"][block]:
                    raise DamagedCorpus(f"{self._file} is damaged: it does not have the checksum it was written with")
                yield block, data


def find(file: epath.Path) -> paths.Entry | None:
    """A file in a bucket; None if it is not there."""
    try:
        return paths.entry(file)
    except FileNotFoundError:
        return None
