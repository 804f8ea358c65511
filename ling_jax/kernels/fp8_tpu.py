"""Products of FP8 blocks and their scales on TPU, where no partial sum leaves the chip.

Every 128 terms of a sum have scales of their own, so each 128-deep product is scaled in float32 before it is added.
Left to XLA, these products would be written out: [K / 128, M, N] float32 for a result [M, N]. Operands stay E4M3 up to
the matrix unit, which takes them as they are on v7x; for v5 and v6 the compiler widens them on the way, exactly but
for NaN, which becomes 480. It refuses them for v4.

What bounds them is the vector unit, which scales twice and adds once for each 256 FLOPs. In the schedules of libtpu
0.0.52 a product takes 3.4 times the instructions of a bfloat16 one on v7x, 2.5 on v6e and 1.3 on v5; a weight gradient
4.2, 3.4 and 1.8. Nothing was run.

Legend: R rows sorted by group, E groups (experts), I inputs, O outputs, K the dim summed over, N the other of I and O.
Lower case r, i, o, k, n: its blocks of 128. J steps of a grid.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ling_jax.kernels import work
from ling_jax.kernels.fp8 import BLOCK, LARGEST

WEIGHT_TILE = 5 << 20  # bytes; the most that a step holds of a weight, of which two are in VMEM
VMEM = 32 << 20  # bytes; half of what a v5p's or v7x's core has


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    # A precision that users set as the default is for wider operands: these products are exact.
    return jax.lax.dot_general(a, b, dims, jax.lax.Precision.DEFAULT, jnp.float32)


def _divisor(size: int, most: int) -> int:
    """The largest power of two times 128 up to `most` that divides `size`."""
    return next(tile for tile in (1024, 512, 256, BLOCK) if tile <= max(most, BLOCK) and size % tile == 0)


def tiles(rows: int, groups: int, inner: int, outputs: int) -> tuple[int, int]:
    """(rows, outputs) that one step of `product` takes; it holds all of `inner`, so that consecutive row tiles of a
    group meet a weight that has stayed in VMEM.

    Rows: whole blocks, since groups are; 256 of a single group, beyond which nothing is gained. Outputs: up to 1024 in
    5 MiB of weight, which are 256 for 18432 inputs.
    """
    return _divisor(rows, 256) if groups == 1 else BLOCK, _divisor(outputs, WEIGHT_TILE // inner)


def _product_kernel(
    groups_ref: Any,
    used_ref: Any,
    x_ref: Any,
    x_scales_ref: Any,
    w_ref: Any,
    w_scales_ref: Any,
    out_ref: Any,
    *,
    out_dim: int,
):
    """A tile of rows times a tile of its group's weight."""
    del groups_ref
    blocks, rows = x_scales_ref.shape

    def add(block, total):
        inner = pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK)
        w = w_ref[0, :, inner] if out_dim == 1 else w_ref[0, inner, :]
        part = _dot(x_ref[:, inner], w, (1, 2 - out_dim))
        row_scales = x_scales_ref[pl.ds(block, 1), :].reshape(rows, 1)
        return total + part * row_scales * w_scales_ref[0, pl.ds(block, 1), :]

    @pl.when(pl.program_id(1) < used_ref[0])
    def _():
        most = min(16, (1 << 21) // out_ref.size)  # 2,500 instructions
        unroll = next(n for n in range(most, 0, -1) if blocks % n == 0)
        total = jax.lax.fori_loop(0, blocks, add, jnp.zeros(out_ref.shape, jnp.float32), unroll=unroll)
        out_ref[...] = total.astype(out_ref.dtype)


def _tile_kernel(x_ref: Any, codes_ref: Any, scales_ref: Any, *, dim: int, floor: float):
    """Tiles of 128 along `dim`, their scales along lanes: of dim 1 one row of [k, rows] for each 128 columns."""
    x = x_ref[...].astype(jnp.float32)
    scales = jnp.maximum(jnp.abs(x).max(dim, keepdims=True), floor) * jnp.float32(1 / LARGEST)
    codes_ref[...] = jnp.clip(x / scales, -LARGEST, LARGEST).astype(codes_ref.dtype)
    scales_ref[...] = scales.reshape(scales_ref.shape)


def quantise(x_RC: jax.Array, dim: int, floor: float, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """float8_e4m3fn [R, C] and float32 scales [R, C / 128] (`dim` 1) or [R / 128, C] (`dim` 0) of tiles of 128 along
    `dim`, as `kernels.blockwise.quantise_tiles` has them. R and C are multiples of 128.

    XLA would write x anew in float32, in an order of its own, before it divides.
    """
    rows, columns = x_RC.shape
    assert rows % BLOCK == columns % BLOCK == 0, x_RC.shape
    tile = (_divisor(rows, 1024), BLOCK) if dim == 1 else (BLOCK, _divisor(columns, 1024))
    many = columns // BLOCK if dim == 1 else rows // BLOCK
    shape = (many, 1, rows if dim == 1 else columns)
    at = (lambda r, c: (c, 0, r)) if dim == 1 else (lambda r, c: (r, 0, c))
    codes, scales = pl.pallas_call(
        partial(_tile_kernel, dim=dim, floor=floor),
        grid=(rows // tile[0], columns // tile[1]),
        in_specs=[pl.BlockSpec(tile, lambda r, c: (r, c))],
        out_specs=[pl.BlockSpec(tile, lambda r, c: (r, c)), pl.BlockSpec((1, 1, tile[1 - dim]), at)],
        out_shape=[jax.ShapeDtypeStruct(x_RC.shape, jnp.float8_e4m3fn), jax.ShapeDtypeStruct(shape, jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="fp8_quantise",
    )(x_RC)
    return codes, scales[:, 0].T if dim == 1 else scales[:, 0]


def _cost(rows: int, inner: int, outputs: int, moved: int) -> pl.CostEstimate:
    return pl.CostEstimate(flops=2 * rows * inner * outputs, transcendentals=0, bytes_accessed=moved)


def _nbytes(*arrays: jax.Array | jax.ShapeDtypeStruct) -> int:
    return sum(a.size * a.dtype.itemsize for a in arrays)


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
      [R, N] as `dtype`, summed in float32; rows past the last group are unspecified.
    """
    (rows, inner), groups, outputs = codes_RK.shape, w_codes_EOI.shape[0], w_codes_EOI.shape[out_dim]
    assert rows % BLOCK == inner % BLOCK == outputs % BLOCK == 0, (rows, inner, outputs)
    row_tile, tile = tiles(rows, groups, inner, outputs)
    ends_E = jnp.cumsum(group_sizes_E.astype(jnp.int32))
    used = (ends_E[-1:] + row_tile - 1) // row_tile  # tiles
    first_J = jnp.minimum(jnp.arange(rows // row_tile) * row_tile, jnp.maximum(ends_E[-1], 1) - 1)
    groups_J = jnp.minimum(jnp.searchsorted(ends_E, first_J, side="right"), groups - 1).astype(jnp.int32)
    w_scales_Ekn = w_scales_Eoi.swapaxes(1, 2) if out_dim == 1 else w_scales_Eoi
    w_scales_EkN = jnp.repeat(w_scales_Ekn, BLOCK, axis=2)  # along a vector's lanes, as outputs are

    def row(r, used):
        """Tiles past the last group read and write where the last one did: nothing is moved for them."""
        return jnp.minimum(r, jnp.maximum(used[0], 1) - 1)

    w_shape = (1, tile, inner) if out_dim == 1 else (1, inner, tile)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(outputs // tile, rows // row_tile),
        in_specs=[
            pl.BlockSpec((row_tile, inner), lambda n, r, groups, used: (row(r, used), 0)),
            pl.BlockSpec((inner // BLOCK, row_tile), lambda n, r, groups, used: (0, row(r, used))),
            pl.BlockSpec(w_shape, lambda n, r, groups, used: (groups[r], *((n, 0) if out_dim == 1 else (0, n)))),
            pl.BlockSpec((1, inner // BLOCK, tile), lambda n, r, groups, used: (groups[r], 0, n)),
        ],
        out_specs=pl.BlockSpec((row_tile, tile), lambda n, r, groups, used: (row(r, used), n)),
    )
    out = jax.ShapeDtypeStruct((rows, outputs), dtype)
    moved = outputs // tile * _nbytes(codes_RK, scales_Rk) + _nbytes(w_codes_EOI, w_scales_EkN, out)
    return pl.pallas_call(
        partial(_product_kernel, out_dim=out_dim),
        grid_spec=grid,
        out_shape=out,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM),
        cost_estimate=_cost(rows, inner, outputs, moved),
        interpret=interpret,
        name="fp8_product",
    )(groups_J, used, codes_RK, scales_Rk.T, w_codes_EOI, w_scales_EkN)


def _gradient_kernel(
    groups_ref: Any, blocks_ref: Any, g_ref: Any, g_scales_ref: Any, x_ref: Any, x_scales_ref: Any, out_ref: Any
):
    """Adds a block of rows to a tile of its group's sum, which stays in VMEM until the next group's turn."""
    step = pl.program_id(2)

    @pl.when((step == 0) | (groups_ref[step] != groups_ref[jnp.maximum(step, 1) - 1]))
    def _():
        out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)

    @pl.when(blocks_ref[step] >= 0)
    def _():
        @pl.loop(0, g_ref.shape[1] // BLOCK)
        def _(o):
            outputs = pl.ds(pl.multiple_of(o * BLOCK, BLOCK), BLOCK)
            part = _dot(g_ref[:, outputs], x_ref[...], (0, 0))
            out_ref[0, outputs, :] += part * g_scales_ref[0, :, outputs].reshape(BLOCK, 1) * x_scales_ref[0]


def _gradient_steps(group_sizes_E: jax.Array, row_blocks: int) -> tuple[jax.Array, jax.Array]:
    """The group of each step and the block of rows it adds; -1 for the one step of an empty group, whose sum must be
    zeroed too, and for steps past the last group."""
    blocks_E = group_sizes_E.astype(jnp.int32) // BLOCK
    steps_E = jnp.maximum(blocks_E, 1)
    ends_E = jnp.cumsum(steps_E)
    steps_J = jnp.arange(row_blocks + group_sizes_E.size, dtype=jnp.int32)
    groups_J = jnp.searchsorted(ends_E, steps_J, side="right").astype(jnp.int32)
    groups_J = jnp.minimum(groups_J, group_sizes_E.size - 1)
    done_J = steps_J - (ends_E - steps_E)[groups_J]
    blocks_J = (jnp.cumsum(blocks_E) - blocks_E)[groups_J] + done_J
    return groups_J, jnp.where(done_J < blocks_E[groups_J], blocks_J, -1)


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
    o_tile, i_tile = _divisor(outputs, 1024), _divisor(inputs, 1024)
    groups_J, blocks_J = _gradient_steps(group_sizes_E, rows // BLOCK)

    def block(j, blocks):
        return jnp.maximum(blocks[j], 0)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(outputs // o_tile, inputs // i_tile, groups_J.size),
        in_specs=[
            pl.BlockSpec((BLOCK, o_tile), lambda o, i, j, groups, blocks: (block(j, blocks), o)),
            pl.BlockSpec((1, 1, o_tile), lambda o, i, j, groups, blocks: (block(j, blocks), 0, o)),
            pl.BlockSpec((BLOCK, i_tile), lambda o, i, j, groups, blocks: (block(j, blocks), i)),
            pl.BlockSpec((1, 1, i_tile), lambda o, i, j, groups, blocks: (block(j, blocks), 0, i)),
        ],
        out_specs=pl.BlockSpec((1, o_tile, i_tile), lambda o, i, j, groups, blocks: (groups[j], o, i)),
    )
    out = jax.ShapeDtypeStruct((groups, outputs, inputs), jnp.float32)
    moved = inputs // i_tile * _nbytes(g_codes_RO, g_scales_rO) + outputs // o_tile * _nbytes(x_codes_RI, x_scales_rI)
    semantics = ("parallel", "parallel", "arbitrary")
    return pl.pallas_call(
        _gradient_kernel,
        grid_spec=grid,
        out_shape=out,
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM),
        cost_estimate=_cost(rows, inputs, outputs, moved + _nbytes(out)),
        interpret=interpret,
        name="fp8_weight_gradient",
    )(groups_J, blocks_J, g_codes_RO, g_scales_rO[:, None], x_codes_RI, x_scales_rI[:, None])


work.register("fp8_product|fp8_weight_gradient", partial(work.grouped, rows_first=True))
work.register("fp8_quantise", lambda call: work.Cost({}))
