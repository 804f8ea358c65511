"""Decoding with a cache is the whole model, one token at a time, whatever else is being decoded.

Legend: B rows, T tokens, V vocabulary, S cache slots.
"""

import copy
import dataclasses
import itertools
import random
from collections import Counter
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ling_jax import generate, token_logprobs
from ling_jax.config import MeshConfig
from ling_jax.generate.cache import cache_bytes, empty_cache
from ling_jax.generate.engine import Answer, Engine, Request, stream
from ling_jax.generate.sampling import Sampling
from ling_jax.model.model import split_model
from tests.support.helpers import Oracle, assert_close, documents, jit, make_model, pack, probe, small, tiny
from tests.support.marks import nightly
from tests.support.tokenizers import OWN

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
    np.testing.assert_array_equal(cache.length_B, [9, 5, 7])


def test_tokens_taken_back_leave_no_trace(weights, prefilled, recomputed):
    """As when a draft is rejected: the rows' lengths are lowered, then other tokens follow."""
    cache = prefilled[1]
    for token in (11, 12):
        _, cache = extend(*weights, cache, np.full((3, 1), token, np.int32), np.ones((3, 1), np.int32))
    cache = dataclasses.replace(cache, length_B=cache.length_B - 2)
    for step in range(2):
        tokens = np.array([[new[step]] for new in NEW], np.int32)
        logits, cache = extend(*weights, cache, tokens, np.ones((3, 1), np.int32))
    for row, prompt in enumerate(PROMPTS):
        assert_close(logits[row, 0], recomputed[row][len(prompt) + 1])


# Whole generations. A small model, since each kind of sampling is compiled by itself.


SMALL = small(num_hidden_layers=1, first_k_dense_replace=0, max_position_embeddings=24)


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
        ([[1], [2, 61]], 4, {}, "prompt 1: the prompt holds token id 61, outside the vocabulary of 61"),
        ([[-1]], 4, {}, "prompt 0: the prompt holds token id -1, outside the vocabulary of 61"),
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


# Continuous batching.

MODEL_LENGTH = 24


@pytest.fixture(scope="module")
def requests():
    """Prompts of 1 to 14 tokens and answers of 1 to 8; some share a beginning, two are one prompt."""
    draw = random.Random(0)
    base = [draw.randrange(59) for _ in range(14)]
    prompts = [base[:9], base[:5] + [7, 7], [3], base[:9], [draw.randrange(59) for _ in range(6)], base, base[:1]]
    return [Request(prompt=prompt, max_new_tokens=1 + 3 * i % 8) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def alone(model, requests):
    return by_recomputation(model, requests)


def by_recomputation(model, requests) -> list[list[int]]:
    """The greedy answers from the logits of full recomputation."""
    oracle = Oracle(model.config, *split_model(model)[1:])
    answers = []
    for request in requests:
        tokens = list(request.prompt)
        for _ in range(request.max_new_tokens):
            tokens.append(int(oracle.logits(oracle.hidden(tokens))[-1].argmax()))
        answers.append(tokens[len(request.prompt) :])
    return answers


@pytest.fixture(scope="module")
def engine(model):
    """Two rows, prompts in chunks of four."""
    return Engine(model, rows=2, slots=MODEL_LENGTH, chunk=4, routing=True)


def run_all(engine: Engine, requests: list[Request], steps: int = 3) -> list[Answer]:
    found = dict(engine.run(requests, steps))
    assert sorted(found) == list(range(len(requests))) and not engine.busy
    return [found[i] for i in range(len(requests))]


def test_rows_that_end_are_replaced_and_every_request_gets_its_own_answer(engine, requests, alone):
    """Prompts come in chunks, and beginnings are taken over from other rows."""
    answers = run_all(engine, requests)
    assert [answer.ids for answer in answers] == alone
    assert {answer.end for answer in answers} == {"length"}


MESHES = [
    nightly({"expert": 4}, 0),
    nightly({"expert": 2, "context": 2}, 0),
    ({"expert": 2, "tensor": 2}, 2),
    nightly({"data": 2, "tensor": 4, "dispatcher": "all_gather"}, 0),
]


@pytest.mark.parametrize(("mesh", "drafts"), MESHES, ids=str)
def test_over_a_mesh_every_request_gets_the_answer_of_full_recomputation(requests, mesh, drafts):
    """Rows on every part of the mesh, of which some stay empty; kv heads repeated where `tensor` has more devices."""
    config = dataclasses.replace(DRAFTER, vocab_size=64)
    model, wanted = make_model(config, mesh=MeshConfig(**mesh)), by_recomputation(make_model(config), requests)
    engine = Engine(model, rows=3, slots=MODEL_LENGTH, chunk=4, drafts=drafts, routing=True)
    answers = run_all(engine, requests)
    assert [answer.ids for answer in answers] == wanted
    assert len(engine.rows.cache.kinds["softmax_moe"].k_LBSGC.sharding.device_set) == np.prod(
        [size for size in mesh.values() if isinstance(size, int)]
    )
    for answer, request in zip(answers, requests, strict=True):
        assert answer.routing.shape[0] == len(request.prompt) + request.max_new_tokens - 1


def test_a_shared_beginning_is_run_once(model, monkeypatch):
    """Four samples of a prompt of 9 tokens: the first runs all of it, the others only its last token."""
    counts = []
    engine = Engine(model, rows=4, slots=MODEL_LENGTH, chunk=16)

    def put(waiting, row, source, shared, original=engine._put):
        counts.append(shared)
        original(waiting, row, source, shared)

    monkeypatch.setattr(engine, "_put", put)
    hot = Sampling(temperature=HOT)
    prompt = [*PROMPTS[0], 1, 2, 3, 4]
    answers = run_all(engine, [Request(prompt=prompt, max_new_tokens=6, sampling=hot, seed=s) for s in range(4)])
    assert counts == [0, 8, 8, 8]
    assert len({tuple(answer.ids) for answer in answers}) == 4


def test_the_same_seed_gives_the_same_answer_whatever_runs_beside_it(model, engine):
    hot = Request(prompt=PROMPTS[0], max_new_tokens=6, sampling=Sampling(temperature=HOT, top_p=0.9), seed=7)
    others = [Request(prompt=[i], max_new_tokens=2 + i, sampling=Sampling(temperature=1.0), seed=i) for i in range(4)]
    beside = run_all(engine, [*others, hot])[-1].ids
    assert beside == run_all(engine, [hot])[0].ids
    assert beside == generate(model, [PROMPTS[0]], 6, temperature=HOT, top_p=0.9, seed=7)[0]


def test_a_withdrawn_request_goes_on_where_it_was(engine, requests, alone):
    """As when a rollout is cut off and finished later, in another row, with other requests between."""
    i = max(range(len(requests)), key=lambda i: requests[i].max_new_tokens)
    ticket = engine.submit(requests[i])
    engine.step(3)
    half = engine.withdraw(ticket)
    before = copy.deepcopy(half)
    assert half.end is None and half.ids == alone[i][: len(half.ids)] and 0 < len(half.ids) < len(alone[i])
    run_all(engine, requests[:3])
    engine.submit(requests[i], half)
    while engine.busy:
        [update] = engine.step(2)
    assert update.answer.ids == alone[i] and len(update.answer.logprobs) == len(alone[i])
    assert half.ids == before.ids and half.logprobs == before.logprobs  # what was given is not written to
    waiting = engine.submit(requests[0])
    assert engine.withdraw(waiting).ids == [] and not engine.busy
    with pytest.raises(KeyError, match="no request has ticket"):
        engine.withdraw(waiting)


def test_the_experts_and_log_probabilities_returned_are_the_models(model, engine):
    """`token_logprobs` to 1e-4, and replaying the routing gives the same logits."""
    request = Request(prompt=PROMPTS[0], max_new_tokens=8, sampling=Sampling(temperature=2.0, top_k=5), seed=1)
    [answer] = run_all(engine, [request])
    tokens = np.array([[*PROMPTS[0], *answer.ids]], np.int32)
    logits = np.asarray(model(tokens).logits_BTV, np.float64)[0, len(PROMPTS[0]) - 1 : -1]
    model_logp = np.log(softmax_rows(logits))
    np.testing.assert_allclose(answer.model_logprobs, model_logp[np.arange(8), answer.ids], atol=1e-4)
    want = token_logprobs(model, tokens)[0, len(PROMPTS[0]) - 1 :]
    np.testing.assert_allclose(answer.model_logprobs, want, atol=1e-4)
    kept = np.where(logits >= np.sort(logits, axis=-1)[:, -5:-4], logits / 2, -np.inf)
    np.testing.assert_allclose(answer.logprobs, np.log(softmax_rows(kept))[np.arange(8), answer.ids], atol=1e-4)
    routing = model(tokens[:, :-1]).routing
    np.testing.assert_array_equal(answer.routing, routing.ids[:, 0].transpose(1, 0, 2))


def softmax_rows(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_a_thousand_random_requests_are_neither_lost_nor_swapped(model, engine):
    """Greedy ones, whose answers are those of the same request alone; of the others length and end must be right."""
    draw = random.Random(1)
    prompts = [[draw.randrange(59) for _ in range(draw.randint(1, 12))] for _ in range(12)]
    want = generate(model, prompts, 8)
    requests, kinds = [], []
    for _ in range(1000):
        which, new = draw.randrange(12), draw.randint(1, 8)
        hot = draw.random() < 0.5
        stops = [draw.choice(want[which])] if draw.random() < 0.3 else []
        sampling = Sampling(temperature=draw.uniform(0.1, 9), top_p=draw.uniform(0.1, 1), top_k=draw.randrange(9))
        options = dict(sampling=sampling, seed=draw.randrange(2**32)) if hot else {}
        requests.append(Request(prompt=prompts[which], max_new_tokens=new, stop_ids=stops, **options))
        kinds.append((which, hot))
    assert len({answer.end for answer in run_all(engine, requests[:20], 8)}) == 2
    for request, answer, (which, hot) in zip(requests, run_all(engine, requests, 8), kinds, strict=True):
        assert len(answer.ids) == len(answer.logprobs) <= request.max_new_tokens
        stopped = bool(request.stop_ids) and answer.ids[-1] in request.stop_ids
        assert answer.end == ("stop" if stopped else "length")
        assert stopped or len(answer.ids) == request.max_new_tokens
        assert not set(request.stop_ids) & set(answer.ids[:-1])
        if not hot:
            assert answer.ids == want[which][: len(answer.ids)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 20}, "exceed the cache's 16 slots a row"),
        ({"stop_ids": [1, 2, 3]}, "3 stop_ids are more than the 2"),
        ({"sampling": Sampling(logit_bias={61: 1.0})}, "logit_bias holds token id 61, outside the vocabulary of 61"),
    ],
)
def test_what_cannot_run_is_refused_when_it_is_submitted(model, change, message):
    engine = Engine(model, rows=1, slots=16, stops=2)
    with pytest.raises(ValueError, match=message):
        engine.submit(dataclasses.replace(Request(prompt=[1], max_new_tokens=2), **change))
    assert not engine.busy


def test_a_cache_takes_what_its_formula_says():
    for dtype in (jnp.float32, jnp.bfloat16):
        cache = empty_cache(tiny(), batch=3, slots=12, dtype=dtype)
        arrays = [a for one in cache.kinds.values() for a in (one.k_LBSGC, one.v_LBSGC)]
        elements = 2 * tiny().num_hidden_layers * 3 * 12 * tiny().num_key_value_heads * tiny().head_dim
        assert (
            sum(a.nbytes for a in arrays) == cache_bytes(tiny(), 3, 12, dtype) == elements * jnp.dtype(dtype).itemsize
        )


# Speculation.

DRAFTER = dataclasses.replace(SMALL, num_nextn_predict_layers=1)
FORKED = {3: 9.0, 7: 9.0, 20: 9.0}  # three tokens are far better than all others: drafts stand now and then


@pytest.fixture(scope="module")
def drafter():
    return make_model(DRAFTER)


def test_greedy_answers_are_the_same_with_speculation(drafter, requests):
    """There are limits, stops, and drafts that stand and fall."""
    forked = [dataclasses.replace(r, sampling=Sampling(logit_bias=FORKED)) for r in requests]
    forked += [dataclasses.replace(r, max_new_tokens=9) for r in forked]
    forked += [dataclasses.replace(r, stop_ids=[7]) for r in forked[-3:]]
    plain = run_all(Engine(drafter, rows=3, slots=MODEL_LENGTH), forked)
    answers = run_all(Engine(drafter, rows=2, slots=MODEL_LENGTH, chunk=8, drafts=2), forked)
    assert [answer.ids for answer in answers] == [answer.ids for answer in plain]
    assert [answer.end for answer in answers] == [answer.end for answer in plain]
    for answer, want in zip(answers, plain, strict=True):
        np.testing.assert_allclose(answer.model_logprobs, want.model_logprobs, atol=1e-4)
    drafted, accepted = (sum(getattr(a, name) for a in answers) for name in ("drafted", "accepted"))
    assert 0.1 < accepted / drafted < 0.9


def test_what_the_mtp_layer_drafts_is_what_it_predicts_without_a_cache(drafter):
    """After a prompt in chunks, then a step: its logits for position `known`, from the whole row at once."""
    engine = Engine(drafter, rows=1, slots=MODEL_LENGTH, chunk=8, drafts=2)
    prompt = [*PROMPTS[0], *PROMPTS[2], 5, 6, 7, 8]
    engine.submit(Request(prompt=prompt, max_new_tokens=9))
    for steps in (1, 2):
        engine.step(steps)
        known = int(engine.rows.known_B[0])
        tokens = np.asarray(engine.rows.tokens_BS[:, :known])
        assert int(engine.rows.drafts_BP[0, 0]) == int(drafter(tokens).mtp_logits_BTV[0, known - 2].argmax())


@pytest.mark.parametrize("drafts", [nightly(0), nightly(2)])
def test_three_tokens_are_drawn_with_the_models_probabilities(drafter, drafts):
    """Chi-square over the 27 answers that top_k 3 leaves."""
    new, wanted, batch = 3, 2400, 50
    sampling = Sampling(temperature=1.5, top_k=3, logit_bias=FORKED)
    prompt = PROMPTS[0]
    paths = list(itertools.product(FORKED, repeat=new))
    logits = np.array(drafter(np.array([[*prompt, *path] for path in paths], np.int32)).logits_BTV)
    logits = logits[:, len(prompt) - 1 : -1, list(FORKED)] / 1.5
    chances = softmax_rows(logits.astype(np.float64))
    index = np.array([[list(FORKED).index(t) for t in path] for path in paths])
    want = wanted * np.take_along_axis(chances, index[:, :, None], axis=-1)[..., 0].prod(1)
    engine = Engine(drafter, rows=batch, slots=16, drafts=drafts)
    asked = [Request(prompt=prompt, max_new_tokens=new, sampling=sampling, seed=seed) for seed in range(wanted)]
    found = Counter(tuple(answer.ids) for answer in run_all(engine, asked))
    got = np.array([found[path] for path in paths])
    assert got.sum() == wanted
    chi2 = ((got - want) ** 2 / want).sum()
    assert want.min() > 5 and chi2 < 80, f"chi-square {chi2} with 26 degrees of freedom"  # its 1e-6 tail is 77


def test_a_beginning_taken_over_gives_the_drafts_of_one_that_was_run(drafter):
    """Where the rows part, the MTP layer's entry for the last shared token is of the other row's next one."""
    engine = Engine(drafter, rows=2, slots=MODEL_LENGTH, chunk=8, drafts=2)
    prompt = [*PROMPTS[0], *PROMPTS[2], 5, 6, 7]
    for last in (8, 11):
        engine.submit(Request(prompt=[*prompt, last, 9], max_new_tokens=9))
    engine.step(1)
    for row in (0, 1):
        known = int(engine.rows.known_B[row])
        tokens = np.asarray(engine.rows.tokens_BS[row : row + 1, :known])
        k_LBSGC = engine.rows.cache.kinds["mtp"].k_LBSGC
        alone = Engine(drafter, rows=2, slots=MODEL_LENGTH, chunk=8, drafts=2)
        alone.submit(Request(prompt=tokens[0, :-1].tolist(), max_new_tokens=9))
        alone.step(1)
        want = alone.rows.cache.kinds["mtp"].k_LBSGC
        assert_close(k_LBSGC[0, row, : known - 1], want[0, 0, : known - 1])


def test_drafts_need_an_mtp_layer(model):
    with pytest.raises(ValueError, match="drafts = 1 must be 0 for a model without an MTP layer"):
        Engine(model, rows=1, slots=8, drafts=1)


def test_a_stop_string_ends_its_row_and_no_other():
    """It ends with the ids of the text up to it; whatever the steps, it is found in the first that completes it."""
    model = make_model(dataclasses.replace(SMALL, vocab_size=400, max_position_embeddings=64))
    prompts = documents([5, 1, 3], vocab=400)
    whole = generate(model, prompts, 40, temperature=HOT)
    texts = [OWN.decode(ids) for ids in whole]
    stop = next(OWN.decode([i]) for i in whole[0][20:] if OWN.decode([i]).isalpha() and len(OWN.decode([i])) > 1)
    got = generate(model, prompts, 40, temperature=HOT, stop=[stop, "never said"], tokenizer=OWN)
    for ids, all_ids, text in zip(got, whole, texts, strict=True):
        assert ids == all_ids[: len(ids)]
        if stop in text:
            assert stop in OWN.decode(ids) and stop not in OWN.decode(ids[:-1])
        else:
            assert ids == all_ids
    assert len(got[0]) < 40
    with pytest.raises(ValueError, match="stop needs tokenizer"):
        generate(model, prompts, 4, stop=["a"])
    with pytest.raises(ValueError, match="stop = 'a' must be a list of texts"):
        generate(model, prompts, 4, stop="a", tokenizer=OWN)
