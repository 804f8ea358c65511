"""The auxiliary-loss-free balance update: the only writer of the expert bias."""

import jax
import jax.numpy as jnp
import numpy as np

from ling_jax.config import ModelConfig
from ling_jax.config.layers import routers_of


def balance_bias(bias_LE: jax.Array, counts_LE: jax.Array, rate: float) -> jax.Array:
    """One zero-mean update per optimizer step (Ling 2.0 report, section 2; spec 2.5).

    Experts with fewer tokens than their layer's mean gain `rate`, those with more lose it, and the mean of
    these changes is taken off, so that the bias does not drift.

    Args:
      bias_LE: float32.  counts_LE: tokens of the whole global batch routed to each expert, per layer.
    """
    counts_LE = counts_LE.astype(jnp.float32)
    sign_LE = jnp.sign(counts_LE.mean(-1, keepdims=True) - counts_LE)
    return bias_LE + rate * (sign_LE - sign_LE.mean(-1, keepdims=True))


def balance_biases(bias: dict, counts_LE: jax.Array, rate: float, config: ModelConfig) -> dict:
    """Updates every MoE layer's bias in the nested dict of `split_model`; `counts_LE` is in layer order, the
    MTP layer last, as in a model's routing."""

    def rows_of(path: tuple[str, ...]) -> jax.Array:
        if path[0] == "mtp":
            return counts_LE[-1]
        return counts_LE[jnp.array(routers_of(config, path[1]))]

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: balance_bias(leaf, rows_of(tuple(key.key for key in path)), rate), bias
    )


def in_layer_order(bias: dict, config: ModelConfig) -> jax.Array:
    """[L, E]: every MoE layer's bias out of the nested dict of `split_model`, the MTP layer's last."""
    rows_LE = jnp.concatenate([leaf.reshape(-1, leaf.shape[-1]) for leaf in jax.tree.leaves(bias)])
    places = [place for key in sorted(bias.get("layers", {})) for place in routers_of(config, key)]  # as leaves are
    order = np.argsort([*places, *range(len(places), rows_LE.shape[0])])
    return rows_LE if (np.diff(order) == 1).all() else rows_LE[order]
