"""Linear attention, the layers of Ring-linear between its softmax ones (spec 2.8).

Legend: B rows, T tokens, D hidden, H heads, C head_dim, P tensor devices, L layers of the trunk.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ling_jax.config import ModelConfig
from ling_jax.kernels.lightning import lightning, slopes_of
from ling_jax.model.attention import Attention, Context, MixerOutput
from ling_jax.model.linear import Init, Linear
from ling_jax.model.norm import RMSNorm
from ling_jax.parallel.context import context_lightning
from ling_jax.parallel.mesh import axis_index, axis_size


@partial(jax.checkpoint, prevent_cse=False, static_argnums=(3, 4))  # the backward pass keeps the arguments alone
def gated_norm(x: jax.Array, gate: jax.Array, weight: jax.Array, groups: int, eps: float) -> jax.Array:
    """RMS norm of each of `groups` parts of the last dim, times weight and sigmoid(gate): in float32 up to the end,
    when it is cast to x's dtype."""
    parts = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1)
    scale = jax.lax.rsqrt(jnp.mean(parts * parts, axis=-1, keepdims=True) + eps)
    normed = (parts * scale).reshape(x.shape) * weight.astype(jnp.float32)
    return (normed * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(x.dtype)


def slopes_by_device(config: ModelConfig, shards: int) -> np.ndarray:
    """float32 [L, P, H / P]: the rates at which the states of each layer's heads decay."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    slopes = [slopes_of(heads, layer, layers, config.slope_convention) for layer in range(layers)]
    return np.array(slopes, np.float32).reshape(layers, shards, -1)


class LinearAttention(Attention):
    """Lightning attention: as many key as query heads, and a norm by groups of heads with a gate before the output."""

    def __init__(self, config: ModelConfig, init: Init):
        super().__init__(dataclasses.replace(config, num_key_value_heads=config.num_attention_heads), init)
        width = config.num_attention_heads * config.head_dim
        self.g_proj = Linear(config.hidden_size, width, ("heads", "hidden"), init)
        self.g_norm = RMSNorm(width, config.rms_norm_eps, init.dtype, "heads")

    def __call__(self, x_BTD: jax.Array, context: Context, cache: Any = None) -> MixerOutput:
        """Returns [B, T, D] and the states after these tokens."""
        c, shards, rank = self.config, axis_size("tensor"), axis_index("tensor")
        rows = self.query_key_value(x_BTD)
        q, k, v = self.heads(jax.nn.silu(rows) if c.linear_silu else rows, context)
        slopes_H = jnp.asarray(slopes_by_device(c, shards))[context.layer, rank]
        scale, captured = c.head_dim**-0.5, {}
        if cache is None and axis_size("context") > 1:
            out_BTHC = context_lightning(q, k, v, slopes_H, context.segments_BT, scale)
        elif cache is None:
            nothing = jnp.zeros((q.shape[0], *q.shape[2:], c.head_dim), jnp.float32)
            out_BTHC, state = lightning(q, k, v, slopes_H, context.segments_BT, nothing, scale)
            captured = {"linear_raw": out_BTHC, "linear_state": state}
        else:
            out_BTHC, cache = cache.attend(q, k, v, slopes_H, context.positions_BT, context.segments_BT > 0, scale)
        out = out_BTHC.astype(x_BTD.dtype).reshape(*x_BTD.shape[:2], -1)
        weight = self.g_norm.weight.get_value().reshape(shards, -1)[rank]
        normed = gated_norm(out, self.g_proj(x_BTD), weight, c.group_norm_size // shards, c.rms_norm_eps)
        return MixerOutput(self.dense(normed), cache, captured)
