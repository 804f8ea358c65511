"""Products with weights: in C++ they are what XLA's are, with one layer of a stack too, and for CPU alone.

Legend: R rows, I inputs, O outputs, L layers.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ling_jax.config import DataConfig, RunConfig, TrainConfig
from ling_jax.kernels import native
from ling_jax.kernels.linear import linear, linear_in_float32, linear_of_layer
from ling_jax.train.state import make_trainer
from ling_jax.train.step import make_train_step
from tests.support.helpers import assert_gradient_close, tiny

TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-8}


@pytest.fixture(params=["1", "0"])
def in_cpp(request, monkeypatch):
    monkeypatch.setenv("LING_JAX_NATIVE", request.param)
    if request.param == "1" and not native.available():
        pytest.skip("this machine has no C++ compiler")
    return request.param == "1"


def lowered(f, *args, platform: str = "cpu") -> str:
    return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("rows", [(1,), (3, 5), (2, 300)])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
def test_products_and_their_gradients_are_those_of_float64(rows, dtype, weight_dtype, in_cpp):
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(*rows, width)), dtype) for width in (48, 37))
    w = jnp.asarray(rng.normal(size=(37, 48)), weight_dtype)
    y, pull = jax.vjp(jax.jit(lambda x, w: linear(x, w)), x, w)
    x64, g64, w64 = (np.asarray(a, np.float64) for a in (x, g, w.astype(dtype)))
    want = x64 @ w64.T, g64 @ w64, g64.reshape(-1, 37).T @ x64.reshape(-1, 48)
    for got, true, like in zip((y, *pull(g)), want, (x, x, w), strict=True):
        assert got.dtype == like.dtype
        assert_gradient_close(got, true, TOLERANCE[str(like.dtype)])


def test_a_layer_is_read_where_it_lies(in_cpp):
    rng = np.random.default_rng(1)
    x, w = jnp.asarray(rng.normal(size=(2, 4, 64)), jnp.float32), jnp.asarray(rng.normal(size=(3, 40, 64)), jnp.float32)
    for layer in range(3):
        got = jax.jit(linear_of_layer)(x, w, jnp.int32(layer))
        assert_gradient_close(got, np.asarray(x, np.float64) @ np.asarray(w[layer], np.float64).T, 1e-6)
    text = jax.jit(linear_of_layer).lower(x, w, jnp.int32(0)).compile().as_text() or ""
    assert not in_cpp or "dynamic-slice" not in text


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
def test_logits_of_bfloat16_are_not_rounded(weight_dtype, in_cpp):
    rng = np.random.default_rng(2)
    x, w = jnp.asarray(rng.normal(size=(5, 64)), jnp.bfloat16), jnp.asarray(rng.normal(size=(40, 64)), weight_dtype)
    got = jax.jit(linear_in_float32)(x, w)
    want = np.asarray(x, np.float64) @ np.asarray(w.astype(jnp.bfloat16), np.float64).T
    assert got.dtype == jnp.float32
    assert_gradient_close(got, want, 1e-6)


def test_other_platforms_and_dtypes_are_xlas(monkeypatch):
    """A program that was traced for CPU may be lowered for another platform."""
    monkeypatch.setattr(native, "available", lambda: pytest.fail("asked for the library"))
    x, w = jnp.ones((4, 8)), jnp.ones((3, 8))
    assert "dot_general" in lowered(jax.grad(lambda x, w: linear(x, w).sum(), (0, 1)), x, w, platform="tpu")
    assert "dot_general" in lowered(partial(linear), x.astype(jnp.float16), w)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_remat_minimal_keeps_products(platform):
    """A dense layer's products are in the step once, where full remat computes them twice: attention's two, gate and
    up, but not down, whose result nothing else needs."""

    def products(remat: str) -> int:
        model = tiny(num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0)
        data = DataConfig(sequence_length=16, global_batch_size=2)
        trainer = make_trainer(RunConfig(model=model, data=data, train=TrainConfig(steps=2, remat=remat)))
        names = "tokens", "positions", "segment_ids", "targets"
        rows = {name: jax.ShapeDtypeStruct((2, 16), jnp.int32) for name in names}
        traced = make_train_step(trainer).trace(jax.eval_shape(trainer.init), rows)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return text.count("@ling_grouped_product" if platform == "cpu" else "stablehlo.dot_general")

    if platform == "cpu" and not native.available():
        pytest.skip("this machine has no C++ compiler")
    assert [products(remat) - products("none") for remat in ("minimal", "full")] == [0, 4]
