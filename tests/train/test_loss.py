"""Losses are sums over the right tokens, equal to what full logits give.

Legend: B rows, T tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ling_jax import token_logprobs
from ling_jax.model.model import split_model
from ling_jax.train.loss import IGNORE, NextToken, Sums, TargetCounts, shift_targets
from ling_jax.train.objective import RouterSums, StepCounts, StepSums, step_counts, total_loss
from tests.support.helpers import (
    Oracle,
    assert_close,
    assert_gradients_close,
    documents,
    jit,
    loss_and_grads,
    make_model,
    pack,
    small,
    tiny,
)

# The head's loss takes this vocabulary in chunks, of which the last is narrower.
CHUNKED = small(vocab_size=4099, num_hidden_layers=1, num_nextn_predict_layers=1)
DOCUMENTS = documents([7, 4, 3, 9, 2], vocab=4099)
PACKED = pack([DOCUMENTS[:3], DOCUMENTS[3:]], 15)
PACKED["targets"][0, 2] = IGNORE  # a token that is input only


@pytest.fixture(scope="module")
def model():
    return make_model(CHUNKED)


def picked(logits_BTV, targets_BT):
    """log softmax of the full logits at the targets."""
    logprobs_BTV = jax.nn.log_softmax(logits_BTV)
    return jnp.take_along_axis(logprobs_BTV, jnp.maximum(targets_BT, 0)[:, :, None], axis=-1)[:, :, 0]


@pytest.fixture(scope="module")
def from_full_logits(model):
    """(loss, its two sums, gradients, router logits), with every logit at once."""
    graph, params, bias = split_model(model)
    mtp_targets = np.asarray(shift_targets(jnp.array(PACKED["targets"]), jnp.array(PACKED["segment_ids"])))

    def loss(params):
        model = nnx.merge(graph, params, bias)
        inputs = (PACKED["tokens"], PACKED["positions"], PACKED["segment_ids"])
        out = model.hidden(*inputs, capture=("router_logits",))
        main, mtp = (
            -jnp.where(targets >= 0, picked(model.logits(hidden), targets), 0).sum()
            for hidden, targets in ((out.hidden_BTD, PACKED["targets"]), (out.mtp_hidden_BTD, mtp_targets))
        )
        means = main / (PACKED["targets"] >= 0).sum(), mtp / (mtp_targets >= 0).sum()
        return means[0] + 0.3 * means[1], ((main, mtp), out.captured["router_logits"])

    (value, (sums, router_logits)), grads = jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, sums, grads, router_logits


def test_the_chunked_head_gives_the_loss_and_all_gradients_of_full_logits(model, from_full_logits):
    loss, sums, grads = loss_and_grads(model, PACKED)
    want, want_sums, want_grads, _ = from_full_logits
    assert_close(loss, want)
    assert_close(sums.objective.nll, want_sums[0])
    assert_close(sums.objective.mtp_nll, want_sums[1])
    assert_gradients_close(grads, want_grads)


def test_targets_and_tokens_are_counted():
    """Documents of 7, 4, 3, 9, 2 tokens have 6 + 3 + 2 + 8 + 1 next tokens and 5 + 2 + 1 + 7 + 0 after those."""
    for batch, want in ((pack([DOCUMENTS[:3], DOCUMENTS[3:]], 15), (20, 15)), (PACKED, (19, 14))):
        counts = step_counts(NextToken(tiny()), batch)  # of PACKED, t + 2 from t = 1 is ignored too
        assert tuple(counts.objective) == want and counts.tokens == 25


def test_the_loss_is_the_sum_of_means_over_the_steps_counts():
    counts = StepCounts(TargetCounts(jnp.float32(10), jnp.float32(5)), jnp.float32(20))
    router = RouterSums(jnp.float32(80), jnp.zeros((3, 8), jnp.int32), jnp.int32(0))
    sums = StepSums(Sums(jnp.float32(30), jnp.float32(40)), router)
    assert float(total_loss(NextToken(tiny()), sums, counts)) == pytest.approx(3 + 0.3 * 8)
    assert float(total_loss(NextToken(tiny()), sums, counts, 0.5)) == pytest.approx(3 + 0.3 * 8 + 0.5 * 4)
    assert float(total_loss(NextToken(small()), sums, counts)) == pytest.approx(3)


def test_a_batch_without_targets_has_loss_0():
    zero = jnp.float32(0)
    assert float(NextToken(tiny()).loss(Sums(zero, zero), TargetCounts(zero, zero))) == 0


def test_the_z_sum_is_over_the_documents_tokens(model, from_full_logits):
    logits = np.asarray(from_full_logits[3], np.float64)[:, PACKED["segment_ids"] > 0]
    assert_close(loss_and_grads(model, PACKED)[1].router.z, (np.log(np.exp(logits).sum(-1)) ** 2).sum())


def run_token_logprobs(model, batch):
    """([B, T-1], gradients of the sum of its squares)."""
    graph, params, bias = split_model(model)

    def values(params):
        model = nnx.merge(graph, params, bias)
        out = token_logprobs(model, batch["tokens"], batch["positions"], batch["segment_ids"])
        return (out**2).sum(), out

    grads, out = jit(jax.grad(values, has_aux=True))(params)
    return out, grads


@pytest.fixture(scope="module")
def scored(model):
    return run_token_logprobs(model, PACKED)


def test_token_logprobs_are_those_of_each_document_by_itself(model, scored):
    oracle = Oracle(model.config, *split_model(model)[1:])
    want = np.zeros((2, 14))
    starts = [(0, 0), (0, 7), (0, 11), (1, 0), (1, 9)]
    for (row, start), document in zip(starts, DOCUMENTS, strict=True):
        logits = oracle.logits(oracle.hidden(document))[:-1]
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        want[row, start : start + len(document) - 1] = logits[np.arange(len(document) - 1), document[1:]]
    assert scored[0].dtype == jnp.float32
    assert_close(scored[0], want)


def test_token_logprobs_are_0_where_the_next_token_is_of_no_or_another_document(scored):
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(scored[0][0]) == 0), [6, 10, 13])
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(scored[0][1]) == 0), [8, 10, 11, 12, 13])


def test_token_logprobs_have_the_gradients_of_full_logits(model, scored):
    graph, params, bias = split_model(model)
    targets = np.roll(PACKED["tokens"], -1, axis=1)[:, :-1]
    same = PACKED["segment_ids"][:, 1:] == PACKED["segment_ids"][:, :-1]
    same &= PACKED["segment_ids"][:, 1:] > 0

    def values(params):
        model = nnx.merge(graph, params, bias)
        out = model.hidden(PACKED["tokens"], PACKED["positions"], PACKED["segment_ids"])
        return (jnp.where(same, picked(model.logits(out.hidden_BTD[:, :-1]), targets), 0) ** 2).sum()

    assert_gradients_close(scored[1], jit(jax.grad(values))(params))
