"""Runs of reinforcement learning: what they log and keep, resumes in the middle of a version, what they refuse."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ling_jax.checkpoint import read_arrays
from ling_jax.data.packing import IGNORE
from ling_jax.post.rl import ROLLOUTS
from ling_jax.train.metrics import read_metrics
from tests.post.test_sft import sft
from tests.support.commands import call
from tests.support.runs import kill_at
from tests.tiny_run import numbers, run, start

SMALL = dict(
    rl__prompts=4, rl__group=4, rl__minibatches=2, rl__max_new_tokens=24, rl__rows=8, rl__problems=16,
    rl__eval_problems=4, rl__eval_every=2, data__global_batch_size=8, data__sequence_length=96, train__steps=6,
    checkpoint__every=2, schedule__warmup_steps=0, train__sample_tokens=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A run that has learned the form of an answer, if not to add."""
    folder = tmp_path_factory.mktemp("tuned")
    sft(folder, "a", sft__epochs=30, sft__task_worked=0, data__seed=1, model__first_k_dense_replace=0)
    return folder / "runs" / "a"


def rl_args(tuned: Path, folder: Path, name: str, **changes: Any) -> list[str]:
    settings = {"init_from": tuned, "runs_dir": folder / "runs", "run": name, **SMALL, **changes}
    flags = {key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()}
    return ["rl", "rl_tiny", *(text for flag, value in flags.items() for text in (f"--{flag}", str(value)))]


def test_a_run_learns_from_its_own_answers_and_keeps_the_biases(tuned, tmp_path):
    _, log = call("post.py", *rl_args(tuned, tmp_path, "a", rl__thinking="off"))
    assert "lpo: units are sentences" in log
    records = read_metrics(tmp_path / "runs" / "a")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    drawn = [record for record in records if "reward/mean" in record]
    assert [record["step"] for record in drawn] == [1, 3, 5], "every version's first update says what it drew"
    names = {"reward/std", "group/without_signal", "response/length_mean", "response/truncated", "time/rollout"}
    assert names <= drawn[0].keys() and {"policy/entropy", "policy/kl_old"} <= records[1].keys()
    assert [record["step"] for record in records if "eval/pass@1" in record] == [1, 5]
    assert records[0]["policy/log_ratio_rms"] < 1e-4, "on its first update a version is the one that drew"
    before, after = (read_arrays(folder)["bias"] for folder in (tuned, tmp_path / "runs" / "a"))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_version_is_packed_as_it_was_drawn(tuned, tmp_path):
    call("post.py", *rl_args(tuned, tmp_path, "a", rl__thinking="off", train__steps=2, rl__preset="gspo"))
    with np.load(tmp_path / "runs" / "a" / ROLLOUTS / "0.npz") as kept:
        for number in range(2):
            rows = {name: kept[f"{number} {name}"] for name in ("targets", "units", "weights", "advantages", "old")}
            drawn = rows["units"] > 0
            assert ((rows["targets"] != IGNORE) == drawn).all()
            assert (rows["weights"][drawn] > 0).all() and (rows["weights"][~drawn] == 0).all()
            assert (rows["old"][drawn] < 0).all() and (rows["old"][~drawn] == 0).all()
            total = (rows["weights"] * rows["advantages"]).sum()
            assert abs(total) < 1e-5, "each answer counts as much as another, and their advantages add up to 0"


def test_a_run_killed_between_the_updates_of_a_version_ends_as_one_that_was_left_alone(tuned, tmp_path):
    sizes = dict(train__steps=8, checkpoint__every=1, rl__thinking="off")
    run("post.py", *rl_args(tuned, tmp_path, "whole", **sizes))
    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    kill_at(start("post.py", *rl_args(tuned, tmp_path, "killed", **sizes)), killed, "line", 3, 0.05)
    run("post.py", *rl_args(tuned, tmp_path, "killed", **sizes))
    one, other = (numbers(read_metrics(folder)) for folder in (killed, whole))
    assert [{**record, "time/rollout": 0} for record in one] == [{**record, "time/rollout": 0} for record in other]
    jax.tree.map(np.testing.assert_array_equal, read_arrays(killed), read_arrays(whole))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(train__bias_update_rate=0.1), "train.bias_update_rate = 0.1 must be 0: expert biases are frozen"),
        (dict(rl__prompts=5), "rl.prompts = 5 must be a multiple of rl.minibatches = 2"),
        (dict(rl__max_new_tokens=90), "more than data.sequence_length = 96"),
        (dict(data__global_batch_size=1), "a minibatch takes"),
        (dict(data__sources__0__path="none"), "no task 'none'"),
    ],
)
def test_settings_that_cannot_be_are_refused(tuned, tmp_path, changes, message):
    _, err = call("post.py", *rl_args(tuned, tmp_path, "a", rl__thinking="off", **changes), code=2)
    assert message in " ".join(err.replace("\u2502", " ").split())


def test_a_run_needs_a_model_to_start_from(tmp_path):
    args = ["rl", "rl_tiny", "--runs-dir", tmp_path / "runs"]
    assert "give --init-from" in call("post.py", *args, code=2)[1]


def test_what_a_version_drew_is_missed_or_refused_where_it_is_gone_or_damaged(tuned, tmp_path):
    sizes = dict(train__steps=1, checkpoint__every=1, rl__thinking="off")
    call("post.py", *rl_args(tuned, tmp_path, "a", **sizes))
    file = tmp_path / "runs" / "a" / ROLLOUTS / "0.npz"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    _, err = call("post.py", *rl_args(tuned, tmp_path, "a", **sizes | dict(train__steps=2)), code=2)
    assert "0.npz is damaged" in err and "move it away" in err
    file.unlink()
    _, log = call("post.py", *rl_args(tuned, tmp_path, "a", **sizes | dict(train__steps=2)))
    assert "0.npz is missing: the answers" in log
