"""FP8 blocks of weights that are split over the mesh: those of the whole weight, whatever the split."""

from math import gcd

import jax
import jax.numpy as jnp

from ling_jax.config.mesh import DIMS, Split
from ling_jax.kernels.blockwise import deviation
from ling_jax.kernels.fp8 import BLOCK, FLOOR, FP8Weight, block_max, codes_of, each, scales_of
from ling_jax.parallel.mesh import all_gather, axis_index, axis_size


def _stored(names: tuple[str, ...], split: Split) -> list[tuple[str, ...]]:
    """The axes that each dim is split over only to be stored."""
    return [axes if DIMS[name].stored else () for name, axes in zip(names, split, strict=True)]


def quantise_shard(w: jax.Array, names: tuple[str, ...], split: Split) -> FP8Weight:
    """This device's codes, and the scales of all blocks, but for dims that products are split over.

    A block that spans shards has the greatest magnitude of all of them.

    Args:
      w: a shard [..., O, I], perhaps of a stack; dims that products are split over are multiples of 128.
      names, split: of the last dims, as `parallel.rules.gather` takes them.
    """
    scales, mine = _scales(w, names, split)
    return FP8Weight(codes_of(w, mine), scales)


def watch_shard(w: jax.Array, names: tuple[str, ...], split: Split) -> jax.Array:
    """`kernels.blockwise.deviation` of this device's part from its codes, for each layer of a stack."""
    mine = _scales(w, names, split)[1]
    return deviation(w, codes_of(w, mine).astype(jnp.float32) * mine, w.ndim - len(names))


def _scales(w: jax.Array, names: tuple[str, ...], split: Split) -> tuple[jax.Array, jax.Array]:
    """Scales of all blocks, and the scale of each element this device holds."""
    amax, axes_of = jnp.abs(w.astype(jnp.float32)), _stored(names, split)
    # Units of a shard first, of both dims: what is gathered is no larger than scales are.
    units = {dim: gcd(BLOCK, w.shape[dim]) if axis_size(*axes_of[dim]) > 1 else BLOCK for dim in (-2, -1)}
    for dim, unit in units.items():
        amax = block_max(amax, dim, unit)
    for dim, unit in units.items():
        for axis in reversed(axes_of[dim]):
            amax = all_gather(amax, axis, dim)
        amax = block_max(amax, dim, BLOCK // unit)
    scales = mine = scales_of(amax, FLOOR)
    for dim in (-2, -1):
        mine = _mine(mine, dim, w.shape[dim], units[dim], axes_of[dim])
    return scales, mine


def _mine(scales: jax.Array, dim: int, size: int, unit: int, axes: tuple[str, ...]) -> jax.Array:
    """Each element's scale along `dim` of this device's part."""
    if axis_size(*axes) == 1:
        return each(scales, dim, size)
    units = jnp.repeat(scales, BLOCK // unit, axis=dim)
    here = jax.lax.dynamic_slice_in_dim(units, axis_index(*axes) * (size // unit), size // unit, dim % scales.ndim)
    return jnp.repeat(here, unit, axis=dim)
