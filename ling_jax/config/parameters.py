"""Every parameter of a model in one table: its shape, what its dims are called, its FP8 rule; and what it adds up to.

Names of tensors, counts and FLOPs all follow from this table; a test holds it to the modules that make the parameters.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from ling_jax.config.checks import check
from ling_jax.config.layers import MTP_KIND, SOFTMAX, LayerKind, layer_kinds, layers_of
from ling_jax.config.model import ModelConfig

# The keys that lead to a parameter, such as ("layers", "softmax_moe", "attention", "dense", "weight").
ParamPath = tuple[str, ...]
# How the official tool chooses the scale of a 128 x 128 FP8 block (spec 3.2); None: never quantised.
Rule = Literal["ordinary", "power_of_two"] | None
EXPERT = "expert"  # the dim of a parameter that has all experts


class Parameter(NamedTuple):
    """A parameter of the model.

    Attributes:
      shape: without the dim of the layers that it is stacked over.
      dims: the names of `shape`'s dims, from which `config.mesh` knows how to split them.
      rule: how its FP8 blocks are scaled.
      layers: how many layers it is stacked over; None if it is none's.
    """

    shape: tuple[int, ...]
    dims: tuple[str, ...]
    rule: Rule = None
    layers: int | None = None

    @property
    def full_shape(self) -> tuple[int, ...]:
        """As the array has it: [L, ...] where it is stacked over layers."""
        return self.shape if self.layers is None else (self.layers, *self.shape)


ParameterTable = dict[ParamPath, Parameter]


def parameters(config: ModelConfig) -> ParameterTable:
    """All parameters, expert biases too, in the order of HF's files: embedding, layers, MTP layer, final norm, head."""
    vocabulary = Parameter((config.vocab_size, config.hidden_size), ("vocab", "hidden"))
    table: ParameterTable = {("word_embeddings", "weight"): vocabulary}
    for kind in dict.fromkeys(layer_kinds(config)):
        count = len(layers_of(config, kind.key))
        block = {path: entry._replace(layers=count) for path, entry in _block(config, kind).items()}
        table |= _under(("layers", kind.key), block)
    if config.num_nextn_predict_layers:
        table |= _under(("mtp",), _mtp(config))
    table[("norm", "weight")] = _vector(config.hidden_size, "hidden")
    if not config.tie_word_embeddings:
        table[("lm_head", "weight")] = vocabulary
    return table


def quantised(config: ModelConfig) -> frozenset[ParamPath]:
    """The parameters whose products are in FP8 where asked: all matrices of attention and FFNs (spec 3.2 and 6)."""
    return frozenset(path for path, entry in parameters(config).items() if entry.rule)


def _under(path: ParamPath, table: Mapping[ParamPath, Parameter]) -> ParameterTable:
    return {(*path, *inner): entry for inner, entry in table.items()}


def _vector(size: int, dim: str) -> Parameter:
    return Parameter((size,), (dim,))


def _norm(name: str, size: int, dim: str = "hidden") -> ParameterTable:
    return {(name, "weight"): _vector(size, dim)}


def _block(config: ModelConfig, kind: LayerKind) -> ParameterTable:
    table = _norm("input_layernorm", config.hidden_size)
    table |= _under(("attention",), MIXERS[kind.mixer].parameters(config))
    table |= _norm("post_attention_layernorm", config.hidden_size)
    ffn = _moe(config) if kind.routed else _swiglu(config.hidden_size, config.intermediate_size)
    return table | _under(("mlp",), ffn)


def _attention(config: ModelConfig, heads: int) -> ParameterTable:
    """The projections and norms that softmax and linear attention share; `heads`: of keys."""
    c = config
    width = c.num_attention_heads * c.head_dim
    rows = width + 2 * heads * c.head_dim
    table: ParameterTable = {
        ("query_key_value", "weight"): Parameter((rows, c.hidden_size), ("qkv_heads", "qkv_inputs"), "ordinary"),
        ("dense", "weight"): Parameter((c.hidden_size, width), ("hidden", "heads"), "power_of_two"),
    }
    if c.use_qkv_bias:
        table[("query_key_value", "bias")] = _vector(rows, "qkv_heads")
    if c.use_bias:
        table[("dense", "bias")] = _vector(c.hidden_size, "hidden")
    if c.use_qk_norm:
        table |= _norm("query_layernorm", c.head_dim, "head_dim") | _norm("key_layernorm", c.head_dim, "head_dim")
    return table


def _linear_attention(config: ModelConfig) -> ParameterTable:
    width = config.num_attention_heads * config.head_dim
    table = _attention(config, config.num_attention_heads)
    table[("g_proj", "weight")] = Parameter((width, config.hidden_size), ("heads", "hidden"))
    return table | _norm("g_norm", width, "heads")


class Mixer(NamedTuple):
    """The facts about a mixer that need no computation.

    Attributes:
      parameters: its parameters.
      flops: forward FLOPs of a token in a row of so many tokens, products with parameters left out.
      check: raises ValueError where `mesh.tensor` and `mesh.context` of these numbers cannot cut it; cuts of the
        parameters' dims are checked by themselves.
      fused: the sizes, by name, that so many tensor devices share and no dim of a parameter shows, since a fused
        projection hides them.
      context: whether it works on rows whose tokens are split over the mesh.
    """

    parameters: Callable[[ModelConfig], ParameterTable]
    flops: Callable[[ModelConfig, int], float]
    check: Callable[[ModelConfig, int, int], None] = lambda config, tensor, context: None
    fused: Callable[[ModelConfig, int], dict[str, int]] = lambda config, tensor: {}
    context: bool = False


def _scores_and_values(config: ModelConfig, length: int) -> float:
    return 2.0 * config.num_attention_heads * config.head_dim * length  # 4 H C T, of which the causal half


def _state_updates(config: ModelConfig, length: int) -> float:
    return 4.0 * config.num_attention_heads * config.head_dim**2  # into the state and out of it


def _check_linear(config: ModelConfig, tensor: int, context: int) -> None:
    heads = config.num_attention_heads
    check(
        heads % (tensor * context) == 0,
        f"model.num_attention_heads = {heads} must be a multiple of mesh.tensor * mesh.context = {tensor} * {context}: "
        "the states of linear attention are exchanged by heads; choose smaller ones",
    )
    check(
        config.group_norm_size % tensor == 0,
        f"model.group_norm_size = {config.group_norm_size} must be a multiple of mesh.tensor = {tensor}: a group is "
        "normed on one device; choose one of its divisors",
    )


def _check_kv_heads(config: ModelConfig, tensor: int, context: int) -> None:
    kv = config.num_key_value_heads
    check(
        kv % tensor == 0 or tensor % kv == 0,
        f"mesh.tensor = {tensor} and model.num_key_value_heads = {kv}: one must divide the other; choose another "
        "mesh.tensor",
    )


def _kv_rows(config: ModelConfig, tensor: int) -> dict[str, int]:
    return {"model.num_key_value_heads * head_dim": max(config.num_key_value_heads, tensor) * config.head_dim}


MIXERS: dict[str, Mixer] = {
    SOFTMAX: Mixer(
        parameters=lambda config: _attention(config, config.num_key_value_heads),
        flops=_scores_and_values,
        check=_check_kv_heads,
        fused=_kv_rows,
        context=True,
    ),
    "linear": Mixer(parameters=_linear_attention, flops=_state_updates, check=_check_linear, context=True),
}


def _swiglu(hidden: int, width: int) -> ParameterTable:
    inner = Parameter((width, hidden), ("ffn", "hidden"), "ordinary")
    outer = Parameter((hidden, width), ("hidden", "ffn"), "ordinary")
    return {("gate_proj", "weight"): inner, ("up_proj", "weight"): inner, ("down_proj", "weight"): outer}


def _moe(config: ModelConfig) -> ParameterTable:
    c = config
    inner = Parameter((c.num_experts, c.moe_intermediate_size, c.hidden_size), (EXPERT, "expert_ffn", "expert_hidden"))
    outer = Parameter((c.num_experts, c.hidden_size, c.moe_intermediate_size), (EXPERT, "expert_hidden", "expert_ffn"))
    table: ParameterTable = {
        ("gate", "weight"): Parameter((c.num_experts, c.hidden_size), ("expert_row", "hidden")),
        ("gate", "expert_bias"): _vector(c.num_experts, "expert_row"),
        ("experts", "gate_proj", "weight"): inner._replace(rule="power_of_two"),
        ("experts", "up_proj", "weight"): inner._replace(rule="power_of_two"),
        ("experts", "down_proj", "weight"): outer._replace(rule="ordinary"),
    }
    if c.shared_intermediate_size:
        table |= _under(("shared_experts",), _swiglu(c.hidden_size, c.shared_intermediate_size))
    return table


def _mtp(config: ModelConfig) -> ParameterTable:
    hidden = config.hidden_size
    table = _norm("enorm", hidden) | _norm("hnorm", hidden)
    table[("eh_proj", "weight")] = Parameter((hidden, 2 * hidden), ("hidden", "mtp_input"))
    return table | _under(("block",), _block(config, MTP_KIND)) | _norm("final_layernorm", hidden)


# Counts (spec 1.3).


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
    table = parameters(config)
    sizes = {path: math.prod(entry.full_shape) for path, entry in table.items()}
    mtp = sum(size for path, size in sizes.items() if path[0] == "mtp")
    trunk = {path: entry for path, entry in table.items() if path[0] != "mtp" and path[-1] != "expert_bias"}
    embeddings = sum(sizes[path] for path in trunk if path[0] in ("word_embeddings", "lm_head"))
    active = sum(_used(config, entry) for entry in trunk.values())
    return Counts(total=sum(sizes.values()), active=active, active_non_embedding=active - embeddings, mtp=mtp)


def _used(config: ModelConfig, entry: Parameter) -> int:
    """Elements of a parameter that one token is computed with."""
    size = math.prod(entry.full_shape)
    return size // config.num_experts * config.num_experts_per_tok if entry.dims[0] == EXPERT else size


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Useful FLOPs of training on one token.

    6 per active matmul parameter (the head, not the embedding lookup; the MTP layer where there is one), and three
    times what each layer's mixer does with other tokens: 6 H head_dim T, the causal half of scores and values, for
    softmax attention. Recomputation does not count.
    """
    c, mtp = config, config.num_nextn_predict_layers
    of_layers = {path: entry for path, entry in parameters(c).items() if path[0] in ("layers", "mtp")}
    active = sum(_used(c, entry) for entry in of_layers.values() if len(entry.dims) > 1)
    head = (1 + mtp) * c.vocab_size * c.hidden_size
    kinds = (*layer_kinds(c), *[MTP_KIND] * mtp)
    return 6.0 * (active + head) + 3.0 * sum(MIXERS[kind.mixer].flops(c, sequence_length) for kind in kinds)
