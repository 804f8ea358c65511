"""Grouped-query attention with QK-norm and partial RoPE.

Legend: B rows, T tokens, D hidden, H query heads, G kv heads, C head_dim, S cache slots.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx

from ling_jax.config import ModelConfig
from ling_jax.kernels.attention import attention
from ling_jax.model.linear import Init, Linear
from ling_jax.model.norm import RMSNorm
from ling_jax.model.rope import apply_rope


class Context(NamedTuple):
    """What every layer of one call shares."""

    rope: tuple[jax.Array, jax.Array]  # cos, sin [B, T, 1, r/2]
    q_slots_BT: jax.Array  # int32 place of each token in its row, or in the cache
    kv_slots_BS: jax.Array
    q_segments_BT: jax.Array  # int32 document of each token, 0 for padding
    kv_segments_BS: jax.Array


class Attention(nnx.Module):
    """Softmax attention (spec 2.3). The fused projection's rows are all H queries, all G keys, all G values."""

    def __init__(self, config: ModelConfig, init: Init):
        c = self.config = config
        rows = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        self.query_key_value = Linear(c.hidden_size, rows, ("heads", "hidden"), init, c.use_qkv_bias)
        inner = c.num_attention_heads * c.head_dim
        self.dense = Linear(inner, c.hidden_size, ("hidden", "heads"), init, c.use_bias)
        head_norm = partial(RMSNorm, c.head_dim, c.rms_norm_eps, init.dtype, "head_dim")
        self.query_layernorm = head_norm() if c.use_qk_norm else None
        self.key_layernorm = head_norm() if c.use_qk_norm else None

    def __call__(self, x_BTD: jax.Array, context: Context, cache: Any = None) -> tuple[jax.Array, Any]:
        """Returns [B, T, D] and the cache with this call's keys and values appended."""
        c = self.config
        heads, groups = c.num_attention_heads, c.num_key_value_heads
        qkv = self.query_key_value(x_BTD).reshape(*x_BTD.shape[:2], heads + 2 * groups, c.head_dim)
        q_BTHC, k_BTGC, v_BTGC = qkv[:, :, :heads], qkv[:, :, heads : heads + groups], qkv[:, :, heads + groups :]
        if self.query_layernorm is not None and self.key_layernorm is not None:
            q_BTHC, k_BTGC = self.query_layernorm(q_BTHC), self.key_layernorm(k_BTGC)
        q_BTHC, k_BTGC = apply_rope(q_BTHC, context.rope), apply_rope(k_BTGC, context.rope)
        same_row = cache is None
        if cache is not None:
            k_BTGC, v_BTGC, cache = cache.append(k_BTGC, v_BTGC)
        out_BTHC = attention(
            q_BTHC,
            k_BTGC,
            v_BTGC,
            q_slots_BT=context.q_slots_BT,
            kv_slots_BS=context.kv_slots_BS,
            q_segments_BT=context.q_segments_BT,
            kv_segments_BS=context.kv_segments_BS,
            scale=c.head_dim**-0.5,
            same_row=same_row,
        )
        return self.dense(out_BTHC.reshape(*x_BTD.shape[:2], -1)), cache
