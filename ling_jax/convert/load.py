"""`load_pretrained`: a model from a HF folder or our checkpoint, whole or split over a mesh."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from ling_jax.checkpoint import placed
from ling_jax.config import ONE_DEVICE, MeshConfig
from ling_jax.convert.weights import Weights, open_weights, whole
from ling_jax.kernels.precision import under_own_switches
from ling_jax.model.model import Ling, abstract_model, param_specs, split_model
from ling_jax.parallel.mesh import make_mesh

READERS = 4  # arrays read at a time
DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


@under_own_switches
def load_pretrained(path: str | Path, *, dtype: Any = None, mesh: MeshConfig | None = None) -> Ling:
    """Loads a model from a HF folder or hub id (bf16, float32, FP8; one safetensors file or more), or our checkpoint.

    Args:
      path: a HF folder, a hub id (ORG/NAME or ORG/NAME@REVISION), a run folder, its `checkpoints/`, one step of it, or
        what convert.py made.
      dtype: of weights and computation, float32 or bfloat16. None computes in float32 on CPU, bfloat16 elsewhere, and
        keeps the weights as stored, but for FP8, whose codes are multiplied by their scales in float32 and kept in the
        dtype of computation.
      mesh: splits the weights over all devices by `parallel.rules`; every process reads only its devices' parts.
        None puts them whole on one device.
    Raises:
      ValueError: before weights are read, for another dtype, a dim that the mesh does not divide, or weights that miss
        something, have something extra, or are truncated or wrongly shaped: each is named.
    """
    dtype = _checked(dtype)
    return load_weights(open_weights(path), dtype=dtype, mesh=mesh)


@under_own_switches
def load_weights(weights: Weights, *, dtype: jnp.dtype | None = None, mesh: MeshConfig | None = None) -> Ling:
    """`load_pretrained` of weights that are open already."""
    (mesh or ONE_DEVICE).check(weights.config)
    compute = _compute_dtype(dtype)
    model = abstract_model(weights.config, mesh=mesh or ONE_DEVICE, dtype=compute)
    graph, params, bias = split_model(model)
    shardings = _shardings(model, mesh)
    leaves: dict[tuple[str, ...], Any] = flatten_dict({"params": params, "bias": bias})

    def read(path: tuple[str, ...]) -> jax.Array:
        wanted = jnp.float32 if path[0] == "bias" else compute if weights.scales_path(path) else dtype
        return _read_array(weights, path, leaves[path].shape, wanted, shardings[path])

    with ThreadPoolExecutor(READERS) as pool:
        arrays = unflatten_dict(dict(zip(leaves, pool.map(read, leaves), strict=True)))
    return nnx.merge(graph, arrays["params"], arrays.get("bias", {}))


def _checked(dtype: Any) -> jnp.dtype | None:
    """The dtype that is asked for; ValueError for one whose products no kernel has."""
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found not in DTYPES:
        raise ValueError(f"dtype = {dtype!r} must be {' or '.join(map(str, DTYPES))}, or None for as it is stored")
    return found


def _compute_dtype(dtype: jnp.dtype | None) -> jnp.dtype:
    if dtype is not None:
        return dtype
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def _shardings(model: Ling, mesh: MeshConfig | None) -> dict[tuple[str, ...], Any]:
    """Where each array is to live; None for each without a mesh."""
    _, params, bias = split_model(model)
    paths = flatten_dict({"params": params, "bias": bias})
    if mesh is None:
        return dict.fromkeys(paths)
    devices = make_mesh(mesh)
    everywhere = dict.fromkeys(paths, NamedSharding(devices, PartitionSpec()))
    return everywhere | flatten_dict({"params": jax.tree.map(partial(NamedSharding, devices), param_specs(model))})


def _read_array(weights: Weights, path: tuple[str, ...], shape: Any, dtype: Any, sharding: Any) -> jax.Array:
    if sharding is None:
        return jnp.asarray(weights.values(path, whole(shape), dtype))
    return placed(shape, sharding, lambda part: weights.values(path, part, dtype))
