"""The one table between our parameters and HF's tensors: names, shapes, stacking, FP8 rules (spec 3.1 and 3.2)."""

from typing import NamedTuple

import numpy as np

from ling_jax.config import ModelConfig
from ling_jax.config.layers import layers_of
from ling_jax.config.parameters import EXPERT, Rule, parameters
from ling_jax.files.arrays import ArrayPath

SCALE = "_scale_inv"  # what HF adds to a quantised tensor's name for its scales


class TensorStack(NamedTuple):
    """One of our arrays: HF's tensors, stacked."""

    names: np.ndarray  # of str, HF's; its shape is that of the leading dims: [], [L], [L, E], or [E] in the MTP layer
    shape: tuple[int, ...]  # of one tensor
    rule: Rule = None

    @property
    def full_shape(self) -> tuple[int, ...]:
        return (*self.names.shape, *self.shape)


def layout(config: ModelConfig) -> dict[ArrayPath, TensorStack]:
    """Every array of a model, in the order in which HF's files have their tensors: the embedding, the layers, the
    final norm, the head. Quantised checkpoints have "scales" beside; see `scales_of`."""
    stacks = {}
    for path, entry in parameters(config).items():
        shape = entry.shape[1:] if entry.dims[0] == EXPERT else entry.shape
        tree = "bias" if path[-1] == "expert_bias" else "params"
        stacks[(tree, *path)] = TensorStack(hf_names(config, path), shape, entry.rule)
    return stacks


def scales_of(path: ArrayPath, stack: TensorStack, block: tuple[int, int]) -> tuple[ArrayPath, TensorStack]:
    """Where the scales of a quantised array are: float32, one for each block of each tensor (spec 3.2)."""
    names = np.array([name + SCALE for name in stack.names.flat], object).reshape(stack.names.shape)
    shape = tuple(-(-size // step) for size, step in zip(stack.shape, block, strict=True))
    return ("scales", *path[1:]), TensorStack(names, shape)


def hf_names(config: ModelConfig, path: ArrayPath) -> np.ndarray:
    """HF's names for one of our parameters.

    Args:
      path: of the parameter in the nested dict of `split_model`, e.g.
        ("layers", "softmax_moe", "mlp", "experts", "gate_proj", "weight").
    Returns:
      Array of str whose shape is our tensor's stacked leading dims: [] for a plain tensor, [L] for a stack of
      layers, [L, E] for their experts, [E] for the MTP layer's.
    """
    if path[0] == "layers":
        return np.array([_layer_names(config, i, path[2:]) for i in layers_of(config, path[1])], object)
    if path[0] == "mtp":
        inner = path[2:] if path[1] == "block" else path[1:]
        return np.array(_layer_names(config, config.num_hidden_layers, inner), object)
    prefix = "" if path[0] == "lm_head" else "model."
    return np.array(prefix + ".".join(path), object)


def _layer_names(config: ModelConfig, layer: int, path: ArrayPath) -> str | list[str]:
    prefix = f"model.layers.{layer}."
    if "experts" not in path:
        return prefix + ".".join(path)
    at = path.index("experts") + 1
    head, tail = ".".join(path[:at]), ".".join(path[at:])
    return [f"{prefix}{head}.{expert}.{tail}" for expert in range(config.num_experts)]
