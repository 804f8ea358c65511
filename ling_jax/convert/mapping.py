"""The one table between our parameters and HF's tensors: names, shapes, stacking, FP8 rules (spec 3.1 and 3.2)."""

from typing import Any, Literal, NamedTuple

import numpy as np

from ling_jax.config import ModelConfig, layer_kinds

Path = tuple[str, ...]  # of a leaf in a checkpoint's nested dict: "params", "bias" or "scales", then the model's keys
# How the official tool chooses a block's FP8 scale; None: this tensor is never quantised.
Rule = Literal["ordinary", "power_of_two"] | None
SCALE = "_scale_inv"  # what HF adds to a quantised tensor's name for its scales


class Stack(NamedTuple):
    """One of our arrays: HF's tensors, stacked."""

    names: np.ndarray  # of str, HF's; its shape is that of the leading dims: [], [L], [L, E], or [E] in the MTP layer
    shape: tuple[int, ...]  # of one tensor
    rule: Rule = None

    @property
    def full_shape(self) -> tuple[int, ...]:
        return (*self.names.shape, *self.shape)


def layout(config: ModelConfig) -> dict[Path, Stack]:
    """Every array of a model, in the order in which HF's files have their tensors: the embedding, the layers, the
    final norm, the head. Quantised checkpoints have "scales" beside; see `scales_of`."""
    kinds = layer_kinds(config)
    tables: dict[Path, Any] = {("word_embeddings",): _weight(config.vocab_size, config.hidden_size)}
    tables |= {("layers", kind): _block(config, kind) for kind in dict.fromkeys(kinds)}
    if config.num_nextn_predict_layers:
        tables[("mtp",)] = _mtp(config)
    tables[("norm",)] = _weight(config.hidden_size)
    if not config.tie_word_embeddings:
        tables[("lm_head",)] = _weight(config.vocab_size, config.hidden_size)
    stacks = {}
    for start, table in tables.items():
        for inner, (shape, rule) in table.items():
            path = (*start, *inner)
            tree = "bias" if path[-1] == "expert_bias" else "params"
            stacks[(tree, *path)] = Stack(hf_names(config, path), shape, rule)
    return stacks


def scales_of(path: Path, stack: Stack, block: tuple[int, int]) -> tuple[Path, Stack]:
    """Where the scales of a quantised array are: float32, one for each block of each tensor (spec 3.2)."""
    names = np.array([name + SCALE for name in stack.names.flat], object).reshape(stack.names.shape)
    shape = tuple(-(-size // step) for size, step in zip(stack.shape, block, strict=True))
    return ("scales", *path[1:]), Stack(names, shape)


def hf_names(config: ModelConfig, path: Path) -> np.ndarray:
    """HF's names for one of our parameters.

    Args:
      path: of the parameter in the nested dict of `split_model`, e.g.
        ("layers", "softmax_moe", "mlp", "experts", "gate_proj", "weight").
    Returns:
      Array of str whose shape is our tensor's stacked leading dims: [] for a plain tensor, [L] for a stack of
      layers, [L, E] for their experts, [E] for the MTP layer's.
    """
    if path[0] == "layers":
        layers = [i for i, kind in enumerate(layer_kinds(config)) if kind == path[1]]
        return np.array([_layer_names(config, i, path[2:]) for i in layers], object)
    if path[0] == "mtp":
        inner = path[2:] if path[1] == "block" else path[1:]
        return np.array(_layer_names(config, config.num_hidden_layers, inner), object)
    prefix = "" if path[0] == "lm_head" else "model."
    return np.array(prefix + ".".join(path), object)


def _layer_names(config: ModelConfig, layer: int, path: Path) -> str | list[str]:
    prefix = f"model.layers.{layer}."
    if "experts" not in path:
        return prefix + ".".join(path)
    at = path.index("experts") + 1
    head, tail = ".".join(path[:at]), ".".join(path[at:])
    return [f"{prefix}{head}.{expert}.{tail}" for expert in range(config.num_experts)]


# What a layer holds: {our path: (shape, FP8 rule)}.

_Table = dict[Path, tuple[tuple[int, ...], Rule]]


def _weight(*shape: int, rule: Rule = None) -> _Table:
    return {("weight",): (shape, rule)}


def _under(name: str, table: _Table) -> _Table:
    return {(name, *path): entry for path, entry in table.items()}


def _attention(config: ModelConfig, linear: bool) -> _Table:
    c, width = config, config.num_attention_heads * config.head_dim
    kv_heads = c.num_attention_heads if linear else c.num_key_value_heads
    rows = width + 2 * kv_heads * c.head_dim
    table = _under("query_key_value", _weight(rows, c.hidden_size, rule="ordinary"))
    table |= _under("dense", _weight(c.hidden_size, width, rule="power_of_two"))
    if c.use_qkv_bias:
        table[("query_key_value", "bias")] = ((rows,), None)
    if c.use_bias:
        table[("dense", "bias")] = ((c.hidden_size,), None)
    if c.use_qk_norm:
        table |= _under("query_layernorm", _weight(c.head_dim)) | _under("key_layernorm", _weight(c.head_dim))
    if linear:
        table |= _under("g_proj", _weight(width, c.hidden_size)) | _under("g_norm", _weight(width))
    return table


def _swiglu(hidden: int, width: int, gate_up: Rule = "ordinary") -> _Table:
    table = _under("gate_proj", _weight(width, hidden, rule=gate_up))
    table |= _under("up_proj", _weight(width, hidden, rule=gate_up))
    return table | _under("down_proj", _weight(hidden, width, rule="ordinary"))


def _moe(config: ModelConfig) -> _Table:
    c = config
    table: _Table = _under("gate", _weight(c.num_experts, c.hidden_size))
    table[("gate", "expert_bias")] = ((c.num_experts,), None)
    table |= _under("experts", _swiglu(c.hidden_size, c.moe_intermediate_size, "power_of_two"))
    if c.num_shared_experts:
        table |= _under("shared_experts", _swiglu(c.hidden_size, c.shared_intermediate_size))
    return table


def _block(config: ModelConfig, kind: str) -> _Table:
    attention, ffn = kind.split("_")
    table = _under("input_layernorm", _weight(config.hidden_size))
    table |= _under("attention", _attention(config, attention == "linear"))
    table |= _under("post_attention_layernorm", _weight(config.hidden_size))
    dense = _swiglu(config.hidden_size, config.intermediate_size)
    return table | _under("mlp", _moe(config) if ffn == "moe" else dense)


def _mtp(config: ModelConfig) -> _Table:
    table = _under("enorm", _weight(config.hidden_size)) | _under("hnorm", _weight(config.hidden_size))
    table |= _under("eh_proj", _weight(config.hidden_size, 2 * config.hidden_size))
    table |= _under("block", _block(config, "softmax_moe"))
    return table | _under("final_layernorm", _weight(config.hidden_size))
