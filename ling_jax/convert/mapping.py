"""The one table between our parameter paths and HF's tensor names (spec 3.1)."""

import numpy as np

from ling_jax.config import ModelConfig, layer_kinds


def hf_names(config: ModelConfig, path: tuple[str, ...]) -> np.ndarray:
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


def _layer_names(config: ModelConfig, layer: int, path: tuple[str, ...]) -> str | list[str]:
    prefix = f"model.layers.{layer}."
    if "experts" not in path:
        return prefix + ".".join(path)
    at = path.index("experts") + 1
    head, tail = ".".join(path[:at]), ".".join(path[at:])
    return [f"{prefix}{head}.{expert}.{tail}" for expert in range(config.num_experts)]
