"""A hybrid model: one program for all of its groups, rates of decay by layer and device, the gated norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ling_jax.kernels.lightning import slopes_of
from ling_jax.model.linear_attention import gated_norm, slopes_by_device
from ling_jax.model.model import abstract_model, split_model
from tests.support.helpers import assert_close, make_model, tiny

HYBRID = tiny(num_hidden_layers=4, layer_group_size=3, group_norm_size=2)


@pytest.mark.parametrize("layers", [8, 32])
def test_a_program_has_five_layers_at_every_depth(layers):
    """A dense linear layer, the rest of its group, a softmax layer and linear ones that come again, the last layer."""
    graph, params, bias = split_model(abstract_model(tiny(num_hidden_layers=layers, layer_group_size=4)))

    def run(params, bias, tokens_BT):
        return nnx.merge(graph, params, bias).hidden(tokens_BT, mtp=False).hidden_BTD

    text = jax.jit(run).lower(params, bias, jax.ShapeDtypeStruct((1, 16), "int32")).as_text()
    assert text.count("@ling_lightning") + text.count("@ling_attention") == 5


def test_padding_anywhere_changes_no_answer():
    model, rng = make_model(HYBRID), np.random.default_rng(0)
    tokens = rng.integers(1, 50, (1, 11)).astype(np.int32)
    want = model(tokens).logits_BTV[0]
    places = np.sort(rng.permutation(23)[:11])
    padded, segments, positions = (np.zeros((1, 23), np.int32) for _ in range(3))
    padded[0, places], segments[0, places], positions[0, places] = tokens, 1, np.arange(11)
    got = model(padded, positions, segments, mtp=False).logits_BTV[0, places]
    assert_close(got, want)


def test_each_device_has_the_rates_of_its_heads_and_layers():
    slopes = slopes_by_device(tiny(num_hidden_layers=7, num_attention_heads=8, slope_convention="hf"), 4)
    assert slopes.shape == (7, 4, 2) and slopes.dtype == np.float32
    np.testing.assert_allclose(slopes[5, 3], slopes_of(8, 5, 7, "hf")[6:], rtol=1e-7)


def test_the_norm_is_of_groups_and_gated_in_float32():
    rng = np.random.default_rng(0)
    x, gate, weight = rng.normal(size=(3, 5, 24)), rng.normal(size=(3, 5, 24)), rng.normal(size=24)
    parts = x.reshape(3, 5, 4, 6)
    normed = (parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-6)).reshape(x.shape)
    want = normed * weight / (1 + np.exp(-gate))
    assert_close(gated_norm(*(jnp.asarray(a, jnp.float32) for a in (x, gate, weight)), 4, 1e-6), want)
    half = gated_norm(*(jnp.asarray(a, jnp.bfloat16) for a in (x, gate, weight)), 4, 1e-6)
    rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, gate, weight)]
    parts = rounded[0].reshape(3, 5, 4, 6)
    exact = (parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-6)).reshape(x.shape) * rounded[2]
    exact /= 1 + np.exp(-rounded[1])
    assert half.dtype == jnp.bfloat16
    assert np.abs(np.asarray(half, np.float64) - exact).max() <= 2**-8 * np.abs(exact).max()
