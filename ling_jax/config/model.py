"""The architecture: its settings, its layer plan, its parameter counts.

Architecture fields are spelled as in the released `config.json`, so `from_hf` and `to_hf` are (nearly)
the identity and one name serves the paper, the checkpoint and this code.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import tyro

from ling_jax.config.checks import check, check_at_least, check_types

MODEL_TYPES = ("bailing_moe", "bailing_moe_v2", "bailing_moe_linear")
LINEAR_HF_FIELDS = ("layer_group_size", "group_norm_size", "linear_silu")  # of bailing_moe_linear only

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
# Choices of the reference that this package has only one of: any other value is an error, not a surprise.
FIXED_HF_FIELDS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "score_function": ("sigmoid",),
    "router_dtype": ("fp32", "float32"),
    "attention_dropout": (0, None),
    "embedding_dropout": (0, None),
    "output_dropout": (0, None),
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """YaRN context extension (arXiv 2309.00071), with the key names of HF's `rope_scaling`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None

    def __post_init__(self):
        check_types(self)
        check_at_least(self, 1, "factor", "original_max_position_embeddings")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture (Ling 2.0 report, arXiv 2510.22115, section 2), in `config.json` spelling."""

    vocab_size: int = 157184
    hidden_size: int
    intermediate_size: int  # width of the leading dense layers' FFN
    num_hidden_layers: int  # trunk layers, the MTP layer not counted
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128
    num_experts: int = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int = 1
    n_group: int = 8
    topk_group: int = 4
    moe_intermediate_size: int  # width of one expert
    first_k_dense_replace: int = 1
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    moe_router_enable_expert_bias: bool = True  # False: training leaves the bias (always present) alone
    num_nextn_predict_layers: int = 0
    mtp_loss_scaling_factor: float = 0.1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 600000.0
    partial_rotary_factor: float | None = 0.5
    rotary_dim: int | None = None  # read only where partial_rotary_factor is absent
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 32768
    use_qk_norm: bool = True
    use_qkv_bias: bool = False
    use_bias: bool = False
    tie_word_embeddings: bool = False
    layer_group_size: int = 0  # Ring-linear: all but the last layer of each group are linear; 0: every layer is softmax
    group_norm_size: int = 1  # number of groups of a linear layer's output norm
    linear_silu: bool = False  # whether a linear layer's queries, keys and values pass through silu
    initializer_range: float = 0.02
    pad_token_id: int | None = 156892
    eos_token_id: int | None = 156892
    # The config.json this came from, so that `to_hf` gives back every field, known or not.
    hf_json: Annotated[str, tyro.conf.Suppress] = dataclasses.field(default="", repr=False)

    def __post_init__(self):
        check_types(self)
        check_at_least(
            self, 1, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "num_experts", "num_experts_per_tok", "n_group", "topk_group",
            "moe_intermediate_size", "intermediate_size", "max_position_embeddings",
        )  # fmt: skip
        check_at_least(
            self, 0, "num_shared_experts", "first_k_dense_replace", "mtp_loss_scaling_factor", "rms_norm_eps",
            "layer_group_size",
        )  # fmt: skip
        check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads = {self.num_attention_heads} must be a multiple of "
            f"num_key_value_heads = {self.num_key_value_heads}",
        )
        check(
            self.first_k_dense_replace <= self.num_hidden_layers,
            f"first_k_dense_replace = {self.first_k_dense_replace} exceeds "
            f"num_hidden_layers = {self.num_hidden_layers}",
        )
        check(
            self.num_nextn_predict_layers in (0, 1),
            f"num_nextn_predict_layers = {self.num_nextn_predict_layers}: the family has 0 or 1 (spec 2.6)",
        )
        self._check_router()
        self._check_rope()
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(self, name)
            check(
                value is None or 0 <= value < self.vocab_size,
                f"{name} = {value} is outside the vocabulary of {self.vocab_size}",
            )

    def _check_router(self):
        check(
            self.num_experts % self.n_group == 0,
            f"num_experts = {self.num_experts} must be a multiple of n_group = {self.n_group}",
        )
        size = self.num_experts // self.n_group
        check(
            size >= 2,
            f"num_experts / n_group = {size}: a group is ranked by its two best experts, so it needs 2",
        )
        check(self.topk_group <= self.n_group, f"topk_group = {self.topk_group} exceeds n_group = {self.n_group}")
        limit = self.topk_group * size
        check(
            self.num_experts_per_tok <= limit,
            f"num_experts_per_tok = {self.num_experts_per_tok} exceeds the {limit} experts that "
            f"topk_group = {self.topk_group} groups of {size} hold; lower it or raise topk_group",
        )

    def _check_rope(self):
        check(self.rope_theta > 0, f"rope_theta = {self.rope_theta} must be positive")
        check(
            self.partial_rotary_factor is not None or self.rotary_dim is not None,
            "partial_rotary_factor and rotary_dim are both missing: the releases rotate half of head_dim; "
            "set partial_rotary_factor (0.5 in every release, 1.0 to rotate the whole head)",
        )
        check(
            0 <= self.rotary_width <= self.head_dim and self.rotary_width % 2 == 0,
            f"the rotated width {self.rotary_width} must be even and at most head_dim = {self.head_dim}",
        )

    @property
    def rotary_width(self) -> int:
        """Leading dims of each head that RoPE turns (spec 1.1: the factor first, else `rotary_dim`)."""
        if self.partial_rotary_factor is not None:
            return int(self.head_dim * self.partial_rotary_factor)
        return self.rotary_dim or 0

    @property
    def max_positions(self) -> int:
        """Longest sequence, in tokens: the trained length, or what YaRN stretches it to."""
        if self.rope_scaling is None:
            return self.max_position_embeddings
        stretched = int(self.rope_scaling.factor * self.rope_scaling.original_max_position_embeddings)
        return max(self.max_position_embeddings, stretched)

    @property
    def shared_intermediate_size(self) -> int:
        return self.num_shared_experts * self.moe_intermediate_size

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Reads a released `config.json`.

        Raises:
          ValueError: for another architecture, a field the releases set and this file lacks, or a value
            this package does not implement; the message names the field and what to do.
        """
        kind = config.get("model_type")
        check(
            kind in MODEL_TYPES,
            f"model_type = {kind!r} in config.json: this version reads {', '.join(MODEL_TYPES)} only",
        )
        linear = kind == "bailing_moe_linear"
        required = REQUIRED_HF_FIELDS + LINEAR_HF_FIELDS * linear
        missing = [name for name in required if name not in config]
        nextn = config.get("num_nextn_predict_layers") or 0
        if nextn and config.get("mtp_loss_scaling_factor") is None:
            missing.append("mtp_loss_scaling_factor")
        check(
            not missing,
            f"config.json lacks {', '.join(missing)}; the releases set every one of them and their class "
            "defaults differ, so nothing is guessed: add them to the file",
        )
        for name, allowed in FIXED_HF_FIELDS.items():
            value = config.get(name, allowed[0])
            check(value in allowed, f"{name} = {value!r} in config.json: only {allowed[0]!r} is implemented")
        known = {f.name for f in dataclasses.fields(cls)} - {"hf_json"} - set(() if linear else LINEAR_HF_FIELDS)
        values = {name: config[name] for name in known if name in config}
        values.setdefault("partial_rotary_factor", None)
        values.setdefault("norm_topk_prob", True)  # hard-coded in the reference's router
        values["num_nextn_predict_layers"] = nextn
        values["mtp_loss_scaling_factor"] = config.get("mtp_loss_scaling_factor") or 0.0
        values["num_shared_experts"] = config["num_shared_experts"] or 0
        values["head_dim"] = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
        values["rope_scaling"] = _rope_scaling_from_hf(config.get("rope_scaling"), config)
        eos = config["eos_token_id"]
        values["eos_token_id"] = eos[0] if isinstance(eos, list) and eos else eos
        return cls(**values, hf_json=json.dumps(dict(config), sort_keys=True))

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` dict: the one read, with the fields that changed since; or a new one."""
        ours = _hf_values(self)
        if not self.hf_json:
            kind = ("BailingMoeLinearV2", "linear") if self.layer_group_size else ("BailingMoeV2", "v2")
            head = {"architectures": [f"{kind[0]}ForCausalLM"], "model_type": f"bailing_moe_{kind[1]}"}
            fixed = {name: allowed[0] for name, allowed in FIXED_HF_FIELDS.items()}
            return head | fixed | ours
        original = json.loads(self.hf_json)
        before = _hf_values(ModelConfig.from_hf(original))
        return original | {name: value for name, value in ours.items() if value != before[name]}


def _hf_values(config: ModelConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    for name in ("hf_json", *(() if config.layer_group_size else LINEAR_HF_FIELDS)):
        del values[name]
    if config.rope_scaling is not None:
        scaling = {k: v for k, v in values["rope_scaling"].items() if v is not None}
        values["rope_scaling"] = {"rope_type": "yarn", **scaling}
    return values


def _rope_scaling_from_hf(scaling: Mapping[str, Any] | None, config: Mapping[str, Any]) -> RopeScaling | None:
    if scaling is None:
        return None
    check(isinstance(scaling, Mapping), f"rope_scaling = {scaling!r} in config.json must be an object or null")
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in (None, "default"):
        return None
    check(kind == "yarn", f"rope_scaling type {kind!r}: only 'yarn' is implemented (spec 2.3)")
    check("factor" in scaling, "rope_scaling lacks 'factor'")
    known = {f.name for f in dataclasses.fields(RopeScaling)}
    values = {k: v for k, v in scaling.items() if k in known and v is not None}
    values.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    for beta in ("beta_fast", "beta_slow"):  # 0 means "the default" in HF's code
        if not values.get(beta, 1):
            del values[beta]
    return RopeScaling(**values)


# ---------------------------------------------------------------------------------------------------
# The layer plan: which kinds of layer run, in which order. Kinds are named ATTENTION_FFN.


class Segment(NamedTuple):
    """`repeats` times the layer kinds of `pattern`, in order; one scan at run time."""

    pattern: tuple[str, ...]
    repeats: int


def layer_kinds(config: ModelConfig) -> tuple[str, ...]:
    """The kind of every trunk layer, in layer order (the MTP layer is not of the trunk).

    In Ring-linear the last layer of each group and those of an incomplete last group are softmax (spec 1.5).
    """
    size = config.layer_group_size
    whole_groups = config.num_hidden_layers // size * size if size else 0

    def kind(layer: int) -> str:
        linear = layer < whole_groups and (layer + 1) % size != 0
        ffn = "dense" if layer < config.first_k_dense_replace else "moe"
        return f"{'linear' if linear else 'softmax'}_{ffn}"

    return tuple(map(kind, range(config.num_hidden_layers)))


def layer_plan(config: ModelConfig) -> tuple[Segment, ...]:
    """The trunk as segments: the dense prefix, then the MoE body."""
    runs = ((kind, len(list(layers))) for kind, layers in itertools.groupby(layer_kinds(config)))
    return tuple(Segment((kind,), repeats) for kind, repeats in runs)


# ---------------------------------------------------------------------------------------------------
# Parameter counts (spec 1.3).


class Counts(NamedTuple):
    """Parameters: all of them (the MTP layer included), those a token uses, and the MTP layer's own.

    `active` counts the trunk with embedding and head, as the report does; the expert bias is in totals only.
    """

    total: int
    active: int
    active_non_embedding: int
    mtp: int


def count_params(config: ModelConfig) -> Counts:
    """Counts parameters from the config alone (spec 1.3)."""
    c = config
    hidden, heads, kv = c.hidden_size, c.num_attention_heads, c.num_key_value_heads
    qkv_rows = (heads + 2 * kv) * c.head_dim
    attention = hidden * qkv_rows + heads * c.head_dim * hidden
    attention += 2 * c.head_dim * c.use_qk_norm + qkv_rows * c.use_qkv_bias + hidden * c.use_bias
    layer = attention + 2 * hidden
    width = heads * c.head_dim  # linear layers have as many kv heads as query heads, a gate and its norm
    more = 2 * (heads - kv) * c.head_dim * (hidden + c.use_qkv_bias) + width * hidden + width
    linear_layers = sum(kind.startswith("linear") for kind in layer_kinds(c))
    expert = 3 * hidden * c.moe_intermediate_size
    shared = 3 * hidden * c.shared_intermediate_size
    gate = hidden * c.num_experts
    moe_active = c.num_experts_per_tok * expert + shared + gate
    moe_total = c.num_experts * expert + shared + gate + c.num_experts
    dense_layers = c.first_k_dense_replace
    moe_layers = c.num_hidden_layers - dense_layers
    trunk = (
        c.num_hidden_layers * layer + linear_layers * more + dense_layers * 3 * hidden * c.intermediate_size + hidden
    )
    embeddings = c.vocab_size * hidden * (1 if c.tie_word_embeddings else 2)
    mtp = c.num_nextn_predict_layers * (layer + moe_total + 2 * hidden * hidden + 3 * hidden)
    active = trunk + moe_layers * moe_active
    return Counts(
        total=trunk + moe_layers * moe_total + embeddings + mtp,
        active=active + embeddings,
        active_non_embedding=active,
        mtp=mtp,
    )


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Useful FLOPs of training on one token: 6 per active matmul parameter (the head, not the embedding
    lookup; the MTP layer where there is one), and 6 L H head_dim T for the causal half of the attention
    scores and values, forward and backward. Recomputation does not count."""
    c = config
    heads, kv, hidden = c.num_attention_heads, c.num_key_value_heads, c.hidden_size
    attention = 2 * hidden * (heads + kv) * c.head_dim
    experts = 3 * hidden * (c.num_experts_per_tok * c.moe_intermediate_size + c.shared_intermediate_size)
    moe = attention + experts + hidden * c.num_experts
    dense_layers, mtp = c.first_k_dense_replace, c.num_nextn_predict_layers
    active = dense_layers * (attention + 3 * hidden * c.intermediate_size)
    active += (c.num_hidden_layers - dense_layers + mtp) * moe + mtp * 2 * hidden * hidden
    head = (1 + mtp) * c.vocab_size * hidden
    scores = (c.num_hidden_layers + mtp) * heads * c.head_dim * sequence_length
    return 6.0 * (active + head + scores)


def architecture_diff(saved: ModelConfig, wanted: ModelConfig) -> list[str]:
    """Lines "field: saved -> wanted" for every architecture field that differs."""
    names = [f.name for f in dataclasses.fields(ModelConfig) if f.name != "hf_json"]
    return [
        f"model.{name}: {getattr(saved, name)!r} -> {getattr(wanted, name)!r}"
        for name in names
        if getattr(saved, name) != getattr(wanted, name)
    ]
