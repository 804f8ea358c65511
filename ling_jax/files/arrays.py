"""Arrays in a folder, each a plain Zarr array whose every file has a checksum that reading compares.

    params.embed/.zarray, params.embed/0.0, ...   shape and dtype; a file for each chunk, uncompressed, in C order
    checksums.json                                shape, dtype and chunk of every array, XXH3-64 of all its files

A chunk is the unit of everything: one process writes it whole and takes its checksum from memory meanwhile; whoever
reads any part of it reads it whole the first time, and uses nothing of it before the checksum is right. So each process
of several vouches for its own shards, and a read of some layers checks those layers.

A folder without checksums.json was written before there were checksums: it is read as it is.
"""

import functools
import itertools
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts
from etils import epath

from ling_jax.files.whole import checksum, read_sealed, sealed

CHECKSUMS = "checksums.json"
OF_PROCESS = "checksums-{}.json"  # what one process wrote, until `merge_checksums`
HEADER = ".zarray"
CHUNK_BYTES = 256 << 20  # of a chunk, or more where no smaller one divides a shard
READERS = 4  # arrays read at a time
AHEAD = 2  # chunks of an array that are read at a time

Path = tuple[str, ...]  # of an array: the keys that lead to it
Index = tuple[slice, ...]  # a part of an array: a start and a stop for every dim
Cell = tuple[int, ...]  # a chunk's place among an array's chunks
Bounds = Sequence[tuple[int, int]]  # a part of an array: first and last + 1 for every dim
Damaged = Callable[[Path, str, str], Exception]  # (array, name of the file, what is wrong) -> what to raise


@functools.cache
def _context() -> ts.Context:
    return ts.Context({"file_io_concurrency": {"limit": 128}})  # made when it is used: it would not survive a fork


class Layout(NamedTuple):
    """An array on disk; `chunk` divides `shape` dim by dim."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]


def chunk_of(shape: Sequence[int], itemsize: int, limit: int | None = None) -> tuple[int, ...]:
    """The largest block of at most `limit` bytes (CHUNK_BYTES) that divides an array and lies together in C order.

    A dim that has no divisor near the limit, such as a large prime, is not cut: there a block is larger.
    """
    chunk = [1] * len(shape)
    for dim in reversed(range(len(shape))):
        most = max(1, (limit or CHUNK_BYTES) // itemsize)
        chunk[dim] = _divisor(shape[dim], most)
        itemsize *= chunk[dim]
        if chunk[dim] < shape[dim]:
            break
    return tuple(chunk)


def _divisor(size: int, most: int) -> int:
    """The greatest divisor of `size` up to `most`; `size` itself if that is less than an eighth of `most`."""
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    best = max(d for d in (*small, *(size // d for d in small)) if d <= most)
    return best if 8 * best > most else size


def _name(path: Path) -> str:
    return ".".join(path)


def _cells(layout: Layout, bounds: Bounds) -> Iterator[Cell]:
    """The chunks that a part of an array lies in."""
    return itertools.product(
        *(range(first // c, -(-last // c)) for (first, last), c in zip(bounds, layout.chunk, strict=True))
    )


def _file(cell: Cell) -> str:
    return ".".join(map(str, cell)) or "0"


def _region(layout: Layout, cell: Cell) -> Index:
    """What a chunk holds of its array: all of it, but at the edges of an array of before there were checksums."""
    sizes = zip(cell, layout.chunk, layout.shape, strict=True)
    return tuple(slice(i * c, min((i + 1) * c, size)) for i, c, size in sizes)


def _spec(folder: epath.Path, path: Path) -> dict[str, Any]:
    where = str(folder / _name(path)) + "/"
    store = where if "://" in where else {"driver": "file", "path": where}
    return {"driver": "zarr", "kvstore": store, "store_data_equal_to_fill_value": True}


def _writable(folder: epath.Path, path: Path, layout: Layout, create: bool) -> ts.TensorStore:
    """Creates an array, or opens one that another process creates."""
    metadata = {"shape": list(layout.shape), "chunks": list(layout.chunk), "compressor": None}
    spec = _spec(folder, path) | {"metadata": metadata, "dtype": layout.dtype.name}
    if create:
        return ts.open(spec, create=True, open=True, context=_context()).result()
    spec["metadata"] |= {"zarr_format": 2, "order": "C", "filters": None, "fill_value": None}
    spec["metadata"] |= {"dtype": _zarr_dtype(layout.dtype)}
    return ts.open(spec, open=True, assume_metadata=True, context=_context()).result()


def _zarr_dtype(dtype: np.dtype) -> str:
    """Zarr's name of a dtype: numpy's own, or for those that numpy lacks, their plain name."""
    return dtype.name if dtype.str[1] == "V" else dtype.str


# Writing.


class Part(NamedTuple):
    """Values on this host that belong at `start` of an array; whole chunks."""

    start: tuple[int, ...]
    values: np.ndarray


class HostArray(NamedTuple):
    """The chunks of one array that this process writes."""

    layout: Layout
    parts: list[Part]


def on_host(arrays: Mapping[Path, Any]) -> dict[Path, HostArray]:
    """What this process is to write of jax or numpy arrays: numpy ones copied, jax ones brought to the host.

    Of a shard that several devices hold, each writes some of the chunks. The arrays may be donated afterwards.
    """
    plans = {path: _plan(array, order) for order, (path, array) in enumerate(arrays.items())}
    for _, shards in plans.values():
        for shard in shards:
            if isinstance(shard.values, jax.Array):
                shard.values.copy_to_host_async()
    return {path: HostArray(layout, [*_parts(layout, shards)]) for path, (layout, shards) in plans.items()}


class _Shard(NamedTuple):
    """A shard of an array on a device or host, and the chunks of it to write, counted within it."""

    start: tuple[int, ...]
    values: Any
    cells: list[tuple[int, ...]]


def _plan(array: Any, order: int) -> tuple[Layout, list[_Shard]]:
    """An array's layout and its shards that this process writes from; `order` is the array's place among all."""
    if not isinstance(array, jax.Array):
        values = np.array(array)
        layout = Layout(values.shape, values.dtype, chunk_of(values.shape, values.dtype.itemsize))
        cells = list(_cells(layout, [(0, size) for size in values.shape])) if jax.process_index() == 0 else []
        return layout, [_Shard((0,) * values.ndim, values, cells)]
    shape = array.sharding.shard_shape(array.shape)
    layout = Layout(array.shape, np.dtype(array.dtype), chunk_of(shape, array.dtype.itemsize))
    replicas = array.sharding.num_devices * math.prod(shape) // math.prod(array.shape)
    cells = list(_cells(layout, [(0, size) for size in shape]))
    shards = []
    for shard in array.addressable_shards:
        start = tuple(s.indices(size)[0] for s, size in zip(shard.index, array.shape, strict=True))
        mine = cells[(shard.replica_id - order) % replicas :: replicas]
        shards += [_Shard(start, shard.data, mine)] if mine else []
    return layout, shards


def _parts(layout: Layout, shards: Iterable[_Shard]) -> Iterator[Part]:
    for start, values, cells in shards:
        held = np.asarray(values)
        for cell in cells:
            at = tuple(s + i * c for s, i, c in zip(start, cell, layout.chunk, strict=True))
            yield Part(at, held[_region(layout, cell)])


def write_arrays(folder: epath.Path, arrays: Mapping[Path, HostArray]) -> None:
    """Writes this process's chunks and their checksums; `merge_checksums` makes the folder complete."""
    lead = jax.process_index() == 0
    writes, entries = [], {}
    for path, (layout, parts) in arrays.items():
        store = _writable(folder, path, layout, create=lead)
        files = entries[path] = {}
        for start, values in parts:
            cell = tuple(s // c for s, c in zip(start, layout.chunk, strict=True))
            write = store[_region(layout, cell)].write(values, can_reference_source_data_indefinitely=True)
            writes.append((write, files, _file(cell), values))
    for _, files, name, values in writes:  # while the disk is at work
        files[name] = checksum(_bytes(values))
    for write, *_ in writes:
        write.result()
    if lead:
        for path in arrays:
            entries[path][HEADER] = checksum((folder / _name(path) / HEADER).read_bytes())
    _write_checksums(folder / OF_PROCESS.format(jax.process_index()), {p: a.layout for p, a in arrays.items()}, entries)


def merge_checksums(folder: epath.Path) -> None:
    """Makes checksums.json of what all processes wrote; once, when all are done. ValueError if a file was written by
    none of them."""
    arrays: dict[str, Any] = {}
    files = sorted(path for path in folder.iterdir() if path.name.startswith(OF_PROCESS.partition("{")[0]))
    for file in files:
        for name, entry in read_sealed(file)["arrays"].items():
            arrays.setdefault(name, {**entry, "files": {}})["files"] |= entry["files"]
    for name, entry in arrays.items():
        layout = _layout(entry)
        wanted = {HEADER, *map(_file, _cells(layout, [(0, size) for size in layout.shape]))}
        if lacking := wanted - entry["files"].keys():
            raise ValueError(f"no process wrote {', '.join(sorted(lacking)[:3])} of {name} in {folder}")
    (folder / CHECKSUMS).write_text(json.dumps(sealed({"arrays": arrays})) + "\n")
    for file in files:
        file.unlink()


def _write_checksums(file: epath.Path, layouts: Mapping[Path, Layout], files: Mapping[Path, dict[str, str]]) -> None:
    arrays = {
        _name(path): {
            "shape": list(layout.shape),
            "dtype": layout.dtype.name,
            "chunk": list(layout.chunk),
            "files": files[path],
        }
        for path, layout in layouts.items()
    }
    file.write_text(json.dumps(sealed({"arrays": arrays})) + "\n")


def create_arrays(folder: epath.Path, layouts: Mapping[Path, Layout]) -> dict[Path, ts.TensorStore]:
    """Arrays to be written in parts of any shape, by this process alone; `seal` completes the folder."""
    return {path: _writable(folder, path, layout, create=True) for path, layout in layouts.items()}


def seal(folder: epath.Path, layouts: Mapping[Path, Layout]) -> None:
    """Takes the checksums of arrays that were written in parts, from their files; all values must be there."""

    def files_of(path: Path) -> dict[str, str]:
        layout = layouts[path]
        store = ts.open(_spec(folder, path) | {"fill_missing_data_reads": False}, context=_context()).result()
        cells = list(_cells(layout, [(0, size) for size in layout.shape]))
        found = {_file(cell): checksum(_bytes(store[_region(layout, cell)].read().result())) for cell in cells}
        return found | {HEADER: checksum((folder / _name(path) / HEADER).read_bytes())}

    with ThreadPoolExecutor(READERS) as pool:
        files = dict(zip(layouts, pool.map(files_of, layouts), strict=True))
    _write_checksums(folder / CHECKSUMS, layouts, files)


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


# Reading.


class StoredArray:
    """One array of an `ArrayFolder`, read in parts; for any number of threads."""

    def __init__(self, path: Path, layout: Layout, store: ts.TensorStore, files: Mapping[str, str], damaged: Damaged):
        self.layout, self._path, self._store, self._files, self._damaged = layout, path, store, files, damaged
        self._checked: set[Cell] = set()

    def read(self, index: Index | None = None) -> np.ndarray:
        """A part of the array, or all of it, in its dtype; the folder's error where its files are damaged."""
        layout = self.layout
        bounds = [(0, size) for size in layout.shape] if index is None else [(s.start, s.stop) for s in index]
        cells = list(_cells(layout, bounds))
        if len(cells) == 1 and self._shared(bounds, cells[0]) == _region(layout, cells[0]):
            return self._finish(cells[0], self._start(cells[0], bounds))
        out = np.empty([b - a for a, b in bounds], layout.dtype)
        reads: list[tuple[Cell, Any]] = []
        for cell in cells:
            if len(reads) == AHEAD:
                self._put(out, bounds, *reads.pop(0))
            reads.append((cell, self._start(cell, bounds)))
        for read in reads:
            self._put(out, bounds, *read)
        return out

    def check(self) -> None:
        """Reads every chunk, for its checksum alone."""
        whole = [(0, size) for size in self.layout.shape]
        for cell in _cells(self.layout, whole):
            self._finish(cell, self._start(cell, whole))

    def _shared(self, bounds: Bounds, cell: Cell) -> Index:
        """What a part of the array and a chunk have in common."""
        both = zip(bounds, _region(self.layout, cell), strict=True)
        return tuple(slice(max(first, r.start), min(last, r.stop)) for (first, last), r in both)

    def _start(self, cell: Cell, bounds: Bounds) -> "tuple[Index, ts.Future]":
        """Begins to read a chunk: the shared part of it, but all of it where its checksum is to be compared."""
        unchecked = self._files and cell not in self._checked
        region = _region(self.layout, cell) if unchecked else self._shared(bounds, cell)
        return region, self._store[region].read()

    def _finish(self, cell: Cell, started: "tuple[Index, ts.Future]") -> np.ndarray:
        name, (region, reading) = _file(cell), started
        try:
            values = reading.result()
        except Exception as error:  # TensorStore's own kinds
            missing = "missing" in str(error) or "NOT_FOUND" in str(error)
            why = "is missing" if missing else f"cannot be read ({str(error).splitlines()[0]})"
            raise self._damaged(self._path, name, why) from error
        if self._files and region == _region(self.layout, cell):
            if self._files.get(name) != checksum(_bytes(values)):
                raise self._damaged(self._path, name, "does not have the checksum it was saved with")
            self._checked.add(cell)
        return values

    def _put(self, out: np.ndarray, bounds: Bounds, cell: Cell, started: "tuple[Index, ts.Future]") -> None:
        """Copies what a chunk and a part of the array share."""
        shared, region = self._shared(bounds, cell), started[0]
        values = self._finish(cell, started)
        inside = tuple(slice(s.start - r.start, s.stop - r.start) for s, r in zip(shared, region, strict=True))
        here = tuple(slice(s.start - a, s.stop - a) for s, (a, _) in zip(shared, bounds, strict=True))
        out[here] = values[inside]


class ArrayFolder:
    """The arrays of a folder, to be read.

    Attributes:
      layouts: of every array.
      has_checksums: whether reading compares any.

    Args:
      fill: a missing chunk of a folder without checksums stands for zeros, as the converter once left them out.
      damaged: makes the error for a file that is missing or changed.
    """

    def __init__(self, folder: epath.Path, damaged: Damaged, fill: bool = False):
        self._folder, self._damaged, self._fill = folder, damaged, fill
        self._lock = threading.Lock()
        self._open: dict[Path, StoredArray] = {}
        self.has_checksums = (folder / CHECKSUMS).exists()
        if self.has_checksums:
            try:
                self._entries: dict[str, Any] = read_sealed(folder / CHECKSUMS)["arrays"]
            except ValueError as error:
                raise damaged((), CHECKSUMS, str(error)) from error
            self.layouts = {tuple(name.split(".")): _layout(entry) for name, entry in self._entries.items()}
        else:
            self._entries = {}
            headers = [p for p in folder.iterdir() if (p / HEADER).exists()] if folder.is_dir() else []
            self.layouts = {tuple(p.name.split(".")): _old_layout(p, damaged) for p in headers}

    def array(self, path: Path) -> StoredArray:
        """An array, opened once; KeyError if there is none."""
        with self._lock:
            if path not in self._open:
                self._open[path] = self._opened(path)
            return self._open[path]

    def read(self, paths: Iterable[Path], read: Callable[[Path], Any]) -> dict[Path, Any]:
        """`read` of each path, some at a time."""
        paths = list(paths)
        with ThreadPoolExecutor(READERS) as pool:
            return dict(zip(paths, pool.map(read, paths), strict=True))

    def count_files(self) -> int:
        return sum(len(entry["files"]) for entry in self._entries.values())

    def _opened(self, path: Path) -> StoredArray:
        files = self._entries[_name(path)]["files"] if self.has_checksums else {}
        header = self._folder / _name(path) / HEADER
        if self.has_checksums:
            try:
                right = checksum(header.read_bytes()) == files[HEADER]
            except FileNotFoundError:
                raise self._damaged(path, HEADER, "is missing") from None
            if not right:
                raise self._damaged(path, HEADER, "does not have the checksum it was saved with")
        spec = _spec(self._folder, path) | {"fill_missing_data_reads": self._fill and not self.has_checksums}
        try:
            store = ts.open(spec, context=_context()).result()
        except Exception as error:
            raise self._damaged(path, HEADER, f"cannot be read ({str(error).splitlines()[0]})") from error
        return StoredArray(path, self.layouts[path], store, files, self._damaged)


def _layout(entry: Mapping[str, Any]) -> Layout:
    return Layout(tuple(entry["shape"]), jax.numpy.dtype(entry["dtype"]), tuple(entry["chunk"]))


def _old_layout(folder: epath.Path, damaged: Damaged) -> Layout:
    """Of an array that only its own header describes."""
    try:
        header = json.loads((folder / HEADER).read_text())
        return Layout(tuple(header["shape"]), jax.numpy.dtype(header["dtype"]), tuple(header["chunks"]))
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(tuple(folder.name.split(".")), HEADER, f"cannot be read ({error})") from error
