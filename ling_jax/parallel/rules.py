"""Gathering what `config.mesh.DIMS` splits, and looking things up in it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ling_jax.config.mesh import DIMS, Split
from ling_jax.kernels.fp8 import BLOCK
from ling_jax.kernels.rows import table_rows
from ling_jax.kernels.weight import Weight
from ling_jax.parallel.mesh import axis_index, axis_size


def spec_of(split: Split, dims: int) -> PartitionSpec:
    """The spec of an array of `dims` dims; those before the split ones are stacks of layers and stay whole."""
    parts = [axes[0] if len(axes) == 1 else axes or None for axes in split]
    return PartitionSpec(*[None] * (dims - len(split)), *parts)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(w: jax.Array, dim: int, axes: tuple[str, ...], wire_dtype: Any, reduce_dtype: Any) -> jax.Array:
    """One axis after the other: over all of a slice's devices at once, XLA for TPU makes an all-reduce of it. With no
    wire dtype nothing is sent, and what comes out is zeros that only a gradient comes back from."""
    if wire_dtype is None:
        return jnp.zeros([size * (axis_size(*axes) if i == dim else 1) for i, size in enumerate(w.shape)], w.dtype)
    wire = w.astype(wire_dtype)
    for axis in reversed(axes):
        wire = jax.lax.all_gather(wire, axis, axis=dim, tiled=True)
    return wire.astype(w.dtype)


def _gather_fwd(w, dim, axes, wire_dtype, reduce_dtype):
    return _gather(w, dim, axes, wire_dtype, reduce_dtype), None


def _gather_bwd(dim, axes, wire_dtype, reduce_dtype, _, g):
    part = g.astype(reduce_dtype)
    for axis in axes:
        part = jax.lax.psum_scatter(part, axis, scatter_dimension=dim, tiled=True)
    return (part.astype(g.dtype),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def gather(w: jax.Array, names: tuple[str, ...], split: Split, wire_dtype: Any, reduce_dtype: Any) -> jax.Array:
    """A parameter's shard -> what this device computes with: whole but for `tensor`, and the experts' own dim.

    Args:
      w: this device's shard inside a manual region; outside one it is returned as it is.
      names, split: of its dims (see `config.mesh.split_of`).
      wire_dtype: it travels in this dtype and comes out, so rounded, in its own; None sends nothing and gives zeros
        that only a gradient comes back from.
      reduce_dtype: in which its gradients are summed and scattered back.
    """
    wire_dtype = None if wire_dtype is None else jnp.dtype(wire_dtype)
    for dim, (name, axes) in enumerate(zip(names, split, strict=True)):
        axes = tuple(axis for axis in axes if axis != "tensor" and axis_size(axis) > 1)
        if DIMS[name].stored and axes:
            with jax.named_scope("gather_weights"):
                w = _gather(w, dim, axes, wire_dtype, jnp.dtype(reduce_dtype))
    return w


def gather_weight(w: Weight, names: tuple[str, ...], split: Split, wire_dtype: Any, reduce_dtype: Any) -> Weight:
    """`gather` of a weight that products are made with."""
    return w.moved(lambda array, wire: gather(array, names, split, wire, reduce_dtype), wire_dtype)


def look_up(table_VD: jax.Array, ids_BT: jax.Array, split: Split, wire_dtype: Any, reduce_dtype: Any) -> jax.Array:
    """Rows of a table whose inputs are split, zeros for an id past its end, as `wire_dtype`: [B, T, D].

    The devices along the first axis look up each other's tokens in their own inputs and exchange what they find: none
    ever has the whole table, nor its gradient. Over further axes the table is gathered (see `gather`).
    """
    axes = tuple(axis for axis in split[1] if axis_size(axis) > 1)
    if not axes:
        return table_rows(table_VD, ids_BT, jnp.dtype(wire_dtype))
    if axes[1:]:
        table_VD = _gather(table_VD, 1, axes[1:], jnp.dtype(wire_dtype), jnp.dtype(reduce_dtype))
    everyones_BT = jax.lax.all_gather(ids_BT, axes[0], tiled=True)
    rows = table_rows(table_VD, everyones_BT, jnp.dtype(wire_dtype))
    return jax.lax.all_to_all(rows, axes[0], split_axis=0, concat_axis=2, tiled=True)


def tensor_rows(w: Weight, rows_PR: np.ndarray) -> Weight:
    """Rows [R, I] of a weight whose inputs are split over `tensor`: rank p gets rows_PR[p] with all their inputs.

    Outside a manual region over `tensor`, P is 1 and the rows are all of them. FP8 blocks move whole: rows_PR names
    128 consecutive ones at a time.
    """
    if axis_size("tensor") == 1:
        return w

    def swap(array: jax.Array) -> jax.Array:
        with jax.named_scope("swap_inputs_for_heads"):
            return jax.lax.all_to_all(array[rows_PR], "tensor", split_axis=0, concat_axis=2, tiled=True)[0]

    def pick(scales: jax.Array) -> jax.Array:
        return scales[jnp.asarray(rows_PR[:, ::BLOCK] // BLOCK)[axis_index("tensor")]]

    return w.rows_swapped(swap, pick)
