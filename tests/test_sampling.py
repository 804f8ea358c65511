"""Tokens are drawn from the right distribution, row by row, and each row by its own rule.

Legend: B rows, V vocabulary, S slots.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from ling_jax.generate.sampling import (
    Kinds,
    Options,
    Sampling,
    draw,
    empty_options,
    keys_at,
    log_distribution,
    penalize,
    with_option,
)
from tests.helpers import jit

LOGITS = np.array([0.5, 2.0, -1.0, 1.0, 1.5, -0.5, 0.0, -3.0], np.float32)
DRAWS = 20_000


def options_of(rows: list[Sampling], vocab: int = LOGITS.size) -> Options:
    options = empty_options(len(rows))
    for row, sampling in enumerate(rows):
        options = with_option(options, row, sampling, row, vocab)
    return options


distribution = partial(jit, static_argnums=2)(log_distribution)


@partial(jit, static_argnums=2)
def draw_many(logprobs_BV, options, kinds):
    return draw(logprobs_BV, keys_at(options, jnp.arange(DRAWS)), kinds)


def drawn(seed: int = 0, **sampling) -> np.ndarray:
    """[V] share of each token in many draws: of one row, at as many positions."""
    one = Sampling(**sampling)
    options, kinds = options_of([one]), Kinds.of([one])
    logprobs_BV = distribution(LOGITS[None], options, kinds)
    options = options._replace(seed_B=np.full(DRAWS, seed, np.uint32))
    tokens = draw_many(jnp.broadcast_to(logprobs_BV, (DRAWS, LOGITS.size)), options, kinds)
    return np.bincount(tokens, minlength=LOGITS.size) / DRAWS


def softmax(logits):
    p = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return p / p.sum()


def reference(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """The distribution by hand: one token after another, best first."""
    if s.temperature == 0:
        return np.eye(logits.size)[np.argmax(logits)]
    p = softmax(logits.astype(np.float64) / s.temperature)
    order = np.argsort(-p, kind="stable")
    if s.top_k:
        order = order[: s.top_k]
    held, kept = 0.0, []
    for token in order:
        if held >= s.top_p * p[order].sum():
            break
        held += p[token]
        kept.append(token)
    kept = [token for token in kept if p[token] >= s.min_p * p.max()]
    out = np.zeros(logits.size)
    out[kept] = p[kept] / p[kept].sum()
    return out


def assert_distribution(shares: np.ndarray, want: np.ndarray):
    """Nothing where nothing may be, and a chi-square within its 1e-6 tail for up to 7 degrees of freedom."""
    assert not shares[want == 0].any()
    chi2 = (DRAWS * (shares - want)[want > 0] ** 2 / want[want > 0]).sum()
    assert chi2 < 42, f"chi-square {chi2}: drew {shares.round(4)}, expected {want.round(4)}"


@pytest.mark.parametrize(
    "sampling",
    [
        dict(temperature=1.0), dict(temperature=0.5), dict(temperature=2.0, top_k=3), dict(temperature=1.0, top_p=0.7),
        dict(temperature=1.0, min_p=0.3), dict(temperature=3.0, top_k=6, top_p=0.8, min_p=0.5), dict(temperature=0.0),
    ],
    ids=str,
)  # fmt: skip
def test_tokens_come_as_often_as_they_should(sampling):
    assert_distribution(drawn(**sampling), reference(LOGITS, Sampling(**sampling)))


def test_random_settings_keep_what_a_reference_keeps():
    """Rows with rules of their own, greedy ones between; the log-probabilities are those of what is left."""
    rng = np.random.default_rng(0)
    rows = [
        Sampling(
            temperature=float(rng.choice([0, 0.3, 1, 4])),
            top_k=int(rng.choice([0, 1, 3, 7, 40, 100])),
            top_p=float(rng.choice([1.0, 1e-9, rng.uniform(0.05, 1)])),
            min_p=float(rng.choice([0, rng.uniform(0, 1), 1])),
        )
        for _ in range(400)
    ]
    logits = rng.normal(0, 2, (400, 40)).astype(np.float32)
    got = np.exp(np.asarray(distribution(logits, options_of(rows, 40), Kinds(True, True, False)), np.float64))
    want = np.stack([reference(row, sampling) for row, sampling in zip(logits, rows, strict=True)])
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("slack", [-1e-3, 1e-3])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_top_p_keeps_the_fewest_tokens_that_hold_that_much(count, slack):
    """A little less than what the best `count` tokens hold keeps them, a little more takes in the next."""
    order = np.argsort(-LOGITS)
    one = Sampling(temperature=1.0, top_p=float(softmax(LOGITS)[order[:count]].sum() + slack))
    kept = np.isfinite(distribution(LOGITS[None], options_of([one]), Kinds.of([one]))[0])
    assert set(np.flatnonzero(kept)) == set(order[: count + (slack > 0)])


def test_what_no_row_asks_for_is_not_in_the_program():
    assert Kinds.of([Sampling(), Sampling(top_p=0.5)]) == Kinds(False, False, False)
    assert Kinds.of([Sampling(), Sampling(temperature=1.0)]) == Kinds(True, False, False)
    assert Kinds.of([Sampling(temperature=1.0, min_p=0.1)]) == Kinds(True, True, False)
    assert Kinds.of([Sampling(presence_penalty=1.0)]) == Kinds(False, False, True)


def test_penalties_count_what_was_seen_and_what_was_said():
    """Prompt 1, 3; answer 0, 3; 5 and 1 lie beyond what is known. In the second row nothing is penalized."""
    rows = [Sampling(repetition_penalty=2.0, presence_penalty=0.25), Sampling()]
    tokens = np.array([[1, 3, 0, 3, 5, 1]] * 2, np.int32)
    known, prompt = np.array([4, 4]), np.array([2, 2])
    got = penalize(jnp.asarray(np.stack([LOGITS] * 2)), tokens, known, prompt, options_of(rows))
    want = LOGITS.copy()
    want[[0, 1, 3]] /= 2
    want[[0, 3]] -= 0.25
    np.testing.assert_allclose(got, [want, LOGITS])
    negative = penalize(jnp.asarray(-LOGITS[None]), tokens[:1], known[:1], prompt[:1], options_of(rows[:1]))
    assert negative[0, 1] == -LOGITS[1] * 2  # a negative logit is multiplied


def test_biases_are_kept_for_their_row():
    options = options_of([Sampling(), Sampling(logit_bias={3: -np.inf, 5: 2.0}), Sampling()])
    np.testing.assert_array_equal(options.bias_BV[[0, 2]], 0)
    assert (
        options.bias_BV[1, 3] == -np.inf and options.bias_BV[1, 5] == 2 and options.bias_BV[1].astype(bool).sum() == 2
    )
    again = with_option(options, 1, Sampling(), 0, LOGITS.size)
    np.testing.assert_array_equal(again.bias_BV, 0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"min_p": 1.5}, "min_p = 1.5 must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0 must be above 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty = inf must be a finite number"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias of token 3 = nan must be a number"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**setting)
