"""A run in stages: each is trained with settings of its own, and it may stop and go on anywhere."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs.ling_tiny import config as ling_tiny
from ling_jax.checkpoint import read_arrays, read_meta, saved_steps
from ling_jax.cli import TrainCommand
from ling_jax.commands.train import planned
from ling_jax.config import DataConfig, DataSource, RopeScaling, RunConfig, ScheduleConfig, Stage
from ling_jax.convert.load import load_pretrained
from ling_jax.files.paths import at
from ling_jax.runner import _entered
from ling_jax.train.metrics import read_metrics
from ling_jax.train.state import make_trainer
from tests.support.commands import call
from tests.support.helpers import assert_trees_equal, small
from tests.support.marks import nightly
from tests.support.runs import kill_at, latest_step, lines_of
from tests.tiny_run import SPARSE, numbers, start, train_args, write_text

# 128 tokens a step in all stages but the last, whose rows are longer than a batch of the others.
RECIPE = """
from dataclasses import replace
from configs.ling_tiny import config as tiny
from ling_jax.config import DataSource, RopeScaling, Stage
def config():
    a, b = (DataSource(path="{folder}/" + name) for name in ("text", "more"))
    stages = (
        Stage(name="general", tokens=1000, sources=(replace(a, weight=0.7), replace(b, weight=0.3))),
        Stage(name="reasoning", tokens=768, sources=(replace(a, weight=0.4), replace(b, weight=0.6))),
        Stage(name="context", tokens=512, sequence_length=64, global_batch_size=2, rope_theta=40000.0,
              max_position_embeddings=256, bias_update_rate=1e-4),
        Stage(name="thought", tokens=512, peak_lr=0.01, warmup_steps=2, fresh_moments=True),
        Stage(name="yarn", tokens=500, sequence_length=256, global_batch_size=1,
              rope_scaling=RopeScaling(factor=2.0, original_max_position_embeddings=256)),
    )
    base = tiny()
    return replace(base, schedule=replace(base.schedule, decay_fraction=0.0), stages=stages)
"""
ENDS = {"general": 8, "reasoning": 14, "context": 18, "thought": 22, "yarn": 24}
TINY = dict(**SPARSE, train__eval_every=0, checkpoint__every=5, checkpoint__keep_last=1)


def train(folder: Path, run: str, *flags: Any) -> str:
    """Trains the recipe, and returns the log."""
    if not (folder / "recipe.py").exists():
        write_text(folder / "more")
        for file in (folder / "more").iterdir():
            file.write_text(file.read_text().replace("the ", "a "))
        (folder / "recipe.py").write_text(RECIPE.format(folder=folder))
    args = train_args(folder, run, **TINY)
    return call("train.py", folder / "recipe.py", *args[1:], *flags)[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "log").write_text(train(folder, "whole"))
    return folder


def step_of(folder: Path, run: str, step: int) -> Path:
    return folder / "runs" / run / "checkpoints" / str(step)


def test_every_stage_has_its_steps_rate_and_rows_and_its_last_checkpoint_stays(folder):
    records = {record["step"]: record for record in read_metrics(folder / "runs" / "whole")}
    assert sorted(records) == list(range(1, 25))
    rates = {step: record["train/learning_rate"] for step, record in records.items()}
    assert [rates[step] for step in (1, 5, 8, 9, 18)] == pytest.approx([0.001, 0.005, 0.005, 0.005, 0.005])
    assert [rates[step] for step in (19, 20, 22, 23)] == pytest.approx([0.005, 0.01, 0.01, 0.01])
    assert saved_steps(at(folder / "runs" / "whole" / "checkpoints")) == list(ENDS.values())
    assert all("eval/nats_per_token" in records[end] for end in ENDS.values())
    last = read_meta(step_of(folder, "whole", 24))["data"]["read"]
    assert last["tokens"] == 22 * 128 + 2 * 256 and last["block"] == 256
    assert records[8]["data/text/share"] == pytest.approx(0.7, abs=0.05)
    assert records[14]["data/text/share"] == pytest.approx(0.4, abs=0.07)


def test_every_checkpoint_carries_its_stages_model(folder):
    models = {name: load_pretrained(str(step_of(folder, "whole", end))).config for name, end in ENDS.items()}
    assert [model.rope_theta for model in models.values()] == [10000.0] * 2 + [40000.0] * 3
    assert models["thought"].rope_scaling is None
    assert models["yarn"].rope_scaling == RopeScaling(factor=2.0, original_max_position_embeddings=256)
    for name, end in ENDS.items():
        assert read_meta(step_of(folder, "whole", end))["config"]["stage"] == name


def test_every_border_is_exported_with_its_stages_config_json(folder, tmp_path):
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
    wanted = {
        "general": (10000.0, None, 128), "reasoning": (10000.0, None, 128), "context": (40000.0, None, 256),
        "thought": (40000.0, None, 256), "yarn": (40000.0, yarn, 256),
    }  # fmt: skip
    for name, end in ENDS.items():
        source, target = step_of(folder, "whole", end), tmp_path / name
        call("convert.py", "to-hf", "--source", source, "--target", target)
        exported = json.loads((target / "config.json").read_text())
        theta, scaling, positions = wanted[name]
        assert (exported["rope_theta"], exported["max_position_embeddings"]) == (theta, positions)
        said = exported["rope_scaling"]
        assert said == scaling or (scaling is not None and scaling.items() <= said.items())
        ours, theirs = (load_pretrained(str(path)).config for path in (source, target))
        training = dict(hf_json=ours.hf_json, mtp_loss_scaling_factor=ours.mtp_loss_scaling_factor)
        assert replace(theirs, **training) == ours  # so what is computed from them is equal


def test_the_log_and_the_report_tell_of_each_stage(folder):
    log, report = (folder / "log").read_text(), (folder / "runs" / "whole" / "report.html").read_text()
    assert "stage context, training from step 14 to 18" in log
    assert "stage thought: steps 19 to 22, 2 rows of 64 tokens, learning rate 0.01" in log
    assert "stage yarn" in report and "24 of 24" in report


def assert_same(folder: Path, run: str) -> None:
    """The run ends as the one that was left alone did, bit for bit."""
    whole, other = (list(numbers(read_metrics(folder / "runs" / name))) for name in ("whole", run))
    assert other == whole
    want = flatten_dict(read_arrays(step_of(folder, "whole", 24)))
    got = flatten_dict(read_arrays(step_of(folder, run, 24)))
    assert want.keys() == got.keys()
    for path, array in want.items():
        np.testing.assert_array_equal(array, got[path], err_msg="/".join(path))
    states = [read_meta(step_of(folder, name, 24))["data"]["read"] for name in ("whole", run)]
    assert states[0] == states[1]


def test_a_run_that_is_stopped_after_a_stage_and_inside_one_goes_on_as_if_it_had_not_been(folder):
    log = train(folder, "stopped", "--stop-after", "reasoning")
    assert "15/" not in log and saved_steps(at(folder / "runs" / "stopped" / "checkpoints")) == [8, 14]
    train(folder, "stopped")
    assert_same(folder, "stopped")
    log = train(folder, "stopped", "--from-stage", "thought")
    assert "resuming from step 18" in log and "stage thought, training from step 18 to 22" in log
    assert_same(folder, "stopped")


SIX = (("line", 7), ("save", 8), ("line", 13), ("save", 14), ("start", 0), ("line", 19))


@pytest.mark.parametrize(
    ("seed", "moments"), [(3, (("line", 8), ("save", 16))), nightly(0, SIX), nightly(1, SIX)], ids=["two", "six", "6"]
)
def test_sigkills_at_borders_in_saves_and_in_steps_change_nothing(folder, seed, moments):
    draw, name = random.Random(seed), f"killed{seed}"
    args = [str(folder / "recipe.py"), *train_args(folder, name, **TINY)[1:]]
    run_dir, ends = folder / "runs" / name, []
    for moment, line in moments:
        process = start("train.py", *args)
        kill_at(process, run_dir, moment, line + draw.randint(0, 1), draw.uniform(0, 0.1))
        ends.append(f"{moment} {lines_of(run_dir)}/{latest_step(run_dir)}")
    print("killed at (moment, lines / checkpoint):", ", ".join(ends))
    train(folder, name)
    assert_same(folder, name)


@pytest.mark.nightly
@pytest.mark.parametrize("border", [8, 18])
def test_a_run_that_branches_off_at_a_border_ends_as_the_one_it_left(folder, border):
    run = f"branch{border}"
    train(folder, run, "--init-from", f"whole@{border}", "--init-optimizer", "continued")
    whole, mine = (list(numbers(read_metrics(folder / "runs" / name))) for name in ("whole", run))
    assert mine == whole[border:]
    assert_trees_equal(read_arrays(step_of(folder, run, 24)), read_arrays(step_of(folder, "whole", 24)))


def test_no_tokens_place_goes_back_where_rows_become_longer(folder):
    before = read_meta(step_of(folder, "whole", 14))["data"]["read"]["places"]
    after = read_meta(step_of(folder, "whole", 24))["data"]["read"]["places"]
    assert all(after[name] >= before[name] for name in before)
    assert sum(before.values()) == 14 * 128


def test_with_fresh_moments_the_optimizer_begins_anew_and_the_rate_goes_on():
    run = RunConfig(
        model=small(num_hidden_layers=1),
        data=DataConfig(sequence_length=16, global_batch_size=2),
        stages=(Stage(name="a", tokens=64), Stage(name="b", tokens=64, fresh_moments=True), Stage(name="c", tokens=9)),
    )
    _, fresh, kept = run.stage_runs()
    trainer = make_trainer(fresh.config)
    state = jax.device_get(trainer.new_state())
    ones = jax.tree.map(np.ones_like, state.optimizer)
    state = state._replace(step=np.int32(2), optimizer=ones)
    new: Any = _entered(trainer, state, fresh).optimizer
    assert all((leaf == 0).all() for leaf in jax.tree.leaves((new[1].mu, new[1].nu))) and new[1].count == 0
    assert new[-1].count == 1  # as it was
    assert _entered(trainer, state._replace(step=np.int32(3)), fresh).optimizer is ones  # inside the stage
    assert _entered(trainer, state._replace(step=np.int32(4)), kept).optimizer is ones


# Their settings.


BASE = replace(
    ling_tiny(), data=DataConfig(sequence_length=256, global_batch_size=16), schedule=ScheduleConfig(warmup_steps=9)
)


def test_a_stage_changes_what_it_names_and_the_rest_stays():
    source = DataSource(path="a")
    run = replace(
        BASE,
        stages=(
            Stage(name="one", tokens=10_000, warmup_steps=7),
            Stage(name="two", tokens=4096, sources=(source,), sequence_length=512, only=("layers.*",)),
            Stage(name="three", tokens=1, mtp_loss_scaling_factor=0.3),
        ),
    )
    one, two, three = run.stage_runs()
    assert [(s.first_step, s.config.train.steps, s.first_tokens) for s in (one, two, three)] == [
        (0, 3, 0), (3, 4, 12288), (4, 5, 20480),
    ]  # fmt: skip
    assert {s.config.data.block_length for s in (one, two, three)} == {512}
    assert one.config.data.sources == BASE.data.sources and three.config.data.sources == (source,)
    assert [s.config.schedule.warmup_steps for s in (one, two, three)] == [7, 0, 0]
    assert three.config.train.only == ("layers.*",) and three.config.model.mtp_loss_scaling_factor == 0.3
    assert RunConfig.from_json(run.to_json()) == run
    assert BASE.stage_runs()[0].config is BASE


def test_a_first_stages_batch_may_grow_into_the_next():
    data = replace(BASE.data, batch_ramp_from=8, batch_ramp_by=8, batch_ramp_tokens=8192)
    stages = (Stage(name="one", tokens=4096), Stage(name="two", tokens=8192))
    run = replace(BASE, data=data, train=replace(BASE.train, microbatches=2), stages=stages)
    one, two = run.stage_runs()
    assert (one.config.train.steps, two.config.train.steps) == (2, 5)  # 2048 tokens a step, then 4096 from 8192 on
    assert two.config.data.batch_at(4096) == 8 and two.config.data.batch_at(8192) == 16


@pytest.mark.parametrize(
    ("stages", "changes", "message"),
    [
        ([dict(name="a"), dict(name="a")], {}, "stages a, a: each needs a name of its own"),
        ([dict(name="a", sequence_length=1 << 20)], {}, "stage 'a': data.sequence_length = 1048576 exceeds"),
        ([dict(name="a")], {"schedule": ScheduleConfig(decay_fraction=0.1)}, "decay_fraction = 0.1 must be 0"),
        ([dict(name="a", global_batch_size=7, microbatches=2)], {}, "stage 'a': data.global_batch_size = 7 must be"),
    ],
)
def test_stages_that_cannot_be_are_refused(stages, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(BASE, stages=tuple(Stage(tokens=100, **stage) for stage in stages), **changes)


def test_unknown_stages_are_named(folder):
    args = train_args(folder, "whole", **TINY)
    for flag in ("--stop-after", "--from-stage"):
        _, err = call("train.py", folder / "recipe.py", *args[1:], flag, "last", code=2)
        assert f"error: {flag} last: the run's stages are general, reasoning, context, thought, yarn" in err
    _, err = call("train.py", folder / "recipe.py", *args[1:], "--from-stage", "general", code=2)
    assert "the run begins with it" in err


def test_a_plan_is_of_one_stage():
    stages = (Stage(name="one", tokens=1), Stage(name="two", tokens=1, sequence_length=512))
    command = TrainCommand(config=replace(BASE, stages=stages))
    assert planned(command).stage == "one"
    assert planned(replace(command, from_stage="two")).data.sequence_length == 512
    with pytest.raises(ValueError, match="--from-stage six: the run's stages are one, two"):
        planned(replace(command, from_stage="six"))
