"""The architecture: its settings.

Architecture fields are spelled as in the released `config.json`, so `from_hf` and `to_hf` are (nearly)
the identity and one name serves the paper, the checkpoint and this code.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from ling_jax.config.checks import as_declared, check, check_at_least, check_types
from ling_jax.config.hf import LINEAR_HF_FIELDS, SLOPES, changed_config_json, new_config_json, read_config_json
from ling_jax.config.rope import RopeScaling, scaling_to_hf


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
    # Whose rates the states of linear layers decay at (see `kernels.lightning.slopes_of`): SGLang's, as vLLM and the
    # known trainers; those of the code beside the released weights; MLX's. No released file says.
    slope_convention: Literal["sglang", "hf", "mlx"] = "sglang"
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
        check_at_least(self, 1, "group_norm_size")
        width = self.num_attention_heads * self.head_dim
        check(
            width % self.group_norm_size == 0,
            f"group_norm_size = {self.group_norm_size} must divide num_attention_heads * head_dim = {width}",
        )
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
    for name in ("hf_json", *(() if config.layer_group_size else (*LINEAR_HF_FIELDS, SLOPES))):
        del values[name]
    if not config.num_nextn_predict_layers:
        values["mtp_loss_scaling_factor"] = 0  # as the releases say where it means nothing
    return values | {"rope_scaling": scaling_to_hf(config.rope_scaling)}
