"""`config.json`, as the releases, the official converter, transformers 4 and transformers 5 write it, in and out."""

import math
from collections.abc import Mapping
from typing import Any

from ling_jax.config.checks import check
from ling_jax.config.rope import PLACES, read_rope, rope_changes

MODEL_TYPES = ("bailing_moe", "bailing_moe_v2", "bailing_moe_linear")
# What the official class saves again has no model_type, only its own name.
CLASSES = {"BailingMoeV2ForCausalLM": "bailing_moe", "BailingMoeLinearV2ForCausalLM": "bailing_moe_linear"}
OLDER = "BailingMoeForCausalLM"  # Ling 1.x: `model_type` bailing_moe too, but another router and no groups
LINEAR_HF_FIELDS = ("layer_group_size", "group_norm_size", "linear_silu")  # of bailing_moe_linear only
SLOPES = "slope_convention"  # of bailing_moe_linear too, but no release has it: ours say which is meant

# Fields a release sets in config.json. The reference configuration class fills some of them with values
# that no release uses (spec 1.6: routed_scaling_factor 1.0 for 2.5), so none is ever filled in for a user.
# Fields that only say which tensors exist (use_qk_norm, tie_word_embeddings, ...) are checked against them.
REQUIRED_HF_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "num_experts",
    "num_experts_per_tok",
    "num_shared_experts",
    "n_group",
    "topk_group",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "routed_scaling_factor",
    "pad_token_id",
    "eos_token_id",
)
# Those of them that may be null: by itself, by a width that follows, by no shared expert, by no limit to groups.
NULLABLE = ("pad_token_id", "eos_token_id", "head_dim", "num_shared_experts", "n_group", "topk_group")
# Choices of the reference that this package has only one of: any other value is an error, not a surprise.
FIXED_HF_FIELDS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "score_function": ("sigmoid",),
    "router_dtype": ("fp32", "float32"),
    "attention_dropout": (0,),
    "embedding_dropout": (0,),
    "output_dropout": (0,),
}
# Choices of the family's other generations, which change the function and have no place here.
FALSE_HF_FIELDS = ("norm_head", "norm_softmax", "use_sliding_window")
MTP_LOSS_SCALING_FACTOR = 0.1  # the releases' recipe; the official converter writes none
WRITTEN_BY = "4.52.3"  # transformers_version in what the official converter writes


def read_config_json(config: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """Values for the fields `names` of a ModelConfig, from a `config.json`. A null says as much as an absent field.

    Raises:
      ValueError: for another architecture, a field the releases set and this file lacks, or a value this package does
        not implement; the message names the field and what to do.
    """
    linear = _check_kind(config)
    said = {name: value for name, value in config.items() if value is not None}
    required = REQUIRED_HF_FIELDS + LINEAR_HF_FIELDS * linear
    missing = [name for name in required if name not in (config if name in NULLABLE else said)]
    if any(isinstance(config.get(place), Mapping) and config[place].get("rope_theta") is not None for place in PLACES):
        missing = [name for name in missing if name != "rope_theta"]
    check(
        not missing,
        f"config.json lacks {', '.join(missing)}; the releases set every one of them and their class "
        "defaults differ, so nothing is guessed: add them to the file",
    )
    for name, allowed in FIXED_HF_FIELDS.items():
        value = said.get(name, allowed[0])
        check(value in allowed, f"{name} = {value!r} in config.json: only {allowed[0]!r} is implemented")
    for name in FALSE_HF_FIELDS:
        check(not said.get(name), f"{name} = {said.get(name)!r} in config.json: it is not implemented")
    values = {name: said[name] for name in names - set(() if linear else (*LINEAR_HF_FIELDS, SLOPES)) if name in said}
    values |= {name: config[name] for name in ("pad_token_id", "eos_token_id")}
    if isinstance(ends := config["eos_token_id"], list) and ends:
        values["eos_token_id"] = ends[0]
    values["num_shared_experts"] = config["num_shared_experts"] or 0
    values["head_dim"] = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    values["n_group"] = config["n_group"] or 1  # the converter writes 0 where a run had no limit to groups
    values["topk_group"] = config["topk_group"] or int(values["n_group"] == 1)
    values["num_nextn_predict_layers"] = config.get("num_nextn_predict_layers") or 0
    values["mtp_loss_scaling_factor"] = _mtp_factor(values)
    return values | _rotary(read_rope(config), values["head_dim"])


def _kind(config: Mapping[str, Any]) -> str | None:
    named = (CLASSES[name] for name in config.get("architectures") or () if name in CLASSES)
    return config["model_type"] if "model_type" in config else next(named, None)


def _check_kind(config: Mapping[str, Any]) -> bool:
    """Whether it is a linear model; ValueError if it is none of ours."""
    kind, classes = _kind(config), config.get("architectures") or ()
    check(
        kind in MODEL_TYPES,
        f"model_type = {kind!r} in config.json: this version reads {', '.join(MODEL_TYPES)} only",
    )
    check(OLDER not in classes, f"architectures = {classes!r} in config.json is Ling 1.x: this version reads 2.0 only")
    return kind == "bailing_moe_linear"


def _mtp_factor(values: Mapping[str, Any]) -> float:
    """The MTP loss factor of the file, or the recipe's; 0 without an MTP layer, where it means nothing."""
    if not values["num_nextn_predict_layers"]:
        return 0.0
    return values.get("mtp_loss_scaling_factor", MTP_LOSS_SCALING_FACTOR)


def _rotary(rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """One spelling of the rotated width, a share of the head (spec 1.1: the factor first, else `rotary_dim`)."""
    factor, dims = rope["partial_rotary_factor"], rope["rotary_dim"]
    if factor is None and isinstance(dims, int | float):
        factor = _share(dims, head_dim)
    return rope | {"partial_rotary_factor": factor, "rotary_dim": None}


def _share(dims: float, head_dim: int) -> float:
    """The share of a head from which its reader, rounding down, gets back the number of rotated `dims`."""
    share = dims / head_dim
    return share if int(head_dim * share) == dims else math.nextafter(share, math.inf)


def new_config_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a model that came from none, with the fields that the official converter writes.

    Args:
      values: of all our fields, in HF's form.
    """
    linear = bool(values.get("layer_group_size"))
    name, module = ("BailingMoeLinearV2", "_moe_linear_v2") if linear else ("BailingMoeV2", "_moe_v2")
    auto_map = {"AutoConfig": f"configuration_bailing{module}.{name}Config"}
    auto_map["AutoModelForCausalLM"] = f"modeling_bailing{module}.{name}ForCausalLM"
    if not linear:
        auto_map["AutoModel"] = f"modeling_bailing{module}.{name}Model"
    head = {
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": auto_map,
        "model_type": "bailing_moe_linear" if linear else "bailing_moe",
        "moe_shared_expert_intermediate_size": values["num_shared_experts"] * values["moe_intermediate_size"],
        "transformers_version": WRITTEN_BY,
        "use_cache": True,
        "use_rmsnorm": True,
    }
    fixed = {name: allowed[0] for name, allowed in FIXED_HF_FIELDS.items()}
    ours = {name: value for name, value in values.items() if name != "rotary_dim"}  # the official class has none
    if values["partial_rotary_factor"] is None:
        ours["partial_rotary_factor"] = _share(values["rotary_dim"], values["head_dim"])
    return head | fixed | ours


def changed_config_json(
    original: Mapping[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, Any]:
    """`original` with the fields that changed from `before` to `now`, and what must follow them."""
    changed = {name: value for name, value in now.items() if value != before[name]}
    rope = {name: now[name] for name in ("rope_theta", "partial_rotary_factor", "rotary_dim", "rope_scaling")}
    kind = {"model_type": _kind(original)}  # many programs go by it
    return {**original, **kind, **changed, **rope_changes(original, changed, rope)}
