"""Which checkpoints of a run are its best: by what validation logged, or by what tasks found."""

import re
from pathlib import Path
from typing import Any

import pytest

from ling_jax.checkpoint import read_meta
from ling_jax.commands.harness import keep_record
from ling_jax.convert.ranking import ranking
from ling_jax.convert.weights import open_weights
from ling_jax.files.paths import at
from ling_jax.train.evaluations import save_record
from ling_jax.train.metrics import MetricsWriter
from tests.support.checkpoints import result, weights_at, write_run
from tests.support.commands import call

STEPS = (10, 20, 30, 40)
BY_A, BY_B = "eval/a/nats_per_token", "eval/b/nats_per_token"


def losses(step: int) -> dict[str, float]:
    """Source a says that 20 and 40 are the best, source b that 10 and 30 are."""
    a, b = {10: (3.0, 1.0), 20: (1.0, 2.0), 30: (2.0, 1.0), 40: (1.5, 4.0)}[step]
    both = {BY_A: a, BY_B: b, "eval/a/bits_per_byte": a / 2, "eval/nats_per_token": (a + b) / 2}
    return both | {"eval/nats_per_token/position_0-512": a, "eval/merged_nats_per_token": 0.5}


def write_record(run: Path, step: int, value: float, better: bool = True, name: str = "sums", **asked: Any) -> None:
    about = {"window": 64, "num_fewshot": None, "limit": None, "chat": False, **asked}
    results = {"sums": {"alias": "sums", "acc,none": value, "acc,strict": 1 - value, "acc_stderr,none": 0.1}}
    save_record(run, f"{step}-{name}", {"step": step, **about, "results": results,
                                        "higher_is_better": {"sums": {"acc": better}}})  # fmt: skip


@pytest.fixture
def run(tmp_path) -> Path:
    """The metrics and evaluations of a run, of every step that it saved."""
    with MetricsWriter(tmp_path) as writer:
        for step in range(5, 41, 5):
            writer.write(step, {"train/loss": 1.0, **(losses(step) if step in STEPS else {})})
    for step, value in zip(STEPS, (0.5, 0.25, 0.75, 0.5), strict=True):
        write_record(tmp_path, step, value)
    return tmp_path


@pytest.mark.parametrize(
    ("metric", "count", "best", "others"),
    [
        (BY_A, 2, [20, 40], [BY_B]),
        (BY_B, 2, [10, 30], [BY_A]),
        (BY_B, 3, [10, 20, 30], [BY_A]),
        ("eval/a/bits_per_byte", 2, [20, 40], [BY_B]),
        ("eval/nats_per_token", 2, [20, 30], []),  # every source chose
        ("eval/nats_per_token/position_0-512", 2, [20, 40], []),
        ("sums/acc", 2, [30, 40], [BY_A, BY_B]),  # of equal ones the later
        ("sums/acc,strict", 2, [20, 40], [BY_A, BY_B]),
    ],
)
def test_the_best_are_those_of_one_held_out_set_and_others_are_shown_beside(run, metric, count, best, others):
    found = ranking(at(run), STEPS, metric)
    assert found.best(count) == best and list(found.others) == others
    for key in others:
        assert found.others[key] == {step: losses(step)[key] for step in STEPS}
    lines = found.render(best).splitlines()
    assert [int(line.split()[0]) for line in lines if " * " in line] == best


def test_a_metric_whose_lower_figures_are_better_ranks_the_other_way(run):
    for step in STEPS:
        write_record(run, step, {10: 0.1}.get(step, 0.2), better=False)
    assert ranking(at(run), STEPS, "sums/acc").best(2) == [10, 40]


@pytest.mark.parametrize(
    ("steps", "metric", "message"),
    [
        (STEPS, None, "--top needs --rank-by: a loss that .* has eval/a/nats_per_token, eval/b/nats_per_token$"),
        ((10, 15, 20, 25), BY_A, "metrics.jsonl has no eval/a/nats_per_token of step 15, 25: set train.eval_every so "
         "that every checkpoint is validated; or choose among those that have it by --steps 10,20"),
        (STEPS, "eval/c/nats_per_token", "has no eval/c/nats_per_token of step 10, 20, 30, 40: .* has eval/a/nats"),
        (STEPS, "eval/merged_nats_per_token", "--rank-by eval/merged_nats_per_token ranks no checkpoints: give a loss"),
        (STEPS, "sums/f1", "evaluations has no sums/f1, asked in one way, of step 10, 20, 30, 40: evaluate each of "),
        ((10, 15), "sums/acc", r"of step 15: evaluate each of them \(python -m ling_jax.evaluate --tasks sums\)$"),
    ],
)  # fmt: skip
def test_figures_that_are_lacking_are_one_error_with_the_remedy(run, steps, metric, message):
    with pytest.raises(ValueError, match=message):
        ranking(at(run), steps, metric)


def test_tasks_that_were_asked_in_several_ways_are_not_compared(run):
    write_record(run, 10, 1.0, name="few", num_fewshot=5)
    assert ranking(at(run), STEPS, "sums/acc").figures[10] == 0.5  # only one way was asked of all
    for step in STEPS:
        write_record(run, step, 1.0, name="few", num_fewshot=5)
    with pytest.raises(ValueError, match="has it asked in several ways, .*'num_fewshot': 5.*: leave one"):
        ranking(at(run), STEPS, "sums/acc")


def test_the_best_are_merged_uniformly_and_the_merge_says_what_chose_them(run):
    write_run(run, {step: weights_at(step) for step in STEPS})
    merge = ("convert.py", "merge", "--source", run, "--target", run / "m")
    _, told = call(*merge, "--top", 2, "--rank-by", BY_A)
    assert f"the best 2 of 4 (*) by {BY_A}:\nstep  " in told and "is left that did not choose" not in told
    for path, values in result(run / "m").items():
        mean = (weights_at(20)[path].astype(float) + weights_at(40)[path]) / 2
        assert abs(values - mean).max() <= 1e-6 * abs(mean).max()
    assert read_meta(run / "m")["merge"]["chosen_by"] == BY_A
    shown, _ = call("convert.py", "inspect", "--no-checksums", "--source", run / "m")
    assert re.search(rf"average of +{run}, the best by {BY_A}: steps 20 \(0.5\), 40 \(0.5\)", shown)
    _, told = call(*merge[:-1], run / "n", "--steps", "10,20,30", "--top", 2, "--rank-by", "eval/nats_per_token")
    assert read_meta(run / "n")["merge"]["steps"] == [20, 30]
    assert f"no held-out text of {run} is left that did not choose: report the target on other text" in told


@pytest.mark.parametrize("kind", ["checkpoints", "snapshots"])
def test_what_tasks_find_of_a_step_ranks_the_steps_and_the_snapshots_of_its_run(tmp_path, kind):
    write_run(tmp_path, {10: weights_at(10)})
    (tmp_path / "checkpoints").rename(tmp_path / kind)
    record = {"step": 10, "results": {"sums": {"acc,none": 0.5}}, "higher_is_better": {"sums": {"acc": True}}}
    keep_record(open_weights(tmp_path / kind / "10"), "sums", record)
    MetricsWriter(tmp_path).close()
    assert ranking(at(tmp_path), [10], "sums/acc").figures == {10: 0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top", 5, "--rank-by", BY_A], "--top 5 must be between 2 and the 4 checkpoints that it chooses from"),
        (["--last", 3, "--top", 1, "--rank-by", BY_A], "--top 1 must be between 2 and the 3 checkpoints"),
        (["--last", 3, "--rank-by", BY_A], f"--rank-by {BY_A} does nothing: give --top"),
        (["--top", 2, "--rank-by", BY_A, "--decay", "sqrt"], "--top averages uniformly, .* no --decay or --weights"),
    ],
)
def test_flags_that_do_not_go_together_are_one_error(run, options, message):
    write_run(run, {step: {("params", "w"): weights_at(1)["params", "norm", "weight"]} for step in STEPS})
    _, told = call("convert.py", "merge", "--source", run, "--target", run / "m", *options, code=2)
    assert re.fullmatch(f"error: {message}.*\n", told), told
