"""LoRA adapters of PEFT, merged: numbers against numpy, and every setting and tensor that has another meaning."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ling_jax import load_pretrained
from ling_jax.convert import transfer
from ling_jax.convert.to_hf import to_hf
from ling_jax.convert.to_jax import to_jax
from ling_jax.convert.weights import model_config_of
from tests.support.adapters import ATTENTION, EXPERT, MTP, PREFIX, SOURCE, arrays, pair, shape_of, write_adapter
from tests.support.commands import call
from tests.support.hf_folders import QUANTISED, SLOWLY, assert_same_folder, tensors_of
from tests.tiny_run import REPO


def assert_merged(source: Path, target: Path, deltas: dict[str, np.ndarray]) -> None:
    """Tensors in `deltas` have them added, in float32 and stored in their own dtype; every other byte is kept."""
    old, new = arrays(source), arrays(target)
    assert old.keys() == new.keys()
    for name, value in old.items():
        assert new[name].dtype == value.dtype
        if name not in deltas:
            assert new[name].tobytes() == value.tobytes(), name
            continue
        want = value.astype(np.float32) + deltas[name]
        if value.dtype == np.float32:
            np.testing.assert_allclose(new[name], want, rtol=1e-6, atol=1e-6)
        else:  # a float32 sum near the middle between two numbers may go either way
            step = np.abs(want) * 2.0**-8 + 1e-6
            assert (np.abs(new[name].astype(np.float32) - want) <= step).all()
            assert np.mean(new[name] == want.astype(value.dtype)) > 0.999


def product(tensors: dict[str, np.ndarray], module: str, scale: float) -> np.ndarray:
    a, b = (tensors[f"{PREFIX}{module}.lora_{side}.weight"].astype(np.float32) for side in "AB")
    return np.float32(scale) * (b @ a)


# Numbers.


def test_modules_of_every_kind_are_merged_and_the_audit_names_them(tmp_path, caplog):
    tensors = pair(ATTENTION) | pair(EXPERT, seed=1) | pair(MTP, seed=2) | pair("lm_head", seed=3)
    adapter = write_adapter(tmp_path / "adapter", tensors)
    audit = to_hf(str(SOURCE), str(tmp_path / "merged"), adapter=str(adapter))
    deltas = {f"{module}.weight": product(tensors, module, 2) for module in (ATTENTION, EXPERT, MTP, "lm_head")}
    assert_merged(SOURCE, tmp_path / "merged", deltas)
    saved = json.loads((tmp_path / "merged" / transfer.AUDIT_FILE).read_text())["tensors"]
    assert sorted(name for name, record in saved.items() if record["cast"]) == sorted(deltas)
    assert "4 F32 + adapter" in audit.render()
    assert "was trained on" not in caplog.text
    assert load_pretrained(tmp_path / "merged").config == model_config_of(SOURCE)


def test_weights_of_two_bytes_are_merged_in_four(tmp_path):
    to_hf(str(SOURCE), str(tmp_path / "bf16"), "bf16")
    tensors = pair(ATTENTION, dtype=ml_dtypes.bfloat16) | pair(EXPERT, dtype=np.float16, seed=1)
    adapter = write_adapter(tmp_path / "adapter", tensors)
    to_hf(str(tmp_path / "bf16"), str(tmp_path / "merged"), adapter=str(adapter))
    deltas = {f"{module}.weight": product(tensors, module, 2) for module in (ATTENTION, EXPERT)}
    assert_merged(tmp_path / "bf16", tmp_path / "merged", deltas)


@pytest.mark.parametrize(
    ("changes", "scales", "ranks"),
    [
        ({"use_rslora": True}, (4.0, 4.0), (4, 4)),
        ({"rank_pattern": {"up_proj": 2}}, (2.0, 4.0), (4, 2)),
        ({"rank_pattern": {"up_proj": 2}, "use_rslora": True}, (4.0, 8 / math.sqrt(2)), (4, 2)),
        ({"alpha_pattern": {r"model\.layers\.\d\.attention\.query_key_value": 1}}, (0.25, 2.0), (4, 4)),
        ({"alpha_pattern": {"key_value": 1, "layers.2.mlp.experts.3.up_proj": 16}}, (2.0, 4.0), (4, 4)),
        ({"alpha_pattern": {"^layers.2.mlp.experts.3.up_proj": 16}}, (2.0, 2.0), (4, 4)),
        ({"lora_alpha": 0.5}, (0.125, 0.125), (4, 4)),
    ],
    ids=["rslora", "ranks", "rslora-ranks", "a-regex", "ends-of-names", "beginnings", "alpha"],
)
def test_the_scale_of_each_module_is_pefts(tmp_path, changes, scales, ranks):
    tensors = pair(ATTENTION, ranks[0]) | pair(EXPERT, ranks[1], seed=1)
    adapter = write_adapter(tmp_path / "adapter", tensors, **changes)
    to_hf(str(SOURCE), str(tmp_path / "merged"), adapter=str(adapter))
    modules = zip((ATTENTION, EXPERT), scales, strict=True)
    assert_merged(SOURCE, tmp_path / "merged", {f"{m}.weight": product(tensors, m, scale) for m, scale in modules})


def test_whole_tensors_and_the_embedding_have_one_reading(tmp_path):
    """`modules_to_save`, the base layer beside an adapted head, and an embedding's pair, which is added transposed."""
    draw, (vocab, hidden) = np.random.default_rng(0), shape_of("lm_head")
    norm, head = (draw.normal(size=shape).astype(np.float32) for shape in (shape_of("model.norm"), (vocab, hidden)))
    a, b = (draw.normal(size=shape).astype(np.float32) for shape in ((4, vocab), (hidden, 4)))
    tensors = pair("lm_head") | {
        f"{PREFIX}model.norm.weight": norm, f"{PREFIX}lm_head.base_layer.weight": head,
        f"{PREFIX}model.word_embeddings.lora_embedding_A": a, f"{PREFIX}model.word_embeddings.lora_embedding_B": b,
    }  # fmt: skip
    adapter = write_adapter(tmp_path / "adapter", tensors, modules_to_save=["norm"])
    to_hf(str(SOURCE), str(tmp_path / "merged"), adapter=str(adapter))
    old = arrays(SOURCE)
    deltas = {
        "model.norm.weight": norm - old["model.norm.weight"],
        "lm_head.weight": head - old["lm_head.weight"] + product(tensors, "lm_head", 2),
        "model.word_embeddings.weight": 2 * (b @ a).T,
    }
    assert_merged(SOURCE, tmp_path / "merged", deltas)
    assert arrays(tmp_path / "merged")["model.norm.weight"].tobytes() == norm.tobytes()


def test_a_checkpoint_of_ours_is_merged_as_its_export_is(tmp_path):
    adapter = write_adapter(tmp_path / "adapter", pair(ATTENTION))
    to_jax(str(SOURCE), str(tmp_path / "ours"))
    for name, source in (("a", SOURCE), ("b", tmp_path / "ours")):
        to_hf(str(source), str(tmp_path / name), adapter=str(adapter))
    assert_same_folder(tmp_path / "a", tmp_path / "b")


# What is refused.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3': only LORA"),
        ({"peft_type": None}, "peft_type = None: only LORA"),
        ({"use_dora": True}, "use_dora = True: only plain LoRA"),
        ({"bias": "all"}, "bias = 'all': only plain LoRA"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication = "),
        ({"target_parameters": ["mlp.experts.up_proj"]}, "target_parameters = "),
        ({"a_setting_of_next_year": 3}, "a_setting_of_next_year = 3"),
        ({"r": 0}, "r = 0, rank_pattern = {}: numbers, ranks of 1 or more"),
        ({"lora_alpha": "8"}, "lora_alpha = '8', alpha_pattern = "),
        ({"rank_pattern": {"dense": None}}, "r = 4, rank_pattern = {'dense': None}"),
        ({"rank_pattern": ["dense"]}, "rank_pattern = .'dense'.: numbers, ranks of 1 or more"),
        ({"alpha_pattern": {"(dense": 2}}, "alpha_pattern: '.dense' is no regular expression"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_by_the_field(tmp_path, changes, words):
    adapter = write_adapter(tmp_path / "adapter", pair(ATTENTION), **changes)
    with pytest.raises(ValueError, match=words):
        to_hf(str(SOURCE), str(tmp_path / "merged"), adapter=str(adapter))
    assert not (tmp_path / "merged.partial").exists()


def test_every_tensor_must_have_its_place(tmp_path):
    tensors = pair(ATTENTION, rank=3) | pair(EXPERT)
    del tensors[f"{PREFIX}{EXPERT}.lora_B.weight"]
    tensors |= {
        f"{PREFIX}model.layers.7.mlp.up_proj.lora_A.weight": np.zeros((4, 64), np.float32),
        f"{PREFIX}{MTP}.lora_magnitude_vector": np.zeros(64, np.float32),
        f"{PREFIX}{MTP}.lora_B.bias": np.zeros(64, np.float32),
        f"{PREFIX}model.norm.weight": np.zeros(3, np.float32),
        f"{PREFIX}model.layers.1.input_layernorm.lora_A.weight": np.zeros((4, 64), np.float32),
    }  # fmt: skip
    adapter = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(ValueError) as raised:
        to_hf(str(SOURCE), str(tmp_path / "merged"), adapter=str(adapter))
    rows, columns = shape_of(ATTENTION)
    for words in (
        f"{ATTENTION}.lora_A.weight is (3, {columns}), not (4, {columns}): {ATTENTION}.weight is ({rows}, {columns})",
        f"of {EXPERT}.weight there is only {PREFIX}{EXPERT}.lora_A.weight",
        "model.layers.7.mlp.up_proj.lora_A.weight has no place",
        "lora_magnitude_vector has no place",
        "lora_B.bias has no place",
        "model.norm.weight is (3,), model.norm.weight is (64,)",
        "input_layernorm.lora_A.weight has no place",
    ):
        assert words in str(raised.value)
    assert not (tmp_path / "merged.partial").exists()


def test_two_tensors_for_one_and_none_at_all_are_refused(tmp_path):
    tensors = pair(ATTENTION)
    twice = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    for name, found, words in (("twice", tensors | twice, "two tensors stand for one"), ("none", {}, "has no tensors")):
        adapter = write_adapter(tmp_path / name, found)
        with pytest.raises(ValueError, match=words):
            to_hf(str(SOURCE), str(tmp_path / "merged"), adapter=str(adapter))


def test_fp8_weights_are_to_be_made_bf16_first(tmp_path):
    [source] = QUANTISED
    name, (_, (rows, columns), _) = next(item for item in tensors_of(source).items() if item[1][0] == "F8_E4M3")
    module = name.removesuffix(".weight")
    tensors = {
        f"{PREFIX}{module}.lora_A.weight": np.ones((4, columns), np.float32),
        f"{PREFIX}{module}.lora_B.weight": np.ones((rows, 4), np.float32),
    }
    adapter = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(ValueError, match=f"{name} is FP8 in .*: merge into bf16 .convert.py to-hf --format bf16"):
        to_hf(str(source), str(tmp_path / "merged"), adapter=str(adapter))
    to_hf(str(source), str(tmp_path / "bf16"), "bf16")
    to_hf(str(tmp_path / "bf16"), str(tmp_path / "merged"), adapter=str(adapter))
    assert_merged(tmp_path / "bf16", tmp_path / "merged", {name: np.full((rows, columns), 8, np.float32)})


def test_a_pickle_and_a_missing_folder_are_named(tmp_path):
    adapter = write_adapter(tmp_path / "adapter", pair(ATTENTION))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="no adapter_model.safetensors, but a pickle, adapter_model.bin"):
        to_hf(str(SOURCE), str(tmp_path / "merged"), adapter=str(adapter))
    with pytest.raises(ValueError, match="nowhere/adapter_config.json is missing"):
        to_hf(str(SOURCE), str(tmp_path / "merged"), adapter=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("read", [load_pretrained, model_config_of])
def test_an_adapter_in_a_models_place_is_told_with_the_command(tmp_path, read):
    adapter = write_adapter(tmp_path / "adapter", pair(ATTENTION))
    words = f"{adapter} is a LoRA adapter of somewhere/{SOURCE.name}, not a model: merge it first with python convert"
    with pytest.raises(ValueError, match=words):
        read(str(adapter))
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=f"{adapter} is a LoRA adapter of BASE, not a model: merge it first"):
        read(str(adapter))


# The command, and kills.


def test_the_command_merges_and_warns_of_another_base(tmp_path):
    adapter = write_adapter(tmp_path / "adapter", pair(ATTENTION), base_model_name_or_path="acme/Other-2.0")
    words = ("merge-adapter", "--source", SOURCE, "--adapter", adapter, "--target", tmp_path / "merged")
    out, err = call("convert.py", *words)
    assert f"{adapter} was trained on acme/Other-2.0, and is merged into {SOURCE}" in err
    assert "1 F32 + adapter" in out
    _, err = call("convert.py", *words, code=2)
    assert "exists: choose another --target" in err


def test_a_merge_that_was_killed_goes_on_but_not_with_another_adapter(tmp_path):
    tensors = pair(ATTENTION) | pair(MTP, seed=2)
    adapter, target = write_adapter(tmp_path / "adapter", tensors), tmp_path / "merged"
    journal = tmp_path / "merged.partial" / transfer.JOURNAL
    words = f"to_hf.to_hf(sys.argv[1], sys.argv[2], max_shard_size='20KB', adapter={str(adapter)!r})"
    slowly = f"{SLOWLY.partition('if sys.argv')[0]}{words}"
    command = [sys.executable, "-c", slowly, str(SOURCE), str(target)]
    process = subprocess.Popen(command, cwd=REPO)
    while process.poll() is None and (not journal.exists() or len(journal.read_bytes().splitlines()) < 10):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -9
    other = write_adapter(tmp_path / "other", tensors)
    with pytest.raises(ValueError, match="unfinished conversion of other files"):
        to_hf(str(SOURCE), str(target), max_shard_size="20KB", adapter=str(other))
    to_hf(str(SOURCE), str(target), max_shard_size="20KB", adapter=str(adapter))
    assert_merged(SOURCE, target, {f"{m}.weight": product(tensors, m, 2) for m in (ATTENTION, MTP)})
