"""Tokens are drawn from the right distribution, row by row, and each row by its own rule.

Legend: B rows, V vocabulary, S slots.
"""

import json
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ling_jax.commands import sample
from ling_jax.convert.tokenizer import ends_of, generation_config_of, tokenizer_of
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
from tests.support.helpers import jit
from tests.support.tokenizers import write_tokenizer
from tests.tiny_run import REPO

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


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"])
@pytest.mark.parametrize("value", ["0.5", None, True, [1.0]])
def test_settings_that_are_no_numbers_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} = .* must be a (whole )?number"):
        Sampling(**{name: value})


def test_numbers_of_numpy_are_numbers():
    assert Sampling(temperature=np.float32(0.5), top_k=np.int64(3)).top_k == 3
    with pytest.raises(ValueError, match="top_k = 2.5 must be a whole number"):
        Sampling(top_k=2.5)


# What generation_config.json and the flags of sample.py say together.


def settings(saved: dict, **flags) -> tuple[float, float, int, float]:
    sampling = sample.sampling_of(sample.SampleCommand(**flags), saved)
    return sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty


def test_flags_come_before_the_file_and_the_file_before_the_defaults():
    saved = {"temperature": 1.5, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
    assert settings({}) == (0.7, 0.8, 0, 1.0)
    assert settings(saved) == (1.5, 0.9, 20, 1.1)
    assert settings(saved, temperature=0.0, top_k=5) == (0.0, 0.9, 5, 1.1)


def test_nulls_are_defaults_and_minus_one_is_every_token():
    nulls = dict.fromkeys(("temperature", "top_p", "top_k", "repetition_penalty", "do_sample", "eos_token_id"))
    assert settings(nulls) == settings({})
    assert settings({"top_k": -1})[2] == settings({"top_k": 50}, top_k=-1)[2] == 0


@pytest.mark.parametrize(
    ("flags", "temperature"),
    [
        ({}, 0.0),
        ({"repetition_penalty": 1.2, "max_new_tokens": 3}, 0.0),
        ({"temperature": 0.3}, 0.3),
        ({"top_p": 0.9}, 0.6),  # who chooses what to draw from wants a draw
        ({"min_p": 0.1}, 0.6),
    ],
)
def test_do_sample_false_is_greedy_unless_a_flag_asks_for_a_draw(flags, temperature):
    assert settings({"do_sample": False, "temperature": 0.6}, **flags)[0] == temperature
    assert settings({"do_sample": True, "temperature": 0.6})[0] == 0.6


def folder_with(folder: Path, generation: dict | None = None, eos: object = 1, **tokenizer) -> str:
    """A HF folder whose tokens 1 to 5 are <|endoftext|>, <|role_end|>, A, B and C; its weights are none."""
    write_tokenizer(folder, ["<|endoftext|>", "<|role_end|>", "A", "B", "C"], **tokenizer)
    config = json.loads((REPO / "tests" / "golden/tiny-ling/config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": eos}))
    (folder / "model.safetensors").touch()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return str(folder)


@pytest.mark.parametrize(
    ("generation", "eos", "tokenizer", "ends"),
    [
        (None, 1, {}, {1, 2}),
        ({"eos_token_id": None}, None, {}, {1, 2}),
        ({"eos_token_id": [3, 4]}, 1, {}, {1, 2, 3, 4}),
        ({"eos_token_id": 3}, [1, 5], {"eos_token": "B"}, {1, 2, 3, 4, 5}),
        ({}, 1, {"eos_token": {"content": "A"}}, {1, 2, 3}),
        ({"eos_token_id": [511, 156892]}, 1, {"eos_token": "not a token"}, {1, 2, 511}),
    ],
    ids=str,
)
def test_ends_are_those_of_all_the_files_together(tmp_path, generation, eos, tokenizer, ends):
    path = folder_with(tmp_path, generation, eos, **tokenizer)
    found = ends_of(path, tokenizer_of(path))
    assert set(found) == ends and len(found) == len(ends)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("temperature", "hot", "a number"),
        ("temperature", True, "a number"),
        ("top_p", [0.9], "a number"),
        ("top_k", 2.5, "a whole number"),
        ("top_k", "50", "a whole number"),
        ("do_sample", "no", "true or false"),
        ("do_sample", 0, "true or false"),
        ("eos_token_id", "1", "a token id, or a list of them"),
        ("eos_token_id", [1, None], "a token id, or a list of them"),
        ("eos_token_id", 1.5, "a token id, or a list of them"),
        ("eos_token_id", -1, "a token id, or a list of them"),
    ],
)
def test_a_generation_config_of_other_types_names_file_and_field(tmp_path, field, value, wanted):
    path = folder_with(tmp_path, {field: value})
    with pytest.raises(ValueError, match=rf"generation_config\.json: {field} = .* must be {wanted}$") as error:
        generation_config_of(path)
    assert str(tmp_path) in str(error.value)


def test_a_generation_config_loses_its_nulls(tmp_path):
    path = folder_with(tmp_path, {"top_p": None, "top_k": 50.0, "x": [1]})
    assert generation_config_of(path) == {"top_k": 50.0, "x": [1]}
