"""Every setting, as frozen dataclasses; no arrays live here."""

from ling_jax.config.data import DataConfig, DataSource, by_tag
from ling_jax.config.differences import architecture_diff, model_settings_diff
from ling_jax.config.hf import FIXED_HF_FIELDS, MODEL_TYPES, REQUIRED_HF_FIELDS
from ling_jax.config.layers import LayerKind, LayerRun, layer_kinds, layer_runs, routed_layers
from ling_jax.config.mesh import MESH_AXES, ONE_DEVICE, MeshConfig
from ling_jax.config.model import ModelConfig
from ling_jax.config.parameters import Counts, count_params, train_flops_per_token
from ling_jax.config.post import (
    PRESETS,
    DroppedReasoning,
    Normalise,
    RLConfig,
    SFTConfig,
    Spread,
    Unit,
)
from ling_jax.config.rope import RopeScaling
from ling_jax.config.run import (
    NEEDLE_TOKENS,
    CheckpointConfig,
    OptimizerConfig,
    RLRun,
    RunConfig,
    ScheduleConfig,
    SFTRun,
    TrainConfig,
    settings_diff,
)
from ling_jax.config.stages import Stage, StageRun

__all__ = [
    "NEEDLE_TOKENS",
    "CheckpointConfig",
    "Counts",
    "DataConfig",
    "DataSource",
    "DroppedReasoning",
    "FIXED_HF_FIELDS",
    "LayerKind",
    "LayerRun",
    "MESH_AXES",
    "MODEL_TYPES",
    "MeshConfig",
    "ModelConfig",
    "Normalise",
    "ONE_DEVICE",
    "OptimizerConfig",
    "PRESETS",
    "REQUIRED_HF_FIELDS",
    "RLConfig",
    "RLRun",
    "RopeScaling",
    "RunConfig",
    "SFTConfig",
    "SFTRun",
    "ScheduleConfig",
    "Spread",
    "Stage",
    "StageRun",
    "TrainConfig",
    "Unit",
    "architecture_diff",
    "by_tag",
    "count_params",
    "layer_kinds",
    "layer_runs",
    "model_settings_diff",
    "routed_layers",
    "settings_diff",
    "train_flops_per_token",
]
