"""Grouped products on GPU: each program takes a block of rows of one group and a tile of that group's weight. Groups
are whole blocks, so no tile has rows of two; one of fewer than 16 rows is filled up.

Legend: R rows, E groups, I inputs, O outputs, K the dim summed over, N the other of I and O, J tiles of rows.
Lower case r, o, i, k, n: their tiles.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ling_jax.kernels import work
from ling_jax.kernels.gpu_tiles import SMALLEST, Effort, Span, call, load, store, tile, tiles
from ling_jax.kernels.precision import dot

MOST_ROWS = 128
# 96 KiB of shared memory at most: three stages of x and w in bfloat16, each 128 x 64. float32 products are no matrix
# unit's, so that smaller tiles lose nothing.
OUTPUTS = {2: 128, 4: 64}  # by itemsize
SUMMED = {2: 64, 4: 32}


def row_tile(block: int) -> int:
    """Rows that a program takes of groups in whole blocks of `block`."""
    return min(block & -block, MOST_ROWS)


def add_product(sum_rn: jax.Array, x_rk: jax.Array, w: jax.Array, out_dim: int) -> jax.Array:
    """`sum_rn` and x w^T (`out_dim` 1, w [n, k]) or x w (`out_dim` 2, w [k, n])."""
    return sum_rn + dot(x_rk, w, ((1,), (2 - out_dim,)))


def add_gradient(sum_oi: jax.Array, g_ro: jax.Array, x_ri: jax.Array) -> jax.Array:
    return sum_oi + dot(g_ro, x_ri, ((0,), (0,)))


def _product_kernel(groups_J: Any, x_RK: Any, w_EOI: Any, y_RN: Any, *, out_dim: int, rows: int, sides: Any):
    """Programs of one tile of rows are neighbours, so that it is read from HBM once; the group's weight, which more
    tiles of rows need, stays in L2."""
    (n_side, k_side), (groups, *_) = sides, w_EOI.shape
    n_tiles, k_tiles = tiles(y_RN.shape[1], n_side), tiles(x_RK.shape[1], k_side)
    j = pl.program_id(0) // n_tiles
    n = Span((pl.program_id(0) % n_tiles) * n_side, n_side, y_RN.shape[1])
    r = Span(j * rows, max(rows, SMALLEST), x_RK.shape[0] if rows >= SMALLEST else (j + 1) * rows)
    group = groups_J[j]

    def add(step, sum_rn):
        k = Span(step * k_side, k_side, x_RK.shape[1])
        w = load(w_EOI, group, *((n, k) if out_dim == 1 else (k, n)))
        return add_product(sum_rn, load(x_RK, r, k), w, out_dim)

    steps = (group < groups).astype(jnp.int32) * k_tiles  # past the last group nothing is read
    store(y_RN, jax.lax.fori_loop(0, steps, add, jnp.zeros((r.size, n_side), jnp.float32)), r, n)


@partial(jax.jit, static_argnames=("rows", "out_dim", "interpret"))
def product(
    x_RK: jax.Array, w_EOI: jax.Array, groups_J: jax.Array, *, rows: int, out_dim: int, interpret: bool
) -> jax.Array:
    """x_r w_e^T (`out_dim` 1) or x_r w_e (`out_dim` 2) in x's dtype, accumulated in float32.

    jit only keeps what was traced: the same shapes come back with every layer and every pass.

    Args:
      w_EOI: in x's dtype.
      groups_J: int32, the group of each tile of `rows` rows (a `row_tile`); E for none, whose rows become zero.
    """
    (num_rows, inner), outputs, itemsize = x_RK.shape, w_EOI.shape[out_dim], x_RK.dtype.itemsize
    sides = tile(outputs, OUTPUTS[itemsize]), tile(inner, SUMMED[itemsize])
    kernel = partial(_product_kernel, out_dim=out_dim, rows=rows, sides=sides)
    grid = (num_rows // rows * tiles(outputs, sides[0]),)
    out = jax.ShapeDtypeStruct((num_rows, outputs), x_RK.dtype)
    effort = Effort(warps=8 if rows == MOST_ROWS else 4, stages=3)
    args = (groups_J, x_RK, w_EOI)
    return call(kernel, grid, [out], *args, name="gpu_grouped_product", effort=effort, interpret=interpret)[0]


def _gradient_kernel(starts_F: Any, g_RO: Any, x_RI: Any, out_EOI: Any, *, rows: int, sides: Any, whole: bool):
    """Steps of `rows` rows through a group, which is a whole number of them or ends inside the last."""
    (o_side, i_side), group = sides, pl.program_id(2)
    o = Span(pl.program_id(1) * o_side, o_side, g_RO.shape[1])
    i = Span(pl.program_id(0) * i_side, i_side, x_RI.shape[1])
    first, end = starts_F[group], starts_F[group + 1]

    def add(step, sum_oi):
        r = Span(first + step * rows, rows, x_RI.shape[0] if whole else end)
        return add_gradient(sum_oi, load(g_RO, r, o), load(x_RI, r, i))

    zeros = jnp.zeros((o_side, i_side), jnp.float32)
    store(out_EOI, jax.lax.fori_loop(0, tiles(end - first, rows), add, zeros), group, o, i)


@partial(jax.jit, static_argnames=("block", "interpret"))
def weight_gradient(
    g_RO: jax.Array, x_RI: jax.Array, group_sizes_E: jax.Array, *, block: int, interpret: bool
) -> jax.Array:
    """float32 [E, O, I]: the sum of g_r x_r^T over each group's rows, 0 for an empty one; other rows are never read.

    Args:
      x_RI: in g's dtype.
      group_sizes_E: int32, multiples of `block`.
    """
    itemsize, groups = x_RI.dtype.itemsize, group_sizes_E.size
    rows, most = max(min(row_tile(block), SUMMED[itemsize]), SMALLEST), OUTPUTS[itemsize]
    (outputs, inputs), sides = (g_RO.shape[1], x_RI.shape[1]), (tile(g_RO.shape[1], most), tile(x_RI.shape[1], most))
    starts_F = jnp.pad(jnp.cumsum(group_sizes_E.astype(jnp.int32)), (1, 0))  # F = E + 1
    kernel = partial(_gradient_kernel, rows=rows, sides=sides, whole=block % rows == 0)
    grid = (tiles(inputs, sides[1]), tiles(outputs, sides[0]), groups)
    out = jax.ShapeDtypeStruct((groups, outputs, inputs), jnp.float32)
    effort = Effort(warps=8 if itemsize == 2 else 4, stages=3)
    args = (starts_F, g_RO, x_RI)
    return call(kernel, grid, [out], *args, name="gpu_grouped_gradient", effort=effort, interpret=interpret)[0]


work.register("gpu_grouped_product|gpu_grouped_gradient", partial(work.grouped, rows_first=True))
