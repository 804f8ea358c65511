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

from ling_jax.config.checks import as_declared, check, check_at_least, check_types
from ling_jax.config.hf import LINEAR_HF_FIELDS, changed_config_json, new_config_json, read_config_json
from ling_jax.config.rope import RopeScaling, scaling_to_hf

# Fields of a ModelConfig that weights do not depend on: whoever goes on with a checkpoint may change them.
SETTINGS = (
    "rope_theta", "rope_scaling", "max_position_embeddings", "moe_router_enable_expert_bias",
    "mtp_loss_scaling_factor", "initializer_range", "pad_token_id", "eos_token_id",
)  # fmt: skip


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
    # YaRN, which its factor and original_max_position_embeddings turn on.
    rope_scaling: Annotated[RopeScaling | None, tyro.conf.arg(constructor=RopeScaling)] = None
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
    # The config.json this came from, so that `to_hf` gives back every field, known or not. Two files that mean the same
    # model are equal.
    hf_json: Annotated[str, tyro.conf.Suppress] = dataclasses.field(default="", repr=False, compare=False)

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
        """Reads a `config.json` of any origin (`config.hf`).

        Raises:
          ValueError: for another architecture, a field the releases set and this file lacks, or a value
            this package does not implement; the message names the field and what to do.
        """
        names = {field.name for field in dataclasses.fields(cls)} - {"hf_json"}
        values = as_declared(cls, read_config_json(config, names))
        return cls(**values, hf_json=json.dumps(dict(config), sort_keys=True))

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` dict: the one read, with the fields that changed since; or a new one."""
        if not self.hf_json:
            return new_config_json(_hf_values(self))
        original = json.loads(self.hf_json)
        return changed_config_json(original, _hf_values(ModelConfig.from_hf(original)), _hf_values(self))


def _hf_values(config: ModelConfig) -> dict[str, Any]:
    """Every field that a `config.json` has, in HF's form."""
    values = dataclasses.asdict(config)
    for name in ("hf_json", *(() if config.layer_group_size else LINEAR_HF_FIELDS)):
        del values[name]
    if not config.num_nextn_predict_layers:
        values["mtp_loss_scaling_factor"] = 0  # as the releases say where it means nothing
    return values | {"rope_scaling": scaling_to_hf(config.rope_scaling)}


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


# ---------------------------------------------------------------------------------------------------
# What weights of one model are to another.


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
    if not any(kind.startswith("linear") for kind in layer_kinds(config)):
        for name in LINEAR_HF_FIELDS:
            del values[name]
    return values
