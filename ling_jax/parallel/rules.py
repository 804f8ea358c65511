"""The one table from a parameter's dims to mesh axes, and the gathering of what it splits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ling_jax.config import MeshConfig
from ling_jax.kernels.blockwise import MasterWeight
from ling_jax.kernels.fp8 import BLOCK, FP8Weight
from ling_jax.kernels.rows import table_rows
from ling_jax.parallel.mesh import axis_index, axis_size

# A dim's mesh axes, major first; () where it stays whole. Vectors (norms, biases) are never split.
RULES: dict[str, tuple[str, ...]] = {
    "vocab": ("tensor",),
    "hidden": ("expert", "fsdp", "context"),
    "heads": ("tensor",),  # query heads, as the output projection's inputs
    "qkv_heads": (),  # the fused rows are query, key and value heads: no contiguous part is one rank's,
    "qkv_inputs": (
        "expert",
        "fsdp",
        "context",
        "tensor",
    ),  # so the inputs are split, and `tensor_rows` swaps them for heads
    "ffn": ("tensor",),
    "expert": ("expert",),
    "expert_ffn": ("tensor",),
    "expert_hidden": ("fsdp", "context"),
    "expert_row": (),
    "head_dim": (),
    "mtp_input": (),
}
STORAGE = {"hidden", "qkv_inputs", "expert_hidden"}  # split to store, whole to compute

Split = tuple[tuple[str, ...], ...]  # mesh axes of each dim of a parameter


def split_of(shape: tuple[int, ...], names: tuple[str, ...], mesh: MeshConfig, stored: bool = True) -> Split:
    """Mesh axes of more than one device that each dim is split over; `context` and `expert` help to store a dim only
    where they divide it. Unless `stored`, dims that would be whole again to compute stay whole.

    Raises:
      ValueError: naming the dim and both numbers, where the axes do not divide it.
    """

    def shards(axes: tuple[str, ...]) -> int:
        return int(np.prod([getattr(mesh, axis) for axis in axes]))

    split = []
    for name, size in zip(names, shape, strict=True):
        axes = tuple(axis for axis in RULES[name] if getattr(mesh, axis) > 1)
        if len(names) == 1 or (name in STORAGE and not stored):
            axes = ()
        for helper in ("context", "expert"):
            if name in STORAGE and size % shards(axes):
                axes = tuple(axis for axis in axes if axis != helper)
        if size % shards(axes):
            text = " * ".join(f"mesh.{axis} {getattr(mesh, axis)}" for axis in axes)
            raise ValueError(f"dim {name!r} of {size} must be a multiple of {text} = {shards(axes)}; lower these axes")
        split.append(axes)
    used = [axis for axes in split for axis in axes]
    assert len(used) == len(set(used)), f"{names}: two dims on one mesh axis, {split}"
    return tuple(split)


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


def gather(w: Any, names: tuple[str, ...], split: Split, wire_dtype: Any, reduce_dtype: Any) -> Any:
    """A weight's shard -> what this device computes with: whole but for `tensor`, and the experts' own dim.

    Args:
      w: this device's shard inside a manual region; outside one it is returned as it is. Of a `MasterWeight` only the
        codes travel: no product reads its master.
      names, split: of its dims (see RULES and `split_of`).
      wire_dtype: it travels in this dtype and comes out, so rounded, in its own.
      reduce_dtype: in which its gradients are summed and scattered back.
    """
    if isinstance(w, MasterWeight):
        master = gather(w.master, names, split, None, reduce_dtype)
        codes = gather(w.quantised.codes, names, split, w.quantised.dtype, reduce_dtype)
        return MasterWeight(master, FP8Weight(codes, w.quantised.scales), w.watch)
    wire_dtype = None if wire_dtype is None else jnp.dtype(wire_dtype)
    for dim, (name, axes) in enumerate(zip(names, split, strict=True)):
        axes = tuple(axis for axis in axes if axis != "tensor" and axis_size(axis) > 1)
        if name in STORAGE and axes:
            with jax.named_scope("gather_weights"):
                w = _gather(w, dim, axes, wire_dtype, jnp.dtype(reduce_dtype))
    return w


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


def tensor_rows(w: Any, rows_PR: np.ndarray) -> Any:
    """Rows [R, I] of a weight whose inputs are split over `tensor`: rank p gets rows_PR[p] with all their inputs.

    Outside a manual region over `tensor`, P is 1 and the rows are all of them. FP8 blocks move whole: rows_PR names
    128 consecutive ones at a time.
    """
    if axis_size("tensor") == 1:
        return w
    if isinstance(w, MasterWeight):
        blocks_PR = jnp.asarray(rows_PR[:, ::BLOCK] // BLOCK)
        scales = w.quantised.scales[blocks_PR[axis_index("tensor")]]
        codes = tensor_rows(w.quantised.codes, rows_PR)
        return MasterWeight(tensor_rows(w.master, rows_PR), FP8Weight(codes, scales), w.watch)
    with jax.named_scope("swap_inputs_for_heads"):
        return jax.lax.all_to_all(w[rows_PR], "tensor", split_axis=0, concat_axis=2, tiled=True)[0]
