"""Blockwise FP8 products equal the rule written out in numpy, bit for bit where it is one of values and scales.

Legend: R rows sorted by group, E groups, I inputs, O outputs.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ling_jax.config import MeshConfig
from ling_jax.config.mesh import DIMS, split_of
from ling_jax.kernels import blockwise
from ling_jax.kernels.blockwise import Tiles, quantise_tiles
from ling_jax.kernels.fp8 import FP8Weight, quantise_weight
from ling_jax.kernels.rows import plan_rows
from ling_jax.kernels.swiglu import routed_swiglu
from ling_jax.kernels.weight import MasterWeight
from ling_jax.parallel.mesh import make_mesh, manual
from ling_jax.parallel.quantise import quantise_shard
from ling_jax.parallel.rules import spec_of
from tests.support.helpers import assert_close, assert_gradient_close, jit

ON_CPU = ("multiplied_out", "loop", "pallas", "triton")


def normal(seed: int, *shape: int, spread: float = 0.0) -> np.ndarray:
    """Normal; with a spread, of magnitudes that differ by powers of e."""
    rng = np.random.default_rng([seed, *shape])
    return (rng.normal(size=shape) * np.exp(spread * rng.normal(size=shape))).astype(np.float32)


def codes_and_scales(x: np.ndarray, blocks: tuple[int, ...], floor: float) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 codes and float32 scales of blocks of a matrix: amax times float32(1 / 448), values clipped to 448."""
    scales = np.zeros([-(-size // block) for size, block in zip(x.shape, blocks, strict=True)], np.float32)
    codes = np.zeros(x.shape, ml_dtypes.float8_e4m3fn)
    for at in np.ndindex(*scales.shape):
        place = tuple(slice(i * block, (i + 1) * block) for i, block in zip(at, blocks, strict=True))
        scales[at] = np.maximum(np.abs(x[place]).max(), np.float32(floor)) * np.float32(1 / 448)
        codes[place] = np.clip(x[place] / scales[at], -448, 448).astype(codes.dtype)
    return codes, scales


def values(x: np.ndarray, blocks: tuple[int, ...], floor: float = blockwise.TINY) -> np.ndarray:
    """float64: what the quantised matrix stands for."""
    codes, scales = codes_and_scales(x, blocks, floor)
    for dim, block in enumerate(blocks):
        scales = np.repeat(scales, block, dim).take(np.arange(x.shape[dim]), dim)
    return codes.astype(np.float64) * scales


def same_bits(got, want) -> None:
    np.testing.assert_array_equal(np.asarray(got).view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize("shape", [(128, 256), (200, 300), (3, 5), (129, 1)])
def test_tiles_and_blocks_are_the_rules_bit_for_bit(shape):
    x = normal(0, *shape, spread=4.0)
    x[:, :1] = 0
    for dim, blocks in ((0, (128, 1)), (1, (1, 128))):
        tiles = jit(quantise_tiles, static_argnums=1)(x, dim)
        codes, scales = codes_and_scales(x, blocks, blockwise.TINY)
        same_bits(tiles.codes, codes)
        np.testing.assert_array_equal(tiles.scales, scales)
        np.testing.assert_array_equal(tiles.multiplied_out(), values(x, blocks).astype(np.float32))
        for name in ("pallas", "triton"):
            kernel = jit(quantise_tiles, static_argnums=(1, 2))(x, dim, name)
            same_bits(kernel.codes, codes)
            np.testing.assert_array_equal(kernel.scales, scales)
    weight, (codes, scales) = jit(quantise_weight)(x), codes_and_scales(x, (128, 128), 1e-4)
    same_bits(weight.codes, codes)
    np.testing.assert_array_equal(weight.scales, scales)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-25, 3e38])
def test_no_magnitude_becomes_nan(value):
    x = np.full((2, 130), value, np.float32)
    got = np.asarray(jit(quantise_tiles, static_argnums=1)(x, 1).multiplied_out(), np.float64)
    assert np.isfinite(got).all() and (value < 1e-37 or np.abs(got / value - 1).max() < 1e-6)


def test_what_is_not_finite_stays_so():
    x = np.ones((2, 130), np.float32)
    x[0, 3], x[1, 129] = np.nan, np.inf
    got = np.asarray(jit(quantise_tiles, static_argnums=1)(x, 1).multiplied_out())
    assert not np.isfinite(got[0, 3]) and not np.isfinite(got[1, 129]) and (got[1, :128] == 1).all()


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("shape", [(256, 128, 384), (200, 300, 130)])
def test_products_of_a_linear_layer_equal_the_rule(shape, implementation):
    rows, inputs, outputs = shape
    x, g, w = (normal(i, *s, spread=1.0) for i, s in enumerate([(rows, inputs), (rows, outputs), (outputs, inputs)]))
    weight, w_values = jit(quantise_weight)(w), values(w, (128, 128), 1e-4)

    @jit
    def run(x, g, weight):
        return (
            blockwise.product(quantise_tiles(x, 1), weight, None, 1, x.dtype, implementation),
            blockwise.product(quantise_tiles(g, 1), weight, None, 2, x.dtype, implementation),
            blockwise.weight_gradient(quantise_tiles(g, 0), quantise_tiles(x, 0), None, implementation),
        )

    y, dx, dw = run(x, g, weight)
    assert_gradient_close(y, values(x, (1, 128)) @ w_values.T, 2e-6)
    assert_gradient_close(dx, values(g, (1, 128)) @ w_values, 2e-6)
    assert_gradient_close(dw, values(g, (128, 1)).T @ values(x, (128, 1)), 2e-6)


def test_a_linear_layers_gradients_are_those_of_the_rule():
    x, w, g = normal(0, 5, 40, 300), normal(1, 200, 300), normal(2, 5, 40, 200, spread=2.0)
    weight = MasterWeight(jnp.asarray(w), jit(quantise_weight)(w))
    y, pull = jax.vjp(lambda x, w: w.linear(x), jnp.asarray(x), weight)
    dx, dw = pull(jnp.asarray(g))
    rows, g_rows = x.reshape(200, 300), g.reshape(200, 200)
    assert_close(y.reshape(200, 200), values(rows, (1, 128)) @ values(w, (128, 128)).T)
    assert_gradient_close(dx.reshape(200, 300), values(g_rows, (1, 128)) @ values(w, (128, 128)), 2e-6)
    assert_gradient_close(dw.master, values(g_rows, (128, 1)).T @ values(rows, (128, 1)), 2e-6)


def test_bfloat16_goes_in_and_comes_out():
    x, w = normal(0, 64, 256), normal(1, 128, 256)
    weight = MasterWeight(jnp.asarray(w), jit(quantise_weight)(w))
    x = jnp.asarray(x, jnp.bfloat16)
    y, pull = jax.vjp(lambda x, w: w.linear(x), x, weight)
    dx, dw = pull(y)
    assert (y.dtype, dx.dtype, dw.master.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    want = values(np.asarray(x, np.float32), (1, 128)) @ values(w, (128, 128)).T
    assert_close(y.astype(jnp.float32), want, 2**-8)


LAYOUTS = {
    "even": (128, 128, 128),
    "hostile": (0, 384, 0, 128, 0),
    "less than there is": (128, 0, 128),
    "one": (512,),
    "nothing": (0, 0),
}


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_products_equal_those_of_each_expert(layout, implementation):
    sizes, (rows, inputs, outputs) = np.array(LAYOUTS[layout], np.int32), (512, 200, 150)
    x, g, w = normal(0, rows, inputs), normal(1, rows, outputs), normal(2, sizes.size, outputs, inputs)
    x[sizes.sum() :] = g[sizes.sum() :] = 0

    @jit
    def run(x, g, w, sizes):
        weight = quantise_weight(w)
        return (
            blockwise.product(quantise_tiles(x, 1), weight, sizes, 1, x.dtype, implementation),
            blockwise.product(quantise_tiles(g, 1), weight, sizes, 2, x.dtype, implementation),
            blockwise.weight_gradient(quantise_tiles(g, 0), quantise_tiles(x, 0), sizes, implementation),
        )

    y, dx, dw = run(x, g, w, sizes)
    want_y, want_dx, want_dw = np.zeros((rows, outputs)), np.zeros((rows, inputs)), np.zeros(w.shape)
    for e, end in enumerate(np.cumsum(sizes)):
        mine, weight = slice(end - sizes[e], end), values(w[e], (128, 128), 1e-4)
        if sizes[e]:
            want_y[mine], want_dx[mine] = values(x[mine], (1, 128)) @ weight.T, values(g[mine], (1, 128)) @ weight
            want_dw[e] = values(g[mine], (128, 1)).T @ values(x[mine], (128, 1))
    for got, want in ((y, want_y), (dx, want_dx), (dw, want_dw)):
        assert_close(got, want)
    assert not np.asarray(y)[sizes.sum() :].any() and not np.asarray(dw)[sizes == 0].any()


def test_routed_experts_equal_a_loop_over_them():
    tokens, hidden, width, experts, choices = 96, 140, 130, 4, 2
    rng = np.random.default_rng(0)
    x, scale = normal(0, tokens, hidden), rng.uniform(0.5, 1, (tokens, choices)).astype(np.float32)
    ids = np.argsort(rng.normal(size=(tokens, experts)), axis=1)[:, :choices].astype(np.int32)
    shapes = [(experts, width, hidden), (experts, width, hidden), (experts, hidden, width)]
    weights = [normal(i, *shape) / np.sqrt(shape[-1]) for i, shape in enumerate(shapes)]

    @jit
    def run(x, scale, weights, g):
        masters = tuple(MasterWeight(w, quantise_weight(w)) for w in weights)
        plan = plan_rows(jnp.asarray(ids), experts, 128)
        y, pull = jax.vjp(lambda *args: routed_swiglu(*args, plan, 128)[0], x, scale, masters)
        return y, pull(g)

    g = normal(5, tokens, hidden)
    y, (dx, dscale, dweights) = run(x, scale, weights, g)

    def one_expert(e: int):
        """In float32, straight through the quantisation: the products' operands are the rule's."""
        gate, up, down = (values(w[e], (128, 128), 1e-4) for w in weights)
        token, choice = np.nonzero(ids == e)
        rows = values(x[token], (1, 128))
        pre, linear_part = rows @ gate.T, rows @ up.T
        inner = pre / (1 + np.exp(-pre)) * linear_part
        return token, choice, values(inner.astype(np.float32), (1, 128)) @ down.T, down, inner

    want_y, want_dscale = np.zeros(x.shape), np.zeros(scale.shape)
    for e in range(experts):
        token, choice, out, down, inner = one_expert(e)
        np.add.at(want_y, token, scale[token, choice][:, None] * out)
        want_dscale[token, choice] = ((values(g[token], (1, 128)) @ down) * inner).sum(1)
    assert_close(y, want_y, 1e-3)  # a value at a rounding's edge falls to the other side: a code's step of 1 / 16
    assert_gradient_close(dscale, want_dscale, 1e-3)
    assert np.isfinite(dx).all() and all(np.isfinite(d.master).all() and np.any(d.master) for d in dweights)


def test_one_scale_for_a_whole_matrix_loses_what_is_small_beside_an_outlier_channel():
    x, w = normal(0, 256, 512), normal(1, 128, 512)
    x[:, 7] *= 1e5  # one channel, as attention grows them without QK-norm
    w[:, :128] = 0  # and nothing that reads it or its tile: the rest is what must not be lost
    exact = x.astype(np.float64) @ w.T.astype(np.float64)

    def error(y) -> float:
        return np.abs(np.asarray(y) - exact).mean() / np.abs(exact).mean()

    run = jit(lambda x, w: blockwise.product(quantise_tiles(x, 1), quantise_weight(w), None, 1, jnp.float32))
    tiles, whole = error(run(x, w)), error(values(x, x.shape) @ values(w, w.shape, 1e-4).T)
    assert tiles < 0.05 and whole > 5 * tiles, (tiles, whole)


SHARDS = [
    # names of a weight's dims, its shape, the mesh
    (("hidden", "heads"), (256, 256), MeshConfig(fsdp=2, expert=2, tensor=2)),
    (("ffn", "hidden"), (256, 192), MeshConfig(fsdp=2, expert=2, tensor=2)),  # shards of 48: blocks span them
    (("ffn", "hidden"), (130, 1000), MeshConfig(fsdp=8)),  # shards of 125, and an edge
    (("qkv_heads", "qkv_inputs"), (384, 256), MeshConfig(fsdp=2, context=2, tensor=2)),
    (("expert", "expert_ffn", "expert_hidden"), (4, 140, 320), MeshConfig(fsdp=4, expert=2)),
]


@pytest.mark.parametrize("names, shape, config", SHARDS, ids=["heads", "ffn", "edges", "qkv", "experts"])
def test_blocks_of_shards_are_those_of_the_whole(names, shape, config):
    mesh = make_mesh(config)
    split = split_of(shape, names, config)
    w = normal(0, *shape, spread=3.0)
    spec = spec_of(split, len(shape))
    kept = PartitionSpec(
        *[axes[0] if axes and not DIMS[name].stored else None for axes, name in zip(split, names, strict=True)]
    )
    specs: Any = spec, kept
    run = jit(manual(partial(quantise_shard, names=names, split=split), mesh, spec, FP8Weight(*specs)))
    got, want = run(w), jit(quantise_weight)(w)
    same_bits(got.codes, np.asarray(want.codes))
    np.testing.assert_array_equal(got.scales, want.scales)


def test_what_is_watched_is_what_was_lost():
    x = normal(0, 256, 256)
    x[:, 3] = 1e6  # hides its neighbours of the first tile
    tiles: Tiles = jit(quantise_tiles, static_argnums=1)(x, 1)
    nonzero, lost, product, square, quantised = np.asarray(
        jit(blockwise.deviation)(x, tiles.multiplied_out()), np.float64
    )
    want = values(x, (1, 128))
    assert nonzero == x.size and lost == (want == 0).sum() and lost / x.size > 0.3
    cosine = product / np.sqrt(square * quantised)
    assert cosine == pytest.approx(
        (x * want).sum() / np.sqrt((x.astype(np.float64) ** 2).sum() * (want**2).sum()), 1e-5
    )
