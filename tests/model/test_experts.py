"""Sorting rows by expert loses and doubles nothing, and the MoE layer equals a loop over all experts.

Legend: N tokens, D hidden, E experts, K experts per token, R rows.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ling_jax.kernels.grouped import padded_rows
from ling_jax.kernels.rows import combine_rows, gather_rows, plan_rows, sum_choices
from ling_jax.model.block import SparseMoE
from ling_jax.model.linear import Init
from tests.support.helpers import assert_close, assert_gradient_close, assert_gradients_close, jit, tiny

plan = partial(jit, static_argnums=(1, 2))(plan_rows)

# (tokens, choices, experts, rows per block): few shapes, since each is compiled.
SHAPES = [(1, 1, 4, 1), (1, 4, 8, 1), (13, 3, 8, 4), (40, 2, 5, 8), (9, 6, 6, 16)]
layouts = st.tuples(st.sampled_from(SHAPES), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1.0, 30.0]))


def draw_ids(shape, seed: int, skew: float) -> np.ndarray:
    """[N, K] distinct experts per token; the larger `skew`, the more tokens agree on theirs."""
    tokens, choices, experts, _ = shape
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(tokens, experts)) + skew * rng.normal(size=experts)
    return np.argsort(-scores, axis=1)[:, :choices].astype(np.int32)


@settings(max_examples=60, deadline=None)
@given(layouts)
def test_every_pair_has_a_row_of_its_own_in_its_experts_range(layout):
    shape, seed, skew = layout
    (tokens, choices, experts, block), ids = shape, draw_ids(*layout)
    rows = jax.device_get(plan(ids, experts, block))
    row_of, sizes = rows.row_of_NK.ravel(), rows.group_sizes_E
    assert len(set(row_of)) == tokens * choices
    ends = np.cumsum(sizes)
    assert (ends[-1] <= rows.pair_of_R.size) and rows.pair_of_R.size == padded_rows(tokens * choices, experts, block)
    np.testing.assert_array_equal(np.searchsorted(ends, row_of, side="right"), ids.ravel())
    counts = np.bincount(ids.ravel(), minlength=experts)
    np.testing.assert_array_equal(sizes, -(-counts // block) * block)


@settings(max_examples=60, deadline=None)
@given(layouts)
def test_rows_and_pairs_are_inverse_and_other_rows_are_padding(layout):
    (tokens, choices, experts, block), ids = layout[0], draw_ids(*layout)
    rows = jax.device_get(plan(ids, experts, block))
    pairs = np.arange(tokens * choices)
    np.testing.assert_array_equal(rows.pair_of_R[rows.row_of_NK.ravel()], pairs)
    assert sorted(rows.pair_of_R[rows.pair_of_R < pairs.size]) == pairs.tolist()
    assert (np.delete(rows.pair_of_R, rows.row_of_NK.ravel()) == pairs.size).all()


@settings(max_examples=30, deadline=None)
@given(layouts)
def test_an_experts_rows_keep_the_order_of_their_tokens(layout):
    ids = draw_ids(*layout)
    rows = np.asarray(plan(ids, *layout[0][2:]).row_of_NK)
    for expert in range(layout[0][2]):
        assert (np.diff(rows[ids == expert]) > 0).all()


@jit
def gathered(x_ND, rows, g_RD):
    return gather_rows(x_ND, rows), sum_choices(g_RD, rows.row_of_NK)


@jit
def gathered_plainly(x_ND, rows, g_RD):
    def gather(x):
        choices = rows.row_of_NK.shape[1]
        real = rows.pair_of_R < rows.row_of_NK.size
        return jnp.where(real[:, None], x[jnp.where(real, rows.pair_of_R // choices, 0)], 0)

    y, vjp = jax.vjp(gather, x_ND)
    return y, *vjp(g_RD)


@jit
def combined(y_RD, weights_NK, rows):
    return combine_rows(y_RD, weights_NK, rows)


@jit
def combined_plainly(y_RD, weights_NK, rows):
    return (y_RD[rows.row_of_NK] * weights_NK[:, :, None]).sum(1)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(layouts)
def test_gathering_rows_and_its_transpose_equal_plain_indexing(layout):
    (tokens, _, experts, block), seed, _ = layout
    rows = plan(draw_ids(*layout), experts, block)
    x, g = normal(seed, tokens, 3), normal(seed, rows.pair_of_R.size, 3)
    for got, want in zip(gathered(x, rows, g), gathered_plainly(x, rows, g), strict=True):
        assert_gradient_close(got, want)


@settings(max_examples=30, deadline=None)
@given(layouts)
def test_combining_rows_equals_the_weighted_sum(layout):
    (tokens, choices, experts, block), seed, _ = layout
    rows = plan(draw_ids(*layout), experts, block)
    y, weights = normal(seed, rows.pair_of_R.size, 3), normal(seed, tokens, choices)
    assert_gradient_close(combined(y, weights, rows), combined_plainly(y, weights, rows))


def swiglu(x, weights, expert=...):
    gate, up, down = (weights[name]["weight"][expert] for name in ("gate_proj", "up_proj", "down_proj"))
    hidden = jax.nn.silu(jnp.matmul(x, gate.T, precision="highest")) * jnp.matmul(x, up.T, precision="highest")
    return jnp.matmul(hidden, down.T, precision="highest")


def moe_by_loop(params, x_ND, ids_NK, config):
    """Every expert for every token, weighted by 0 where it was not chosen (spec 2.5)."""
    scores_NE = jax.nn.sigmoid(jnp.matmul(x_ND, params["gate"]["weight"].T, precision="highest"))
    chosen_NE = (ids_NK[:, :, None] == jnp.arange(config.num_experts)).any(1)
    weights_NE = jnp.where(chosen_NE, scores_NE, 0)
    weights_NE *= config.routed_scaling_factor / weights_NE.sum(1, keepdims=True)
    out = sum(weights_NE[:, e, None] * swiglu(x_ND, params["experts"], e) for e in range(config.num_experts))
    return out + swiglu(x_ND, params["shared_experts"]) if config.num_shared_experts else out


@partial(jit, static_argnums=(0, 5))
def run_both(graph, params, bias, x_ND, g_ND, config):
    """((y, dparams, dx) of the layer and of the loop, the chosen ids)."""

    def layer(params, x_ND):
        out = nnx.merge(graph, params, bias)(x_ND[None], jnp.ones((1, len(x_ND)), bool), None)
        return out.y_BTD[0], out.routing

    y, vjp, routing = jax.vjp(layer, params, x_ND, has_aux=True)
    want, want_vjp = jax.vjp(lambda params, x: moe_by_loop(params, x, routing.ids[0], config), params, x_ND)
    return (y, *vjp(g_ND)), (want, *want_vjp(g_ND)), routing.ids[0]


def moe_layer(config, bias_E):
    layer = SparseMoE(config, Init(nnx.Rngs(0), 0.5, jnp.dtype(jnp.float32)))
    graph, params, bias = nnx.split(layer, nnx.Param, nnx.Variable)
    return graph, nnx.to_pure_dict(params), jax.tree.map(lambda _: jnp.asarray(bias_E), nnx.to_pure_dict(bias))


HOT = np.array([0, 0, 9, 9, 9, 0, 0, 0], np.float32)  # every token to experts 2, 3 and 4
BIASES = {"spread": np.zeros(8, np.float32), "one hot and many empty": HOT}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("tokens", [1, 120])
def test_the_moe_layer_and_all_its_gradients_equal_a_loop_over_experts(tokens, bias):
    config = tiny(hidden_size=9, moe_intermediate_size=7)
    graph, params, biases = moe_layer(config, BIASES[bias])
    got, want, ids = run_both(graph, params, biases, normal(0, tokens, 9), normal(1, tokens, 9), config)
    if bias != "spread":
        assert (np.sort(ids) == [2, 3, 4]).all()
    assert_close(got[0], want[0])
    assert_gradients_close(got[1], want[1])
    assert_gradient_close(got[2], want[2])
