"""Weights to our checkpoint and back: every byte, every name, every fault."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict

from ling_jax import load_pretrained
from ling_jax.checkpoint import read_arrays, read_shapes
from ling_jax.config import ModelConfig, count_params, layer_kinds
from ling_jax.convert import transfer
from ling_jax.convert.fp8 import FP8, dequantise, quantise
from ling_jax.convert.mapping import layout
from ling_jax.convert.survey import survey
from ling_jax.convert.tensorfile import NAMES, TensorFile, write_tensors
from ling_jax.convert.to_hf import to_hf
from ling_jax.convert.to_jax import to_jax
from ling_jax.convert.verify import verify
from ling_jax.convert.weights import StoredWeights, narrow, open_weights
from ling_jax.files.arrays import merge_checksums, on_host, write_arrays
from ling_jax.files.one_writer import HOLDER, OneWriter
from ling_jax.model.model import abstract_model, split_model
from tests.support.commands import call
from tests.support.helpers import assert_trees_equal, small, tiny
from tests.support.hf_folders import (
    CASES,
    CONFIG,
    FLOATS,
    INDEX,
    QUANTISED,
    SHARDS,
    SLOWLY,
    assert_same_folder,
    edit_json,
    edit_tensors,
    tensors_of,
    write_folder,
)
from tests.support.marks import nightly
from tests.test_golden import kind_of
from tests.tiny_run import REPO


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A HF folder with random weights, in two files."""
    folder = tmp_path_factory.mktemp("hf") / "source"
    write_folder(folder, sharded=True)
    return folder


@pytest.fixture
def copy(source, tmp_path) -> Path:
    return shutil.copytree(source, tmp_path / "copy")


# The table.


@pytest.mark.parametrize(
    "config",
    [
        tiny(),
        tiny(use_qkv_bias=True, use_bias=True),
        small(tie_word_embeddings=True, use_qk_norm=False),
        small(num_shared_experts=0, first_k_dense_replace=0),
        small(num_shared_experts=2),
    ],
)
def test_the_table_has_the_arrays_of_the_model(config):
    _, params, bias = split_model(abstract_model(config))
    want = {path: leaf.shape for path, leaf in flatten_dict({"params": params, "bias": bias}).items()}
    stacks = layout(config)
    assert {path: stack.full_shape for path, stack in stacks.items()} == want
    assert sum(math.prod(stack.full_shape) for stack in stacks.values()) == count_params(config).total
    names = [name for stack in stacks.values() for name in stack.names.flat]
    assert len(set(names)) == len(names)


def test_linear_layers_have_their_own_arrays_and_are_counted():
    """Ring-mini-linear: 16 of 20 layers are linear (spec 1.3 and 1.5)."""
    config = ModelConfig(
        hidden_size=2048, intermediate_size=5120, num_hidden_layers=20, num_attention_heads=16,
        num_key_value_heads=4, moe_intermediate_size=512, layer_group_size=5, group_norm_size=4,
    )  # fmt: skip
    kinds = layer_kinds(config)
    assert [i for i, kind in enumerate(kinds) if kind.mixer == "softmax"] == [4, 9, 14, 19]
    assert count_params(config)[:3] == (16_423_448_320, 1_600_773_120, 956_947_456)
    stacks = layout(config)
    assert sum(math.prod(stack.full_shape) for stack in stacks.values()) == count_params(config).total
    assert stacks["params", "layers", "linear_moe", "attention", "g_proj", "weight"].full_shape == (15, 2048, 2048)
    assert abstract_model(config).layers["linear_moe"].attention.g_proj.weight.shape == (15, 2048, 2048)


# There and back.


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_golden_case_comes_back_byte_for_byte(case, tmp_path):
    audit = to_jax(str(case), str(tmp_path / "ours"))
    assert not audit.missing and not audit.unused and len(audit.records) == len(tensors_of(case))
    config = ModelConfig.from_hf(json.loads((case / "config.json").read_text()))
    saved = {path: leaf.shape for path, leaf in flatten_dict(read_shapes(tmp_path / "ours")).items()}
    scales = {path for path in saved if path[0] == "scales"}
    assert bool(scales) == (kind_of(case) == "ling-fp8") and {("params", *path[1:]) for path in scales} <= saved.keys()
    own = {path: shape for path, shape in saved.items() if path not in scales}
    assert own == {path: stack.full_shape for path, stack in layout(config).items()}  # the model's: see above
    assert survey(str(tmp_path / "ours")).records == survey(str(case)).records
    to_hf(str(tmp_path / "ours"), str(tmp_path / "back"), max_shard_size="300KB")
    assert (tmp_path / "back" / INDEX).exists()
    assert_same_folder(case, tmp_path / "back")
    assert verify(str(case), str(tmp_path / "back"), logits=False).good


@pytest.mark.parametrize("name", ["model.layers.2.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.gate.weight"])
def test_a_change_of_one_tensor_of_ours_changes_that_tensor_of_hf_alone(source, tmp_path, name):
    to_jax(str(source), str(tmp_path / "ours"))
    weights = StoredWeights(str(tmp_path / "ours"))
    [(path, at)] = [
        (path, index) for path, stack in weights.stacks.items() for index, n in np.ndenumerate(stack.names) if n == name
    ]
    state, changed = epath.Path(tmp_path / "ours" / "state"), flatten_dict(read_arrays(tmp_path / "ours"))
    changed[path][(*at, 0, 0)] = 7
    state.rmtree()
    write_arrays(state, on_host(changed))
    merge_checksums(state)
    to_hf(str(tmp_path / "ours"), str(tmp_path / "back"))
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert [n for n in before if before[n] != after[n]] == [name]
    found = verify(str(source), str(tmp_path / "back"), logits=False)
    assert list(found.different) == [name] and found.different[name].count == 1 and not found.good
    assert name in found.render() and "NOT the same weights" in found.render()


def test_a_converted_checkpoint_is_the_model(source, tmp_path):
    to_jax(str(source), str(tmp_path / "ours"))
    ours, theirs = load_pretrained(tmp_path / "ours"), load_pretrained(source)
    for a, b in zip(split_model(ours)[1:], split_model(theirs)[1:], strict=True):
        assert_trees_equal(a, b)
    assert ours.config == theirs.config


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_to_jax_casts_all_but_the_expert_bias(source, tmp_path, dtype):
    audit = to_jax(str(source), str(tmp_path / "ours"), dtype)
    shapes = read_shapes(tmp_path / "ours")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(shapes["params"])} == {dtype}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(shapes["bias"])} == {"float32"}
    casts = {record.cast for name, record in audit.records.items() if not name.endswith("expert_bias")}
    assert casts == ({None} if dtype == "float32" else {"F32 -> BF16"})
    found = verify(str(source), str(tmp_path / "ours"), logits=False)
    assert found.good and set(found.cast) == (set() if dtype == "float32" else {"F32 -> BF16"})


@pytest.mark.parametrize("form", ["bf16", "fp32", "fp8"])
def test_a_hf_folder_becomes_one_of_another_format(source, tmp_path, form):
    to_hf(str(source), str(tmp_path / "new"), form)
    dtypes = {name: dtype for name, (dtype, _, _) in tensors_of(tmp_path / "new").items()}
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert ("quantization_config" in config) == (form == "fp8")
    assert config["torch_dtype"] == ("float32" if form == "fp32" else "bfloat16")
    assert all(dtype == "F32" for name, dtype in dtypes.items() if name.endswith(("expert_bias", "_scale_inv")))
    assert dtypes["lm_head.weight"] == dtypes["model.norm.weight"] == ("F32" if form == "fp32" else "BF16")
    fp8 = {name for name, dtype in dtypes.items() if dtype == "F8_E4M3"}
    assert fp8 == {name.removesuffix("_scale_inv") for name in dtypes if name.endswith("_scale_inv")}
    assert bool(fp8) == (form == "fp8") and not any("gate.weight" in n or "eh_proj" in n or "norm" in n for n in fp8)
    assert verify(str(source), str(tmp_path / "new"), logits=False).good


def test_tensors_of_one_array_may_have_several_dtypes(copy, tmp_path, caplog):
    """bf16 beside float32, with a NaN whose bits a cast would change."""

    def change(tensors):
        for name in tensors:
            if ".layers.1." in name and not name.endswith("expert_bias"):
                tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
                tensors[name].reshape(-1).view(np.uint16)[0] = 0xFF81

    for shard in SHARDS:
        edit_tensors(copy / shard, change)
    audit = to_jax(str(copy), str(tmp_path / "ours"))
    assert "numbers are NaN or infinite: model.layers.1." in caplog.text
    assert {record.not_finite for name, record in audit.records.items() if ".layers.1.mlp.exp" in name} == {1}
    assert "NaN or infinite" in audit.render() and " in 0 tensors" not in audit.render()
    to_hf(str(tmp_path / "ours"), str(tmp_path / "back"))
    assert_same_folder(copy, tmp_path / "back")


def test_narrowing_keeps_the_bits_of_what_was_widened():
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(narrow(values.astype(np.float32), values.dtype).view(np.uint16), bits)
    codes = np.arange(256, dtype=np.uint8).view(FP8)
    np.testing.assert_array_equal(narrow(codes.astype(ml_dtypes.bfloat16), FP8).view(np.uint8), codes.view(np.uint8))


def test_what_lies_beside_the_weights_comes_along(copy, tmp_path):
    extra = {"tokenizer.json": "{}", "chat_template.jinja": "x", "modeling.py": "raise SystemExit", "LICENSE": "MIT"}
    extra |= {"generation_config.json": '{"eos_token_id": [1, 2]}'}
    for name, text in extra.items():
        (copy / name).write_text(text)
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    edit_json(copy / "config.json", lambda c: c.update(auto_map={"AutoModel": "modeling.Ling"}, anything=[1, None]))
    to_jax(str(copy), str(tmp_path / "ours"))
    to_hf(str(tmp_path / "ours"), str(tmp_path / "back"))
    for name, text in extra.items():
        assert (tmp_path / "back" / name).read_text() == text
    assert not (tmp_path / "back" / "pytorch_model.bin").exists()
    assert "to-hf --format keep" in (tmp_path / "back" / "README.md").read_text()
    assert_same_folder(copy, tmp_path / "back")


def test_files_are_no_larger_than_asked_and_the_index_names_them(source, tmp_path):
    to_hf(str(source), str(tmp_path / "new"), max_shard_size="40KB")
    index = json.loads((tmp_path / "new" / INDEX).read_text())
    sizes = {name: len(data) for name, (_, _, data) in tensors_of(tmp_path / "new").items()}
    assert index["weight_map"].keys() == sizes.keys() and index["metadata"]["total_size"] == sum(sizes.values())
    for file in set(index["weight_map"].values()):
        inside = [sizes[name] for name, place in index["weight_map"].items() if place == file]
        assert sum(inside) <= 40_000 or len(inside) == 1
    assert_same_folder(source, to_one_file(tmp_path))


def to_one_file(tmp_path: Path) -> Path:
    to_hf(str(tmp_path / "new"), str(tmp_path / "one"))
    assert (tmp_path / "one" / "model.safetensors").exists() and not (tmp_path / "one" / INDEX).exists()
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config == json.loads((tmp_path / "new" / "config.json").read_text())
    return tmp_path / "one"


# FP8.


@pytest.mark.parametrize("case", QUANTISED, ids=lambda case: case.name)
def test_fp8_is_multiplied_out_as_the_official_code_does(case, tmp_path):
    to_jax(str(case), str(tmp_path / "ours"), "float32")
    expected = json.loads((case / "meta.json").read_text())["dequantised"]
    weights = StoredWeights(str(tmp_path / "ours"))
    compared = 0
    for path, stack in weights.stacks.items():
        values = weights.read(path, tuple(slice(0, n) for n in stack.full_shape)).reshape(-1, *stack.shape)
        for name, value in zip(stack.names.flat, values, strict=True):
            if name in expected:
                digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
                assert digest == expected[name]["sha256_float32"], name
                compared += 1
    assert compared == len(expected) > 0


def official(w: np.ndarray, power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
    """Block by block, as spec 3.2 says."""
    codes = np.zeros(w.shape, FP8)
    scales = np.zeros((-(-w.shape[0] // 128), -(-w.shape[1] // 128)), np.float32)
    for i, j in np.ndindex(scales.shape):
        block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
        scale = np.float32(max(np.abs(w[block]).max(), np.float32(1e-4))) / np.float32(448)
        if power_of_two:
            mantissa, exponent = np.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
            scale = np.ldexp(np.float32(1), exponent - 1 if mantissa == 0.5 else exponent)
        scales[i, j] = scale
        codes[block] = (w[block] * (np.float32(1) / np.float32(scale))).astype(FP8)
    return codes, scales


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (1, 1), (130, 257), (127, 128), (300, 5)])
@pytest.mark.parametrize("rule", ["ordinary", "power_of_two"])
def test_quantisation_is_the_official_rule_block_by_block(shape, rule):
    draw = np.random.default_rng(0)
    w = (draw.standard_normal(shape) * np.exp(draw.standard_normal(shape) * 2)).astype(np.float32)
    w[-1] = 0
    found = quantise(w, rule)
    codes, scales = official(w, rule == "power_of_two")
    np.testing.assert_array_equal(found.codes.view(np.uint8), codes.view(np.uint8))
    np.testing.assert_array_equal(found.scales, scales)
    error = np.abs(dequantise(*found) - w)
    assert (error <= np.abs(w) / 16 + 2.0**-10 * found.scales.max()).all()


def test_a_block_of_zeros_has_the_least_scale():
    assert quantise(np.zeros((3, 3), np.float32), "ordinary").scales == np.float32(1e-4) / np.float32(448)


@pytest.mark.parametrize("case", FLOATS[:1], ids=lambda case: case.name)
def test_an_export_to_fp8_follows_each_tensors_rule_and_comes_back_byte_for_byte(case, tmp_path):
    to_hf(str(case), str(tmp_path / "fp8"), "fp8")
    source, exported = open_weights(case), tensors_of(tmp_path / "fp8")
    compared = 0
    for path, stack in source.stacks.items():
        values = source.values(path, tuple(slice(0, n) for n in stack.full_shape), np.float32)
        for name, value in zip(stack.names.flat, values.reshape(-1, *stack.shape), strict=True):
            if stack.rule is not None:
                pow2 = ".attention.dense." in name or (".experts." in name and "down_proj" not in name)
                codes, scales = official(np.ascontiguousarray(value), pow2)
                assert exported[name] == ("F8_E4M3", value.shape, codes.tobytes())
                assert exported[name + "_scale_inv"] == ("F32", scales.shape, scales.tobytes())
                compared += 1
    assert compared > 50
    to_jax(str(tmp_path / "fp8"), str(tmp_path / "ours"))
    to_hf(str(tmp_path / "ours"), str(tmp_path / "back"), "fp8")  # what is FP8 already stays as it is
    assert_same_folder(tmp_path / "fp8", tmp_path / "back")


@pytest.mark.parametrize("case", QUANTISED, ids=lambda case: case.name)
def test_arrays_of_which_some_tensors_are_fp8_come_back_byte_for_byte(case, tmp_path):
    """As releases exclude some modules from quantisation; the list of theirs is unknown (spec 3.2)."""
    copy = shutil.copytree(case, tmp_path / "copy")
    file = TensorFile(copy / "model.safetensors")
    tensors = {name: np.array(file.read(name)) for name in file.tensors}
    name = "model.layers.1.attention.dense.weight"
    tensors[name] = np.full(tensors[name].shape, 0.3, ml_dtypes.bfloat16)
    del tensors[name + "_scale_inv"]
    rewrite(copy / "model.safetensors", tensors)
    to_jax(str(copy), str(tmp_path / "ours"))
    to_hf(str(tmp_path / "ours"), str(tmp_path / "back"))
    assert_same_folder(copy, tmp_path / "back")
    values = split_model(load_pretrained(tmp_path / "ours"))[1]["layers"]["softmax_moe"]["attention"]["dense"]["weight"]
    assert (np.asarray(values[0], np.float32) == np.float32(ml_dtypes.bfloat16(0.3))).all()


def rewrite(file: Path, tensors: dict[str, np.ndarray]) -> None:
    file.unlink()
    write_tensors(file, {name: (NAMES[a.dtype], a.shape) for name, a in tensors.items()}, {}, tensors.items())


@pytest.mark.parametrize("case", QUANTISED, ids=lambda case: case.name)
def test_scales_that_are_missing_or_too_many_are_named(case, tmp_path):
    copy = shutil.copytree(case, tmp_path / "copy")
    file = TensorFile(copy / "model.safetensors")
    tensors = {name: np.array(file.read(name)) for name in file.tensors}
    scale = tensors.pop("model.layers.0.mlp.up_proj.weight_scale_inv")
    tensors["lm_head.weight_scale_inv"] = scale
    rewrite(copy / "model.safetensors", tensors)
    with pytest.raises(ValueError) as raised:
        open_weights(copy)
    assert "1 tensor(s) missing: model.layers.0.mlp.up_proj.weight_scale_inv" in str(raised.value)
    assert "1 tensor(s) that the config has no place for: lm_head.weight_scale_inv" in str(raised.value)


# What is wrong.


def test_a_source_that_does_not_fit_its_config_is_refused_before_anything_is_written(copy, tmp_path):
    def change(tensors):
        tensors.pop("model.layers.2.mlp.experts.5.down_proj.weight", None)
        tensors["model.layers.9.input_layernorm.weight"] = np.zeros(3, np.float32)

    edit_tensors(copy / SHARDS[1], change)
    with pytest.raises(ValueError, match="disagrees with the files it names"):
        to_jax(str(copy), str(tmp_path / "ours"))
    index = {name: SHARDS[i] for i in (0, 1) for name in TensorFile(copy / SHARDS[i]).tensors}
    (copy / INDEX).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ValueError) as raised:
        to_jax(str(copy), str(tmp_path / "ours"))
    assert "missing: model.layers.2.mlp.experts.5.down_proj.weight" in str(raised.value)
    assert "no place for: model.layers.9.input_layernorm.weight" in str(raised.value)
    assert os.listdir(tmp_path) == ["copy"]


def test_a_tensor_in_two_files_is_named(copy, tmp_path):
    edit_tensors(copy / SHARDS[1], lambda t: t.update({"lm_head.weight": np.zeros(3, np.float32)}))
    with pytest.raises(ValueError, match=r"1 tensor\(s\) in two files: lm_head.weight"):
        to_jax(str(copy), str(tmp_path / "ours"))


def test_a_missing_mtp_layer_comes_with_a_hint(tmp_path):
    write_folder(tmp_path / "hf", config=small())
    edit_json(
        tmp_path / "hf" / "config.json", lambda c: c.update(num_nextn_predict_layers=1, mtp_loss_scaling_factor=0.1)
    )
    with pytest.raises(ValueError, match="set num_nextn_predict_layers to 0 in config.json"):
        to_jax(str(tmp_path / "hf"), str(tmp_path / "ours"))


def test_pickles_are_refused_with_a_way_out(copy, tmp_path):
    for name in (*SHARDS, INDEX):
        (copy / name).unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    for convert_ in (lambda: to_jax(str(copy), str(tmp_path / "x")), lambda: load_pretrained(copy)):
        with pytest.raises(ValueError, match=r"pickles only \(pytorch_model.bin\).*save_pretrained"):
            convert_()


def test_nothing_is_overwritten(source, tmp_path):
    (tmp_path / "there").mkdir()
    for convert_ in (to_jax, to_hf):
        with pytest.raises(ValueError, match="there exists: choose another --target"):
            convert_(str(source), str(tmp_path / "there"))
    with pytest.raises(ValueError, match="--max-shard-size 5 apples"):
        to_hf(str(source), str(tmp_path / "x"), max_shard_size="5 apples")


def test_another_process_at_the_same_target_is_refused(source, tmp_path):
    partial = tmp_path / "x.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("not of a conversion")
    with pytest.raises(ValueError, match="x.partial is an unfinished conversion of other files or with other settings"):
        to_hf(str(source), str(tmp_path / "x"))
    with (
        OneWriter(epath.Path(partial)),
        pytest.raises(ValueError, match="x.partial is in use: process .* writes there"),
    ):
        to_hf(str(source), str(tmp_path / "x"))
    assert [file.name for file in partial.iterdir()] == ["notes.txt"]
    (partial / "notes.txt").unlink()
    to_hf(str(source), str(tmp_path / "x"))
    assert not partial.exists() and HOLDER not in [file.name for file in (tmp_path / "x").iterdir()]


# Kills and full disks.


@pytest.mark.parametrize("direction", ["to_jax", nightly("to_hf")])
def test_a_conversion_killed_twice_goes_on_and_ends_with_every_byte(source, tmp_path, direction):
    target = tmp_path / "target"
    journal = tmp_path / "target.partial" / transfer.JOURNAL
    command = [sys.executable, "-c", SLOWLY, direction, str(source), str(target)]
    seen = 0
    for _ in range(2):
        process = subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and (not journal.exists() or len(journal.read_bytes().splitlines()) < seen + 10):
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -9, process.stderr.read() if process.stderr else ""
        seen = len(journal.read_bytes().splitlines())
        assert not target.exists()
        with pytest.raises(ValueError):
            load_pretrained(tmp_path / "target.partial")
    with journal.open("a") as file:
        file.write('{"piece": "half a li')
    before = seen
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert before >= 20 and os.listdir(tmp_path) == ["target"]
    audit = json.loads((target / transfer.AUDIT_FILE).read_text())
    assert audit["missing"] == audit["unused"] == [] and len(audit["tensors"]) == len(tensors_of(source))
    assert verify(str(source), str(target), logits=False).good
    to_hf(str(target), str(tmp_path / "back"))
    assert_same_folder(source, tmp_path / "back")


def test_a_source_that_changed_since_is_not_gone_on_with(copy, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transfer.TensorRecord, "add", fail)
        with pytest.raises(ValueError, match="No space left on device. What is copied is kept: make room"):
            to_jax(str(copy), str(tmp_path / "ours"))
    os.utime(copy / SHARDS[0])
    with pytest.raises(ValueError, match="is an unfinished conversion of other files"):
        to_jax(str(copy), str(tmp_path / "ours"))


# On a small disk at argv[2]: what fits without room for it, then with it.
FULL_DISK = """
import os, sys
from pathlib import Path
from ling_jax.convert import to_hf, to_jax, transfer

direction, source, disk = sys.argv[1], sys.argv[2], Path(sys.argv[3])
convert = {"to_jax": to_jax.to_jax, "to_hf": to_hf.to_hf}[direction]
filler = disk / "filler"
free = os.statvfs(disk)
with filler.open("wb") as file:
    os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - 100_000)
for checked in (True, False):
    if not checked:  # as where another program fills the disk in the meantime
        transfer.Conversion._check_space = lambda self, size: None
    try:
        convert(source, str(disk / "target"))
        sys.exit("it fitted")
    except ValueError as error:
        print(error)
    assert not (disk / "target").exists()
filler.unlink()
convert(source, str(disk / "target"))
to_hf.to_hf(str(disk / "target"), str(disk / "back"))
os.system(f"cp -r {disk / 'back'} {sys.argv[4]}")
"""


@pytest.mark.parametrize("direction", ["to_jax", "to_hf"])
def test_a_full_disk_is_one_error_and_the_same_command_goes_on(source, tmp_path, direction):
    disk = tmp_path / "disk"
    disk.mkdir()
    shell = f'mount -t tmpfs -o size=8m tmpfs {disk} && exec "$@"'
    command = [sys.executable, "-c", FULL_DISK, direction, str(source), str(disk), str(tmp_path / "back")]
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", shell, "-", *command], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout.splitlines()
    assert "make room" in told[0] and "free" in told[0]
    assert "make room, and run the same command to go on" in told[1]
    assert_same_folder(source, tmp_path / "back")


# The command.


def test_the_command_converts_inspects_and_compares(source, tmp_path):
    ours, back = tmp_path / "ours", tmp_path / "back"
    call("convert.py", "to-hf", "--source", source, "--target", tmp_path / "trunk", "--no-mtp")
    assert json.loads((tmp_path / "trunk" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    out, _ = call("convert.py", "to-jax", "--source", source, "--target", ours)
    assert f"{len(tensors_of(source))} of {len(tensors_of(source))} tensors" in out and "every byte is kept" in out
    out, _ = call("convert.py", "inspect", "--source", ours)
    assert f"{count_params(CONFIG).total:,}" in out and "model.layers.1-2.mlp.experts.0-7.up_proj.weight" in out
    call("convert.py", "to-hf", "--source", ours, "--target", back, "--format", "bf16")
    edit_tensors(back / "model.safetensors", lambda t: t["lm_head.weight"].__setitem__((3, 4), 9))
    out, _ = call("convert.py", "verify", "--source", source, "--target", back, code=1)
    assert "NOT the same weights" in out and "lm_head.weight" in out
    assert "F32 -> BF16" in out and "greatest difference" in out
    _, err = call("convert.py", "to-jax", "--source", source, "--target", ours, code=2)
    assert err.startswith("error: ") and len(err.splitlines()) == 1


def test_tensors_can_be_listed_one_by_one_without_reading_weights(source):
    found = survey(str(source), checksums=False)
    text = found.render(each=True)
    assert all(name in text for name in tensors_of(source))
