"""LoRA adapters in PEFT's form, with random numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ling_jax.convert.tensorfile import DTYPES, NAMES, write_tensors
from tests.support.hf_folders import FLOATS, tensors_of

SOURCE = FLOATS[0]
PREFIX = "base_model.model."
ATTENTION = "model.layers.1.attention.query_key_value"
EXPERT = "model.layers.2.mlp.experts.3.up_proj"
MTP = "model.layers.4.attention.dense"
PLAIN = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": f"somewhere/{SOURCE.name}", "r": 4,
    "lora_alpha": 8, "lora_dropout": 0.1, "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
    "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "target_modules": ["dense"],
    "init_lora_weights": True, "layer_replication": None, "megatron_core": "megatron.core", "inference_mode": True,
}  # fmt: skip


def shape_of(name: str) -> tuple[int, ...]:
    return tensors_of(SOURCE)[name + ".weight"][1]


def pair(module: str, rank: int = 4, dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    draw, (rows, columns) = np.random.default_rng(seed), shape_of(module)
    a, b = draw.normal(size=(rank, columns)), draw.normal(size=(rows, rank))
    return {
        f"{PREFIX}{module}.lora_A.weight": (a / 10).astype(dtype),
        f"{PREFIX}{module}.lora_B.weight": (b / 10).astype(dtype),
    }


def write_adapter(folder: Path, tensors: dict[str, np.ndarray], **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | changes))
    entries = {name: (NAMES[value.dtype], value.shape) for name, value in tensors.items()}
    write_tensors(folder / "adapter_model.safetensors", entries, {}, tensors.items())
    return folder


def arrays(folder: Path) -> dict[str, np.ndarray]:
    found = tensors_of(folder).items()
    return {name: np.frombuffer(data, DTYPES[dtype]).reshape(shape) for name, (dtype, shape, data) in found}
