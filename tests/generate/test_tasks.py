"""Requests of evaluation tasks are answered together as each is alone. They are encoded as in lm-eval's own model."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ling_jax.data.tokenizer import BOS, EOD, Tokenizer
from ling_jax.generate import tasks
from ling_jax.generate.tasks import TaskModel, wanted_of, windows
from ling_jax.model.model import split_model
from tests.support.helpers import VALUES, Oracle, make_model, small
from tests.support.tokenizers import OWN, TEXTS

CONFIG = small(vocab_size=OWN.vocab_size, eos_token_id=OWN.eod_id, pad_token_id=OWN.eod_id, max_position_embeddings=128)
WINDOW = 96
TIE = 1e-4  # of logits: below it two programs may choose differently
WORDS = TEXTS[0].split()


@pytest.fixture(scope="module")
def model() -> TaskModel:
    return TaskModel(make_model(CONFIG), OWN, window=WINDOW, rows=8, stop_ids=[OWN.eod_id])


@pytest.fixture(scope="module")
def oracle(model) -> Oracle:
    return Oracle(CONFIG, *split_model(model.model)[1:])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Tokenizer:
    """The same tokenizer, which adds no start token, as the released models'."""
    folder = tmp_path_factory.mktemp("plain")
    OWN.save(str(folder))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": False}))
    return Tokenizer.load(str(folder))


def words(count: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def logprobs(oracle: Oracle, ids: list[int]) -> np.ndarray:
    logits_TV = oracle.logits(oracle.hidden(ids))
    return logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))


def alone(oracle: Oracle, context: list[int], continuation: list[int]) -> tuple[float, bool, float]:
    """(sum, greedy, least distance of a best token to the second) in float64, of one request without padding."""
    found_TV = logprobs(oracle, context + continuation)[len(context) - 1 : -1]
    best_TV = np.sort(found_TV, axis=-1)
    total = float(found_TV[np.arange(len(continuation)), continuation].sum())
    return total, found_TV.argmax(-1).tolist() == continuation, float((best_TV[:, -1] - best_TV[:, -2]).min())


def continued(oracle: Oracle, prompt: list[int], new: int) -> tuple[list[int], float]:
    """The greedy answer of one prompt, token by token, and the least distance of a best token to the second."""
    ids, least = list(prompt), np.inf
    for _ in range(new):
        last_V = logprobs(oracle, ids)[-1]
        least = min(least, float(np.diff(np.sort(last_V)[-2:])[0]))
        ids.append(int(last_V.argmax()))
    return ids[len(prompt) :], least


def test_all_kinds_together_take_few_programs(model):
    """The first test: those after it compile little."""
    compiled: list[str] = []

    def note(event: str, seconds: float, fun_name: str = "", **_) -> None:
        if event.endswith("/backend_compile_duration"):
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(note)
    model.loglikelihood([(words(1 + i % 13, i), " " + words(1 + i % 4, i)) for i in range(100)])
    model.loglikelihood_rolling([words(5 + 3 * i, i) for i in range(20)])
    model.generate_until([(words(1 + i % 11, i), {"until": ["a"], "max_gen_toks": 4 + i % 9}) for i in range(30)])
    jax.monitoring.unregister_event_duration_listener(note)
    print(compiled)
    assert 4 <= len(compiled) <= 12


def test_continuations_are_scored_as_each_is_alone(model, oracle):
    pairs = [(words(1 + 2 * (i % 7), i), " " + words(1 + i % 3, 100 + i)) for i in range(20)]
    ties = 0
    for (context, continuation), (total, greedy) in zip(pairs, model.loglikelihood(pairs), strict=True):
        ids, whole = OWN.encode(context), OWN.encode(context + continuation)
        want, best, distance = alone(oracle, [OWN.bos_id, *ids], whole[len(ids) :])
        assert abs(total - want) <= VALUES * max(1, abs(want))
        ties += greedy != best and distance < TIE
        assert greedy == best or distance < TIE
    print(f"{ties} ties")


def test_texts_longer_than_the_window_are_scored_once(model, oracle):
    texts = [words(count, count) for count in (1, 20, 60)] + [""]
    assert len(OWN.encode(texts[2])) > 2 * WINDOW
    for text, total in zip(texts, model.loglikelihood_rolling(texts), strict=True):
        want = sum(alone(oracle, *pair)[0] for pair in windows(OWN.encode(text), OWN.bos_id, WINDOW))
        assert abs(total - want) <= VALUES * max(1, abs(want))


@given(st.integers(0, 70), st.integers(1, 20))
def test_windows_predict_every_token_once_and_are_full(count, length):
    ids = list(range(count))
    found = list(windows(ids, -1, length))
    assert [token for _, continuation in found for token in continuation] == ids
    for context, continuation in found:
        assert len(context) + len(continuation) - 1 <= length
        assert [*context, *continuation] == list(range(context[0], context[0] + len(context) + len(continuation)))
    assert all(len(context) + len(continuation) == length + 1 for context, continuation in found[1:])


def test_answers_are_those_of_each_prompt_alone(model, oracle):
    prompts = [words(1 + 3 * (i % 4), i) for i in range(7)]
    news = [3 + 2 * (i % 3) for i in range(7)]
    whole = [continued(oracle, OWN.prefix_ids + OWN.encode(p), n) for p, n in zip(prompts, news, strict=True)]
    texts = [OWN.decode(ids[: ids.index(OWN.eod_id)] if OWN.eod_id in ids else ids) for ids, _ in whole]
    stops = [text[len(text) // 2 :][:1] or "no such text" for text in texts]  # one that comes
    asked = [(p, {"until": [s], "max_gen_toks": n}) for p, s, n in zip(prompts, stops, news, strict=True)]
    asked += [(p, {"until": "no such text", "max_gen_toks": n}) for p, n in zip(prompts, news, strict=True)]
    found, ties = model.generate_until(asked), 0
    for i, text in enumerate(found):
        want = texts[i].split(stops[i])[0] if i < len(prompts) else texts[i - len(prompts)]
        tied = whole[i % len(prompts)][1] < TIE
        ties += tied
        assert text == want or tied
    assert ties < len(found)
    print(f"{ties} ties")


def test_a_prompt_that_is_too_long_keeps_its_end(model):
    prompt = words(80, 3)
    assert model._prompts([prompt, "a", ""], 8) == [
        OWN.encode(prompt)[8 - WINDOW :], OWN.prefix_ids + OWN.encode("a"), [OWN.bos_id],
    ]  # fmt: skip


def test_equal_requests_are_drawn_apart_and_again_the_same(model):
    asked = [("a", {"until": [], "max_gen_toks": 8, "do_sample": True})] * 4 + [("b", {"max_gen_toks": 8})] * 2
    found = model.generate_until(asked)
    assert len(set(found[:4])) == 4 and len(set(found[4:])) == 1
    assert model.generate_until(asked) == found


# What is asked of the model, as ids.


@pytest.fixture
def asked(monkeypatch) -> list[tuple[list[int], list[int]]]:
    """The pairs that reach the scorer."""
    pairs: list[tuple[list[int], list[int]]] = []
    monkeypatch.setattr(tasks, "score", lambda model, some: pairs.extend(some) or [(0.0, True)] * len(some))
    return pairs


def test_a_pair_is_encoded_as_lm_evals_hugging_face_model_does(model, plain, asked):
    model = TaskModel(model.model, plain, window=WINDOW)
    encode = plain.encode
    model.loglikelihood([("if x", " is"), ("if x  ", "is"), ("", " is"), ("  ", "is"), ("", BOS + "is"), ("", EOD)])
    assert asked[0] == (encode("if x"), encode(" is"))
    assert asked[1] == (encode("if x"), encode("if x  is")[len(encode("if x")) :])  # spaces go with what follows
    assert asked[2] == ([plain.bos_id], encode(" is"))
    assert asked[3] == ([plain.bos_id], encode("  is"))
    assert asked[4] == ([plain.bos_id], encode("is"))  # not twice
    assert asked[5] == ([plain.bos_id], [plain.eod_id])


def test_a_start_token_that_the_tokenizer_adds_comes_once(model, asked):
    ids = OWN.encode("if x")
    model.loglikelihood([("if x", " is"), (BOS + "if x", " is"), ("", " is")])
    assert asked == [([OWN.bos_id, *ids], OWN.encode(" is"))] * 2 + [([OWN.bos_id], OWN.encode(" is"))]


def test_what_grows_into_one_token_is_encoded_apart(model, asked):
    whole = next(token for token in OWN.encode(TEXTS[0]) if len(OWN.decode([token]).strip()) > 2)
    text = OWN.decode([whole])
    model.loglikelihood([(text[:-1], text[-1])])
    assert asked[0][1] == OWN.encode(text[-1])


def test_a_pair_that_is_too_long_keeps_its_end(model, asked):
    context, continuation = words(80, 1), " " + words(2, 2)
    model.loglikelihood([(context, continuation)])
    ids, after = OWN.encode(context), OWN.encode(continuation)
    assert asked == [(ids[-(WINDOW + 1 - len(after)) :], after)]


@pytest.mark.parametrize(
    ("pair", "words_"),
    [(("a", ""), "request 1 has an empty"), (("a", " b" * 120), "request 1 has a continuation of .* window of 96")],
)
def test_a_pair_that_cannot_be_scored_is_named(model, pair, words_):
    with pytest.raises(ValueError, match=words_):
        model.loglikelihood([("a", "b"), pair])


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({}, (256, (), 0.0)),
        ({"until": "\n", "max_new_tokens": 7}, (7, ("\n",), 0.0)),
        ({"until": ["a", "b"], "max_gen_toks": 3, "max_tokens": 9, "num_beams": 1}, (3, ("a", "b"), 0.0)),
        ({"do_sample": False, "temperature": 0.7}, (256, (), 0.0)),
        ({"do_sample": True}, (256, (), 1.0)),
        ({"temperature": 0.5, "top_p": None}, (256, (), 0.5)),
    ],
)
def test_generation_settings_mean_what_they_mean_to_lm_eval(settings, want):
    wanted = wanted_of(settings, 512)
    assert (wanted.new, wanted.stop, wanted.sampling.temperature) == want


def test_further_generation_settings_are_taken():
    sampling = wanted_of({"do_sample": True, "top_p": 0.9, "top_k": 5, "max_gen_toks": 1}, 8).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 0.9, 5)


@pytest.mark.parametrize(
    ("settings", "words_"),
    [
        ({"max_gen_toks": 96}, "an answer of 96 tokens leaves no room for its prompt in a window of 96"),
        ({"max_gen_toks": 0}, "max_gen_toks = 0 must be a whole number from 1 on"),
        ({"max_gen_toks": "8"}, "max_gen_toks = '8'"),
        ({"until": [1], "max_gen_toks": 8}, r"until = \[1\] must be a text"),
        ({"num_beams": 10, "max_gen_toks": 8}, "num_beams.* what is not known here, only until, max_gen_toks"),
        ({"best_of": 2, "max_gen_toks": 8}, "best_of"),
        ({"do_sample": True, "top_p": 2, "max_gen_toks": 8}, "top_p = 2"),
    ],
)
def test_generation_settings_that_cannot_be_met_are_named(settings, words_):
    with pytest.raises(ValueError, match=words_):
        wanted_of(settings, WINDOW)
