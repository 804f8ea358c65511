"""A run that branches off another: `--init-from RUN@STEP --init-optimizer continued`."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from ling_jax.checkpoint import read_arrays, read_meta, saved_steps
from ling_jax.cli import parse_train
from ling_jax.data.mixture import Draws, NextRow
from ling_jax.files.paths import at
from ling_jax.runner import run_training
from ling_jax.train.metrics import read_metrics
from tests.support.commands import call
from tests.tiny_run import DENSE, numbers, train_args

# 4 rows of 32 tokens a step. Expert biases and stages: tests/train/test_stages.py, by night.
TINY = dict(**DENSE, train__steps=12, train__eval_every=0, checkpoint__every=4, checkpoint__keep_last=3)
RATES = [0.005, 0.005 * 2 / 3, 0.005 / 3, 0]  # a linear decay over the last 3 of 12 steps


def train(folder: Path, run: str, *flags: Any, code: int = 0, **changes: Any) -> str:
    return call("train.py", *train_args(folder, run, **{**TINY, **changes}), *flags, code=code)[1]


def branch(folder: Path, run: str, origin: str | Path, *flags: Any, code: int = 0, **changes: Any) -> str:
    """The log of a run that continues `origin`."""
    flags = ("--init-from", origin, "--init-optimizer", "continued", *flags)
    return train(folder, run, *flags, code=code, **changes)


def step_of(folder: Path, run: str, step: int) -> Path:
    return folder / "runs" / run / "checkpoints" / str(step)


@contextlib.contextmanager
def rows_taken() -> Iterator[dict[int, list[NextRow]]]:
    """The rows of each step, counted from 0, that runs inside read; threads read ahead of the last one."""
    taken, take = {}, Draws.take

    def noted(draws: Draws, step: int) -> Any:
        taken[step], state = take(draws, step)
        return taken[step], state

    with mock.patch.object(Draws, "take", noted):
        yield taken


@pytest.fixture(scope="module")
def whole() -> dict[int, list[NextRow]]:
    """The rows that the run which is left has read."""
    return {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, whole) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with rows_taken() as taken:
        train(folder, "whole")
    whole.update(taken)
    return folder


def assert_continues(folder: Path, run: str, first: int, last: int = 12) -> None:
    """`run` has the numbers of the one that it left from step `first` on, bit for bit, and no others."""
    whole, mine = (list(numbers(read_metrics(folder / "runs" / name))) for name in ("whole", run))
    assert mine == [record for record in whole if record["step"] >= first]
    jax.tree.map(
        np.testing.assert_array_equal,
        read_arrays(step_of(folder, run, last)),
        read_arrays(step_of(folder, "whole", last)),
    )
    read = [read_meta(step_of(folder, name, last))["data"]["read"] for name in ("whole", run)]
    assert read[0] == read[1]


def test_with_unchanged_settings_a_branch_has_the_bits_of_the_run_it_left_and_needs_it_no_more(folder):
    origin = folder / "left" / "run"
    shutil.copytree(folder / "runs" / "whole", origin)
    log = branch(folder, "same", f"{origin}@4")
    assert f"resuming from step 4 of {origin}/checkpoints/4" in log and "settings that differ" not in log
    assert saved_steps(at(folder / "runs" / "same" / "checkpoints")) == [8, 12]
    assert_continues(folder, "same", first=5)
    shutil.rmtree(folder / "left")
    assert "resuming from step 12\n" in branch(folder, "same", f"{origin}@4")
    assert_continues(folder, "same", first=5)


def test_changed_settings_are_said_and_hold_from_the_step_on_and_no_token_comes_twice(folder, whole):
    """A decay that branches off a constant rate, with a smaller batch of shorter rows."""
    changes = dict(schedule__decay_fraction=0.25, schedule__decay="linear", data__global_batch_size=2)
    with rows_taken() as taken:
        log = branch(folder, "changed", "whole@8", **changes, data__sequence_length=16)
    assert "settings that differ from those of step 8 (old -> new)" in log
    for name, old, new in (("data.global_batch_size", 4, 2), ("schedule.decay_fraction", 0.0, 0.25)):
        assert f"{name}: {old} -> {new}" in log
    records = list(read_metrics(folder / "runs" / "changed"))
    assert [record["step"] for record in records] == [9, 10, 11, 12]
    assert [record["train/learning_rate"] for record in records] == pytest.approx(RATES)
    assert min(taken) == 8
    rows = [row for step in range(12) for row in (whole if step < 8 else taken)[step]]
    assert [row.count for row in rows] == 32 * [32] + 8 * [16]
    marked = np.zeros(max(row.begin + row.count for row in rows), int)
    for row in rows:
        marked[row.begin : row.begin + row.count] += 1
    assert marked.max() == 1


def test_settings_that_cannot_change_are_refused_as_a_resume_refuses_them(folder):
    log = branch(folder, "refused", "whole@8", "--data.seed", 1, code=2)
    assert "data.seed: 0 -> 1: the run has read its text in the order of the former" in log
    log = branch(folder, "refused", "whole@8", "--model.hidden-size", 64, code=2)
    assert f"{step_of(folder, 'whole', 8)} holds a run of another architecture: model.hidden_size: 32 -> 64" in log
    assert "leave --init-optimizer out" in log
    log = branch(folder, "refused", "whole@8", "--optimizer.eight-bit", code=2)
    assert "is not of this configuration, it differs in" in log
    log = branch(folder, "refused", "whole@8", train__steps=8, code=2)
    assert "has done 8 steps, and the run ends after 8: raise that" in log
    assert not saved_steps(at(folder / "runs" / "refused" / "checkpoints"))


def test_a_missing_or_damaged_checkpoint_is_named_with_the_remedy(folder):
    assert f"--init-from whole@5: {folder / 'runs' / 'whole'} has the steps 4, 8, 12" in branch(
        folder, "none", "whole@5", code=2
    )
    assert "nobody@5, which does not exist: give a run folder with a saved step" in branch(
        folder, "none", "nobody@5", code=2
    )
    damaged = folder / "runs" / "damaged"
    shutil.copytree(folder / "runs" / "whole", damaged)
    [array] = (damaged / "checkpoints" / "8" / "state").glob("optimizer*mu.*lm_head*")
    next(file for file in array.iterdir() if file.name not in (".zarray", "zarr.json")).unlink()
    log = branch(folder, "none", "damaged@8", code=2)
    assert f"checkpoint {damaged / 'checkpoints' / '8'} is damaged: optimizer/" in log
    assert f"the same command with --init-from {damaged / 'checkpoints' / '12'}" in log


def test_weights_without_moments_cannot_be_continued(folder):
    merged = folder / "merged"
    call("convert.py", "merge", "--source", folder / "runs" / "whole", "--last", 2, "--target", merged)
    log = branch(folder, "none", merged, code=2)
    assert f"{merged} has weights and no moments of an optimizer; name a step of a run's" in log


def test_a_run_is_no_branch_of_itself(folder):
    log = branch(folder, "whole", "whole@8", code=2)
    assert "whole@8 is the run itself: choose another --run, or go back with --from-step 8" in log


@pytest.mark.parametrize("flags", [[], ["--init-from", "runs/a@8", "--init-mtp", "new"]])
def test_the_flag_without_a_checkpoint_to_continue_is_refused(flags):
    with pytest.raises(ValueError, match="--init-optimizer continued goes on with a checkpoint as it is"):
        run_training(*parse_train(["ling_tiny", "--init-optimizer", "continued", *flags]))
