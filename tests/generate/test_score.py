"""Continuations are scored as the model scores them one at a time, whatever they are scored with.

Legend: T tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ling_jax
from ling_jax import score, token_logprobs
from ling_jax.config import MeshConfig
from ling_jax.generate.score import CALL_TOKENS, ROW, _calls, _Request
from ling_jax.model.model import split_model
from tests.support.helpers import Oracle, make_model, small, tiny

CONFIG = small(max_position_embeddings=1100)


def mixed(count: int, longest: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, (count, 2)) // [1, 8] + [0, 1]
    return [tuple(rng.integers(0, 59, n).tolist() for n in pair) for pair in lengths]


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG)


def test_sums_and_greedy_are_those_of_the_specification():
    model = make_model(tiny())
    oracle = Oracle(model.config, *split_model(model)[1:])
    pairs = mixed(8, 12) + [([5], greedy_after(oracle, [5], 3))]
    for (context, continuation), (total, greedy) in zip(pairs, score(model, pairs), strict=True):
        logits_TV = oracle.logits(oracle.hidden(context + continuation))[len(context) - 1 : -1]
        logits_TV -= np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        want = logits_TV[np.arange(len(continuation)), continuation].sum()
        assert abs(total - want) <= 2e-5 * max(1, abs(want))
        assert greedy == (logits_TV.argmax(-1).tolist() == continuation)
    assert greedy  # the last


def greedy_after(oracle: Oracle, tokens: list[int], count: int) -> list[int]:
    new: list[int] = []
    for _ in range(count):
        new.append(int(oracle.logits(oracle.hidden(tokens + new))[-1].argmax()))
    return new


def test_many_of_all_lengths_are_scored_as_each_is_alone(model):
    pairs = [*mixed(60, 200), ([1], [2]), ([3] * 700, [4]), *mixed(3, 1000, seed=1)]
    together = score(model, pairs)
    assert all(isinstance(total, float) and isinstance(greedy, bool) for total, greedy in together)
    for i in range(0, len(pairs), 16):
        context, continuation = pairs[i]
        want = float(token_logprobs(model, [context + continuation])[0, len(context) - 1 :].sum())
        assert abs(together[i][0] - want) <= 2e-5 * max(1, abs(want))
        [(alone, greedy)] = score(model, [pairs[i]])
        assert abs(together[i][0] - alone) <= 2e-5 * max(1, abs(want)) and greedy == together[i][1]


def test_four_hundred_requests_take_few_programs(model):
    """Even where they are scored in one call, one by one, and in another order."""
    compiled: list[str] = []

    def note(event: str, seconds: float, fun_name: str = "", **_) -> None:
        if event.endswith("/backend_compile_duration") and "_scores" in fun_name:
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(note)
    pairs = mixed(400, 400, seed=2)
    score(model, pairs)
    assert len(compiled) <= 4
    for pair in pairs[:40]:
        score(model, [pair])
    score(model, pairs[::-1])
    assert len(compiled) <= 12
    jax.monitoring.unregister_event_duration_listener(note)


@given(st.lists(st.tuples(st.integers(1, 1500), st.integers(1, 40)), max_size=60))
def test_every_request_lies_whole_in_one_row(lengths):
    requests = [_Request(i, np.zeros(sum(pair), np.int32), pair[0]) for i, pair in enumerate(lengths)]
    seen = []
    for length, rows in _calls(requests):
        assert len(rows) * length <= max(CALL_TOKENS, length) and length & (length - 1) == 0
        for row in rows:
            assert sum(request.tokens for request in row) <= length <= max(ROW, 2 * row[0].tokens)
            seen += [request.place for request in row]
    assert sorted(seen) == list(range(len(requests)))


@pytest.mark.parametrize("mesh", [{"expert": 4}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_a_model_on_a_mesh_scores_as_one_on_a_device(tmp_path, mesh):
    golden = "tests/golden/tiny-ling"
    pairs = mixed(5, 20)
    want = score(ling_jax.load_pretrained(golden), pairs)
    got = score(ling_jax.load_pretrained(golden, mesh=MeshConfig(**mesh)), pairs)
    for (a, greedy_a), (b, greedy_b) in zip(got, want, strict=True):
        assert abs(a - b) <= 2e-5 * max(1, abs(b)) and greedy_a == greedy_b


def test_arrays_are_taken_as_lists_are(model):
    context, continuation = [1, 2, 3], [4, 5]
    want = score(model, [(context, continuation)])
    assert score(model, [(np.array(context), jnp.array(continuation))]) == want
    assert score(model, iter([[np.array(context, np.uint8), continuation]])) == want
    assert score(model, []) == []


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([([1], [2]), ([], [2])], "the context of pair 1 is empty: give a token .*scoring_prefix"),
        ([([1], [])], "the continuation of pair 0 is empty: there is nothing to score"),
        ([([1], [61])], "the continuation of pair 0 holds token id 61, outside the vocabulary of 61"),
        ([([-1], [2])], "the context of pair 0 holds token id -1"),
        ([([1.5], [2])], "the context of pair 0 holds 1.5"),
        ([([True], [2])], "the context of pair 0 holds True"),
        ([("a", [2])], "the context of pair 0 is 'a'"),
        ([(1, [2])], "the context of pair 0 is 1"),
        ([[1, 2, 3]], r"pair 0 is \[1, 2, 3\]; it must be \(context, continuation\)"),
        (["ab"], "pair 0 is 'ab'"),
        (7, "pairs = 7"),
        ([([1] * 1000, [2] * 102)], "pair 0 has 1102 tokens, .* the model has 1100 positions"),
    ],
)
def test_what_cannot_be_scored_is_named(model, pairs, words):
    with pytest.raises(ValueError, match=words):
        score(model, pairs)


def test_the_last_token_needs_no_position(model):
    [(total, _)] = score(model, [([1] * 1000, [2] * 101)])
    assert np.isfinite(total)
