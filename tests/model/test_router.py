"""Routing follows the specification's section 2.5.

Legend: N tokens, D hidden, E experts, K experts per token.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ling_jax.kernels import native
from ling_jax.model.linear import Init
from ling_jax.model.model import abstract_model, split_model
from ling_jax.model.router import Router, _chosen, route
from tests.support.helpers import assert_close, assert_gradient_close, choose_experts, jit, sigmoid, tiny

CONFIG = tiny(num_experts=16, n_group=4, topk_group=2, num_experts_per_tok=5)
TOKENS = 24


@partial(jit, static_argnums=3)
def routed(logits_NE, bias_E, valid_N, config, ids_NK=None):
    return route(logits_NE, bias_E, valid_N, config, ids_NK)


def draw(seed: int, spread: float = 2.0, bias_spread: float = 0.3, config=CONFIG):
    """(logits, bias, valid)."""
    rng = np.random.default_rng(seed)
    logits = spread * rng.normal(size=(TOKENS, config.num_experts))
    bias = bias_spread * rng.normal(size=config.num_experts)
    return logits.astype(np.float32), bias.astype(np.float32), np.ones(TOKENS, bool)


@pytest.mark.parametrize("bias_spread", [0.0, 0.3, 5.0])
def test_chosen_experts_are_those_of_the_specification(bias_spread):
    logits, bias, valid = draw(0, bias_spread=bias_spread)
    ids = np.asarray(routed(logits, bias, valid, CONFIG).ids)
    assert [set(row) for row in ids] == [set(choose_experts(sigmoid(row), bias, CONFIG)) for row in logits]


def check_choice() -> None:
    """The C++ choice against XLA's: ties, NaN, one group, groups of one expert."""
    rng = np.random.default_rng(0)
    for experts, groups, open_groups, choices in (
        (64, 8, 4, 8),
        (16, 4, 2, 5),
        (8, 1, 1, 1),
        (6, 3, 3, 6),
        (12, 6, 3, 4),
    ):
        sizes = dict(groups=groups, open_groups=open_groups, choices=choices)
        scores = rng.normal(size=(5, 150, experts)).astype(np.float32)
        scores[1] = np.round(scores[1]) + 0.0
        scores[2][rng.random(scores[2].shape) < 0.1] = np.nan
        scores[3] *= 1e38
        scores[4] = 0
        for some in scores:
            got, want = (jax.jit(partial(f, **sizes))(some) for f in (native.choose, _chosen))
            np.testing.assert_array_equal(got, want)


def test_the_choice_in_cpp_is_xlas():
    if not native.available():
        pytest.skip("this machine has no C++ compiler")
    check_choice()


def test_ids_are_best_first():
    logits, bias, valid = draw(1)
    ids = np.asarray(routed(logits, bias, valid, CONFIG).ids)
    assert (np.diff(np.take_along_axis(sigmoid(logits) + bias, ids, 1), axis=1) <= 0).all()


def test_a_group_is_worth_its_two_best_experts_not_its_best():
    logits = np.full((TOKENS, 16), -3, np.float32)
    logits[:, 0] = 9  # the best expert, alone in its group
    logits[:, 4:6] = logits[:, 8:10] = 2
    ids = np.asarray(routed(logits, np.zeros(16, np.float32), np.ones(TOKENS, bool), CONFIG).ids)
    assert set((ids // 4).ravel()) == {1, 2}


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 20), st.floats(0, 10))
def test_every_token_goes_to_distinct_experts_of_few_groups_and_is_counted_once_for_each(seed, spread, bias_spread):
    logits, bias, valid = draw(seed, spread, bias_spread)
    routing = jax.device_get(routed(logits, bias, valid, CONFIG))
    chosen, group_size = CONFIG.num_experts_per_tok, CONFIG.num_experts // CONFIG.n_group
    assert all(len(set(row)) == chosen for row in routing.ids)
    assert all(len(set(row // group_size)) <= CONFIG.topk_group for row in routing.ids)
    assert routing.counts.sum() == TOKENS * chosen
    np.testing.assert_array_equal(routing.counts, np.bincount(routing.ids.ravel(), minlength=CONFIG.num_experts))


def test_closed_groups_stay_closed_where_every_open_score_is_negative():
    """A closed group masked with 0 would win against biased scores below 0."""
    logits, _, valid = draw(2)
    ids = np.asarray(routed(logits, np.full(16, -5, np.float32), valid, CONFIG).ids)
    assert [set(row) for row in ids] == [set(choose_experts(sigmoid(row), np.zeros(16), CONFIG)) for row in logits]


def test_bias_selects_but_never_weighs():
    logits, bias, valid = draw(3, bias_spread=3.0)
    routing, unbiased = (jax.device_get(routed(logits, b, valid, CONFIG)) for b in (bias, 0 * bias))
    assert (np.sort(routing.ids) != np.sort(unbiased.ids)).any()
    scores = np.take_along_axis(sigmoid(logits), routing.ids, axis=1)
    assert_close(routing.weights, 2.5 * scores / scores.sum(1, keepdims=True))


def test_weights_sum_to_the_routed_scaling_factor():
    logits, bias, valid = draw(4, spread=30.0)
    assert_close(routed(logits, bias, valid, CONFIG).weights.sum(1), np.full(TOKENS, 2.5))


def test_a_single_expert_keeps_its_own_score():
    config = tiny(num_experts=16, num_experts_per_tok=1)
    logits, bias, valid = draw(5)
    routing = jax.device_get(routed(logits, bias, valid, config))
    assert_close(routing.weights, 2.5 * np.take_along_axis(sigmoid(logits), routing.ids, axis=1))


def test_weights_are_not_normalised_where_the_config_says_so():
    config = tiny(num_experts=16, num_experts_per_tok=5, norm_topk_prob=False, routed_scaling_factor=1.5)
    logits, bias, valid = draw(6)
    routing = jax.device_get(routed(logits, bias, valid, config))
    assert_close(routing.weights, 1.5 * np.take_along_axis(sigmoid(logits), routing.ids, axis=1))


def test_padding_is_routed_but_counts_neither_as_load_nor_in_the_z_sum():
    logits, bias, valid = draw(7)
    valid[::3] = False
    routing, everything = (jax.device_get(routed(logits, bias, mask, CONFIG)) for mask in (valid, np.ones_like(valid)))
    np.testing.assert_array_equal(routing.ids, everything.ids)
    np.testing.assert_array_equal(routing.weights, everything.weights)
    np.testing.assert_array_equal(routing.counts, np.bincount(routing.ids[valid].ravel(), minlength=16))
    lse = np.log(np.exp(logits.astype(np.float64)).sum(1))
    assert_close(routing.z_sum, (lse[valid] ** 2).sum())


def test_gradients_reach_the_logits_through_the_weights_of_chosen_experts_alone():
    logits, bias, valid = draw(8)
    cotangent = np.random.default_rng(0).normal(size=(TOKENS, CONFIG.num_experts_per_tok)).astype(np.float32)
    ids = np.asarray(routed(logits, bias, valid, CONFIG).ids)

    def chosen(logits, bias):
        return (route(logits, bias, valid, CONFIG).weights * cotangent).sum()

    def replayed(logits):
        scores = jnp.take_along_axis(1 / (1 + jnp.exp(-logits)), ids, axis=1)
        return (2.5 * scores / scores.sum(1, keepdims=True) * cotangent).sum()

    d_logits, d_bias = jit(jax.grad(chosen, argnums=(0, 1)))(logits, bias)
    assert_gradient_close(d_logits, jit(jax.grad(replayed))(logits))
    idle = np.ones(logits.shape, bool)
    np.put_along_axis(idle, ids, False, axis=1)
    assert not np.asarray(d_logits)[idle].any()
    assert not np.asarray(d_bias).any()


def test_a_replayed_choice_takes_the_place_of_the_routers_own():
    logits, bias, valid = draw(9)
    own = jax.device_get(routed(logits, bias, valid, CONFIG))
    again = jax.device_get(routed(logits, bias, valid, CONFIG, own.ids))
    for name in own._fields:
        np.testing.assert_array_equal(getattr(again, name), getattr(own, name), err_msg=name)
    other_ids = (own.ids + 1) % CONFIG.num_experts
    other = jax.device_get(routed(logits, bias, valid, CONFIG, other_ids))
    scores = np.take_along_axis(sigmoid(logits), other_ids, axis=1)
    np.testing.assert_array_equal(other.ids, other_ids)
    assert_close(other.weights, 2.5 * scores / scores.sum(1, keepdims=True))
    np.testing.assert_array_equal(other.counts, np.bincount(other_ids.ravel(), minlength=16))


def test_logits_are_float32_products_of_bfloat16_states():
    """Neither the product nor the weight is rounded to bfloat16."""
    router = Router(CONFIG, Init(nnx.Rngs(0), 1.0, jnp.dtype(jnp.float32)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(TOKENS, CONFIG.hidden_size)), jnp.bfloat16)
    routing, logits = jit(lambda x: router(x, jnp.ones(TOKENS, bool)))(x)
    want = np.asarray(x, np.float64) @ np.asarray(router.weight[...], np.float64).T
    assert logits.dtype == routing.weights.dtype == jnp.float32
    assert_close(logits, want)


def test_the_expert_bias_is_float32_whatever_the_parameters_are():
    _, params, bias = split_model(abstract_model(tiny(), param_dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(bias)} == {jnp.dtype(jnp.float32)}
