"""Runs that start from weights: what of them must fit, what may change, and whose tokenizer it is."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ling_jax import runner
from ling_jax.checkpoint import read_arrays
from ling_jax.cli import parse_train
from ling_jax.config import DataConfig, RunConfig, TrainConfig
from ling_jax.convert.origin import check_origin, origin_tokenizer
from ling_jax.convert.to_hf import to_hf
from ling_jax.convert.weights import open_weights
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.files.paths import at
from ling_jax.runner import _check_special_ids, _first_state, _with_origin, run_training
from ling_jax.train.state import make_trainer
from tests.support.commands import call
from tests.support.helpers import assert_trees_equal, random_weights, small
from tests.support.hf_folders import edit_json, write_folder
from tests.support.runs import NoCheckpoint
from tests.support.tokenizers import OWN
from tests.tiny_run import SPARSE, train_args

OTHER = Tokenizer.train(["other words make another tokenizer " * 9], 290)


def first_state(folder: Path, mtp: str, layers: int):
    """The state of a new run, of small() with so many MTP layers, that starts from `folder`."""
    model = small(num_nextn_predict_layers=layers)
    config = RunConfig(model=model, data=DataConfig(sequence_length=32), train=TrainConfig(param_dtype="float32"))
    check_origin(str(folder), model, mtp)
    trainer = make_trainer(config)
    return trainer, _first_state(trainer, NoCheckpoint(), open_weights(folder, mtp=mtp == "same"))


@pytest.fixture
def with_mtp(tmp_path) -> Path:
    write_folder(tmp_path / "with", config=small(num_nextn_predict_layers=1))
    return tmp_path / "with"


@pytest.fixture
def without_mtp(tmp_path) -> Path:
    write_folder(tmp_path / "without", config=small())
    return tmp_path / "without"


# What fits.


def test_settings_that_change_are_said_in_one_line(without_mtp, caplog):
    wanted = small(rope_theta=6e5, max_position_embeddings=1024, eos_token_id=58)
    with caplog.at_level("INFO"):
        check_origin(str(without_mtp), wanted, "same")
    [line] = caplog.messages
    assert "model.rope_theta: 10000.0 -> 600000.0; model.max_position_embeddings: 512 -> 1024" in line
    assert "model.eos_token_id: 59 -> 58" in line and str(without_mtp) in line


def test_equal_settings_are_not_mentioned(without_mtp, caplog):
    with caplog.at_level("INFO"):
        check_origin(str(without_mtp), small(mtp_loss_scaling_factor=0.9), "same")
    assert caplog.messages == []


def test_another_architecture_is_refused_with_both_values(without_mtp):
    with pytest.raises(ValueError, match=r"another architecture \(there -> here\): model.num_experts: 8 -> 16"):
        check_origin(str(without_mtp), small(num_experts=16), "same")


# The MTP layer.


@pytest.mark.parametrize(("kind", "layers", "flag"), [("with", 0, "drop"), ("without", 1, "new")])
def test_an_mtp_layer_on_one_side_is_refused_by_naming_the_flag(with_mtp, without_mtp, kind, layers, flag):
    folder = with_mtp if kind == "with" else without_mtp
    with pytest.raises(ValueError) as error:
        check_origin(str(folder), small(num_nextn_predict_layers=layers), "same")
    assert f"num_nextn_predict_layers: {1 - layers} -> {layers}" in str(error.value)
    assert f"--init-mtp {flag}" in str(error.value)


@pytest.mark.parametrize(("mtp", "layers"), [("new", 0), ("drop", 1)])
def test_a_flag_that_contradicts_the_model_is_refused(with_mtp, mtp, layers):
    with pytest.raises(ValueError, match=rf"--init-mtp {mtp}, but .* = {layers}: set it to {1 - layers}"):
        check_origin(str(with_mtp), small(num_nextn_predict_layers=layers), mtp)


def test_a_dropped_mtp_layer_leaves_the_rest_as_it_was(with_mtp):
    _, state = first_state(with_mtp, "drop", 0)
    _, params, bias = random_weights(small(num_nextn_predict_layers=1))
    assert_trees_equal(state.params, {name: tree for name, tree in params.items() if name != "mtp"})
    assert_trees_equal(state.bias, {name: tree for name, tree in bias.items() if name != "mtp"})


@pytest.mark.parametrize("kind", ["without", "with", "missing"])
def test_a_new_mtp_layer_is_that_of_a_new_run_and_the_rest_is_the_origins(with_mtp, without_mtp, kind):
    """Also where the origin has one, or says so and has it not."""
    folder = with_mtp if kind == "with" else without_mtp
    if kind == "missing":
        edit_json(folder / "config.json", lambda c: c.update(num_nextn_predict_layers=1))
    trainer, state = first_state(folder, "new", 1)
    fresh, (_, params, bias) = trainer.new_state(), random_weights(small(num_nextn_predict_layers=int(kind == "with")))
    assert_trees_equal(state.params["mtp"], fresh.params["mtp"])
    assert_trees_equal(state.bias["mtp"], fresh.bias["mtp"])
    for got, want in ((state.params, params), (state.bias, bias)):
        for name in want.keys() - {"mtp"}:
            assert_trees_equal(got[name], want[name])


def test_the_flag_without_weights_to_start_from_is_refused():
    with pytest.raises(ValueError, match="--init-mtp new is about the weights of --init-from"):
        run_training(*parse_train(["ling_tiny", "--init-mtp", "new"]))


# The tokenizer.


def test_the_tokenizer_beside_the_weights_is_taken(without_mtp):
    OWN.save(str(without_mtp))
    assert origin_tokenizer(open_weights(without_mtp), None) == str(without_mtp / "tokenizer.json")


def test_the_same_tokenizer_elsewhere_is_as_good(without_mtp, tmp_path):
    OWN.save(str(without_mtp))
    OWN.save(str(tmp_path / "elsewhere"))
    assert origin_tokenizer(open_weights(without_mtp), str(tmp_path / "elsewhere")) == str(tmp_path / "elsewhere")


def test_another_tokenizer_is_refused_with_both_names(without_mtp, tmp_path):
    OWN.save(str(without_mtp))
    OTHER.save(str(tmp_path / "other"))
    with pytest.raises(ValueError) as error:
        origin_tokenizer(open_weights(without_mtp), str(tmp_path / "other"))
    for word in (str(tmp_path / "other"), str(without_mtp / "tokenizer.json"), OWN.fingerprint, OTHER.fingerprint):
        assert word in str(error.value)


def test_weights_without_a_tokenizer_take_the_one_that_is_named_and_never_a_new_one(without_mtp, tmp_path):
    OTHER.save(str(tmp_path / "other"))
    OWN.save(str(tmp_path / "tokenizer"))  # a neighbour's, in a folder of the name that a run gives its own
    OWN.save(str(tmp_path / "hf"))
    assert origin_tokenizer(open_weights(without_mtp), str(tmp_path / "other")) == str(tmp_path / "other")
    with pytest.raises(ValueError, match="has no tokenizer.json, .*--data.tokenizer"):
        origin_tokenizer(open_weights(without_mtp), None)


@pytest.mark.parametrize("end", ["document", "turn"])
def test_a_models_eos_may_end_a_document_or_a_turn(end):
    """The official files for chat say the turn's end, those for pretraining the document's."""
    model = small(vocab_size=400, eos_token_id=OWN.eod_id if end == "document" else OWN.role_end_id)
    _check_special_ids(OWN, model)
    with pytest.raises(ValueError, match="ends documents with id"):
        _check_special_ids(OWN, dataclasses.replace(model, eos_token_id=7))


# The whole way.


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a corpus and the run `short`, trained at 64 positions."""
    folder = tmp_path_factory.mktemp("origin")
    short = dict(**SPARSE, model__max_position_embeddings=64, model__rope_theta=1e4, data__sequence_length=64)
    call("train.py", *train_args(folder, "short", **short, train__steps=20, train__eval_every=0))
    return folder


def extended(folder: Path, name: str, origin: str | Path, *flags: str, code: int = 0) -> str:
    """The log of two steps, at a rate that changes nothing, of a run that starts from `origin`."""
    still = dict(**SPARSE, train__steps=2, train__eval_every=0, schedule__peak_lr=1e-9)
    args = [*train_args(folder, name, **still), *map(str, flags)]
    return call("train.py", *args, "--init-from", origin, code=code)[1]


def test_a_run_starts_from_a_step_of_another_by_its_name(folder):
    extended(folder, "branch", "short@20")
    short, branch = (flatten_dict(read_arrays(folder / "runs" / name)["params"]) for name in ("short", "branch"))
    for path, weight in short.items():
        np.testing.assert_allclose(branch[path], weight, atol=1e-6)
    report = (folder / "runs" / "branch" / "report.html").read_text()
    step = folder / "runs" / "short" / "checkpoints" / "20"
    assert f'<tr><th scope="row">started from</th><td>{step}</td></tr>' in report
    assert "started from" not in (folder / "runs" / "short" / "report.html").read_text()
    log = extended(folder, "other", "short@7", code=2)
    assert f"--init-from short@7: {folder / 'runs' / 'short'} has the steps 20" in log


def test_what_was_assumed_gives_way_in_the_model_that_is_trained_too(folder, monkeypatch):
    """Not only in the settings that the run saves."""
    trained = []

    def stopped(trainer, *rest):
        trained.append(trainer.config.model)
        raise ValueError("far enough")

    real = runner._with_origin
    monkeypatch.setattr(
        runner, "_with_origin", lambda c, *rest: real(dataclasses.replace(c, assumed=("rope_theta",)), *rest)
    )
    monkeypatch.setattr(runner, "Session", stopped)
    flags = ("--model.rope-theta", "77", "--model.max-position-embeddings", "64")
    assert "far enough" in extended(folder, "guess", folder / "runs" / "short", *flags, code=2)
    assert [model.rope_theta for model in trained] == [1e4]


def other_text(folder: Path) -> Path:
    """A corpus of other words, from which another tokenizer would be trained."""
    text = folder / "other"
    if not text.exists():
        text.mkdir()
        for i in range(20):
            (text / f"{i}.txt").write_text("\n".join(f"quartz zebra {i} jumps {n} over words" for n in range(60)))
    return text


@pytest.mark.nightly
def test_context_grows_by_flags_from_4k_to_32k_to_128k_in_small(folder):
    """64 positions at theta 1e4, 512 at 6e5, 2048 by YaRN; each run starts where the one before ended, the last from an
    export and on other text."""
    at_32k = ["--model.rope-theta", "600000", "--model.max-position-embeddings", "512"]
    log = extended(folder, "long", folder / "runs" / "short", *at_32k, "--data.sequence-length", "512")
    assert "model.rope_theta: 10000.0 -> 600000.0; model.max_position_embeddings: 64 -> 512" in log
    yarn = ["--model.rope-scaling.factor", "4", "--model.rope-scaling.original-max-position-embeddings", "512"]
    longest = [*yarn, "--data.sequence-length", "2048", "--data.global-batch-size", "1", *at_32k]
    to_hf(str(folder / "runs" / "long"), str(folder / "hf"))
    log = extended(folder, "longest", folder / "hf", *longest, "--data.sources.0.path", other_text(folder))
    used, own = (folder / "runs" / name / "tokenizer" / "tokenizer.json" for name in ("longest", "short"))
    assert used.read_bytes() == own.read_bytes()
    assert "model.rope_scaling: None -> RopeScaling(factor=4.0, original_max_position_embeddings=512" in log
    to_hf(str(folder / "runs" / "longest"), str(folder / "exported"))
    written = json.loads((folder / "exported" / "config.json").read_text())
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert scaling.items() <= written["rope_scaling"].items() and written["rope_theta"] == 6e5


def test_other_text_is_read_with_the_origins_tokenizer_and_a_run_that_has_begun_needs_its_origin_no_more(
    folder, tmp_path
):
    short, run_dir = folder / "runs" / "short", folder / "runs" / "warm"
    origin = shutil.copytree(short, tmp_path / "gone")
    flags = ["--data.sources.0.path", other_text(folder), "--model.max-position-embeddings", "64"]
    assert f"tokenizer of the weights in {origin}" in extended(folder, "warm", origin, *flags)
    used, own = (folder / "tokenizer" / "tokenizer.json" for folder in (run_dir, short))
    assert used.read_bytes() == own.read_bytes()
    arrays, start = (flatten_dict(read_arrays(str(folder))["params"]) for folder in (run_dir, short))
    assert max(np.abs(arrays[path] - start[path]).max() for path in start) < 1e-6
    shutil.rmtree(origin)
    assert "resuming from step 2" in extended(folder, "warm", origin, *flags, "--train.steps", "3")
    shown, _ = call("convert.py", "inspect", "--no-checksums", "--source", run_dir)
    assert re.search(rf"run started from +{origin}/checkpoints/20\n", shown)


def test_a_step_that_lies_alone_knows_its_tokenizers_fingerprint(folder, tmp_path):
    bare = shutil.copytree(folder / "runs" / "short" / "checkpoints" / "20", tmp_path / "bare")
    OTHER.save(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=f"their checkpoint says: .*{open_weights(bare).trained_with}"):
        origin_tokenizer(open_weights(bare), str(tmp_path / "other"))
    own = str(folder / "runs" / "short" / "tokenizer")
    assert origin_tokenizer(open_weights(bare), own) == own


def test_assumed_settings_give_way_to_those_of_the_weights_and_flags_to_none(tmp_path, caplog):
    """A configuration some of whose values are guesses starts from a folder that knows them, and resumes with them."""
    guessed = small(layer_group_size=2, group_norm_size=2, rope_theta=1e6)
    known = dataclasses.replace(guessed, group_norm_size=4, rope_theta=5e5)
    write_folder(tmp_path / "hf", config=known)
    config = RunConfig(model=guessed, data=DataConfig(sequence_length=32), assumed=("group_norm_size", "rope_theta"))
    with caplog.at_level("INFO"):
        begun = _with_origin(config, at(tmp_path / "run"), str(tmp_path / "hf"))
    assert (begun.model.group_norm_size, begun.model.rope_theta) == (4, 5e5)
    assert "model.group_norm_size: 2 -> 4; model.rope_theta: 1000000.0 -> 500000.0" in caplog.text
    check_origin(str(tmp_path / "hf"), begun.model, "same")
    _, command = parse_train(["ring_flash_linear_2_0", "--model.rope-theta", "5e5"])
    assert command.config.assumed == ("group_norm_size",)
    assert parse_train(["ring_flash_linear_2_0"])[1].config.assumed == ("group_norm_size", "rope_theta")
