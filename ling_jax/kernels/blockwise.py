"""Products in blockwise FP8, as Ling 2.0 trains (report, section 5.1; spec 6).

Every operand is E4M3: activations and gradients in tiles of 128 along the contracted dim, a scale each, weights in
blocks of 128 x 128. The three products of a layer (its output, its input's gradient, its weight's) each quantise along
their own contraction; scales and sums are float32. Groups of rows begin at multiples of 128, so no tile has two.

Legend: R rows sorted by group, K contracted dim, E groups (experts), I inputs, O outputs, N either of these, J blocks
of 128 rows; small letters are numbers of blocks.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ling_jax.kernels import fp8_tpu, gpu_fp8, gpu_tiles
from ling_jax.kernels.choose import Kernel, pallas
from ling_jax.kernels.fp8 import BLOCK, FP8Weight, block_max, codes_of, each, scales_of
from ling_jax.kernels.grouped import grouped_product, grouped_weight_gradient, groups_of_blocks
from ling_jax.kernels.precision import dot

TINY = 2.0**-100  # a tile's greatest magnitude counts as no less: an ordinary float32 as its scale

# What `kernels.weight.MasterWeight.watch` sums of each operand but the weight, and which these are.
OPERANDS = ("inputs", "gradients", "gradients_by_rows", "inputs_by_rows")  # the last two of the weight's gradient
SUMS = ("nonzero", "lost", "product", "square", "quantised_square")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiles:
    """A matrix of activations or gradients [A, B], quantised along one dim."""

    codes: jax.Array  # float8_e4m3fn [A, B]
    scales: jax.Array  # float32, that dim's size divided by 128 and rounded up
    dim: int = field(metadata={"static": True})  # 0 or 1

    def multiplied_out(self) -> jax.Array:
        """float32 [A, B]."""
        return self.codes.astype(jnp.float32) * each(self.scales, self.dim, self.codes.shape[self.dim])


def _quantise(x: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    scales = scales_of(block_max(jnp.abs(x.astype(jnp.float32)), dim, BLOCK), TINY)
    return codes_of(x, each(scales, dim, x.shape[dim])), scales


def _quantise_kernel(x: jax.Array, dim: int, interpret: bool, room: Any = fp8_tpu) -> tuple[jax.Array, jax.Array]:
    """`room`: the module of a platform's kernels."""
    codes, scales = room.quantise(_fill(x, BLOCK, BLOCK), dim, TINY, interpret=interpret)
    return codes[: x.shape[0], : x.shape[1]], jax.lax.slice_in_dim(scales, 0, x.shape[1 - dim], axis=1 - dim)


def _quantise_triton(x: jax.Array, dim: int, interpret: bool) -> tuple[jax.Array, jax.Array]:
    return _quantise_kernel(x, dim, interpret, gpu_fp8) if gpu_tiles.take_fp8() else _quantise(x, dim)


_QUANTISE = Kernel(
    tpu=partial(_quantise_kernel, interpret=False),
    nvidia=partial(_quantise_triton, interpret=False),
    rest=_quantise,
    named={"xla": _quantise, "pallas": pallas(_quantise_kernel), "triton": pallas(_quantise_triton)},
)


def quantise_tiles(x: jax.Array, dim: int, implementation: str = "auto") -> Tiles:
    """[A, B] in tiles of 128 along `dim`: scale = amax * float32(1 / 448), code = x / scale; "xla", "pallas" (for
    TPU), "triton" (for NVIDIA GPUs), both interpreted on CPU, or "auto"."""
    codes, scales = _QUANTISE(x, implementation=implementation, dim=dim)
    return Tiles(codes, scales, dim)


def deviation(x: jax.Array, y: jax.Array, stacked: int = 0) -> jax.Array:
    """float32 [..., SUMS] of `x` and its quantised form, the first dims a stack: how many elements are not zero and how
    many of these were lost to it, and what the cosine between the two is made of."""
    x = x.astype(jnp.float32)
    terms = (x != 0, (x != 0) & (y == 0), x * y, x * x, y * y)
    return jnp.stack([a.sum(tuple(range(stacked, x.ndim)), jnp.float32) for a in terms], -1)


def _fill(a: jax.Array, *multiples: int) -> jax.Array:
    """Zeros added, so that the last dims are multiples."""
    padding = [(0, -size % multiple) for size, multiple in zip(a.shape[-len(multiples) :], multiples, strict=True)]
    return jnp.pad(a, [(0, 0)] * (a.ndim - len(padding)) + padding) if any(after for _, after in padding) else a


def _inside(y_RN: jax.Array, sizes_E: jax.Array | None) -> jax.Array:
    """Zeros past the last group."""
    if sizes_E is None:
        return y_RN
    return jnp.where((jnp.arange(y_RN.shape[0]) < sizes_E.sum())[:, None], y_RN, 0)


def _multiplied_out(x: Tiles, w: FP8Weight, sizes_E: jax.Array | None, out_dim: int, dtype: jnp.dtype):
    """On CPU, where FP8 is no faster: the values that codes and scales stand for, in float32."""
    x_RK, weight = x.multiplied_out(), w.astype(jnp.dtype(jnp.float32))
    if sizes_E is None:
        return dot(x_RK, weight, ((1,), (2 - out_dim,))).astype(dtype)
    return grouped_product(x_RK, weight, sizes_E, BLOCK, out_dim).astype(dtype)


def _multiplied_out_dw(g: Tiles, x: Tiles, sizes_E: jax.Array | None):
    g_RO, x_RI = g.multiplied_out(), x.multiplied_out()
    if sizes_E is None:
        return dot(g_RO, x_RI, ((0,), (0,)))
    return grouped_weight_gradient(g_RO, x_RI, sizes_E, BLOCK)


def _loop(x: Tiles, w: FP8Weight, sizes_E: jax.Array | None, out_dim: int, dtype: jnp.dtype):
    """Block by block of the contracted dim, so that no more than one product of [R, N] is there."""
    codes_RK = _fill(x.codes, 1, BLOCK)
    w_codes = _fill(w.codes, *((1, BLOCK) if out_dim == 1 else (BLOCK, 1)))
    k_dim, n_dim = w.codes.ndim - out_dim, w.codes.ndim - 3 + out_dim
    outputs = w.codes.shape[n_dim]
    if sizes_E is not None:
        groups_J = groups_of_blocks(sizes_E, codes_RK.shape[0] // BLOCK, BLOCK)
        groups_R = jnp.repeat(jnp.minimum(groups_J, sizes_E.size - 1), BLOCK)

    def body(block, total_RN):
        rows = jax.lax.dynamic_slice_in_dim(codes_RK, block * BLOCK, BLOCK, 1)
        weight = jax.lax.dynamic_slice_in_dim(w_codes, block * BLOCK, BLOCK, k_dim)
        scales = jax.lax.dynamic_index_in_dim(w.scales, block, k_dim, keepdims=False)
        scale_R = jax.lax.dynamic_index_in_dim(x.scales, block, 1)
        if sizes_E is None:
            part, scales = dot(rows, weight, ((1,), (k_dim,))), scales[None]
        else:
            numbers = jax.lax.RaggedDotDimensionNumbers((((1,), (k_dim,)), ((), ())), [0], [0])
            part = jax.lax.ragged_dot_general(rows, weight, sizes_E, numbers, preferred_element_type=jnp.float32)
            scales = scales[groups_R]
        return total_RN + part * scale_R * each(scales, 1, outputs)

    zeros = jnp.zeros((codes_RK.shape[0], outputs), jnp.float32)
    return _inside(jax.lax.fori_loop(0, codes_RK.shape[1] // BLOCK, body, zeros), sizes_E).astype(dtype)


def _loop_dw(g: Tiles, x: Tiles, sizes_E: jax.Array | None):
    g_codes, x_codes = _fill(g.codes, BLOCK, 1), _fill(x.codes, BLOCK, 1)
    blocks, groups = g_codes.shape[0] // BLOCK, 1 if sizes_E is None else sizes_E.size
    groups_J = jnp.zeros(blocks, jnp.int32) if sizes_E is None else groups_of_blocks(sizes_E, blocks, BLOCK)

    def body(j, total_EOI):
        a, b = (jax.lax.dynamic_slice_in_dim(codes, j * BLOCK, BLOCK) for codes in (g_codes, x_codes))
        part_OI = dot(a, b, ((0,), (0,))) * g.scales[j][:, None] * x.scales[j][None, :]
        return total_EOI.at[groups_J[j]].add(part_OI, mode="drop")

    zeros = jnp.zeros((groups, g_codes.shape[1], x_codes.shape[1]), jnp.float32)
    total_EOI = jax.lax.fori_loop(0, blocks, body, zeros)
    return total_EOI[0] if sizes_E is None else total_EOI


def _kernel(
    x: Tiles,
    w: FP8Weight,
    sizes_E: jax.Array | None,
    out_dim: int,
    dtype: jnp.dtype,
    interpret: bool,
    room: Any = fp8_tpu,
):
    codes_RK = _fill(x.codes, BLOCK, BLOCK)
    w_codes, w_scales = _fill(w.codes, BLOCK, BLOCK), w.scales
    sizes = sizes_E
    if sizes is None:
        w_codes, w_scales, sizes = w_codes[None], w_scales[None], jnp.array([codes_RK.shape[0]], jnp.int32)
    options: dict[str, Any] = dict(out_dim=out_dim, dtype=dtype, interpret=interpret)
    y_RN = room.product(codes_RK, _fill(x.scales, BLOCK, 1), w_codes, w_scales, sizes, **options)
    return _inside(y_RN[: x.codes.shape[0], : w.codes.shape[w.codes.ndim - 3 + out_dim]], sizes_E)


def _kernel_dw(g: Tiles, x: Tiles, sizes_E: jax.Array | None, interpret: bool, room: Any = fp8_tpu):
    g_codes, x_codes = (_fill(tiles.codes, BLOCK, BLOCK) for tiles in (g, x))
    g_scales, x_scales = (_fill(tiles.scales, 1, BLOCK) for tiles in (g, x))
    sizes = jnp.array([g_codes.shape[0]], jnp.int32) if sizes_E is None else sizes_E
    dw_EOI = room.weight_gradient(g_codes, g_scales, x_codes, x_scales, sizes, interpret=interpret)
    dw_EOI = dw_EOI[:, : g.codes.shape[1], : x.codes.shape[1]]
    return dw_EOI[0] if sizes_E is None else dw_EOI


def _triton(x: Tiles, w: FP8Weight, sizes_E: jax.Array | None, out_dim: int, dtype: jnp.dtype, interpret: bool):
    if not gpu_tiles.take_fp8():
        return _loop(x, w, sizes_E, out_dim, dtype)
    return _kernel(x, w, sizes_E, out_dim, dtype, interpret, gpu_fp8)


def _triton_dw(g: Tiles, x: Tiles, sizes_E: jax.Array | None, interpret: bool):
    return _kernel_dw(g, x, sizes_E, interpret, gpu_fp8) if gpu_tiles.take_fp8() else _loop_dw(g, x, sizes_E)


_PRODUCT = Kernel(
    cpu=_multiplied_out,
    tpu=partial(_kernel, interpret=False),
    nvidia=partial(_triton, interpret=False),
    rest=_loop,
    named={"multiplied_out": _multiplied_out, "loop": _loop, "pallas": pallas(_kernel), "triton": pallas(_triton)},
)
_WEIGHT_GRADIENT = Kernel(
    cpu=_multiplied_out_dw,
    tpu=partial(_kernel_dw, interpret=False),
    nvidia=partial(_triton_dw, interpret=False),
    rest=_loop_dw,
    named={
        "multiplied_out": _multiplied_out_dw,
        "loop": _loop_dw,
        "pallas": pallas(_kernel_dw),
        "triton": pallas(_triton_dw),
    },
)


def product(
    x: Tiles,
    w: FP8Weight,
    sizes_E: jax.Array | None,
    out_dim: int,
    dtype: Any,
    implementation: str = "auto",
) -> jax.Array:
    """x_r w_e^T (`out_dim` 1) or x_r w_e (`out_dim` 2) of the rows r of each group e, [R, N] in `dtype`.

    Args:
      x: along dim 1.  w: [E, O, I]; or [O, I], with `sizes_E` None: one weight for all rows.
      sizes_E: int32 rows of each group, multiples of 128; rows past the last group come out as zero.
      implementation: "multiplied_out" (float32, for CPU), "pallas" (for TPU) and "triton" (for NVIDIA GPUs), both
        interpreted on CPU, "loop" (XLA, for the rest) or "auto".
    """
    assert x.dim == 1
    return _PRODUCT(x, w, sizes_E, implementation=implementation, out_dim=out_dim, dtype=jnp.dtype(dtype))


def weight_gradient(g: Tiles, x: Tiles, sizes_E: jax.Array | None, implementation: str = "auto") -> jax.Array:
    """float32 [E, O, I] (or [O, I]): the sum of g_r x_r^T over the rows r of each group, 0 for an empty one; both are
    quantised along dim 0. See `product`."""
    assert g.dim == x.dim == 0
    return _WEIGHT_GRADIENT(g, x, sizes_E, implementation=implementation)
