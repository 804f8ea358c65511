"""How the settings of two models differ: which differences make them useless, and which may be chosen anew."""

import dataclasses
from typing import Any

from ling_jax.config.hf import LINEAR_HF_FIELDS
from ling_jax.config.layers import layer_kinds
from ling_jax.config.model import ModelConfig

# Fields of a ModelConfig that weights do not depend on: whoever goes on with a checkpoint may change them.
SETTINGS = (
    "rope_theta", "rope_scaling", "max_position_embeddings", "moe_router_enable_expert_bias",
    "mtp_loss_scaling_factor", "initializer_range", "pad_token_id", "eos_token_id", "slope_convention",
)  # fmt: skip


def architecture_diff(saved: ModelConfig, wanted: ModelConfig) -> list[str]:
    """Lines "model.field: saved -> wanted" for all that decides which tensors there are, their shapes and what the
    network does with them, by meaning: how a width is spelled, and fields that say nothing, make no difference."""
    before, after = _architecture(saved), _architecture(wanted)
    names = [name for name in before | after if before.get(name) != after.get(name)]
    return [f"model.{name}: {before.get(name)!r} -> {after.get(name)!r}" for name in names]


def model_settings_diff(saved: ModelConfig, wanted: ModelConfig) -> list[str]:
    """The same lines for the fields that may change between a checkpoint and a run that goes on with it."""
    names = [name for name in SETTINGS if getattr(saved, name) != getattr(wanted, name)]
    if not (saved.num_nextn_predict_layers and wanted.num_nextn_predict_layers):
        names = [name for name in names if name != "mtp_loss_scaling_factor"]
    return [f"model.{name}: {getattr(saved, name)!r} -> {getattr(wanted, name)!r}" for name in names]


def _architecture(config: ModelConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    for name in ("hf_json", *SETTINGS, "partial_rotary_factor", "rotary_dim"):
        del values[name]
    values["rotary_width"] = config.rotary_width
    if config.topk_group == config.n_group:  # every group is open, so there is no limit
        values["n_group"] = values["topk_group"] = "no limit"
    if not config.first_k_dense_replace:  # no layer has this width
        del values["intermediate_size"]
    if config.num_experts_per_tok == 1:  # a single expert keeps its score
        del values["norm_topk_prob"]
    if not any(kind.mixer == "linear" for kind in layer_kinds(config)):
        for name in LINEAR_HF_FIELDS:
            del values[name]
    return values
