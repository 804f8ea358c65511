"""The device mesh, and what a device knows of it inside a manual region.

Every device's objective is its own share and their sum is the objective. Under `check_vma=False` the transposes
that JAX applies (psum to psum, all_gather to psum_scatter, a permutation to its inverse) are exactly those of that
sum, so gradients are taken inside the region and nothing is counted twice.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

from ling_jax.config import MESH_AXES, MeshConfig

log = logging.getLogger(__name__)

BATCH_AXES = ("data", "fsdp", "expert")  # a batch's rows
TOKEN_AXES = (*BATCH_AXES, "context")  # a batch's tokens
WORK_AXES = (*TOKEN_AXES, "tensor")  # all that one pipeline stage has


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of `config` over `devices` (default: all there are; one process may leave some idle, with a warning).

    Raises:
      ValueError: if the axes multiply to more devices than there are, or on several processes to fewer.
    """
    devices = jax.devices() if devices is None else devices
    sizes, product = config.shape, math.prod(config.shape)
    if product < len(devices) and jax.process_count() == 1:
        log.warning("the mesh uses %d of %d devices; --mesh.fsdp and --mesh.expert use more", product, len(devices))
        devices = devices[:product]
    if product != len(devices):
        text = " * ".join(f"{name} {size}" for name, size in zip(MESH_AXES, sizes, strict=True) if size > 1) or "1"
        raise ValueError(
            f"the mesh has {product} devices ({text}), but there are {len(devices)} {devices[0].platform} devices: set "
            f"--mesh.* so that the axes multiply to {len(devices)}"
        )
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.sharding.Mesh(_arrange(config, devices), MESH_AXES, axis_types=auto)


def _arrange(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """`devices` as an array of the mesh's shape: the later an axis, the nearer its neighbours; TPU slices along `data`.
    GPUs and CPUs keep their order, host by host, so that any axis may span hosts."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(config.shape)
    if slices == 1:
        return mesh_utils.create_device_mesh(config.shape, devices, allow_split_physical_axes=True)
    if config.data % slices:
        raise ValueError(
            f"mesh.data = {config.data} must be a multiple of the {slices} slices, between which only `data` is split: "
            "raise it, or use one slice"
        )
    between = [slices if axis == "data" else 1 for axis in MESH_AXES]
    within = [size // part for size, part in zip(config.shape, between, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def axis_size(*names: str) -> int:
    """Devices along the axes inside a manual region of them; 1 outside."""
    mesh = jax.sharding.get_abstract_mesh()
    size = 1
    for name in names:
        size *= mesh.shape[name] if name in mesh.manual_axes else 1
    return size


def axis_index(*names: str) -> jax.Array | int:
    """This device's place along the axes, the first one major; 0 outside a manual region."""
    names = _present(names)
    return jax.lax.axis_index(names) if names else 0


def _present(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if axis_size(name) > 1)


def psum(x: Any, *names: str) -> Any:
    """Sum over the axes; x itself where they have one device."""
    names = _present(names)
    return jax.lax.psum(x, names) if names else x


def pmax(x: Any, *names: str) -> Any:
    names = _present(names)
    return jax.lax.pmax(x, names) if names else x


def all_gather(x: jax.Array, name: str, axis: int) -> jax.Array:
    """Concatenated over a mesh axis; x itself where it has one device."""
    return jax.lax.all_gather(x, name, axis=axis % x.ndim, tiled=True) if axis_size(name) > 1 else x


def manual(f: Callable, mesh: jax.sharding.Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`f` on every device's shards. `check_vma=False`: Pallas kernels raise under the check, so that the sharded
    result equals one device's is a matter of tests."""
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def rows_here(mesh: jax.sharding.Mesh, rows: int) -> np.ndarray:
    """Which of a batch's `rows` this process's devices hold, ascending: what it has to read."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    held = sharding.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in held if index is not None]))


def place_batch(
    mesh: jax.sharding.Mesh,
    batch: Mapping[str, np.ndarray],
    fields: Mapping[str, str],
    here: np.ndarray,
    rows: int,
) -> dict[str, jax.Array]:
    """The global batch of `rows` rows, from the rows `here` that this process has read.

    Args:
      fields: the dims of each array, one letter each, of which B is that of the rows.
    """

    def place(value: np.ndarray, dims: str) -> jax.Array:
        axis = dims.index("B")
        sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))

        def part(index: Any) -> np.ndarray:
            return np.take(value, np.searchsorted(here, np.arange(rows)[index[axis]]), axis)

        return jax.make_array_from_callback((*value.shape[:axis], rows, *value.shape[axis + 1 :]), sharding, part)

    return {name: place(batch[name], dims) for name, dims in fields.items()}
