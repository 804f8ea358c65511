"""The evaluation of chat models on tasks: figures, records in the run, one JSON object."""

import json
from pathlib import Path

import pytest

from ling_jax.post.measure import Attempt, Questions, Result
from ling_jax.post.tasks import Problem
from ling_jax.train.evaluations import read_records
from tests.post.test_sft import sft
from tests.support.commands import call


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A run that has learned sums of its own for a moment."""
    folder = tmp_path_factory.mktemp("tuned")
    sft(folder, "a", sft__epochs=4)
    return folder / "runs" / "a"


def evaluate(run: Path, *flags, code: int = 0) -> tuple[str, str]:
    args = ("--checkpoint", run, "--task", "sums", "--problems", 6, "--max-new-tokens", 12, *flags)
    return call("post.evaluate", *args, code=code)


def test_both_modes_are_asked_and_kept_in_the_run(tuned):
    out, _ = evaluate(tuned, "--samples", 3, "--json")
    last = json.loads(out.splitlines()[-1])
    assert {"pass@1", "pass@k", "mean_length", "truncated"} <= last.keys() and last["k"] == 3
    assert last["problems"] == 6 and set(last["modes"]) == {"at once", "thinking"}
    assert last["pass@1"] == pytest.approx(sum(mode["pass@1"] for mode in last["modes"].values()) / 2)
    [record] = read_records(tuned)
    assert set(record["results"]) == {"sums (at once)", "sums (thinking)"} and record["temperature"] == 1.0
    [file] = (tuned / "evaluations").glob("*.jsonl")
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(answers) == 2 * 6 * (1 + 3)
    assert sum(one["thinking"] for one in answers) == 24 and sum(not one["temperature"] for one in answers) == 12
    assert all(one["tokens"] <= 12 and one["truncated"] == (one["tokens"] == 12) for one in answers if one["truncated"])
    page = (tuned / "report.html").read_text()
    assert "sums (thinking)" in page and "answers of sums" in page


def test_one_mode_can_be_asked_alone_and_several_checkpoints_share_a_table(tuned, tmp_path):
    out, _ = evaluate(tuned, "--thinking", "on", "--json", "--out", tmp_path / "answers.jsonl")
    last = json.loads(out.splitlines()[-1])
    assert list(last["modes"]) == ["thinking"] and "at once" not in out
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 12
    step = max((tuned / "checkpoints").iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else -1)
    args = ("--checkpoint", tuned, step, "--task", "sums", "--problems", 2, "--max-new-tokens", 4, "--json")
    out, _ = call("post.evaluate", *args)
    both = json.loads(out.splitlines()[-1])["checkpoints"]
    assert [one["checkpoint"] for one in both] == [str(tuned), str(step)]
    assert both[0]["modes"] == both[1]["modes"], "the same weights and seed"


def test_the_same_seed_gives_the_same_answers_however_many_are_drawn_side_by_side(tuned, tmp_path):
    files = [tmp_path / name for name in ("one.jsonl", "many.jsonl")]
    evaluate(tuned, "--samples", 2, "--out", files[0], "--batch-size", 1)
    evaluate(tuned, "--samples", 2, "--out", files[1], "--batch-size", 5)
    assert files[0].read_text() == files[1].read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--problems", 0), "--problems = 0 must be at least 1"),
        (("--temperature", 0), "--temperature = 0.0 must be above 0"),
        (("--task", "none"), "no task 'none': there are sums, letters"),
        (("--max-new-tokens", 500), "mean tokens"),
    ],
)
def test_what_cannot_be_asked_is_refused(tuned, flags, message):
    out, err = evaluate(tuned, *flags, code=0 if message == "mean tokens" else 2)
    assert message in out + err


def attempt(right: bool, tokens: int = 4, truncated: bool = False) -> Attempt:
    return Attempt("1", "1", tokens, False, truncated, right)


def test_figures_are_means_over_problems():
    questions = Questions(problems=[Problem("a", "1"), Problem("b", "1")], thinking=None, samples=2)
    drawn = [[attempt(True), attempt(False, 8)], [attempt(False, 8, True), attempt(False)]]
    figures = Result(questions, [attempt(True), attempt(False)], drawn).summary()
    assert (figures["pass@1"], figures["pass@k"], figures["k"]) == (0.25, 0.5, 2)
    assert (figures["pass@1_greedy"], figures["mean_length"], figures["truncated"]) == (0.5, 6, 0.25)
    assert figures["pass@1_stderr"] == pytest.approx(0.25)
