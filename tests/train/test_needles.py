"""Needles in rows of a run's own tokens: the rows are as they should be, and right answers are counted on any mesh."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from configs.ling_tiny import config as ling_tiny
from ling_jax.config import MeshConfig, TrainConfig
from ling_jax.data.made import KEYS, RETRIEVAL, documents
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.train import needle
from ling_jax.train.compute import make_compute
from ling_jax.train.figures import Run, new_figure
from ling_jax.train.loss import IGNORE
from ling_jax.train.metrics import read_metrics
from ling_jax.train.needle import (
    DEPTHS,
    make_needle_scorer,
    needle_lengths,
    needle_metrics,
    prepare_needles,
)
from tests.support.commands import call
from tests.support.helpers import random_weights, tiny
from tests.support.marks import nightly
from tests.support.tokenizers import OWN
from tests.tiny_run import DENSE, train_args

MODEL = tiny(vocab_size=64)


def config_of(rows: int, positions: int, **changes):
    run = ling_tiny()
    model = replace(run.model, max_position_embeddings=positions)
    return replace(run, model=model, train=replace(run.train, eval_needle=rows), **changes)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """A tokenizer that has seen the text, as a run's own has."""
    return Tokenizer.train([text for text, _ in zip(documents(RETRIEVAL), range(1000), strict=False)], 600)


def test_the_rows_ask_in_the_format_of_the_text_and_are_of_the_asked_lengths(trained):
    assert needle_lengths(256) == [256] and needle_lengths(5000) == [256, 1024, 4096]
    needles = prepare_needles(trained, config_of(3, 1024))
    assert list(needles) == [256, 1024]
    for length, rows in needles.items():
        assert {name: (values.shape, values.dtype) for name, values in rows.items()} == {
            name: ((3, length), np.int32) for name in ("tokens", "targets", "positions", "segment_ids", "answers")
        }
        for row in range(3):
            tokens, targets, answers = (rows[name][row] for name in ("tokens", "targets", "answers"))
            used = int((rows["segment_ids"][row] > 0).sum())
            assert length - 80 < used <= length and tokens[0] == trained.bos_id
            text = trained.decode(tokens[1:used].tolist())
            assert trained.encode(text) == tokens[1:used].tolist()  # as a document of it would be
            body, _, asked = text.partition("?")
            last = {word: body.rindex(f"-{word}") for word in KEYS}
            assert sorted(set(answers[answers > 0])) == list(range(1, DEPTHS + 1)) and asked.count("?") == DEPTHS - 1
            for number in range(1, DEPTHS + 1):
                places = np.flatnonzero(answers == number)
                answer = trained.decode(targets[places].tolist())
                key = next(key for key in KEYS if answer.startswith(f"-{key}"))
                assert body[last[key] :].startswith(f"{answer}\n") and body.count(f"-{key}") == 2
                assert trained.decode(tokens[: places[0] + 1].tolist()).endswith(f"\n?{key}")
                if length > 256:
                    assert abs(last[key] / len(body) - (number - 0.5) / DEPTHS) < 0.15
            assert (targets[answers == 0] == IGNORE).all()


def test_off_there_are_none_and_rows_that_are_too_short_for_a_tokenizer_are_left_out(caplog):
    assert prepare_needles(OWN, config_of(0, 4096)) == {}
    assert list(prepare_needles(OWN, config_of(1, 1024))) == [1024]
    assert "no needles in rows of 256 tokens: with this tokenizer they take" in caplog.text
    with pytest.raises(ValueError, match="eval_needle = 2 looks in rows of 256 tokens at least, and the model has 255"):
        config_of(2, 255, data=replace(ling_tiny().data, sequence_length=64))


def right_answers(mesh: MeshConfig, rows: dict) -> np.ndarray:
    devices = int(np.prod([mesh.fsdp, mesh.expert, mesh.context, mesh.tensor]))
    compute = make_compute(MODEL, TrainConfig(remat="none"), mesh, jax.devices()[:devices])
    _, params, bias = random_weights(MODEL)
    return np.asarray(make_needle_scorer(compute)(params, bias, rows))


@pytest.mark.parametrize(
    "mesh", [dict(context=2, tensor=2), nightly(dict(fsdp=2, expert=2)), nightly({}), nightly(dict(tensor=2))]
)
def test_an_answer_is_right_where_all_of_its_tokens_are_the_likeliest(mesh):
    """Some answers are what the model says, some miss one token."""
    draw, length = np.random.default_rng(0), 32
    tokens = draw.integers(0, 64, (4, length), np.int32)
    positions, segments = np.tile(np.arange(length, dtype=np.int32), (4, 1)), np.ones((4, length), np.int32)
    graph, params, bias = random_weights(MODEL)
    model = nnx.merge(graph, params, bias)
    said = np.asarray(model(tokens, positions, segments).logits_BTV).argmax(-1)
    answers, targets = np.zeros((4, length), np.int32), np.full((4, length), IGNORE, np.int32)
    want = np.zeros(DEPTHS, int)
    for row in range(3):  # the last one is padding
        for number in range(1, DEPTHS + 1):
            span = slice(4 * (number - 1), 4 * (number - 1) + number % 3 + 1)
            answers[row, span], targets[row, span] = number, said[row, span]
            if (row + number) % 3:
                want[number - 1] += 1
            else:
                targets[row, span.stop - 1] = (targets[row, span.stop - 1] + 1) % 64
    batch = dict(tokens=tokens, positions=positions, segment_ids=segments, targets=targets, answers=answers)
    np.testing.assert_array_equal(right_answers(MeshConfig(**mesh), batch), want)


def test_shares_are_of_all_rows_however_they_come_in_batches():
    run = config_of(5, 1024)
    ones = {length: np.ones((5, length), np.int32) for length in (256, 1024)}
    needles = {length: {"tokens": rows, "targets": rows} for length, rows in ones.items()}
    sizes = []

    def scorer(params, bias, batch):
        sizes.append(batch["tokens"].shape)
        return (batch["tokens"][:, :1] * np.arange(DEPTHS) % 2).sum(0)  # padding adds nothing

    run = replace(run, data=replace(run.data, sequence_length=256, global_batch_size=16))
    metrics = needle_metrics(scorer, {}, {}, needles, run)
    assert sizes == [(5, 256), (4, 1024), (4, 1024)]  # no more than a step's tokens
    assert metrics["eval/needle/256/accuracy"] == metrics["eval/needle/1024/accuracy"] == 0.5
    assert metrics["eval/needle/1024/accuracy_per_depth"].tolist() == [0, 1] * (DEPTHS // 2)


def test_the_picture_has_a_panel_for_each_stage_that_was_tested():
    def record(step, *lengths):
        return {"step": step} | {f"eval/needle/{n}/accuracy_per_depth": [step / 10] * DEPTHS for n in lengths}

    records = [record(2, 256), {"step": 3}, record(4, 256), record(6, 256, 1024), {"step": 9}]
    figure = new_figure()
    said = str(needle._draw_needle(figure, Run(records, {}, 0, {"general": 4, "context": 8, "yarn": 9})))
    assert [axes.get_title() for axes in figure.axes] == ["general", "context"]
    assert figure.axes[1].images[0].get_array().shape == (DEPTHS, 2)
    assert "general 40% at 256 tokens; context 60% at 256 tokens, 60% at 1,024 tokens" in said
    figure = new_figure()
    assert "60% at 1,024 tokens" in str(needle._draw_needle(figure, Run(records, {}, 0)))
    assert [axes.get_title() for axes in figure.axes] == ["step 6"]
    assert needle._draw_needle(new_figure(), Run([{"step": 1}], {}, 0)) is None


def test_a_run_logs_what_it_finds_and_its_report_shows_it(tmp_path):
    args = train_args(
        tmp_path, "run", **DENSE, train__steps=2, train__eval_needle=2, model__max_position_embeddings=1024
    )
    call("train.py", *args)
    last = read_metrics(tmp_path / "runs" / "run")[-1]
    shares = last["eval/needle/1024/accuracy_per_depth"]
    assert len(shares) == DEPTHS and last["eval/needle/1024/accuracy"] == pytest.approx(np.mean(shares))
    assert (tmp_path / "runs" / "run" / "report" / "needle.png").exists()
    assert "Needles found" in (tmp_path / "runs" / "run" / "report.html").read_text()
