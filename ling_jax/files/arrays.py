"""Arrays in a folder, each a plain Zarr array whose every file has a checksum that reading compares.

    params.embed/.zarray, params.embed/0.0, ...   shape and dtype; a file for each chunk, uncompressed, in C order
    checksums.json                                shape, dtype and chunk of every array, XXH3-64 of all its files

A chunk is the unit of everything: one process writes it whole and takes its checksum from memory meanwhile; whoever
reads any part of it reads it whole the first time, and uses nothing of it before the checksum is right. So each process
of several vouches for its own shards, and a read of some layers checks those layers.

A folder without checksums.json was written before there were checksums: it is read as it is.
"""

import itertools
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts
from etils import epath

from ling_jax.files.buckets import context, failure, is_bucket, is_out_of_reach, reaching, store_of
from ling_jax.files.whole import checksum, checksum_of_parts, read_sealed, sealed

CHECKSUMS = "checksums.json"
OF_PROCESS = "checksums-{}.json"  # what one process wrote, until `merge_checksums`
HEADER = ".zarray"
CHUNK_BYTES = 256 << 20  # of a chunk, or a quarter more; or more where no smaller one divides a shard
KEPT_BYTES = 8 << 20  # of a chunk that is kept when a part of it is read: nobody asks for it layer by layer then
READERS = 4  # arrays read at a time
AHEAD = 2  # chunks of an array that are read at a time

ArrayPath = tuple[str, ...]  # of an array: the keys that lead to it
Index = tuple[slice, ...]  # a part of an array: a start and a stop for every dim
Cell = tuple[int, ...]  # a chunk's place among an array's chunks
Bounds = Sequence[tuple[int, int]]  # a part of an array: first and last + 1 for every dim
OnDamage = Callable[[ArrayPath, str, str], Exception]  # (array, name of the file, what is wrong) -> what to raise


class Layout(NamedTuple):
    """An array on disk; `chunk` divides `shape` dim by dim."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]


def chunk_of(shape: Sequence[int], itemsize: int, limit: int | None = None) -> tuple[int, ...]:
    """The largest block that divides an array, lies together in C order and has at most `limit` bytes (CHUNK_BYTES), or
    a quarter more: the 76 layers of Ling-1T are cut by 19, not by 4.

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
    """The greatest divisor of `size` up to `most` and a quarter; `size` itself if that is under an eighth of `most`."""
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    best = max(d for d in (*small, *(size // d for d in small)) if 4 * d <= 5 * most)
    return best if 8 * best > most else size


def layout_of(shape: Sequence[int], dtype: np.dtype, sharding: jax.sharding.Sharding) -> Layout:
    """How a jax array is stored: its chunks divide its shards."""
    return Layout(tuple(shape), dtype, chunk_of(sharding.shard_shape(tuple(shape)), dtype.itemsize))


def share(chunks: int, replica: int, replicas: int, order: int) -> range:
    """Which chunks of a shard one of the `replicas` devices that hold it writes; `order` is the array's place among
    all, so that of many small arrays each device writes some."""
    return range(chunks)[(replica - order) % replicas :: replicas]


def _name(path: ArrayPath) -> str:
    return ".".join(path)


def _cells(layout: Layout, bounds: Bounds) -> Iterator[Cell]:
    """The chunks that a part of an array lies in."""
    return itertools.product(
        *(range(first // c, -(-last // c)) for (first, last), c in zip(bounds, layout.chunk, strict=True))
    )


def _file(cell: Cell) -> str:
    return ".".join(map(str, cell)) or "0"


def _region(layout: Layout, cell: Cell) -> Index:
    """The part of an array that a chunk holds: a whole chunk, but at the edges of an array of before there were
    checksums."""
    sizes = zip(cell, layout.chunk, layout.shape, strict=True)
    return tuple(slice(i * c, min((i + 1) * c, size)) for i, c, size in sizes)


def _place(folder: epath.Path) -> dict[str, Any]:
    return store_of(folder) if is_bucket(folder) else {"driver": "file", "path": f"{folder}/"}


def _spec(folder: epath.Path, path: ArrayPath) -> dict[str, Any]:
    return {"driver": "zarr", "kvstore": _place(folder / _name(path)), "store_data_equal_to_fill_value": True}


def _writable(folder: epath.Path, path: ArrayPath, layout: Layout, create: bool) -> "ts.Future[ts.TensorStore]":
    """Creates an array, or opens one that another process creates."""
    metadata = {"shape": list(layout.shape), "chunks": list(layout.chunk), "compressor": None}
    spec = _spec(folder, path) | {"metadata": metadata, "dtype": layout.dtype.name}
    if create:
        return ts.open(spec, create=True, open=True, context=context())
    spec["metadata"] |= {"zarr_format": 2, "order": "C", "filters": None, "fill_value": None}
    spec["metadata"] |= {"dtype": _zarr_dtype(layout.dtype)}
    return ts.open(spec, open=True, assume_metadata=True, context=context())


def _kvstore(store: ts.TensorStore) -> ts.KvStore:
    """Where the files of an array are."""
    assert store.kvstore is not None
    return store.kvstore


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


def on_host(arrays: Mapping[ArrayPath, Any]) -> dict[ArrayPath, HostArray]:
    """The parts of jax or numpy arrays that this process writes: numpy ones copied, jax ones brought to the host.

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
    layout = layout_of(array.shape, np.dtype(array.dtype), array.sharding)
    replicas = array.sharding.num_devices * math.prod(shape) // math.prod(array.shape)
    cells = list(_cells(layout, [(0, size) for size in shape]))
    shards = []
    for shard in array.addressable_shards:
        start = tuple(s.indices(size)[0] for s, size in zip(shard.index, array.shape, strict=True))
        mine = [cells[i] for i in share(len(cells), shard.replica_id, replicas, order)]
        shards += [_Shard(start, shard.data, mine)] if mine else []
    return layout, shards


def _parts(layout: Layout, shards: Iterable[_Shard]) -> Iterator[Part]:
    for start, values, cells in shards:
        held = np.asarray(values)
        for cell in cells:
            at = tuple(s + i * c for s, i, c in zip(start, cell, layout.chunk, strict=True))
            yield Part(at, held[_region(layout, cell)])


def write_arrays(folder: epath.Path, arrays: Mapping[ArrayPath, HostArray]) -> None:
    """Writes this process's chunks and their checksums; `merge_checksums` makes the folder complete."""
    with reaching(folder):
        _write_arrays(folder, arrays)


def _write_arrays(folder: epath.Path, arrays: Mapping[ArrayPath, HostArray]) -> None:
    lead = jax.process_index() == 0
    writes, entries = [], {}
    opening = {path: _writable(folder, path, layout, create=lead) for path, (layout, _) in arrays.items()}
    for path, (layout, parts) in arrays.items():
        store, files = opening[path].result(), entries.setdefault(path, {})
        for start, values in parts:
            cell = tuple(s // c for s, c in zip(start, layout.chunk, strict=True))
            write = store[_region(layout, cell)].write(values, can_reference_source_data_indefinitely=True)
            writes.append((write, files, _file(cell), values))
    for _, files, name, values in writes:  # while the disk is at work
        files[name] = checksum(_bytes(values))
    for write, *_ in writes:
        write.result()
    if lead:
        headers = {path: _kvstore(store.result()).read(HEADER) for path, store in opening.items()}
        for path, header in headers.items():
            entries[path][HEADER] = checksum(header.result().value)
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


def _write_checksums(
    file: epath.Path, layouts: Mapping[ArrayPath, Layout], files: Mapping[ArrayPath, dict[str, str]]
) -> None:
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


def create_arrays(folder: epath.Path, layouts: Mapping[ArrayPath, Layout]) -> dict[ArrayPath, ts.TensorStore]:
    """Arrays for `write_chunks`, by this process alone; `seal` completes the folder."""
    opening = {path: _writable(folder, path, layout, create=True) for path, layout in layouts.items()}
    with reaching(folder):
        return {path: store.result() for path, store in opening.items()}


def write_chunks(store: ts.TensorStore, layout: Layout, part: Part) -> dict[str, str]:
    """Writes values that are whole chunks of an array; returns the checksums of their files by name, for `seal`."""
    bounds = [(first, first + size) for first, size in zip(part.start, part.values.shape, strict=True)]
    writes, files = [], {}
    for cell in _cells(layout, bounds):
        region = _region(layout, cell)
        inside = tuple(slice(s.start - a, s.stop - a) for s, a in zip(region, part.start, strict=True))
        values = np.ascontiguousarray(part.values[inside])
        writes.append(store[region].write(values, can_reference_source_data_indefinitely=True))
        files[_file(cell)] = checksum(_bytes(values))
    for write in writes:
        write.result()
    return files


def seal(folder: epath.Path, layouts: Mapping[ArrayPath, Layout], files: Mapping[ArrayPath, Mapping[str, str]]) -> None:
    """Completes a folder whose chunks `write_chunks` wrote, with the checksums that it gave for each array."""
    headers = {path: {HEADER: checksum((folder / _name(path) / HEADER).read_bytes())} for path in layouts}
    for path, layout in layouts.items():
        assert {*files[path]} == {*map(_file, _cells(layout, [(0, size) for size in layout.shape]))}, path
    _write_checksums(folder / CHECKSUMS, layouts, {path: {**files[path], **headers[path]} for path in layouts})


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


# Reading.


def _unread(place: epath.Path, path: ArrayPath, name: str, error: Exception, damaged: OnDamage) -> Exception:
    """The error for TensorStore's, which may tell of a damaged file, or of a bucket that is out of reach."""
    if is_bucket(place) and is_out_of_reach(error):
        return failure(place / name, error)
    missing = "missing" in str(error) or "NOT_FOUND" in str(error)
    return damaged(path, name, "is missing" if missing else f"cannot be read ({str(error).splitlines()[0]})")


_Reading = tuple[Index, Callable[[], np.ndarray]]  # a part of an array that is being read; the call waits for it


def _span(whole: Index, part: Index) -> tuple[int, int] | None:
    """The first and last + 1 of the elements that are a part of a chunk; None if they do not lie together."""
    shape = [w.stop - w.start for w in whole]
    first = np.ravel_multi_index([p.start - w.start for p, w in zip(part, whole, strict=True)], shape)
    last = np.ravel_multi_index([p.stop - 1 - w.start for p, w in zip(part, whole, strict=True)], shape)
    together = last + 1 - first == math.prod(p.stop - p.start for p in part)
    return (int(first), int(last) + 1) if together else None


class StoredArray:
    """One array of an `ArrayFolder`, read in parts; for any number of threads."""

    def __init__(
        self,
        place: epath.Path,
        path: ArrayPath,
        layout: Layout,
        store: ts.TensorStore,
        files: Mapping[str, str],
        damaged: OnDamage,
    ):
        self.layout, self._place, self._path, self._store = layout, place, path, store
        self._files, self._damaged = files, damaged
        self._checked: set[Cell] = set()
        self._kept: dict[Cell, np.ndarray] = {}

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

    def stream(self, index: Index, size: int) -> Iterator[np.ndarray]:
        """Yields the values of one chunk, whose place is `index`, in C order, flat, `size` at a time and the rest.

        It is neither in memory as a whole nor read twice. Its last values come only if its checksum is right: until
        then, use for nothing that lasts what was made of those before.
        """
        [cell] = _cells(self.layout, [(s.start, s.stop) for s in index])
        assert self._files and _region(self.layout, cell) == index
        count, hashed = math.prod(self.layout.chunk), checksum_of_parts()
        for first in range(0, count, size):
            yield self._next(cell, (first, min(first + size, count)), count, hashed)  # no name: it would be kept

    def _next(self, cell: Cell, span: tuple[int, int], count: int, hashed: Any) -> np.ndarray:
        """Some of the `count` values of a chunk; `hashed` has those before them."""
        name = _file(cell)
        try:
            values = self._range(cell, span, [span[1] - span[0]])()
        except Exception as error:  # TensorStore's own kinds
            raise _unread(self._place, self._path, name, error, self._damaged) from error
        hashed.update(_bytes(values))
        if span[1] == count:
            if self._files.get(name) != hashed.hexdigest():
                raise self._damaged(self._path, name, "does not have the checksum it was saved with")
            self._checked.add(cell)
        return values

    def check(self) -> None:
        """Reads every chunk, for its checksum alone."""
        whole = [(0, size) for size in self.layout.shape]
        for cell in _cells(self.layout, whole):
            self._finish(cell, self._start(cell, whole))

    def _shared(self, bounds: Bounds, cell: Cell) -> Index:
        """The overlap of a part of the array and a chunk."""
        both = zip(bounds, _region(self.layout, cell), strict=True)
        return tuple(slice(max(first, r.start), min(last, r.stop)) for (first, last), r in both)

    def _start(self, cell: Cell, bounds: Bounds) -> "_Reading":
        """Begins to read a chunk: the shared part of it, but all of it where its checksum is to be compared."""
        whole, shared = _region(self.layout, cell), self._shared(bounds, cell)
        if cell in self._kept:
            return whole, lambda: self._kept[cell]
        if not self._files or cell in self._checked:
            span = _span(whole, shared) if self._files and self._store.kvstore else None
            if span is None:
                return shared, self._store[shared].read().result
            return shared, self._range(cell, span, [s.stop - s.start for s in shared])
        return whole, self._store[whole].read().result

    def _range(self, cell: Cell, span: tuple[int, int], shape: Sequence[int]) -> Callable[[], np.ndarray]:
        """Begins to read a part of a chunk by its bytes: TensorStore itself reads chunks whole."""
        size, dtype = self.layout.dtype.itemsize, self.layout.dtype
        reading = _kvstore(self._store).read(_file(cell), byte_range=slice(span[0] * size, span[1] * size))

        def values() -> np.ndarray:
            found = reading.result()
            if found.state == "missing":
                raise ValueError("it is missing")
            return np.frombuffer(found.value, dtype).reshape(shape)

        return values

    def _finish(self, cell: Cell, started: "_Reading", keep: bool = False) -> np.ndarray:
        name, (region, reading) = _file(cell), started
        try:
            values = reading()
        except Exception as error:  # TensorStore's own kinds
            raise _unread(self._place, self._path, name, error, self._damaged) from error
        if self._files and region == _region(self.layout, cell) and cell not in self._kept:
            if self._files.get(name) != checksum(_bytes(values)):
                raise self._damaged(self._path, name, "does not have the checksum it was saved with")
            if keep and values.nbytes <= KEPT_BYTES:
                self._kept[cell] = values
            self._checked.add(cell)
        return values

    def _put(self, out: np.ndarray, bounds: Bounds, cell: Cell, started: "_Reading") -> None:
        """Copies what a chunk and a part of the array share. Small chunks that are read in parts are kept."""
        shared, region = self._shared(bounds, cell), started[0]
        values = self._finish(cell, started, keep=shared != region)
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

    def __init__(self, folder: epath.Path, damaged: OnDamage, fill: bool = False):
        self._folder, self._damaged, self._fill = folder, damaged, fill
        self._lock = threading.Lock()
        self._open: dict[ArrayPath, Future[StoredArray]] = {}
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

    def array(self, path: ArrayPath) -> StoredArray:
        """An array, opened once, several at a time; KeyError if there is none."""
        with self._lock:
            first = path not in self._open
            opened = self._open.setdefault(path, Future())
        if first:
            try:
                opened.set_result(self._opened(path))
            except BaseException as error:
                opened.set_exception(error)
        return opened.result()

    def read(self, paths: Iterable[ArrayPath], read: Callable[[ArrayPath], Any]) -> dict[ArrayPath, Any]:
        """`read` of each path, some at a time."""
        paths = list(paths)
        with ThreadPoolExecutor(READERS) as pool:
            return dict(zip(paths, pool.map(read, paths), strict=True))

    def count_files(self) -> int:
        return sum(len(entry["files"]) for entry in self._entries.values())

    def _opened(self, path: ArrayPath) -> StoredArray:
        files = self._entries[_name(path)]["files"] if self.has_checksums else {}
        spec, place = _spec(self._folder, path), self._folder / _name(path)
        if self.has_checksums:  # read once: TensorStore is told what it says
            header = self._header(place, path)
            if checksum(header) != files[HEADER]:
                raise self._damaged(path, HEADER, "does not have the checksum it was saved with")
            spec["metadata"] = json.loads(header)
        spec["fill_missing_data_reads"] = self._fill and not self.has_checksums
        try:
            store = ts.open(spec, open=True, assume_metadata=self.has_checksums, context=context()).result()
        except Exception as error:
            raise _unread(place, path, HEADER, error, self._damaged) from error
        return StoredArray(place, path, self.layouts[path], store, files, self._damaged)

    def _header(self, place: epath.Path, path: ArrayPath) -> bytes:
        try:
            found = ts.KvStore.open(_place(place), context=context()).result().read(HEADER).result()
            if found.state == "missing":
                raise ValueError("it is missing")
        except Exception as error:
            raise _unread(place, path, HEADER, error, self._damaged) from error
        return found.value


def _layout(entry: Mapping[str, Any]) -> Layout:
    return Layout(tuple(entry["shape"]), jax.numpy.dtype(entry["dtype"]), tuple(entry["chunk"]))


def _old_layout(folder: epath.Path, damaged: OnDamage) -> Layout:
    """The layout of an array that only its own header describes."""
    try:
        header = json.loads((folder / HEADER).read_text())
        return Layout(tuple(header["shape"]), jax.numpy.dtype(header["dtype"]), tuple(header["chunks"]))
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(tuple(folder.name.split(".")), HEADER, f"cannot be read ({error})") from error
