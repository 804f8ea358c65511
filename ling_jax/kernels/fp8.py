"""Weights kept as FP8 blocks: half of bfloat16's bytes to hold and to read.

Legend: R rows sorted by group, E groups (experts), I inputs, O outputs, b blocks of 128 inputs.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ling_jax.config.mesh import FP8_BLOCK
from ling_jax.kernels import work
from ling_jax.kernels.precision import kernel_precision

BLOCK = FP8_BLOCK
LARGEST = 448.0  # of e4m3
FLOOR = 1e-4  # a block's greatest magnitude counts as no less (spec 3.2)
FEW = 256  # rows up to which the kernel reads codes; for more, weights are multiplied out first


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FP8Weight:
    """A weight [..., O, I]; it stands where an array would, and `astype` multiplies it out."""

    codes: jax.Array  # float8_e4m3fn [..., O, I]
    scales: jax.Array  # float32 [..., ceil(O / 128), ceil(I / 128)]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def dtype(self) -> jnp.dtype:
        return self.codes.dtype

    def astype(self, dtype: jnp.dtype) -> jax.Array:
        """Codes times their scales, in float32, then as `dtype`."""
        return (self.codes.astype(jnp.float32) * _each(self.scales, self.shape)).astype(dtype)


def _each(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return each(each(scales, -2, shape[-2]), -1, shape[-1])


def each(scales: jax.Array, dim: int, size: int) -> jax.Array:
    """Each element's scale along `dim`, which has `size`; without a gather, so that XLA can fuse it into a product's
    operand."""
    return jax.lax.slice_in_dim(jnp.repeat(scales, BLOCK, axis=dim), 0, size, axis=dim % scales.ndim)


def block_max(a: jax.Array, dim: int, block: int) -> jax.Array:
    """The greatest of each `block` elements along `dim`, fewer at its end; of what is not negative."""
    dim = dim % a.ndim
    missing = -a.shape[dim] % block
    if missing:
        a = jnp.pad(a, [(0, missing if axis == dim else 0) for axis in range(a.ndim)])
    return a.reshape(*a.shape[:dim], a.shape[dim] // block, block, *a.shape[dim + 1 :]).max(dim + 1)


def scales_of(amax: jax.Array, floor: float) -> jax.Array:
    """amax / 448, which XLA would not compute as others do, so as a product (it makes one of it)."""
    return jnp.maximum(amax, floor) * jnp.float32(1 / LARGEST)


def codes_of(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / scale as e4m3; XLA makes NaN of what rounding has put past its largest."""
    return jnp.clip(x.astype(jnp.float32) / scale, -LARGEST, LARGEST).astype(jnp.float8_e4m3fn)


def quantise_weight(w: jax.Array) -> FP8Weight:
    """By blocks of 128 x 128, smaller at the edges: scale = max(amax, 1e-4) / 448, code = w / scale (spec 3.2)."""
    amax = block_max(block_max(jnp.abs(w.astype(jnp.float32)), -2, BLOCK), -1, BLOCK)
    scales = scales_of(amax, FLOOR)
    return FP8Weight(codes_of(w, _each(scales, w.shape)), scales)


def _kernel(codes_of_ref: Any, scales_of_ref: Any, x_ref: Any, codes_ref: Any, scales_ref: Any, out_ref: Any):
    """One row times a tile of its group's weight."""
    del codes_of_ref, scales_of_ref
    total = jnp.zeros((1, out_ref.shape[-1]), jnp.float32)
    for block in range(scales_ref.shape[1]):
        inputs = pl.ds(block * BLOCK, BLOCK)
        x, codes = x_ref[0, :, inputs], codes_ref[0, :, inputs].astype(x_ref.dtype)  # exact
        part = jax.lax.dot_general(x, codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        total += part * scales_ref[0, block, :][None, :]
    out_ref[0] = total.astype(out_ref.dtype)


def rows_product(
    x_RI: jax.Array,
    codes_GOI: jax.Array,
    scales_Eob: jax.Array,
    first: jax.Array | int,
    group_sizes_E: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """x_r w_e^T for a few rows r of each group e, in x's dtype; for TPU.

    A group's codes are read once, as they are, and multiplied by their scales on the chip; nothing of other groups is.
    Rows past the last group are unspecified. I and O are multiples of 128.

    Args:
      codes_GOI: of more groups than these, which begin at `first`.  scales_Eob: of these groups' blocks.
    """
    rows, inputs = x_RI.shape
    outputs = codes_GOI.shape[1]
    ends_E = jnp.cumsum(group_sizes_E)
    last = jnp.maximum(ends_E[-1], 1) - 1
    groups_R = jnp.searchsorted(ends_E, jnp.minimum(jnp.arange(rows), last), side="right").astype(jnp.int32)
    groups_R = jnp.minimum(groups_R, group_sizes_E.size - 1)  # where there are no rows at all
    tile = next(size for size in (512, 256, BLOCK) if outputs % size == 0)
    scales_EbO = jnp.repeat(scales_Eob.swapaxes(1, 2), BLOCK, axis=2)  # along a vector's lanes, as outputs are
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(outputs // tile, rows),
        in_specs=[
            pl.BlockSpec((1, 1, inputs), lambda o, r, codes, scales: (r, 0, 0)),
            pl.BlockSpec((1, tile, inputs), lambda o, r, codes, scales: (codes[r], o, 0)),
            pl.BlockSpec((1, inputs // BLOCK, tile), lambda o, r, codes, scales: (scales[r], 0, o)),
        ],
        out_specs=pl.BlockSpec((1, 1, tile), lambda o, r, codes, scales: (r, 0, o)),
    )
    out = jax.ShapeDtypeStruct((rows, 1, outputs), x_RI.dtype)
    call = pl.pallas_call(_kernel, grid_spec=grid, out_shape=out, interpret=interpret, name="fp8_rows")
    with kernel_precision(x_RI.dtype):
        return call(groups_R + first, groups_R, x_RI[:, None], codes_GOI, scales_EbO)[:, 0]


work.register("fp8_rows", work.grouped)
