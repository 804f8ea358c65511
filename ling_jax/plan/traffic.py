"""The traffic between a run and its storage: bytes and objects of a checkpoint, of a start and of a conversion.

It is computed from the shardings that the trainer uses and from the rules by which files are cut; nothing is compiled,
and no array is made. Times are bounds, at rates that are assumed, not measured here:

    HOST_BYTES_PER_SECOND   what one machine with a network of 200 Gb/s, as every host of TPU v5p has, wrote through
                            gcsfuse in objects of 100 MiB; it read three times as fast (docs/benchmarks.md of
                            github.com/GoogleCloudPlatform/gcsfuse, version 3.4.3)
    WRITES, READS           requests a second that a bucket of Google's serves before it has spread over more servers
                            (cloud.google.com/storage/docs/request-rate)
"""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.serialization import to_state_dict
from flax.traverse_util import flatten_dict

from ling_jax.config import ModelConfig
from ling_jax.convert.fp8 import BLOCK as FP8_BLOCK
from ling_jax.convert.mapping import ArrayPath, layout
from ling_jax.convert.to_hf import shards_of, tensors_of
from ling_jax.convert.to_jax import array_of
from ling_jax.convert.weights import BF16, F32
from ling_jax.files.arrays import Bounds, Layout, layout_of, share
from ling_jax.files.paths import BLOCK
from ling_jax.train.state import Trainer

HOST_BYTES_PER_SECOND = 4e9
WRITES, READS = 1000, 5000
SHARD_BYTES = 5 * 10**9  # of a file of an export, by default
HOST_CHIPS = 4  # of every TPU topology that has several hosts
ASSUMED = (
    f"assumed: {HOST_BYTES_PER_SECOND / 1e9:g} GB/s for each host, {WRITES:,} writes and {READS:,} reads a second in a "
    "bucket; the quota of a project may be lower"
)

Arrays = Mapping[ArrayPath, Any]  # of jax.ShapeDtypeStruct with a sharding


@dataclass(frozen=True)
class PlannedDevice:
    """Stands for a device that is not here."""

    id: int
    process_index: int  # its host
    platform: str = "planned"
    device_kind: str = "planned"


def planned_devices(topology: str, slices: int = 1) -> list[Any]:
    """One for each device of a TPU topology such as "v5p:4x4x4", in the order of its hosts; for what does not depend on
    how chips are joined, and without libtpu."""
    kind, _, dims = topology.partition(":")
    of_chip = 2 if kind == "tpu7x" else 1
    number = slices * of_chip * math.prod(map(int, dims.split("x")))
    return [PlannedDevice(i, i // (HOST_CHIPS * of_chip)) for i in range(number)]


class Traffic(NamedTuple):
    """Bytes and objects that some work moves: all hosts together, and the most that one of them does.

    Requests are those for chunks and for files of weights; the few more for each array (its header) and for a host (its
    checksums) are not among them.
    """

    hosts: int
    read: int = 0  # bytes
    reads: int = 0  # requests
    written: int = 0  # bytes
    objects: int = 0  # written
    largest: int = 0  # bytes of the largest of them
    of_host: int = 0  # bytes of the busiest host, read and written

    @property
    def seconds(self) -> dict[str, float]:
        """That the bytes take, and the requests, each alone."""
        requests = max(self.objects / WRITES, self.reads / READS)
        return {"bytes": self.of_host / HOST_BYTES_PER_SECOND, "requests": requests}

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "seconds": self.seconds}


def traffic_of(trainer: Trainer) -> dict[str, Traffic]:
    """The traffic of a run's checkpoints and starts, and of conversions of its model, by what is done."""
    model, state = trainer.config.model, _state(trainer)
    weights = {path: array for path, array in state.items() if path[0] in ("params", "bias")}
    saved = {path: layout_of(array.shape, np.dtype(array.dtype), array.sharding) for path, array in state.items()}
    converted = {path: array_of(path, stack, _released(path)) for path, stack in layout(model).items()}
    return {
        "save a checkpoint": _saving(state, saved),
        "resume": _reading(state, saved),
        "start from a converted checkpoint": _reading(weights, converted),
        "convert.py to-jax": _to_jax(converted),
        "convert.py to-hf --format bf16": _to_hf(model, {path: saved[path] for path in weights}),
    }


def _released(path: ArrayPath) -> np.dtype:
    """In a HF folder that is not FP8."""
    return F32 if path[0] == "bias" else BF16


def _state(trainer: Trainer) -> Arrays:
    """All arrays of a checkpoint, in the order in which they are saved."""
    shapes, shardings = jax.eval_shape(trainer.init), trainer.shardings()
    state = jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes, shardings)
    return flatten_dict(to_state_dict(state))


def _chunk_bytes(stored: Layout) -> int:
    return math.prod(stored.chunk) * stored.dtype.itemsize


def _chunks(stored: Layout, shape: Iterable[int]) -> int:
    """How many make up a part of this shape that cuts none, such as a shard."""
    return math.prod(size // c for size, c in zip(shape, stored.chunk, strict=True))


# A run's checkpoints and starts.


class _Shards(NamedTuple):
    """An array's shards, device by device."""

    hosts: np.ndarray
    starts: np.ndarray  # [devices, dims]
    shape: tuple[int, ...]
    replicas: np.ndarray  # the device's place among those that hold the same


@functools.cache
def _shards(sharding: Any, shape: tuple[int, ...]) -> _Shards:
    mesh = sharding.mesh
    places = dict(zip(mesh.axis_names, np.indices(mesh.devices.shape).reshape(mesh.devices.ndim, -1), strict=True))

    def place(axes: Iterable[str]) -> np.ndarray:
        """Along several axes together, the first one major."""
        found = np.zeros(mesh.devices.size, int)
        for axis in axes:
            found = found * mesh.shape[axis] + places[axis]
        return found

    split = [(axes,) if isinstance(axes, str) else axes or () for axes in sharding.spec]
    split += [()] * (len(shape) - len(split))
    used = {axis for axes in split for axis in axes}
    held = sharding.shard_shape(shape)
    starts = np.zeros((mesh.devices.size, len(shape)), int)
    for dim, (axes, size) in enumerate(zip(split, held, strict=True)):
        starts[:, dim] = place(axes) * size
    hosts = np.array([device.process_index for device in mesh.devices.flat])
    return _Shards(hosts, starts, held, place(axis for axis in mesh.axis_names if axis not in used))


def _saving(state: Arrays, saved: Mapping[ArrayPath, Layout]) -> Traffic:
    """Objects are the chunks, and a header of each array."""
    sizes, objects = [], len(state)
    for order, (path, array) in enumerate(state.items()):
        shards = _shards(array.sharding, array.shape)
        chunks, replicas = _chunks(saved[path], shards.shape), shards.replicas.max() + 1
        mine = np.array([len(share(chunks, replica, replicas, order)) for replica in range(replicas)])[shards.replicas]
        objects += int(mine.sum())
        sizes.append(np.bincount(shards.hosts, mine * _chunk_bytes(saved[path])))
    of_hosts, largest = np.sum(sizes, 0), max(map(_chunk_bytes, saved.values()))
    written, of_host = int(of_hosts.sum()), int(of_hosts.max())
    return Traffic(of_hosts.size, written=written, objects=objects, largest=largest, of_host=of_host)


def _reading(wanted: Arrays, stored: Mapping[ArrayPath, Layout]) -> Traffic:
    """Each host reads what its devices hold, equal shards once."""
    found = [_read_by_hosts(array.sharding, array.shape, stored[path]) for path, array in wanted.items()]
    sizes, requests = np.sum(found, 0).T
    return Traffic(sizes.size, int(sizes.sum()), int(requests.sum()), of_host=int(sizes.max()))


@functools.cache
def _read_by_hosts(sharding: Any, shape: tuple[int, ...], stored: Layout) -> np.ndarray:
    """Bytes and requests of each host: [hosts, 2]."""
    shards, chunk = _shards(sharding, shape), np.array(stored.chunk, int)
    alike: dict[bytes, tuple[int, int]] = {}  # hosts whose shards are cut by chunks in the same way

    def read(host: int) -> tuple[int, int]:
        starts = np.unique(shards.starts[shards.hosts == host], axis=0)
        starts -= starts.min(0) // chunk * chunk
        if starts.tobytes() not in alike:
            parts = [[(at, at + size) for at, size in zip(row, shards.shape, strict=True)] for row in starts.tolist()]
            alike[starts.tobytes()] = read_in_parts(stored, parts)
        return alike[starts.tobytes()]

    return np.array([read(host) for host in range(shards.hosts.max() + 1)])


def read_in_parts(stored: Layout, parts: Iterable[Bounds]) -> tuple[int, int]:
    """(bytes, requests) for parts of an array that one process reads, one after the other: a chunk is read whole when
    its checksum is compared, and after that wherever the part of it does not lie together in its file."""
    checked = np.zeros([size // c for size, c in zip(stored.shape, stored.chunk, strict=True)], bool)
    elements = requests = 0
    for bounds in parts:
        chunks, shared, together = _overlap(stored, bounds)
        elements += int(np.where(checked[chunks] & together, shared, math.prod(stored.chunk)).sum())
        requests += shared.size
        checked[chunks] = True
    return elements * stored.dtype.itemsize, requests


def _overlap(stored: Layout, bounds: Bounds) -> tuple[tuple[slice, ...], np.ndarray, np.ndarray]:
    """The chunks that a part of an array lies in; and of each the elements that are in the part, and whether these lie
    together in its file: whole rows behind the first dim that has more than one."""
    chunks = tuple(slice(first // c, -(-last // c)) for (first, last), c in zip(bounds, stored.chunk, strict=True))
    shared, together, single = np.ones((), np.int64), np.ones((), bool), np.ones((), bool)
    for (first, last), c, chunk in zip(bounds, stored.chunk, chunks, strict=True):
        starts = np.arange(chunk.start, chunk.stop) * c
        rows = np.minimum(starts + c, last) - np.maximum(starts, first)
        together = np.logical_and.outer(together, rows == c) | np.logical_and.outer(single, rows > 0)
        single = np.logical_and.outer(single, rows == 1)
        shared = np.multiply.outer(shared, rows)
    return chunks, shared, together


# Conversions, which one host makes.


def _to_jax(arrays: Mapping[ArrayPath, Layout]) -> Traffic:
    """Every tensor is read once, in blocks, and every chunk written once."""
    size = sum(math.prod(stored.shape) * stored.dtype.itemsize for stored in arrays.values())
    objects = len(arrays) + sum(_chunks(stored, stored.shape) for stored in arrays.values())
    largest = max(map(_chunk_bytes, arrays.values()))
    return Traffic(1, size, -(-size // BLOCK), size, objects, largest, 2 * size)


def _to_hf(model: ModelConfig, saved: Mapping[ArrayPath, Layout]) -> Traffic:
    """Tensors are written one after the other, so that a chunk with parts of several is read twice at most: whole to be
    checked, and then part by part."""
    stacks = layout(model)
    read = reads = 0
    for path, stored in saved.items():
        depth = stacks[path].names.ndim
        several = math.prod(stored.chunk[:depth]) > 1
        read += math.prod(stored.shape) * stored.dtype.itemsize * (2 if several else 1)
        reads += stacks[path].names.size * math.prod(map(int.__floordiv__, stored.shape[depth:], stored.chunk[depth:]))
    weights: Any = SimpleNamespace(stacks=stacks, dtypes={}, block=FP8_BLOCK)
    tensors = tensors_of(weights, "bf16")
    files = [sum(tensors[name].nbytes for name in names) for names in shards_of(tensors, SHARD_BYTES).values()]
    return Traffic(1, read, reads, sum(files), len(files), max(files), read + sum(files))
