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

from ling_jax.kernels import fp8_tpu
from ling_jax.kernels.fp8 import BLOCK, FP8Weight, block_max, codes_of, each, scales_of
from ling_jax.kernels.grouped import grouped_product, grouped_weight_gradient, groups_of_blocks
from ling_jax.kernels.precision import dot

TINY = 2.0**-100  # a tile's greatest magnitude counts as no less: an ordinary float32 as its scale

# What `MasterWeight.watch` sums of each operand but the weight, and which these are.
OPERANDS = ("inputs", "gradients", "gradients_by_rows", "inputs_by_rows")  # the last two of the weight's gradient
SUMS = ("nonzero", "lost", "product", "square", "quantised_square")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MasterWeight:
    """A weight [..., O, I] in training: products read `quantised`, their gradient is that of `master`."""

    master: jax.Array
    quantised: FP8Weight
    watch: jax.Array | None = None  # float32 zeros [..., OPERANDS, SUMS], whose gradient is what was to be watched

    @property
    def dtype(self) -> jnp.dtype:
        return self.master.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.master.shape

    @property
    def ndim(self) -> int:
        return self.master.ndim

    def __getitem__(self, index: object) -> "MasterWeight":
        assert index is ..., "parts are taken of its arrays"
        return self

    def hollow(self) -> "MasterWeight":
        """What a backward pass needs of it: a master that was gathered to be here is not kept, nor gathered again."""
        return MasterWeight(jnp.zeros((), self.dtype), self.quantised, self.watch)

    def gradient(self, of_master: jax.Array, watched: jax.Array | None) -> Any:
        """The gradient of all this, for a custom VJP; codes have none."""
        none: Any = None
        return MasterWeight(of_master.astype(self.dtype), none, watched)


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


def quantise_tiles(x: jax.Array, dim: int, implementation: str = "auto") -> Tiles:
    """[A, B] in tiles of 128 along `dim`: scale = amax * float32(1 / 448), code = x / scale; "xla", "pallas" (for TPU;
    interpreted on CPU) or "auto"."""

    def xla(x):
        scales = scales_of(block_max(jnp.abs(x.astype(jnp.float32)), dim, BLOCK), TINY)
        return codes_of(x, each(scales, dim, x.shape[dim])), scales

    def kernel(x, interpret):
        codes, scales = fp8_tpu.quantise(_fill(x, BLOCK, BLOCK), dim, TINY, interpret=interpret)
        return codes[: x.shape[0], : x.shape[1]], jax.lax.slice_in_dim(scales, 0, x.shape[1 - dim], axis=1 - dim)

    compiled = partial(kernel, interpret=False)
    if implementation == "xla":
        codes, scales = xla(x)
    elif implementation == "pallas":
        codes, scales = jax.lax.platform_dependent(x, cpu=partial(kernel, interpret=True), default=compiled)
    else:
        codes, scales = jax.lax.platform_dependent(x, tpu=compiled, default=xla)
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


def _multiplied_out(x: Tiles, w: FP8Weight, sizes_E, out_dim, dtype):
    """On CPU, where FP8 is no faster: the values that codes and scales stand for, in float32."""
    x_RK, weight = x.multiplied_out(), w.astype(jnp.dtype(jnp.float32))
    if sizes_E is None:
        return dot(x_RK, weight, ((1,), (2 - out_dim,))).astype(dtype)
    return grouped_product(x_RK, weight, sizes_E, BLOCK, out_dim).astype(dtype)


def _multiplied_out_dw(g: Tiles, x: Tiles, sizes_E):
    g_RO, x_RI = g.multiplied_out(), x.multiplied_out()
    if sizes_E is None:
        return dot(g_RO, x_RI, ((0,), (0,)))
    return grouped_weight_gradient(g_RO, x_RI, sizes_E, BLOCK)


def _loop(x: Tiles, w: FP8Weight, sizes_E, out_dim, dtype):
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


def _loop_dw(g: Tiles, x: Tiles, sizes_E):
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


def _kernel(x: Tiles, w: FP8Weight, sizes_E, out_dim, dtype, interpret):
    codes_RK = _fill(x.codes, BLOCK, BLOCK)
    w_codes, w_scales = _fill(w.codes, BLOCK, BLOCK), w.scales
    sizes = sizes_E
    if sizes is None:
        w_codes, w_scales, sizes = w_codes[None], w_scales[None], jnp.array([codes_RK.shape[0]], jnp.int32)
    options = dict(out_dim=out_dim, dtype=dtype, interpret=interpret)
    y_RN = fp8_tpu.product(codes_RK, _fill(x.scales, BLOCK, 1), w_codes, w_scales, sizes, **options)
    return _inside(y_RN[: x.codes.shape[0], : w.codes.shape[w.codes.ndim - 3 + out_dim]], sizes_E)


def _kernel_dw(g: Tiles, x: Tiles, sizes_E, interpret):
    g_codes, x_codes = (_fill(tiles.codes, BLOCK, BLOCK) for tiles in (g, x))
    g_scales, x_scales = (_fill(tiles.scales, 1, BLOCK) for tiles in (g, x))
    sizes = jnp.array([g_codes.shape[0]], jnp.int32) if sizes_E is None else sizes_E
    dw_EOI = fp8_tpu.weight_gradient(g_codes, g_scales, x_codes, x_scales, sizes, interpret=interpret)
    dw_EOI = dw_EOI[:, : g.codes.shape[1], : x.codes.shape[1]]
    return dw_EOI[0] if sizes_E is None else dw_EOI


def _choose(implementation: str, functions: tuple[Any, Any, Any], args: Any) -> jax.Array:
    multiplied_out, loop, kernel = functions
    if implementation == "multiplied_out":
        return multiplied_out(*args)
    if implementation == "loop":
        return loop(*args)
    compiled = partial(kernel, interpret=False)
    if implementation == "pallas":
        return jax.lax.platform_dependent(*args, cpu=partial(kernel, interpret=True), default=compiled)
    return jax.lax.platform_dependent(*args, cpu=multiplied_out, tpu=compiled, default=loop)


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
      implementation: "multiplied_out" (float32, for CPU), "loop" (XLA, for GPU), "pallas" (for TPU; interpreted on CPU)
        or "auto".
    """
    assert x.dim == 1
    options = dict(out_dim=out_dim, dtype=jnp.dtype(dtype))
    functions = partial(_multiplied_out, **options), partial(_loop, **options), partial(_kernel, **options)
    return _choose(implementation, functions, (x, w, sizes_E))


def weight_gradient(g: Tiles, x: Tiles, sizes_E: jax.Array | None, implementation: str = "auto") -> jax.Array:
    """float32 [E, O, I] (or [O, I]): the sum of g_r x_r^T over the rows r of each group, 0 for an empty one; both are
    quantised along dim 0. See `product`."""
    assert g.dim == x.dim == 0
    return _choose(implementation, (_multiplied_out_dw, _loop_dw, _kernel_dw), (g, x, sizes_E))


def gradients(g_RO: jax.Array, x_RI: jax.Array, w: MasterWeight, sizes_E: jax.Array | None = None) -> Any:
    """The weight's, with what it watches of all four operands but the weight itself."""
    g, x = quantise_tiles(g_RO, 0), quantise_tiles(x_RI, 0)
    sums = None
    if w.watch is not None:
        rows = [(a, quantise_tiles(a, 1)) for a in (x_RI, g_RO)]
        pairs = (*rows, (g_RO, g), (x_RI, x))
        sums = jnp.stack([deviation(a, tiles.multiplied_out()) for a, tiles in pairs])
    return w.gradient(weight_gradient(g, x, sizes_E), sums)


@jax.custom_vjp
def linear(x: jax.Array, w: MasterWeight) -> jax.Array:
    """`kernels.linear.linear` in FP8: [..., I] -> [..., O] in x's dtype."""
    y_RO = product(quantise_tiles(x.reshape(-1, x.shape[-1]), 1), w.quantised, None, 1, x.dtype)
    return y_RO.reshape(*x.shape[:-1], -1)


def _linear_fwd(x, w):
    return linear(x, w), (x, w.hollow())


def _linear_bwd(saved, g):
    x, w = saved
    g_RO, x_RI = (a.reshape(-1, a.shape[-1]) for a in (g, x))
    dx_RI = product(quantise_tiles(g_RO, 1), w.quantised, None, 2, x.dtype)
    return dx_RI.reshape(x.shape), gradients(g_RO, x_RI, w)


linear.defvjp(_linear_fwd, _linear_bwd)
