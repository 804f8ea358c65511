"""Products of FP8 blocks and their scales on GPU, where no partial sum leaves the registers.

Every 128 terms of a sum have scales of their own, so each 128-deep product is scaled in float32 before it is added:
the matrix units' own sums, which keep fewer bits than float32, are never longer than that. NVIDIA's compute capability
8.9 and later have such units; Blackwell runs the same kernels. Its own MX format has scales that are powers of two, one
for every 32 elements, so it cannot hold what Ling's rule asks for.

Legend: R rows sorted by group, E groups (experts), I inputs, O outputs, K the dim summed over, N the other of I and O.
Lower case r, i, o, k, n: its blocks of 128. J tiles of rows.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ling_jax.kernels import work
from ling_jax.kernels.fp8 import BLOCK, codes_of, scales_of
from ling_jax.kernels.gpu_tiles import SMALLEST, Effort, Span, call, load, store, tile, tiles
from ling_jax.kernels.precision import dot

# 96 KiB of shared memory: three stages of two 128 x 128 tiles of codes.
EFFORT = Effort(warps=8, stages=3)


def dot_codes(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """`a` times `b`, in float32, whatever precision users have set for wider operands: these products are exact."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, jax.lax.Precision.DEFAULT, jnp.float32)


def add_scaled(sum_: jax.Array, part: jax.Array, row_scales: jax.Array, column_scales: jax.Array) -> jax.Array:
    """`sum_` and a product of 128 terms, each of its rows and columns with a scale; one scale may be all columns'."""
    return sum_ + part * (row_scales[:, None] * column_scales)


def _block(number: Any, size: int) -> Span:
    """The block of 128 with this number in a dim of `size`, a multiple of 128."""
    return Span(number * BLOCK, BLOCK, size)


def _product_kernel(
    groups_J: Any, x_RK: Any, scales_kR: Any, w_EOI: Any, w_scales_Eoi: Any, y_RN: Any, *, out_dim: int
):
    """A block of rows times a block of its group's weight; the programs of one block of rows are neighbours, so that
    it is read from HBM once."""
    (rows, inner), outputs, groups = x_RK.shape, y_RN.shape[1], w_EOI.shape[0]
    j, n_block = pl.program_id(0) // (outputs // BLOCK), pl.program_id(0) % (outputs // BLOCK)
    r, n, group = _block(j, rows), _block(n_block, outputs), groups_J[j]

    def add(step, sum_rn):
        k = _block(step, inner)
        w = load(w_EOI, group, *((n, k) if out_dim == 1 else (k, n)))
        scale = load(w_scales_Eoi, group, *((n_block, step) if out_dim == 1 else (step, n_block)))
        part = dot_codes(load(x_RK, r, k), w, (1, 2 - out_dim))
        return add_scaled(sum_rn, part, load(scales_kR, step, r), scale)

    steps = (group < groups).astype(jnp.int32) * (inner // BLOCK)  # past the last group nothing is read
    store(y_RN, jax.lax.fori_loop(0, steps, add, jnp.zeros((BLOCK, BLOCK), jnp.float32)), r, n)


@partial(jax.jit, static_argnames=("out_dim", "dtype", "interpret"))
def product(
    codes_RK: jax.Array,
    scales_Rk: jax.Array,
    w_codes_EOI: jax.Array,
    w_scales_Eoi: jax.Array,
    group_sizes_E: jax.Array,
    *,
    out_dim: int,
    dtype: jnp.dtype,
    interpret: bool = False,
) -> jax.Array:
    """x_r w_e^T (`out_dim` 1) or x_r w_e (`out_dim` 2) for the rows r of each group e, of FP8 x and w.

    R, O and I are multiples of 128.

    Args:
      codes_RK: float8_e4m3fn.  scales_Rk: float32, one for each row's 128 elements.
      w_codes_EOI: float8_e4m3fn.  w_scales_Eoi: float32, one for each 128 x 128 block.
      group_sizes_E: int32 rows of each group, multiples of 128.
    Returns:
      [R, N] as `dtype`, summed in float32; rows past the last group are zero.
    """
    (rows, inner), outputs = codes_RK.shape, w_codes_EOI.shape[out_dim]
    assert rows % BLOCK == inner % BLOCK == outputs % BLOCK == 0, (rows, inner, outputs)
    ends_E = jnp.cumsum(group_sizes_E.astype(jnp.int32)) // BLOCK
    groups_J = (jnp.arange(rows // BLOCK, dtype=jnp.int32)[:, None] >= ends_E).sum(1, jnp.int32)
    kernel, out = partial(_product_kernel, out_dim=out_dim), jax.ShapeDtypeStruct((rows, outputs), dtype)
    args = (groups_J, codes_RK, scales_Rk.T, w_codes_EOI, w_scales_Eoi)
    grid = (rows // BLOCK * (outputs // BLOCK),)
    return call(kernel, grid, [out], *args, name="gpu_fp8_product", effort=EFFORT, interpret=interpret)[0]


def _gradient_kernel(starts_F: Any, g_RO: Any, g_scales_rO: Any, x_RI: Any, x_scales_rI: Any, out_EOI: Any):
    """A block of a group's gradient: the group's blocks of rows one after another."""
    o, i = (_block(pl.program_id(1 - dim), a.shape[1]) for dim, a in enumerate((g_RO, x_RI)))
    group = pl.program_id(2)
    first = starts_F[group]

    def add(step, sum_oi):
        block = first + step
        r = _block(block, g_RO.shape[0])
        part = dot_codes(load(g_RO, r, o), load(x_RI, r, i), (0, 0))
        return add_scaled(sum_oi, part, load(g_scales_rO, block, o), load(x_scales_rI, block, i)[None, :])

    zeros = jnp.zeros((BLOCK, BLOCK), jnp.float32)
    store(out_EOI, jax.lax.fori_loop(0, starts_F[group + 1] - first, add, zeros), group, o, i)


@partial(jax.jit, static_argnames=("interpret",))
def weight_gradient(
    g_codes_RO: jax.Array,
    g_scales_rO: jax.Array,
    x_codes_RI: jax.Array,
    x_scales_rI: jax.Array,
    group_sizes_E: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """The sum of g_r x_r^T over the rows r of each group, of FP8 g and x.

    Args:
      g_codes_RO, x_codes_RI: float8_e4m3fn; R, O and I are multiples of 128.
      g_scales_rO, x_scales_rI: float32, one for each column's 128 rows.
      group_sizes_E: int32 rows of each group, multiples of 128.
    Returns:
      float32 [E, O, I]; 0 for an empty group. Rows past the last group are never read.
    """
    (rows, outputs), inputs, groups = g_codes_RO.shape, x_codes_RI.shape[1], group_sizes_E.size
    assert rows % BLOCK == inputs % BLOCK == outputs % BLOCK == 0, (rows, inputs, outputs)
    starts_F = jnp.pad(jnp.cumsum(group_sizes_E.astype(jnp.int32)) // BLOCK, (1, 0))  # in blocks; F = E + 1
    out = jax.ShapeDtypeStruct((groups, outputs, inputs), jnp.float32)
    args = (starts_F, g_codes_RO, g_scales_rO, x_codes_RI, x_scales_rI)
    grid = (inputs // BLOCK, outputs // BLOCK, groups)
    return call(_gradient_kernel, grid, [out], *args, name="gpu_fp8_gradient", effort=EFFORT, interpret=interpret)[0]


def _rows_kernel(groups_J: Any, first_1: Any, x_RI: Any, codes_GOI: Any, scales_Eoi: Any, y_RO: Any, *, rows: int):
    """A tile of rows of one group times a block of its weight, which is widened exactly once it is here."""
    (room, inner), outputs = x_RI.shape, y_RO.shape[1]
    j, o_block = pl.program_id(0) // (outputs // BLOCK), pl.program_id(0) % (outputs // BLOCK)
    r = Span(j * rows, max(rows, SMALLEST), room if rows >= SMALLEST else (j + 1) * rows)
    o, group = _block(o_block, outputs), groups_J[j]

    def add(step, sum_ro):
        i = _block(step, inner)
        x_ri = load(x_RI, r, i)
        codes_oi = load(codes_GOI, first_1[0] + group, o, i).astype(x_ri.dtype)
        return sum_ro + dot(x_ri, codes_oi, ((1,), (1,))) * load(scales_Eoi, group, o_block, step)

    steps = (group < scales_Eoi.shape[0]).astype(jnp.int32) * (inner // BLOCK)
    store(y_RO, jax.lax.fori_loop(0, steps, add, jnp.zeros((r.size, BLOCK), jnp.float32)), r, o)


@partial(jax.jit, static_argnames=("rows", "interpret"))
def rows_product(
    x_RI: jax.Array,
    codes_GOI: jax.Array,
    scales_Eoi: jax.Array,
    first: jax.Array | int,
    groups_J: jax.Array,
    *,
    rows: int,
    interpret: bool = False,
) -> jax.Array:
    """x_r w_e^T for rows that are not quantised, in x's dtype, of weights whose codes alone are read. I and O are
    multiples of 128.

    Args:
      codes_GOI: of more groups than these, which begin at `first`.  scales_Eoi: of these groups' blocks.
      groups_J: int32, the group of each tile of `rows` rows (see `gpu_grouped.row_tile`); E for none, whose rows become
        zero.
    """
    (room, inner), outputs = x_RI.shape, codes_GOI.shape[1]
    assert inner % BLOCK == outputs % BLOCK == 0, (inner, outputs)
    out = jax.ShapeDtypeStruct((room, outputs), x_RI.dtype)
    args = (groups_J, jnp.asarray(first, jnp.int32).reshape(1), x_RI, codes_GOI, scales_Eoi)
    grid = (room // rows * (outputs // BLOCK),)
    kernel, effort = partial(_rows_kernel, rows=rows), Effort(warps=4, stages=3)
    return call(kernel, grid, [out], *args, name="gpu_fp8_rows", effort=effort, interpret=interpret)[0]


def _rows_cost(call: work.KernelCall) -> work.Cost:
    """The expected rows, and the codes and scales of the experts that have some."""
    x, codes, scales = [a for a in call.operands if a.ndim >= 2]
    [y], rows, read = call.results, call.rows(x.shape[0]), min(call.experts_read, scales.shape[0])
    moved = rows / x.shape[0] * (work.size_of(x) + work.size_of(y))
    moved += read * (work.size_of(codes) / codes.shape[0] + work.size_of(scales) / scales.shape[0])
    return work.Cost({x.dtype.name: 2.0 * rows * codes.shape[1] * codes.shape[2]}, moved)


def _tile_kernel(x_RC: Any, codes_RC: Any, scales: Any, *, dim: int, floor: float, sides: tuple[int, int]):
    """Tiles of 128 along `dim`; a scale for each of the other dim's elements."""
    at = [Span(pl.program_id(d) * side, side, x_RC.shape[d]) for d, side in enumerate(sides)]
    x = load(x_RC, *at).astype(jnp.float32)
    scale = scales_of(jnp.abs(x).max(dim), floor)
    store(codes_RC, codes_of(x, jnp.expand_dims(scale, dim)), *at)
    store(scales, scale, pl.program_id(dim), at[1 - dim])


@partial(jax.jit, static_argnames=("dim", "floor", "interpret"))
def quantise(x_RC: jax.Array, dim: int, floor: float, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """float8_e4m3fn [R, C] and float32 scales [R, C / 128] (`dim` 1) or [R / 128, C] (`dim` 0) of tiles of 128 along
    `dim`, as `kernels.blockwise.quantise_tiles` has them. R and C are multiples of 128.

    XLA would read x twice, once for the scales and once for the codes.
    """
    rows, columns = x_RC.shape
    assert rows % BLOCK == columns % BLOCK == 0, x_RC.shape
    sides = (tile(rows, 64), BLOCK) if dim == 1 else (BLOCK, tile(columns, 64))
    codes = jax.ShapeDtypeStruct(x_RC.shape, jnp.float8_e4m3fn)
    scales = jax.ShapeDtypeStruct((x_RC.shape[dim] // BLOCK, x_RC.shape[1 - dim]), jnp.float32)
    kernel = partial(_tile_kernel, dim=dim, floor=floor, sides=sides)
    grid = tuple(tiles(size, side) for size, side in zip(x_RC.shape, sides, strict=True))
    effort = Effort(warps=4, stages=1)
    codes, scales = call(
        kernel, grid, [codes, scales], x_RC, name="gpu_fp8_quantise", effort=effort, interpret=interpret
    )
    return codes, scales.T if dim == 1 else scales


work.register("gpu_fp8_product|gpu_fp8_gradient", partial(work.grouped, rows_first=True))
work.register("gpu_fp8_rows", _rows_cost)
work.register("gpu_fp8_quantise", lambda call: work.Cost({}))
