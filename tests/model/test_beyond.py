"""Tensors that config.json has no place for: those with one right reading are left out and listed, all else is refused;
and exports that leave the MTP layer out."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from ling_jax import load_pretrained
from ling_jax.convert import transfer
from ling_jax.convert.survey import survey
from ling_jax.convert.to_hf import to_hf
from ling_jax.convert.to_jax import to_jax
from ling_jax.convert.verify import verify
from ling_jax.convert.weights import open_weights
from tests.support.helpers import assert_close, make_model, small, tiny
from tests.support.hf_folders import INDEX, SHARDS, edit_json, edit_tensors, error_of, tensors_of, write_folder


@pytest.fixture
def sharded(tmp_path):
    write_folder(tmp_path / "sharded", sharded=True)
    return tmp_path / "sharded"


MTP = small(num_nextn_predict_layers=1)
INV_FREQ = {f"model.layers.{i}.attention.rotary_emb.inv_freq": np.ones(3, np.float32) for i in range(2)}


def tied(folder, change=lambda head: head):
    """A folder whose head is tied to its embedding, and there all the same."""
    write_folder(folder, config=small(tie_word_embeddings=True))
    copy = {"lm_head.weight": "model.word_embeddings.weight"}
    edit_tensors(folder / "model.safetensors", lambda t: t.update({new: change(t[old]) for new, old in copy.items()}))
    return folder


def with_buffers(folder):
    write_folder(folder, config=small())
    one = np.ones(3, np.float32)
    more = {**INV_FREQ, "model.rotary_emb.inv_freq": one, "v_head.summary.weight": one}
    edit_tensors(folder / "model.safetensors", lambda t: t.update(more))
    return folder


def mtp_turned_off(folder):
    write_folder(folder, config=MTP, sharded=True)
    edit_json(folder / "config.json", lambda c: c.update(num_nextn_predict_layers=0))
    return folder


def head_in_bfloat16(folder):
    """As float32 tools write beside a bfloat16 embedding: other bytes, the same numbers."""
    write_folder(folder, dtype=ml_dtypes.bfloat16, config=small(tie_word_embeddings=True))
    name = "model.word_embeddings.weight"
    edit_tensors(folder / "model.safetensors", lambda t: t.update({"lm_head.weight": t[name].astype(np.float32)}))
    return folder


@pytest.mark.parametrize(
    ("make", "count", "reason"),
    [
        (tied, 1, "equal to the embedding"),
        (head_in_bfloat16, 1, "equal to the embedding"),
        (with_buffers, 4, "a value head"),
        (mtp_turned_off, 39, "num_nextn_predict_layers is 0"),
    ],
)
def test_tensors_with_one_right_reading_are_left_out_with_one_warning(tmp_path, caplog, make, count, reason):
    folder = make(tmp_path / "hf")
    model = load_pretrained(folder)
    load_pretrained(folder)
    [line] = caplog.messages
    assert f"{count} tensor(s) that the model does not use are left out" in line and reason in line
    assert str(folder) in line
    weights = open_weights(folder)
    assert len(weights.beyond) == count and not weights.beyond.keys() & weights.dtypes.keys()
    want = make_model(MTP if make is mtp_turned_off else model.config)
    tokens = np.array([[5, 7, 11]])
    if make is not head_in_bfloat16:
        assert_close(model(tokens).logits_BTV, want(tokens).logits_BTV)


def test_a_tied_head_that_differs_is_refused_by_name(tmp_path):
    folder = tied(tmp_path / "hf", lambda head: head + np.float32(1e-6))
    assert "lm_head.weight differs from model.word_embeddings.weight" in error_of(folder)
    assert "tie_word_embeddings" in error_of(folder)


@pytest.mark.parametrize(
    ("config", "change", "name"),
    [
        (small(num_hidden_layers=3), {"num_hidden_layers": 2}, "model.layers.2.attention.dense.weight"),
        (tiny(), {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}, "model.layers.2.attention.dense.weight"),
    ],
    ids=["trunk", "trunk and MTP"],
)
def test_a_layer_that_the_config_does_not_count_is_not_taken_for_an_mtp_layer(tmp_path, config, change, name):
    write_folder(tmp_path / "hf", config=config)
    edit_json(tmp_path / "hf" / "config.json", lambda c: c.update(change))
    assert "no place for" in error_of(tmp_path / "hf") and name in error_of(tmp_path / "hf")


def test_half_an_mtp_layer_is_not_left_out(tmp_path):
    write_folder(tmp_path / "hf", config=MTP)
    edit_tensors(tmp_path / "hf" / "model.safetensors", lambda t: t.pop("model.layers.2.enorm.weight"))
    edit_json(tmp_path / "hf" / "config.json", lambda c: c.update(num_nextn_predict_layers=0))
    assert "no place for: model.layers.2." in error_of(tmp_path / "hf")


@pytest.mark.parametrize("name", ["model.inv_freq", "model.rotary_emb.inv_freq.weight", "head.v_head", "v_head"])
def test_a_name_that_is_only_like_one_of_them_stays_an_error(tmp_path, name):
    write_folder(tmp_path / "hf", config=small())
    edit_tensors(tmp_path / "hf" / "model.safetensors", lambda t: t.update({name: np.zeros(3, np.float32)}))
    assert f"1 tensor(s) that the config has no place for: {name}" in error_of(tmp_path / "hf")


@pytest.mark.parametrize("kind", ["HF folder", "converted", "tensors missing"])
def test_an_export_without_the_mtp_layer_is_the_rest_of_the_model(tmp_path, kind):
    """Also of a folder that says it has one and has not."""
    config, here = tiny(), tmp_path / "hf"
    write_folder(here, config=config)
    rest = {name: tensor for name, tensor in tensors_of(here).items() if ".layers.3." not in name}
    if kind == "tensors missing":
        edit_tensors(here / "model.safetensors", lambda t: [t.pop(name) for name in [*t] if ".layers.3." in name])
        with pytest.raises(ValueError, match="convert.py to-hf --no-mtp"):
            to_hf(str(here), str(tmp_path / "out"))
    elif kind == "converted":
        to_jax(str(here), str(tmp_path / "ours"))
        here = tmp_path / "ours"
    audit = to_hf(str(here), str(tmp_path / "out"), mtp=False)
    assert tensors_of(tmp_path / "out") == rest
    assert not audit.missing and not audit.unused and bool(audit.beyond) == (kind == "HF folder")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config.to_hf() | {"num_nextn_predict_layers": 0, "mtp_loss_scaling_factor": 0}
    model = load_pretrained(tmp_path / "out")
    tokens = np.array([[5, 7, 11]])
    assert_close(model(tokens).logits_BTV, make_model(config)(tokens).logits_BTV)
    assert model.mtp is None


def test_what_was_left_out_is_in_the_audit_and_in_what_inspect_prints(sharded, tmp_path):
    edit_tensors(sharded / SHARDS[0], lambda t: t.update({"v_head.bias": np.zeros(1, np.float32)}))
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"v_head.bias": SHARDS[0]}))
    audit = to_jax(str(sharded), str(tmp_path / "ours"))
    assert list(audit.beyond) == ["v_head.bias"] and "v_head.bias (a value head" in audit.render()
    written = json.loads((tmp_path / "ours" / transfer.AUDIT_FILE).read_text())
    assert list(written["beyond"]) == ["v_head.bias"] and "v_head.bias" not in written["tensors"]
    assert "v_head.bias" in survey(str(sharded)).render()
    to_hf(str(tmp_path / "ours"), str(tmp_path / "back"))
    assert "v_head.bias" not in tensors_of(tmp_path / "back")
    assert verify(str(sharded), str(tmp_path / "back"), logits=False).good


def test_settings_that_two_folders_of_the_same_weights_do_not_share_are_told(sharded, tmp_path):
    other = shutil.copytree(sharded, tmp_path / "other")
    edit_json(other / "config.json", lambda c: c.update(rope_theta=5.0))
    found = verify(str(sharded), str(other), logits=False)
    assert found.good and "model.rope_theta: 10000.0 -> 5.0" in found.render()
