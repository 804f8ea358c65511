"""Parameters in bfloat16: how an update smaller than half their last place still moves them.

Rounded to the nearest, a weight that is to change by less than 1/512 of itself stays as it is, step after step. Rounded
up with the probability of what is cut off (stochastic rounding; Gupta et al., arXiv 1502.02551), it moves by the update
in the mean. The random bits are a hash of where and when they are used, so they depend on no mesh, thread or number of
devices, a resumed run draws those of one that went through, and every device makes the bits of its own shards.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

GOLDEN = np.uint32(0x9E3779B9)  # 2^32 over the golden ratio: neighbouring columns are far apart before they are mixed


def apply_updates(params: Any, updates: Any, seed: int, count: jax.Array) -> Any:
    """`params` + float32 `updates`, added in float32; a sum whose parameter is bfloat16 is rounded stochastically.

    Args:
      seed: the run's.  count: int32 [], updates done before: both choose the random bits, with the parameter's path.
    """
    key = _mix(_mix(jnp.uint32(seed % 2**32)) + count.astype(jnp.uint32))

    def apply(path: Any, p: jax.Array, update: jax.Array) -> jax.Array:
        total = p.astype(jnp.float32) + update
        if p.dtype == jnp.float32:
            return total
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return to_bfloat16(total, random_bits(p.shape, _mix(key + np.uint32(zlib.crc32(name.encode())))))

    return jax.tree_util.tree_map_with_path(apply, params, updates)


def to_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """float32 -> one of the two bfloat16 neighbours, whose mean over uint32 random `bits` is x. What bfloat16 holds
    exactly stays, and so do infinities and NaN."""
    # The upper half of a float32's bits is a bfloat16, the lower half what is cut off: a carry rounds away from zero.
    carried = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits >> 16)
    rounded = jax.lax.bitcast_convert_type(carried & np.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def random_bits(shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    """uint32 of `shape`: a hash of `key` and of each element's row (over all dims but the last) and column."""
    row: Any = np.zeros([1] * len(shape), np.uint32)
    stride = 1
    for dim in reversed(range(len(shape) - 1)):
        row = row + _count(shape, dim) * np.uint32(stride % 2**32)
        stride *= shape[dim]
    return _mix(_mix(_mix(row) ^ key) + _count(shape, len(shape) - 1) * GOLDEN)


def _count(shape: tuple[int, ...], dim: int) -> jax.Array:
    """0, 1, ... along a dim, to be broadcast over the others."""
    return jax.lax.broadcasted_iota(jnp.uint32, [size if i == dim else 1 for i, size in enumerate(shape)], dim)


def _mix(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: every bit of a uint32 changes about half of the result's."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
