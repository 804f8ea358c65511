"""Adam with both moments in 8 bits: blocks of one scale and a code for each value, as in bitsandbytes (Dettmers et al.,
8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861).

A code stands for one of 256 shares of its block's largest magnitude. In each decade from 1e-6 to 1 they are the middles
of equal bins, twice as many as in the decade below. Levels number them: those of a decade with n bins are n .. 2n - 1,
so that the share is arithmetic in the level, and its level in the share, without the look-ups that a TPU is slow at.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from ling_jax.config.mesh import DIMS

BLOCK = 256  # values with one scale
SHORTEST = 32  # block, where no dim is longer: below it, the scale would cost too much
SMALLEST = 4096  # elements of a parameter (of one layer) whose moments are coded
TINY = float(np.finfo(np.float32).tiny)  # a block below it is 0: 1/scale would not be finite


class Decade(NamedTuple):
    bins: int  # and the first level
    top: float


# Signed: level = |code|; unsigned: level = code + 1. The level after the last decade's stands for 1, those before the
# first one's for 0.
SIGNED = tuple(Decade(2**i, 10.0 ** (i - 6)) for i in range(7))
UNSIGNED = tuple(Decade(2 ** (i + 1), 10.0 ** (i - 6)) for i in range(7))


class Coded(NamedTuple):
    codes: jax.Array  # int8 (signed) or uint8, of the values' shape
    scales: jax.Array  # float32, of the values' shape but for the blocked dim, which counts blocks


class Adam8State(NamedTuple):
    count: jax.Array  # int32 []
    mu: Any  # as the parameters, with a Coded, or float32 where they are not blocked, for each
    nu: Any


def block_dims(params: dict, axes: dict) -> dict:
    """`block_dim` of each parameter."""
    return jax.tree.map(lambda p, names: block_dim(p.shape[-len(names) :], names), params, axes)


def block_dim(shape: tuple[int, ...], names: tuple[str, ...]) -> int:
    """Which of a parameter's own dims blocks lie along, counted from the end; 0: its moments stay float32.

    It depends on no mesh, so that a checkpoint fits every one: longest blocks first, then dims that `config.mesh`
    never splits, then those that only `tensor` does. A block that a shard's edge cuts costs communication.
    """
    if len(names) < 2 or math.prod(shape) < SMALLEST:
        return 0

    def worth(dim: int) -> tuple[int, ...]:
        axes = DIMS[names[dim]].axes
        return min(shape[dim], BLOCK), not axes, axes == ("tensor",)

    best = max(range(-len(names), 0), key=worth)
    return best if shape[best] >= SHORTEST else 0


def moment_sharding(moment: Any, parameter: NamedSharding) -> Any:
    """A moment's arrays, with its parameter's sharding -> their own: scales are whole along dims that the parameter's
    shards would not cut evenly."""
    axes = [(part,) if isinstance(part, str) else part or () for part in parameter.spec]
    shards = [math.prod(parameter.mesh.shape[axis] for axis in dim) for dim in axes]

    def of(array: jax.Array) -> NamedSharding:
        parts = zip(parameter.spec, array.shape, shards, strict=True)
        return NamedSharding(parameter.mesh, PartitionSpec(*[None if size % n else part for part, size, n in parts]))

    return jax.tree.map(of, moment)


def decode(x: Coded, dim: int) -> jax.Array:
    """float32 blocks (as `in_blocks`), within a few units of rounding of the map's values."""
    code = in_blocks(x.codes, dim).astype(jnp.int32)
    if x.codes.dtype == jnp.uint8:
        shares = _share(code + 1, UNSIGNED)
    else:
        shares = _share(jnp.abs(code), SIGNED)
        shares = jnp.where((code < 0) & (code > -128), -shares, shares)
    return shares * jnp.expand_dims(x.scales, dim)


def encode(blocks: jax.Array, dim: int, size: int, signed: bool) -> Coded:
    """The nearest codes of `size` float32 values in blocks; zeros for a block of zeros.

    Unsigned values above 0 never become 0, as they do in bitsandbytes: on a step without a gradient (a token that is
    not in the batch) the update would be the first moment over eps, which broke embeddings.
    """
    scales = jnp.abs(blocks).max(dim, keepdims=True)
    shares = blocks * jnp.where(scales >= TINY, 1 / scales, 0)
    if signed:
        level = _level(jnp.abs(shares), SIGNED, 0.0)
        one = 2 * SIGNED[-1].bins  # of which only the positive one has a code, int8's lowest
        codes = jnp.where(shares < 0, -jnp.minimum(level, one - 1), jnp.where(level == one, -one, level))
    else:
        codes = jnp.maximum(_level(shares, UNSIGNED, 1.0) - 1, (blocks > 0).astype(jnp.float32))
    codes = codes.astype(jnp.int32).astype(jnp.int8 if signed else jnp.uint8)
    return Coded(from_blocks(codes, dim, size), scales.squeeze(dim))


def _share(level: jax.Array, decades: tuple[Decade, ...]) -> jax.Array:
    level = level.astype(jnp.float32)
    share = jnp.zeros_like(level)
    for bins, top in decades:
        share = jnp.where(level >= bins, 0.1 * top + (level - (bins - 0.5)) * (0.9 * top / bins), share)
    return jnp.where(level >= 2 * decades[-1].bins, 1.0, share)


def _level(share: jax.Array, decades: tuple[Decade, ...], zero: float) -> jax.Array:
    """As float32. A decade begins half way between its first share and the one before, its bins at a tenth of `top`."""
    level = jnp.full_like(share, zero)
    before = 0.0
    for bins, top in decades:
        width = 0.9 * top / bins
        found = jnp.minimum(jnp.floor(share * (1 / width) + bins * (8 / 9)), 2 * bins - 1)
        level = jnp.where(share >= (before + 0.1 * top + width / 2) / 2, found, level)
        before = top - width / 2
    return jnp.where(share >= (before + 1) / 2, 2.0 * decades[-1].bins, level)


def in_blocks(x: jax.Array, dim: int) -> jax.Array:
    """[..., n, ...] -> [..., blocks, BLOCK, ...], zeros after a last block that is not full."""
    block, place = min(BLOCK, x.shape[dim]), x.ndim + dim
    if missing := -x.shape[dim] % block:
        x = jnp.pad(x, [(0, missing * (i == place)) for i in range(x.ndim)])
    return x.reshape(*x.shape[:place], -1, block, *x.shape[place + 1 :])


def from_blocks(blocks: jax.Array, dim: int, size: int) -> jax.Array:
    """The inverse of `in_blocks`, for `size` values."""
    place = blocks.ndim + dim - 1
    merged = blocks.reshape(*blocks.shape[:place], -1, *blocks.shape[place + 2 :])
    return jax.lax.slice_in_dim(merged, 0, size, axis=place) if size != merged.shape[place] else merged


def scale_by_adam_8bit(b1: float, b2: float, eps: float, blocks: dict) -> optax.GradientTransformation:
    """`optax.scale_by_adam` of float32 gradients with `Coded` moments; `blocks` are the parameters' `block_dims`.

    An update is made from the new moments before they are coded, and only they are kept coded.
    """

    def init(params: Any) -> Adam8State:
        leaves, tree = jax.tree.flatten(params)
        # Optax finds the moments in a state by calling this with a placeholder that has no leaves.
        pairs = list(zip(leaves, jax.tree.leaves(blocks), strict=bool(leaves)))
        mu = tree.unflatten([_zeros(p, dim, signed=True) for p, dim in pairs])
        nu = tree.unflatten([_zeros(p, dim, signed=False) for p, dim in pairs])
        return Adam8State(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count: Any = optax.safe_increment(state.count)

        def adam(g: jax.Array, mu: jax.Array, nu: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            m, v = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g**2
            return m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps), m, v

        def step(g: jax.Array, mu: Any, nu: Any, dim: int) -> tuple[jax.Array, Any, Any]:
            if not dim:
                return adam(g, mu, nu)
            size = g.shape[dim]
            update, m, v = adam(in_blocks(g, dim), decode(mu, dim), decode(nu, dim))
            return from_blocks(update, dim, size), encode(m, dim, size, True), encode(v, dim, size, False)

        leaves, tree = jax.tree.flatten(updates)
        moments = (tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu))
        steps = [step(*each) for each in zip(leaves, *moments, jax.tree.leaves(blocks), strict=True)]
        new, mu, nu = (tree.unflatten(each) for each in zip(*steps, strict=True))
        return new, Adam8State(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _zeros(p: jax.Array, dim: int, signed: bool) -> Any:
    if not dim:
        return jnp.zeros(p.shape, jnp.float32)
    place = p.ndim + dim
    scales = (*p.shape[:place], -(-p.shape[place] // BLOCK), *p.shape[place + 1 :])
    return Coded(jnp.zeros(p.shape, jnp.int8 if signed else jnp.uint8), jnp.zeros(scales, jnp.float32))
