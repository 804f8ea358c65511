"""HF folders that tests write, change and compare."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from ling_jax import load_pretrained
from ling_jax.convert.mapping import hf_names
from ling_jax.convert.tensorfile import TensorFile
from tests.support.helpers import random_weights, tiny
from tests.test_golden import FOLDER, kind_of

CONFIG = tiny(use_qkv_bias=True)
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def hf_tensors(config, params, bias) -> dict[str, np.ndarray]:
    """Our parameters under HF's names."""
    tensors = {}
    for path, leaf in (flatten_dict(params) | flatten_dict(bias)).items():
        names = hf_names(config, path)
        parts = np.asarray(leaf).reshape(-1, *leaf.shape[names.ndim :])
        tensors |= dict(zip(names.reshape(-1), parts, strict=True))
    return tensors


def write_folder(folder, dtype=np.float32, config=CONFIG, sharded=False):
    """A HF folder with random weights; returns them as (params, bias)."""
    _, params, bias = random_weights(config)
    params = jax.tree.map(lambda p: np.asarray(p, dtype), params)
    tensors = {name: np.ascontiguousarray(t) for name, t in hf_tensors(config, params, bias).items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    if not sharded:
        save_file(tensors, folder / "model.safetensors")
        return params, bias
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(SHARDS, halves, strict=True):
        save_file({name: tensors[name] for name in half}, folder / file)
    weight_map = {name: file for file, half in zip(SHARDS, halves, strict=True) for name in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return params, bias


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_json(file, change):
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def error_of(folder) -> str:
    with pytest.raises(ValueError) as raised:
        load_pretrained(folder)
    return str(raised.value)


CASES = [folder for folder in sorted(FOLDER.iterdir()) if (folder / "config.json").exists()]
QUANTISED = [case for case in CASES if kind_of(case) == "ling-fp8"]
FLOATS = [case for case in CASES if kind_of(case) == "ling"]


def tensors_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """(dtype, shape, bytes) of every tensor of a HF folder."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        data, opened = file.read_bytes(), TensorFile(file)
        for name, tensor in opened.tensors.items():
            assert name not in found
            found[name] = (tensor.dtype, tensor.shape, data[tensor.begin : tensor.end])
    return found


def assert_same_folder(a: Path, b: Path) -> None:
    ours, theirs = tensors_of(a), tensors_of(b)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert json.loads((a / "config.json").read_text()) == json.loads((b / "config.json").read_text())


# Converts slowly, in small pieces.
SLOWLY = """
import sys, time
from ling_jax.convert import to_hf, to_jax, transfer, weights

weights.PIECE_BYTES = transfer.PIECE_BYTES = to_jax.PIECE_BYTES = to_jax.SMALL_BYTES = 1 << 12
def add(record, part, original=transfer.TensorRecord.add):
    time.sleep(0.004)
    original(record, part)
transfer.TensorRecord.add = add
if sys.argv[1] == "to_jax":
    to_jax.to_jax(sys.argv[2], sys.argv[3])
else:
    to_hf.to_hf(sys.argv[2], sys.argv[3], max_shard_size="20KB")
"""
