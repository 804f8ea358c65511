"""Ling made a Ring-linear: every tensor against what it was made of."""

import dataclasses
import json

import numpy as np
import pytest

from ling_jax import ModelConfig, load_pretrained
from ling_jax.convert.linearize import linearize
from ling_jax.convert.to_hf import to_hf
from ling_jax.convert.to_jax import to_jax
from tests.support.adapters import arrays
from tests.support.commands import call
from tests.support.helpers import tiny
from tests.support.hf_folders import assert_same_folder, write_folder
from tests.support.tokenizers import OWN, TEXTS
from tests.tiny_run import REPO

CONFIG = tiny(num_hidden_layers=5, use_qkv_bias=True)  # groups of two: the fifth layer is of no whole group
LINEAR, SOFTMAX = (0, 2), (1, 3, 4, 5)  # 5: the MTP layer


def heads_of(rows: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [H, C, ...], k and v [G, C, ...] of a fused projection or its bias."""
    each = rows.reshape(-1, CONFIG.head_dim, *rows.shape[1:])
    heads = CONFIG.num_attention_heads
    return each[:heads], each[heads : heads + groups], each[heads + groups :]


@pytest.mark.parametrize("heads", ["replicate", "random"])
def test_each_tensor_is_what_it_is_said_to_be(tmp_path, heads):
    write_folder(tmp_path / "ling", config=CONFIG)
    audit = linearize(str(tmp_path / "ling"), str(tmp_path / "linear"), 2, heads)
    before, after = arrays(tmp_path / "ling"), arrays(tmp_path / "linear")
    assert audit.config.group_norm_size == 4 and audit.config.layer_group_size == 2
    made = {f"model.layers.{i}.attention.{name}.weight" for i in LINEAR for name in ("g_proj", "g_norm")}
    fused = {f"model.layers.{i}.attention.query_key_value.{kind}" for i in LINEAR for kind in ("weight", "bias")}
    assert after.keys() == before.keys() | made
    for name in before.keys() - fused:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    for name in made:
        if "g_norm" in name:
            np.testing.assert_array_equal(after[name], np.ones(48))
        else:
            assert after[name].shape == (48, 32) and abs(after[name].std() / CONFIG.initializer_range - 1) < 0.1
    for name in fused:
        (q, k, v), (new_q, new_k, new_v) = heads_of(before[name], 2), heads_of(after[name], 4)
        np.testing.assert_array_equal(new_q, q)
        for old, new in ((k, new_k), (v, new_v)):
            if heads == "replicate":
                np.testing.assert_array_equal(new, old[[0, 0, 1, 1]])
            elif name.endswith("weight"):
                assert abs(new.std() / CONFIG.initializer_range - 1) < 0.1
                assert len({head.tobytes() for head in new}) == 4
    assert not np.array_equal(after[f"{min(made)}"], after[f"{max(m for m in made if 'g_proj' in m)}"])


def test_the_command_gives_the_same_bytes_from_a_checkpoint_and_says_how_states_decay(tmp_path):
    write_folder(tmp_path / "ling", config=CONFIG)
    to_jax(str(tmp_path / "ling"), str(tmp_path / "ours"))
    linearize(str(tmp_path / "ling"), str(tmp_path / "linear"), 2)
    out, _ = call("convert.py", "linearize", "--source", str(tmp_path / "ours"), "--target", str(tmp_path / "other"),
                "--layer-group-size", "2")  # fmt: skip
    assert "this model's is 'sglang'" in out
    assert_same_folder(tmp_path / "linear", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["architectures"] == ["BailingMoeLinearV2ForCausalLM"] and config["layer_group_size"] == 2


def test_what_comes_out_runs_and_goes_out_and_in_byte_for_byte(tmp_path):
    write_folder(tmp_path / "ling", config=CONFIG)
    linearize(str(tmp_path / "ling"), str(tmp_path / "linear"), 2)
    to_jax(str(tmp_path / "linear"), str(tmp_path / "ours"))
    to_hf(str(tmp_path / "ours"), str(tmp_path / "back"))
    assert_same_folder(tmp_path / "linear", tmp_path / "back")
    tokens = np.arange(20)[None] % CONFIG.vocab_size
    a, b = (load_pretrained(tmp_path / name)(tokens).logits_BTV for name in ("linear", "ours"))
    np.testing.assert_array_equal(a, b)
    assert np.isfinite(a).all()


@pytest.mark.parametrize(
    ("size", "message"), [(1, "must be from 2 to"), (6, "must be from 2 to .* 5 layers"), (0, "must be from 2 to")]
)
def test_a_group_that_leaves_nothing_linear_is_refused(tmp_path, size, message):
    write_folder(tmp_path / "ling", config=CONFIG)
    with pytest.raises(ValueError, match=message):
        linearize(str(tmp_path / "ling"), str(tmp_path / "linear"), size)
    assert not (tmp_path / "linear").exists()


def test_what_is_linear_or_in_fp8_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has linear attention already"):
        linearize(str(REPO / "tests/golden/tiny-ring-linear"), str(tmp_path / "linear"), 2)
    with pytest.raises(ValueError, match="has FP8 weights: write them out first"):
        linearize(str(REPO / "tests/golden/tiny-ling-fp8"), str(tmp_path / "linear"), 2)


def test_the_rates_of_decay_are_written_and_read_and_may_be_chosen_anew():
    config = tiny(num_hidden_layers=4, layer_group_size=2, group_norm_size=2, slope_convention="hf")
    written = config.to_hf()
    assert written["slope_convention"] == "hf" and ModelConfig.from_hf(written).slope_convention == "hf"
    released = {name: value for name, value in written.items() if name != "slope_convention"}
    read = ModelConfig.from_hf(released)
    assert read.slope_convention == "sglang" and read.to_hf() == released
    assert "slope_convention" not in tiny().to_hf()


def test_a_text_is_scored_under_every_convention_and_the_best_comes_first(tmp_path):
    """The folder says which one is its own; a model without linear attention has none to compare."""
    config = tiny(vocab_size=400, num_hidden_layers=3, layer_group_size=3, group_norm_size=2, slope_convention="mlx")
    write_folder(tmp_path / "linear", config=dataclasses.replace(config, num_nextn_predict_layers=0))
    write_folder(tmp_path / "ling", config=tiny(vocab_size=400))
    for folder in ("linear", "ling"):
        OWN.save(str(tmp_path / folder))
    text = tmp_path / "text.txt"
    text.write_text(TEXTS[0][:1500])
    flags = "--text", text, "--length", 64, "--compare-slopes"
    head, *rows = call("evaluate", "--checkpoint", tmp_path / "linear", *flags)[0].splitlines()
    assert head.split() == ["slope_convention", "nats", "per", "token", "perplexity", "bits", "per", "byte"]
    assert sorted(row.split()[0] for row in rows) == ["hf", "mlx", "sglang"]
    assert [row.split()[0] for row in rows if "(its setting)" in row] == ["mlx"]
    nats = [float(row.replace("(its setting)", "").split()[1]) for row in rows]
    assert nats == sorted(nats) and len(set(nats)) == 3
    _, err = call("evaluate", "--checkpoint", tmp_path / "ling", *flags, code=2)
    assert "has no layers with linear attention" in err
