"""Snapshots of weights: taken at an interval of tokens, kept by their own rule, merged and scored during a run."""

import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ling_jax.checkpoint import Checkpointer, read_arrays, read_mean, read_meta, saved_steps
from ling_jax.config import CheckpointConfig, RunConfig, StageRun
from ling_jax.convert.load import load_pretrained
from ling_jax.convert.merge import merge_snapshots
from ling_jax.convert.tokenizer import tokenizer_of
from ling_jax.convert.weights import LINEAGE
from ling_jax.files.paths import at
from ling_jax.snapshots import Snapshots
from ling_jax.train.metrics import read_metrics
from tests.support.commands import call
from tests.tiny_run import DENSE, numbers, train_args

# 128 tokens a step: a snapshot every 4 steps.
TINY = dict(
    **DENSE, train__steps=24, train__eval_every=8, checkpoint__every=10, checkpoint__snapshot_tokens=512,
    checkpoint__keep_snapshots=3, checkpoint__merge_snapshots=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    call("train.py", *train_args(folder, "whole", **TINY), "--checkpoint.write-merged")
    return folder


def test_they_have_weights_alone_at_their_tokens_and_the_last_ones_are_kept(folder):
    snapshots = folder / "runs" / "whole" / "snapshots"
    assert saved_steps(at(snapshots)) == [16, 20, 24]
    assert {path[0] for path in flatten_dict(read_arrays(snapshots / "20"))} <= {"params", "bias"}
    assert read_meta(snapshots / "20")["data"]["read"]["tokens"] == 20 * 128
    last = read_arrays(folder / "runs" / "whole" / "checkpoints" / "24")
    for path, weight in flatten_dict(read_arrays(snapshots / "24")["params"]).items():
        np.testing.assert_array_equal(weight, flatten_dict(last["params"])[path])


def test_a_snapshot_is_a_checkpoint_of_its_run(folder):
    path = str(folder / "runs" / "whole" / "snapshots" / "16")
    assert load_pretrained(path).config.vocab_size == 320
    assert tokenizer_of(path).fingerprint == read_meta(path)["tokenizer"]


def score_of(checkpoint: Path) -> float:
    """Nats per token of the run's held-out text."""
    out, _ = call("evaluate", "--checkpoint", checkpoint, "--held-out")
    each = re.findall(r"^(text|all) +[\d,]+ +(\S+) +\S+$", out, re.MULTILINE)
    assert [name for name, _ in each] == ["text", "all"] and each[0][1] == each[1][1]
    return float(each[0][1])


def test_their_mean_is_scored_as_the_merged_checkpoint_is(folder, tmp_path):
    run = folder / "runs" / "whole"
    scores = {r["step"]: r for r in read_metrics(run) if "eval/merged_nats_per_token" in r}
    assert sorted(scores) == [8, 16, 24]  # at 8 of the two that there are
    call("convert.py", "merge", "--source", run / "snapshots", "--last", 3, "--target", tmp_path / "merged")
    seen = read_arrays(tmp_path / "merged")
    for path, weight in flatten_dict(seen["params"]).items():
        each = [flatten_dict(read_arrays(run / "snapshots" / str(step))["params"])[path] for step in (16, 20, 24)]
        np.testing.assert_allclose(weight, np.mean(np.float64(each), 0), atol=1e-6)
    found = {key: scores[24][f"eval/{key}nats_per_token"] for key in ("merged_", "")}
    for key, place in (("merged_", tmp_path / "merged"), ("", run)):
        assert score_of(place) == pytest.approx(found[key], rel=1e-5)
    assert found["merged_"] != found[""]


def test_a_runs_last_act_is_to_write_their_mean(folder):
    run = folder / "runs" / "whole"
    assert read_meta(run / "merged")[LINEAGE]["steps"] == [16, 20, 24]
    assert read_meta(run / "merged")[LINEAGE]["weights"] == [1 / 3] * 3  # by no curve: gaps may differ
    assert read_meta(run / "merged")[LINEAGE]["decay"] is None
    each = [flatten_dict(read_arrays(run / "snapshots" / str(step))) for step in (16, 20, 24)]
    for path, weight in flatten_dict(read_arrays(run / "merged")).items():
        np.testing.assert_allclose(weight, np.mean([np.float64(one[path]) for one in each], 0), atol=1e-6)


def test_it_is_written_once_and_one_of_an_earlier_end_is_not_lost(folder, tmp_path):
    whole, run = folder / "runs" / "whole", at(tmp_path / "run")
    shutil.copytree(whole / "tokenizer", run / "tokenizer")
    stage = StageRun(RunConfig.from_json((whole / "config.json").read_text()), first_step=12)
    for step in (12, 16, 20, 24):  # the first is of the stage before
        if step == 24:
            before = read_meta(run / "merged")
            merge_snapshots(run, stage)
            assert read_meta(run / "merged") == before and before[LINEAGE]["steps"] == [16, 20]
        shutil.copytree(whole / "snapshots" / str(max(step, 16)), run / "snapshots" / str(step))
        merge_snapshots(run, stage)
        assert (run / "merged").exists() == (step >= 20)
    assert read_meta(run / "merged")[LINEAGE]["steps"] == [16, 20, 24]
    [earlier] = run.glob("merged.*")
    assert read_meta(earlier) == before


def test_a_run_that_goes_on_from_an_earlier_step_takes_them_anew(folder):
    args = train_args(folder, "again", **TINY)
    call("train.py", *args, "--train.steps", "18")
    call("train.py", *args, "--from-step", "10")
    whole, again = (folder / "runs" / name for name in ("whole", "again"))
    [aside] = again.glob("snapshots.*")
    assert sorted(path.name for path in aside.iterdir()) == ["12", "16"]  # and what they had made is not lost
    assert saved_steps(at(again / "snapshots")) == [16, 20, 24]
    assert list(numbers(read_metrics(again))) == list(numbers(read_metrics(whole)))
    for path, weight in flatten_dict(read_arrays(whole / "snapshots" / "24")).items():
        np.testing.assert_array_equal(weight, flatten_dict(read_arrays(again / "snapshots" / "24"))[path])


def test_the_mean_is_float32_in_the_dtype_and_on_the_devices_of_what_it_is_for(tmp_path):
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(16, 6)).astype(np.float32) for _ in range(3)]
    checkpoints = Checkpointer(str(tmp_path), CheckpointConfig(keep_last=5))
    for step, value in enumerate(values):
        checkpoints.save(step, {"params": {"w": value}, "bias": {"b": value[:, 0]}}, {})
    checkpoints.close()
    mesh = jax.make_mesh((8,), ("fsdp",))
    places = [jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axis)) for axis in ("fsdp", None)]
    like = {
        "params": {"w": jax.ShapeDtypeStruct((16, 6), np.float32, sharding=places[0])},
        "bias": {"b": jax.ShapeDtypeStruct((16,), np.float32, sharding=places[1])},
    }
    mean = read_mean([at(tmp_path / str(step)) for step in range(3)], like)
    assert mean["params"]["w"].sharding.is_equivalent_to(places[0], 2)
    np.testing.assert_allclose(mean["params"]["w"], np.mean(np.float64(values), 0), atol=1e-6)
    np.testing.assert_allclose(mean["bias"]["b"], np.mean(np.float64(values), 0)[:, 0], atol=1e-6)
    like["params"]["w"] = jax.ShapeDtypeStruct((16, 7), np.float32, sharding=places[0])
    with pytest.raises(ValueError, match=r"params/w: saved float32\[16, 6\], wanted float32\[16, 7\]"):
        read_mean([at(tmp_path / "0"), at(tmp_path / "1")], like)


def test_a_snapshot_that_has_lost_a_file_is_named_with_the_remedy(tmp_path):
    config = CheckpointConfig(snapshot_tokens=1, merge_snapshots=2)
    snapshots, weights = Snapshots(at(tmp_path), config), {"w": jax.numpy.ones((4, 4))}
    for step in (1, 2):
        snapshots.save(step, weights, {}, {})
    assert np.array_equal(snapshots.merged(weights, {})[0]["w"], weights["w"])
    next(path for path in (tmp_path / "snapshots" / "1").rglob("*") if path.parent.name == "params.w").unlink()
    with pytest.raises(
        ValueError, match=r"snapshots/1 is damaged: .*A run goes on without its snapshots: move .* away"
    ):
        snapshots.merged(weights, {})
    snapshots.close()


def test_more_merged_than_kept_is_refused():
    with pytest.raises(ValueError, match="merge_snapshots = 9 must be between 2 and keep_snapshots = 8"):
        CheckpointConfig(snapshot_tokens=10, merge_snapshots=9)
    with pytest.raises(ValueError, match="and checkpoint.snapshot_tokens above 0"):
        CheckpointConfig(merge_snapshots=4)
    with pytest.raises(ValueError, match="write_merged needs checkpoint.merge_snapshots above 0"):
        CheckpointConfig(write_merged=True)
