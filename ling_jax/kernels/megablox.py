"""The grouped matrix product kernels that JAX ships for TPU, as `kernels.grouped` needs them.

Legend: R rows, E groups, I inputs, O outputs.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from ling_jax.kernels import work
from ling_jax.kernels.precision import kernel_precision

ROWS = (512, 256, 128)
# The kernels count tiles with a float32 histogram, whose edges stop being exact near 2**12 tiles (on CPU 3485 fail).
MOST_TILES = 1024


def _tile(dim: int, most: int) -> int:
    """All of `dim`, or the largest multiple of 128 up to `most` that divides it, or `most` with a masked tail."""
    if dim <= most:
        return dim
    return next((size for size in range(most, 0, -128) if dim % size == 0), most)


def tiles(rows: int, groups: int, inner: int, outputs: int, itemsize: int) -> tuple[int, int, int]:
    """(rows, contracted, outputs) that one step of the product of [rows, inner] with [groups, inner, outputs] takes.

    Rows: the most that divide them, since a remainder would need a padded copy, but at most an eighth of the mean
    group, since a tile that two groups share is computed for both. Contracted: whole up to 4 KiB, so that consecutive
    tiles of a group meet a weight that has stayed in VMEM. Outputs: 512 (bfloat16), so that a step does 256 FLOPs or
    more for each byte it reads (a v5p's balance is 166) and all its buffers, twice, stay below 12 MiB of VMEM. Tiles of
    more than 512 rows, of buffers for a million, take less of the others.
    """
    tile, more = _row_tile(rows, groups), _row_tile(rows, groups) // ROWS[0]
    return tile, _tile(inner, 4096 // max(more, 1) // itemsize), _tile(outputs, 1024 // max(more // 2, 1) // itemsize)


def weight_tiles(rows: int, groups: int, outputs: int, inputs: int, itemsize: int) -> tuple[int, int, int]:
    """(rows, outputs, inputs) of one step of the weight gradient, where rows are contracted. Its sum and its result
    are float32: 512 x 1024 of them, the result twice, take 6 MiB."""
    tile, more = _row_tile(rows, groups), _row_tile(rows, groups) // (2 * ROWS[0])
    return tile, _tile(outputs, 1024 // itemsize), _tile(inputs, 2048 // max(more, 1) // itemsize)


def _row_tile(rows: int, groups: int) -> int:
    """See `tiles`; more rows where there would be more than MOST_TILES."""
    rows += -rows % ROWS[-1]
    tile = next(size for size in ROWS if rows % size == 0 and size <= max(rows // (8 * groups), ROWS[-1]))
    return tile if rows // tile <= MOST_TILES else ROWS[0] * -(-rows // (ROWS[0] * MOST_TILES))


def _fill(x_RI: jax.Array, tile: int) -> jax.Array:
    """Rows in whole tiles; no copy where they are."""
    missing = -x_RI.shape[0] % tile
    return jnp.pad(x_RI, ((0, missing), (0, 0))) if missing else x_RI


def product(x_RI: jax.Array, w_EOI: jax.Array, group_sizes_E: jax.Array, *, out_dim: int, interpret: bool) -> jax.Array:
    """x_r w_e^T (`out_dim` 1) or x_r w_e (`out_dim` 2) in x's dtype; what lies past the last group is unspecified."""
    w = w_EOI.astype(x_RI.dtype)
    tiling = tiles(x_RI.shape[0], w.shape[0], w.shape[3 - out_dim], w.shape[out_dim], w.dtype.itemsize)
    x = _fill(x_RI, tiling[0])
    with kernel_precision(x.dtype):
        y = gmm(
            x, w, group_sizes_E, x.dtype, tiling, transpose_rhs=out_dim == 1, interpret=interpret
        )  # accumulates in float32
    return y[: x_RI.shape[0]]


def weight_gradient(g_RO: jax.Array, x_RI: jax.Array, group_sizes_E: jax.Array, *, interpret: bool) -> jax.Array:
    """float32 [E, O, I]: sum of g_r x_r^T over each group's rows, 0 for an empty one; other rows are never read."""
    tiling = weight_tiles(x_RI.shape[0], group_sizes_E.size, g_RO.shape[1], x_RI.shape[1], x_RI.dtype.itemsize)
    g, x = _fill(g_RO, tiling[0]), _fill(x_RI, tiling[0])
    with kernel_precision(x.dtype):
        return tgmm(g.swapaxes(0, 1), x, group_sizes_E, jnp.float32, tiling, interpret=interpret)


work.register("gmm|tgmm", work.grouped)
