"""Every setting, as frozen dataclasses; no arrays live here."""

from ling_jax.config.hf import FIXED_HF_FIELDS, MODEL_TYPES, REQUIRED_HF_FIELDS
from ling_jax.config.model import (
    Counts,
    ModelConfig,
    Segment,
    architecture_diff,
    count_params,
    layer_kinds,
    layer_plan,
    model_settings_diff,
    train_flops_per_token,
)
from ling_jax.config.rope import RopeScaling
from ling_jax.config.run import (
    MESH_AXES,
    ONE_DEVICE,
    CheckpointConfig,
    DataConfig,
    DataSource,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    settings_diff,
)

__all__ = [
    "CheckpointConfig",
    "Counts",
    "DataConfig",
    "DataSource",
    "FIXED_HF_FIELDS",
    "MESH_AXES",
    "MODEL_TYPES",
    "MeshConfig",
    "ModelConfig",
    "ONE_DEVICE",
    "OptimizerConfig",
    "REQUIRED_HF_FIELDS",
    "RopeScaling",
    "RunConfig",
    "ScheduleConfig",
    "Segment",
    "TrainConfig",
    "architecture_diff",
    "count_params",
    "layer_kinds",
    "layer_plan",
    "model_settings_diff",
    "settings_diff",
    "train_flops_per_token",
]
