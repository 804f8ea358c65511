"""Loading HF folders: every weight in its place, or one error that names what is wrong, before weights are read."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

from ling_jax import load_pretrained
from ling_jax.checkpoint import Checkpointer
from ling_jax.config import DataConfig, MeshConfig, RunConfig, TrainConfig
from ling_jax.convert.weights import HFFolder
from ling_jax.model.model import split_model
from ling_jax.saver import RunSaver
from ling_jax.train.state import make_trainer
from tests.support.helpers import assert_close, assert_trees_equal, make_model, small
from tests.support.hf_folders import CONFIG, INDEX, SHARDS, edit_json, edit_tensors, error_of, write_folder
from tests.tiny_run import REPO


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The good folders `one` and `sharded`, to be copied."""
    root = tmp_path_factory.mktemp("hf")
    write_folder(root / "one")
    write_folder(root / "sharded", sharded=True)
    return root


@pytest.fixture
def one(folders, tmp_path):
    return shutil.copytree(folders / "one", tmp_path / "copy")


@pytest.fixture
def sharded(folders, tmp_path):
    return shutil.copytree(folders / "sharded", tmp_path / "copy")


# What loads.


@pytest.mark.parametrize("config", [CONFIG, small(tie_word_embeddings=True, use_qk_norm=False)], ids=["MTP", "tied"])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_weight_comes_to_its_place(tmp_path, sharded, config):
    params, bias = write_folder(tmp_path / "hf", config=config, sharded=sharded)
    model = load_pretrained(tmp_path / "hf")
    _, got_params, got_bias = split_model(model)
    assert_trees_equal(got_params, params)
    assert_trees_equal(got_bias, bias)
    assert model.config.to_hf() == config.to_hf()


@pytest.mark.parametrize("kind", ["one", "sharded", "checkpoint"])
def test_over_a_mesh_the_same_weights_are_split_and_give_the_same_logits(folders, tmp_path, kind):
    if kind == "checkpoint":
        train = TrainConfig(param_dtype="float32")
        config = RunConfig(model=CONFIG, data=DataConfig(sequence_length=32), train=train)
        saver = RunSaver(Checkpointer(str(tmp_path / "checkpoints"), config.checkpoint), config)
        saver.save(make_trainer(config).new_state())
        saver.checkpointer.close()
    folder = tmp_path if kind == "checkpoint" else folders / kind
    mesh = MeshConfig(fsdp=2, expert=4)
    whole, split = load_pretrained(folder), load_pretrained(folder, mesh=mesh)
    for got, want in zip(split_model(split)[1:], split_model(whole)[1:], strict=True):
        assert_trees_equal(got, want)
    up_proj = split_model(split)[1]["layers"]["softmax_moe"]["mlp"]["experts"]["up_proj"]["weight"]
    assert up_proj.sharding.spec == PartitionSpec(None, "expert", None, "fsdp")
    assert up_proj.addressable_shards[0].data.size == up_proj.size // 8
    tokens = np.random.default_rng(0).integers(0, 59, (2, 16))
    assert_close(split(tokens).logits_BTV, whole(tokens).logits_BTV)


def test_only_what_a_device_holds_is_read(folders, monkeypatch):
    read = []

    def spy(source, path, index, original=HFFolder.read):
        read.append(part := original(source, path, index))
        return part

    monkeypatch.setattr(HFFolder, "read", spy)
    model = load_pretrained(folders / "one", mesh=MeshConfig(fsdp=4, expert=2))
    params = split_model(model)[1]
    assert sum(part.size for part in read) < 1.2 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert max(part.size for part in read) <= max(leaf.size for leaf in jax.tree.leaves(params)) / 8


def test_a_mesh_that_does_not_divide_the_model_is_one_error(one):
    with pytest.raises(ValueError, match=r"model.num_experts = 8 must be a multiple of mesh.expert = 3"):
        load_pretrained(one, mesh=MeshConfig(expert=3))


def test_a_path_may_be_a_string(one):
    assert load_pretrained(str(one)).config.vocab_size == CONFIG.vocab_size


def test_a_bfloat16_file_stays_bfloat16_and_computes_in_float32_on_cpu(tmp_path):
    """The expert bias stays float32 as it was written."""
    params, bias = write_folder(tmp_path / "hf", dtype=ml_dtypes.bfloat16)
    model = load_pretrained(tmp_path / "hf")
    _, got_params, got_bias = split_model(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(got_params)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(got_bias)} == {jnp.dtype(jnp.float32)}
    assert_trees_equal(got_params, params)
    assert_trees_equal(got_bias, bias)
    assert model.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16])
def test_dtype_is_that_of_weights_and_computation(one, dtype):
    model = load_pretrained(one, dtype=dtype)
    _, params, bias = split_model(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)} == {model.dtype}
    assert {leaf.dtype for leaf in jax.tree.leaves(bias)} == {jnp.dtype(jnp.float32)}


def test_an_expert_bias_in_bfloat16_becomes_float32(one):
    def cast(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

    edit_tensors(one / "model.safetensors", cast)
    assert {leaf.dtype for leaf in jax.tree.leaves(split_model(load_pretrained(one))[2])} == {jnp.dtype(jnp.float32)}


def test_a_loaded_model_is_the_model_that_was_written(tmp_path):
    config = small(num_hidden_layers=1)
    write_folder(tmp_path / "hf", config=config)
    tokens = np.array([[5, 7, 11]])
    want = make_model(config)(tokens).logits_BTV
    np.testing.assert_array_equal(load_pretrained(tmp_path / "hf")(tokens).logits_BTV, want)


# Tensors that do not fit the config.

NORM = "model.layers.1.input_layernorm.weight"
EXPERT = "model.layers.2.mlp.experts.5.down_proj.weight"


@pytest.mark.parametrize("name", [NORM, EXPERT, "lm_head.weight", "model.layers.2.mlp.gate.expert_bias"])
def test_a_missing_tensor_is_named(one, name):
    edit_tensors(one / "model.safetensors", lambda t: t.pop(name))
    assert error_of(one) == f"{one} does not match its config.json: 1 tensor(s) missing: {name}"


def test_a_config_saved_by_transformers_5_gives_the_same_logits(tmp_path):
    """YaRN is in rope_parameters there, and theta with it."""
    case = REPO / "tests" / "golden" / "tiny-ling-yarn"
    shutil.copytree(case, tmp_path / "hf", ignore=shutil.ignore_patterns("expected*"))

    def rewrite(config):
        rope = {"rope_theta": config.pop("rope_theta"), "partial_rotary_factor": config.pop("partial_rotary_factor")}
        config["rope_parameters"] = {**config.pop("rope_scaling"), "type": "yarn", **rope}
        config["dtype"] = config.pop("torch_dtype")

    edit_json(tmp_path / "hf" / "config.json", rewrite)
    expected = load_file(case / "expected.safetensors")
    got = load_pretrained(tmp_path / "hf")(expected["fwd.input_ids"].astype(np.int32)).logits_BTV
    assert_close(got, expected["fwd.logits"], 1e-4)


def test_an_extra_tensor_is_named(one):
    edit_tensors(one / "model.safetensors", lambda t: t.update(surprise=np.zeros(3, np.float32)))
    assert "1 tensor(s) that the config has no place for: surprise" in error_of(one)


@pytest.mark.parametrize("name", [NORM, EXPERT])
def test_a_wrong_shape_is_named_with_both_shapes(one, name):
    edit_tensors(one / "model.safetensors", lambda t: t.update({name: np.zeros((4, 2), np.float32)}))
    right = "(32,)" if name == NORM else "(32, 20)"
    assert f"1 wrong shape(s): {name} is (4, 2), the config says {right}" in error_of(one)


def test_a_transposed_tensor_is_a_wrong_shape(one):
    edit_tensors(one / "model.safetensors", lambda t: t.update({EXPERT: np.ascontiguousarray(t[EXPERT].T)}))
    assert f"{EXPERT} is (20, 32), the config says (32, 20)" in error_of(one)


def test_all_that_is_wrong_is_in_one_error_cut_after_ten_names(one):
    def change(tensors):
        for name in [n for n in tensors if ".experts.0." in n] + [NORM]:
            del tensors[name]
        tensors["surprise"] = np.zeros(1, np.float32)
        tensors["model.norm.weight"] = np.zeros(5, np.float32)

    edit_tensors(one / "model.safetensors", change)
    message = error_of(one)
    assert "10 tensor(s) missing" in message and "surprise" in message and "model.norm.weight is (5,)" in message
    edit_tensors(one / "model.safetensors", lambda t: t.pop("model.word_embeddings.weight"))
    assert "11 tensor(s) missing" in error_of(one) and "and 1 more" in error_of(one)


def test_a_config_with_more_layers_than_the_file_is_refused(one):
    edit_json(one / "config.json", lambda c: c.update(num_hidden_layers=4))
    assert "tensor(s) missing: model.layers.4." in error_of(one)


# Files.


def test_a_truncated_file_is_named(one):
    file = one / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert f"{file} is damaged or truncated" in error_of(one)


@pytest.mark.parametrize("content", [b"", b"12345", b"\xff" * 100, b"<html>sign in</html>"])
def test_a_file_that_is_no_safetensors_file_is_named(one, content):
    (one / "model.safetensors").write_bytes(content)
    assert f"{one / 'model.safetensors'} is damaged or truncated" in error_of(one)


def test_a_truncated_shard_is_named(sharded):
    os.truncate(sharded / SHARDS[1], 5000)
    assert f"{sharded / SHARDS[1]} is damaged or truncated" in error_of(sharded)


def test_a_missing_shard_is_named(sharded):
    (sharded / SHARDS[1]).unlink()
    assert f"{sharded / SHARDS[1]} is missing" in error_of(sharded)


@pytest.mark.parametrize("place", ["../secret.safetensors", "sub/x.safetensors", "..", "", "/etc/passwd"])
def test_an_index_that_points_outside_its_folder_is_refused(sharded, place):
    shutil.copy(sharded / SHARDS[0], sharded.parent / "secret.safetensors")
    (sharded / "sub").mkdir()
    shutil.copy(sharded / SHARDS[0], sharded / "sub" / "x.safetensors")
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({NORM: place}))
    assert f"points outside its folder: {place!r}; refusing to read it" in error_of(sharded)


def test_links_to_blobs_elsewhere_load_as_in_the_cache_of_hf(sharded):
    for name in SHARDS:
        blob = sharded.parent / f"blob-{name}"
        (sharded / name).rename(blob)
        (sharded / name).symlink_to(blob)
    assert load_pretrained(sharded).config.num_hidden_layers == 3


def test_a_tensor_of_whole_numbers_is_named(sharded):
    edit_tensors(sharded / SHARDS[0], lambda t: t.update({(name := sorted(t)[0]): t[name].astype(np.int32)}))
    assert "1 dtype(s) other than BF16, F16, F32" in error_of(sharded)


def test_a_tensor_that_its_shard_lacks_is_named(sharded):
    edit_tensors(sharded / SHARDS[0], lambda t: t.pop(sorted(t)[0]))
    name = sorted(json.loads((sharded / INDEX).read_text())["weight_map"])[0]
    message = error_of(sharded)
    assert f"{sharded / INDEX} disagrees with the files it names on {name}" in message


def test_a_tensor_in_another_shard_than_the_index_says_is_named(sharded):
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": SHARDS[1]}))
    assert "disagrees with the files it names on lm_head.weight" in error_of(sharded)


def test_a_tensor_that_the_index_lacks_is_named(sharded):
    edit_json(sharded / INDEX, lambda index: index["weight_map"].pop("lm_head.weight"))
    assert "disagrees with the files it names on lm_head.weight" in error_of(sharded)


# The JSON files.


def test_a_missing_config_is_named(one):
    (one / "config.json").unlink()
    assert error_of(one) == f"{one / 'config.json'} is missing"


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_broken_json_is_named(sharded, name):
    (sharded / name).write_text('{"vocab_size": 61,')
    assert f"{sharded / name} is not valid JSON" in error_of(sharded)


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", "[]"), (INDEX, "[]"), (INDEX, '{"weight_map": []}'), (INDEX, '{"weight_map": {"a": 3}}')],
)
def test_json_of_another_kind_is_named(sharded, name, content):
    (sharded / name).write_text(content)
    assert str(sharded / name) in error_of(sharded)


def test_a_config_of_another_architecture_is_refused(one):
    edit_json(one / "config.json", lambda c: c.update(model_type="llama"))
    assert "model_type = 'llama' in config.json" in error_of(one)


@pytest.mark.parametrize("settings", [{"quant_method": "gptq"}, {"quant_method": "fp8", "fmt": "e5m2"}, {}, 3])
def test_weights_quantised_in_another_way_are_refused(one, settings):
    edit_json(one / "config.json", lambda c: c.update(quantization_config=settings))
    assert "quantization_config" in error_of(one) and "use the bf16 release" in error_of(one)


def test_the_format_of_quantised_weights_is_named_and_the_long_rest_is_not(one):
    """As releases since 2.6 have it, and as MLX writes it."""
    scheme = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {"x": 1}}}
    edit_json(one / "config.json", lambda c: c.update(quantization_config=scheme))
    assert "'compressed-tensors', 'format': 'float-quantized'}" in error_of(one) and "group_0" not in error_of(one)
    edit_json(one / "config.json", lambda c: c.pop("quantization_config"))
    edit_json(one / "config.json", lambda c: c.update(quantization={"bits": 4, "group_size": 64}))
    assert "{'bits': 4, 'group_size': 64}" in error_of(one) and "use the bf16 release" in error_of(one)


def test_a_quantization_config_of_null_is_none(one):
    edit_json(one / "config.json", lambda c: c.update(quantization_config=None))
    load_pretrained(one)


def test_a_folder_without_weights_is_refused(one):
    (one / "model.safetensors").unlink()
    assert str(one) in error_of(one)


def test_a_path_that_does_not_exist_is_named(tmp_path):
    assert f"{tmp_path / 'nowhere'}, which does not exist" in error_of(tmp_path / "nowhere")


def test_nothing_is_left_open_or_changed_in_the_folder(one):
    before = {file.name: file.read_bytes() for file in one.iterdir()}
    nnx.state(load_pretrained(one))
    assert {file.name: file.read_bytes() for file in one.iterdir()} == before
