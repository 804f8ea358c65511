"""Weights as FP8 blocks stand where arrays do, and few rows are multiplied as they are stored.

Legend: R rows sorted by group, E groups, I inputs, O outputs.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from ling_jax.config import MeshConfig
from ling_jax.convert.fp8 import quantise
from ling_jax.generate.engine import Engine, Request
from ling_jax.generate.serving import in_fp8
from ling_jax.kernels import native
from ling_jax.kernels.fp8 import FP8Weight, quantise_weight, rows_product
from ling_jax.kernels.weight import as_weight
from ling_jax.model.model import split_model
from tests.support.helpers import assert_close, jit, make_model, small
from tests.support.marks import nightly


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(256, 384), (200, 300), (1, 5)])
def test_blocks_are_quantised_as_the_official_tool_does_but_for_the_last_bit_of_a_scale(shape):
    w = normal(0, *shape) * np.exp(normal(1, *shape))
    w[:1, :1] = 300
    got, want = jit(quantise_weight)(w), quantise(w, "ordinary")
    np.testing.assert_allclose(got.scales, want.scales, rtol=2e-7)
    exact = np.asarray(got.codes, np.float32) == want.codes.astype(np.float32)
    assert exact.mean() > 0.999
    largest = np.abs(got.codes.astype(np.float32) - want.codes.astype(np.float32)).max()
    assert largest <= 32 and np.abs(np.asarray(got.astype(jnp.float32)) - w).max() <= 16 / 448 * 300


def test_a_linear_layer_takes_blocks_for_its_weight():
    x, w = normal(0, 3, 300), normal(1, 200, 300)
    q = quantise_weight(jnp.asarray(w))
    assert q.shape == w.shape and q.ndim == 2 and q.dtype == ml_dtypes.float8_e4m3fn
    assert_close(jit(lambda x, q: as_weight(q).linear(x))(x, q), x @ np.asarray(q.astype(jnp.float32)).T)


LAYOUTS = {
    "even": (2, 2, 2, 2),
    "hostile": (0, 5, 0, 1),
    "the first only": (1, 0, 0, 0),
    "full": (0, 0, 0, 9),
    "nothing": (0, 0, 0, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_few_rows_times_blocks_equal_the_loop_over_groups(layout):
    """The TPU's kernel, interpreted, and what a CPU runs; NaN past the groups."""
    sizes, (x, w) = np.array(LAYOUTS[layout], np.int32), (normal(0, 9, 256), normal(1, 4, 384, 256))
    inside = sizes.sum()
    x[inside:] = np.nan
    q = quantise_weight(jnp.asarray(w))
    whole, groups = np.asarray(q.astype(jnp.float32), np.float64), np.repeat(np.arange(4), sizes)
    want = np.einsum("ri,roi->ro", x[:inside].astype(np.float64), whole[groups])
    kernel = jit(lambda x, q, sizes: rows_product(x, q.codes, q.scales, 0, sizes, interpret=True))(x, q, sizes)
    assert_close(kernel[:inside], want)
    on_cpu = jit(lambda x, q, sizes: as_weight(q).product(x, sizes, 1, 1))(np.nan_to_num(x), q, sizes)
    assert_close(on_cpu[:inside], want)
    assert not np.asarray(on_cpu[inside:]).any()


def check_blocks() -> None:
    """The C++ product with groups from `first` on, against float64: blocks smaller at the edges, no rows, many."""
    for sizes, groups, (outputs, inputs) in (([1, 0, 7], 3, (256, 384)), ([9, 20], 6, (130, 200)), ([1], 2, (64, 90))):
        first = groups - len(sizes)
        w = quantise_weight(jnp.asarray(normal(0, groups, outputs, inputs)))
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jnp.asarray(normal(1, sum(sizes) + 2, inputs), dtype)
            args = x, w.codes, w.scales[first:], jnp.array(sizes), jnp.int32(first)
            got, whole = jax.jit(native.fp8_product)(*args), np.asarray(w.astype(dtype), np.float64)
            want, ends = np.zeros(got.shape), np.cumsum(sizes)
            for group, end in enumerate(ends):
                rows = slice(end - sizes[group], end)
                want[rows] = np.asarray(x, np.float64)[rows] @ whole[first + group].T
            assert_close(got, want, 1e-6 if dtype == jnp.float32 else 2**-8)
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    one = jnp.zeros((1, 16)).at[0, 3].set(1)
    codes = jnp.zeros((1, 256, 16), jnp.float8_e4m3fn).at[0, :, 3].set(jnp.asarray(every))
    got = jax.jit(native.fp8_product)(one, codes, jnp.ones((1, 2, 1)), jnp.array([1]), 0)
    np.testing.assert_array_equal(got[0], every.astype(np.float32))


def test_blocks_are_multiplied_in_cpp_as_they_are_stored():
    if not native.available():
        pytest.skip("this machine has no C++ compiler")
    check_blocks()


def test_many_rows_meet_weights_multiplied_out():
    sizes, x, w = np.array([300, 0, 84], np.int32), normal(0, 384, 128), normal(1, 3, 130, 128)
    q = quantise_weight(jnp.asarray(w))
    got = jit(lambda x, q, sizes: as_weight(q).product(x, sizes, 4, 1))(x, q, sizes)
    whole = np.asarray(q.astype(jnp.float32))
    assert_close(got, np.concatenate([x[:300] @ whole[0].T, x[300:] @ whole[2].T]))


@pytest.mark.parametrize("mesh", [None, nightly({"expert": 4})], ids=str)
def test_answers_in_fp8_are_those_of_the_weights_multiplied_out(mesh):
    config = small(vocab_size=64, max_position_embeddings=32)
    options = {} if mesh is None else {"mesh": MeshConfig(**mesh)}
    graph, params, bias = split_model(make_model(config))
    codes = in_fp8(config, params)
    assert isinstance(codes["layers"]["softmax_moe"]["mlp"]["experts"]["up_proj"]["weight"], FP8Weight)

    def multiplied_out(value):
        return value.astype(jnp.float32) if isinstance(value, FP8Weight) else value

    plain = nnx.merge(graph, _each(multiplied_out, codes), bias)
    requests = [Request(prompt=normal_ids(i), max_new_tokens=8) for i in range(3)]
    want = dict(Engine(plain, rows=3, slots=16).run(requests))
    got = dict(Engine(make_model(config, **options), rows=3, slots=16, fp8=True).run(requests))
    for i in range(3):
        assert got[i].ids == want[i].ids
        assert_close(np.array(got[i].model_logprobs), np.array(want[i].model_logprobs))


def _each(f, tree):
    return {k: _each(f, v) if isinstance(v, dict) else f(v) for k, v in tree.items()}


def normal_ids(seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 59, 3 + seed).tolist()


def test_a_mesh_that_cuts_a_block_is_refused():
    with pytest.raises(
        ValueError, match="mesh.tensor = 2 cuts model.moe_intermediate_size = 20 inside FP8 blocks of 128"
    ):
        Engine(make_model(small(vocab_size=64), mesh=MeshConfig(tensor=2)), rows=1, slots=8, fp8=True)
