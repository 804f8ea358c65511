"""Decoding with a cache is the whole model, one token at a time; sampling draws from the right distribution.

Legend: B rows, T tokens, V vocabulary, S cache slots.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ling_jax import generate
from ling_jax.generate.cache import empty_cache
from ling_jax.generate.sampler import Sampling, sample_token, stream
from ling_jax.model.model import split_model
from tests.helpers import Oracle, assert_close, documents, jit, make_model, pack, probe, small, tiny

PROMPTS = documents([5, 1, 3])
NEW = documents([4, 4, 4], seed=1)  # what each prompt is continued with


# The cache.


@partial(jit, static_argnums=0)
def extend(graph, params, bias, cache, tokens_BT, segment_ids_BT):
    """(logits [B, T, V], the cache with these tokens)."""
    model = nnx.merge(graph, params, bias)
    out = model.hidden(tokens_BT, segment_ids_BT=segment_ids_BT, cache=cache)
    return model.logits(out.hidden_BTD), out.cache


def left_padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segment ids)."""
    length = max(map(len, rows))
    tokens = np.array([[9] * (length - len(row)) + row for row in rows], np.int32)
    segments = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows], np.int32)
    return tokens, segments


@pytest.fixture(scope="module")
def weights():
    return split_model(make_model(tiny()))


@pytest.fixture(scope="module")
def recomputed():
    """Per row, the logits [T, V] of prompt and continuation from one call without a cache."""
    rows = [prompt + new for prompt, new in zip(PROMPTS, NEW, strict=True)]
    batch = pack([[row] for row in [*rows, [], [], []]], 15)
    logits = probe(make_model(tiny()), batch).logits_BTV
    return [logits[i, : len(row)] for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def prefilled(weights):
    """(logits, cache) of the prompts, padded on the left."""
    cache = empty_cache(tiny(), batch=3, slots=12, dtype=jnp.float32)
    return extend(*weights, cache, *left_padded(PROMPTS))


def test_prefill_gives_the_logits_of_full_recomputation(prefilled, recomputed):
    for row, prompt in enumerate(PROMPTS):
        assert_close(prefilled[0][row, -len(prompt) :], recomputed[row][: len(prompt)])


def test_cached_steps_give_the_logits_of_full_recomputation(weights, prefilled, recomputed):
    """Rows of unequal prompts go on side by side, each at its own position."""
    cache = prefilled[1]
    for step in range(4):
        tokens = np.array([[new[step]] for new in NEW], np.int32)
        logits, cache = extend(*weights, cache, tokens, np.ones((3, 1), np.int32))
        for row, prompt in enumerate(PROMPTS):
            assert_close(logits[row, 0], recomputed[row][len(prompt) + step])
    np.testing.assert_array_equal(cache.tokens_B, [9, 5, 7])
    assert int(cache.used) == 9


def test_tokens_taken_back_leave_no_trace(weights, prefilled, recomputed):
    """As when a draft is rejected: the count of slots and tokens is lowered, then other tokens follow."""
    cache = prefilled[1]
    for token in (11, 12):
        _, cache = extend(*weights, cache, np.full((3, 1), token, np.int32), np.ones((3, 1), np.int32))
    cache = dataclasses.replace(cache, used=cache.used - 2, tokens_B=cache.tokens_B - 2)
    for step in range(2):
        tokens = np.array([[new[step]] for new in NEW], np.int32)
        logits, cache = extend(*weights, cache, tokens, np.ones((3, 1), np.int32))
    for row, prompt in enumerate(PROMPTS):
        assert_close(logits[row, 0], recomputed[row][len(prompt) + 1])


# Whole generations. A small model, since each kind of sampling is compiled by itself.


SMALL = small(num_hidden_layers=1, max_position_embeddings=24)


@pytest.fixture(scope="module")
def model():
    return make_model(SMALL)


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, PROMPTS, 6)


def test_greedy_ids_are_the_best_of_the_full_logits(model, greedy):
    oracle = Oracle(SMALL, *split_model(model)[1:])
    for prompt, new in zip(PROMPTS, greedy, strict=True):
        logits = oracle.logits(oracle.hidden(prompt + new))[len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == new


def test_a_row_does_not_depend_on_the_others(model, greedy):
    """Nor on how far it is padded: alone, a prompt of 3 takes 4 slots, not 8."""
    assert generate(model, [PROMPTS[2]], 6) == [greedy[2]]


def test_greedy_is_deterministic(model, greedy):
    assert generate(model, PROMPTS, 6, seed=5) == greedy


def test_an_end_token_ends_its_row_and_no_other(model, greedy):
    end = next(t for t in greedy[0] if t not in greedy[1] + greedy[2])
    got = generate(model, PROMPTS, 6, eos_ids=[end, 60])
    assert got == [greedy[0][: greedy[0].index(end) + 1], *greedy[1:]]


HOT = 1e6  # all tokens are as good as equally likely: the random numbers alone decide


def test_the_same_seed_gives_the_same_answers_and_another_seed_others(model):
    first, again, other = (generate(model, PROMPTS, 6, temperature=HOT, seed=seed) for seed in (3, 3, 4))
    assert first == again != other


def test_rows_and_steps_are_drawn_independently(model):
    rows = generate(model, PROMPTS, 6, temperature=HOT, seed=3)
    assert len(set(map(tuple, rows))) == 3 and all(len(set(row)) > 3 for row in rows)


def test_streamed_chunks_join_to_the_whole_answer(model, greedy):
    chunks = list(stream(model, PROMPTS, 6, Sampling(), every=4))
    assert len(chunks) == 2 and [len(row) for row in chunks[0]] == [4, 4, 4]
    assert [first + second for first, second in zip(*chunks, strict=True)] == greedy


def test_a_stream_stops_once_every_row_has_ended(model, greedy):
    ends = [row[0] for row in greedy]
    chunks = list(stream(model, PROMPTS, 6, Sampling(), eos_ids=ends))
    assert chunks == [[[end] for end in ends]]


@pytest.mark.parametrize(
    ("prompts", "new", "options", "message"),
    [
        ([], 4, {}, "an empty prompt"),
        ([[1], []], 4, {}, "an empty prompt"),
        ([[1], [2, 61]], 4, {}, "prompt 1 holds token id 61, outside the vocabulary of 61"),
        ([[-1]], 4, {}, "prompt 0 holds token id -1, outside the vocabulary of 61"),
        ([[1] * 20], 5, {}, "a prompt of 20 tokens and max_new_tokens = 5 exceed the model's 24 positions"),
        ([[1]], 0, {}, "max_new_tokens = 0 must be at least 1"),
        ([[1]], 4, {"temperature": 1.0, "top_p": 0.0}, "top_p = 0.0 must be above 0 and at most 1"),
        ([[1]], 4, {"temperature": 1.0, "top_p": 1.5}, "top_p = 1.5 must be above 0 and at most 1"),
        ([[1]], 4, {"temperature": 1.0, "top_p": float("nan")}, "top_p = nan must be above 0"),
        ([[1]], 4, {"temperature": 1.0, "top_k": -1}, "top_k = -1 must not be negative"),
        ([[1]], 4, {"temperature": float("nan")}, "temperature = nan must be a number"),
        ([[1]], 4, {"seed": 2**40}, "seed = 1099511627776 must be from 0 to 4294967295"),
        ([[1]], 4, {"temperature": -0.5}, "temperature = -0.5 must be a number"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_compiling(model, prompts, new, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, new, **options)


def test_the_last_position_can_be_used(model):
    assert len(generate(model, [[1] * 20], 4)[0]) == 4


# One draw.

LOGITS = np.array([0.5, 2.0, -1.0, 1.0, 1.5, -0.5, 0.0, -3.0], np.float32)
DRAWS = 20_000
draw = partial(jit, static_argnums=2)(sample_token)


def drawn(logits=LOGITS, seed=0, **sampling) -> np.ndarray:
    """[V] share of each token in many draws."""
    rows = np.broadcast_to(logits, (DRAWS, logits.size))
    return np.bincount(draw(rows, jax.random.key(seed), Sampling(**sampling)), minlength=logits.size) / DRAWS


def softmax(logits):
    p = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return p / p.sum()


def assert_distribution(shares: np.ndarray, want: np.ndarray):
    """Nothing where nothing may be, and a chi-square within its 1e-6 tail for up to 7 degrees of freedom."""
    assert not shares[want == 0].any()
    chi2 = (DRAWS * (shares - want)[want > 0] ** 2 / want[want > 0]).sum()
    assert chi2 < 42, f"chi-square {chi2}: drew {shares.round(4)}, expected {want.round(4)}"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature):
    assert_distribution(drawn(temperature=temperature), softmax(LOGITS / temperature))


def test_temperature_0_takes_the_best():
    assert drawn(temperature=0.0)[1] == 1


def test_top_k_keeps_the_k_best():
    kept = np.where(np.isin(np.arange(8), [1, 4, 3]), LOGITS, -np.inf)
    assert_distribution(drawn(temperature=1.0, top_k=3), softmax(kept))
    assert drawn(temperature=5.0, top_k=1)[1] == 1
    assert_distribution(drawn(temperature=1.0, top_k=100), softmax(LOGITS))


@pytest.mark.parametrize("slack", [-1e-3, 1e-3])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_top_p_keeps_the_fewest_tokens_that_hold_that_much(count, slack):
    """A little less than what the best `count` tokens hold keeps them, a little more takes in the next."""
    order = np.argsort(-LOGITS)
    top_p = softmax(LOGITS)[order[:count]].sum() + slack
    size = count + (slack > 0)
    kept = np.where(np.isin(np.arange(8), order[:size]), LOGITS, -np.inf)
    assert_distribution(drawn(temperature=1.0, top_p=float(top_p)), softmax(kept))


def test_top_p_is_taken_after_temperature_and_top_k():
    """Of the three best at half the temperature, two hold 0.9."""
    three = softmax(2 * LOGITS[[1, 4, 3]])
    assert three[0] < 0.7 < three[:2].sum()
    kept = np.where(np.isin(np.arange(8), [1, 4]), 2 * LOGITS, -np.inf)
    assert_distribution(drawn(temperature=0.5, top_k=3, top_p=0.7), softmax(kept))


def test_the_tiniest_top_p_takes_the_best():
    assert drawn(temperature=1.0, top_p=1e-9)[1] == 1
