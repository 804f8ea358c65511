"""The benchmark of speculation runs, and its figures are what they say."""

import dataclasses
import json
import math
import random

import jax.numpy as jnp
import pytest

from benchmarks import speculation
from benchmarks.speculation import Parts, follow, path_of, read, repeated_share, run_drafts, run_trunk
from ling_jax.checkpoint import Checkpointer
from ling_jax.config import DataConfig, DataSource, RunConfig
from ling_jax.convert.load import load_pretrained
from ling_jax.generate.engine import Engine, Request
from ling_jax.generate.sampling import Sampling
from tests.support.helpers import random_weights, small
from tests.support.tokenizers import OWN
from tests.tiny_run import WORDS

MODEL = small(
    num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=1, vocab_size=400,
    max_position_embeddings=64, eos_token_id=1, pad_token_id=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with random weights, its text and tokenizer."""
    folder = tmp_path_factory.mktemp("speculation")
    draw = random.Random(0)
    (folder / "text.txt").write_text("\n".join(" ".join(draw.choices(WORDS, k=8)) for _ in range(200)))
    source = DataSource(path=str(folder / "text.txt"))
    data = DataConfig(sources=(source,), holdout_fraction=0.1, sequence_length=32)
    config = RunConfig(model=MODEL, data=data)
    _, params, bias = random_weights(MODEL)
    checkpointer = Checkpointer(str(folder / "checkpoints"), config.checkpoint)
    checkpointer.save(1, {"params": params, "bias": bias}, {"config": dataclasses.asdict(config)})
    checkpointer.close()
    OWN.save(str(folder / "tokenizer"))
    return folder


@pytest.mark.parametrize(
    ("answers", "want"),
    [
        ([[1, 2, 3, 4]], 0.0),
        ([[1, 2, 1, 2, 1]], 0.5),  # 12, 21, then both again
        ([[5, 5, 5, 5, 5]], 0.75),
        ([[1, 2, 3], [1, 2, 3]], 0.0),  # not within one answer
        ([[1, 2, 3], [7, 7, 7]], 0.25),
        ([[1], []], 0.0),
    ],
)
def test_the_share_of_repeated_runs(answers, want):
    assert repeated_share(answers, size=2) == want
    assert repeated_share([[*range(8), *range(8)]]) == pytest.approx(1 / 9)


@pytest.mark.nightly
def test_all_figures_are_finite_and_agree(run_dir, capsys):
    sizes = ["--prompts", "2", "--prompt-len", "8", "--new", "16", "--drafts", "2"]
    speculation.main(["--checkpoint", str(run_dir), *sizes])
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    figures = {name: value for name, value in result.items() if isinstance(value, int | float)}
    assert all(math.isfinite(value) for value in figures.values()), figures
    assert all(figures[name] > 0 for name in ("plain_step_ms", "verify_ms", "draft_ms", "speedup")), figures
    assert 0 <= result["acceptance"] <= 1 <= result["tokens_per_step"] <= 3
    assert result["differing_answers"] == 0 and lines[0].startswith("0 of 2 greedy answers differ")
    parts = result["plain_step_ms"] / (result["verify_ms"] + result["draft_ms"])
    assert result["predicted_speedup"] == pytest.approx(result["tokens_per_step"] * parts)
    assert any(line.split()[:1] == ["speedup_over_predicted"] for line in lines)


@pytest.mark.nightly
def test_the_timed_parts_do_what_the_engine_does(run_dir, monkeypatch):
    """At every step they draw the same tokens and make the same drafts."""
    model, drafted = load_pretrained(run_dir), []
    engine = Engine(model, rows=1, slots=24, drafts=2)

    def step(count, original=engine.step):
        updates = original(count)
        drafted.append(engine.rows.drafts_BP[0].tolist())
        return updates

    monkeypatch.setattr(engine, "step", step)
    request = Request(prompt=OWN.encode("the model reads a short line")[:8], max_new_tokens=16)
    path = path_of(request.prompt, follow(engine, request), 2)
    parts, tokens = Parts(model, Sampling(), 2), path.tokens_S.tolist()
    for i in range(int(path.steps)):
        until = path._replace(steps=jnp.int32(i + 1))
        cache, hidden_SD = read(*parts.weights, path.tokens_S)
        drawn, cache = run_trunk(*parts.weights, cache, until, parts.options, 3, parts.kinds)
        known = int(path.known_S[i])
        assert [int(token_1[0]) for token_1, _ in drawn] == tokens[known : known + 3]
        drafts, _ = run_drafts(*parts.weights, cache, until, hidden_SD, parts.options, 2, parts.kinds)
        assert [int(token_1[0]) for token_1 in drafts] == drafted[i + 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "900"], r"prompts = 900 exceed the \d+ windows of 8 tokens in the held-out text"),
        (["--new", "60"], "exceed the model's 64 positions"),
        (["--drafts", "0"], "drafts = 0 must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(run_dir, monkeypatch, options, message):
    monkeypatch.setattr(speculation, "load_pretrained", lambda _: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        speculation.main(["--checkpoint", str(run_dir), "--prompts", "2", "--prompt-len", "8", *options])
