"""Grouped-query attention with QK-norm and partial RoPE.

Legend: B rows, T tokens, D hidden, H query heads, G kv heads, C head_dim, S cache slots.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ling_jax.config import ModelConfig
from ling_jax.kernels.attention import attention, cached_attention
from ling_jax.kernels.weight import as_weight
from ling_jax.model.linear import Init, Linear
from ling_jax.model.norm import RMSNorm
from ling_jax.model.rope import apply_rope
from ling_jax.parallel.context import context_attention
from ling_jax.parallel.mesh import axis_index, axis_size
from ling_jax.parallel.rules import gather_weight, tensor_rows


class Context(NamedTuple):
    """The inputs that every layer of one call shares."""

    rope: tuple[jax.Array, jax.Array]  # cos, sin [B, T, 1, r/2]
    positions_BT: jax.Array  # int32 RoPE positions, and slots in the cache if there is one
    segments_BT: jax.Array  # int32 document of each token, 0 for padding
    layer: jax.Array | int = 0  # int32 [], the layer's place among all of the trunk


class MixerOutput(NamedTuple):
    """The results of what mixes a row's tokens."""

    y_BTD: jax.Array
    cache: Any = None  # the states of decoding with these tokens, None where there are none
    captured: dict[str, jax.Array] = {}  # intermediates that `model.model.CAPTURES` names


def local_heads(config: ModelConfig) -> tuple[int, int]:
    """(query heads, kv heads) of one device: kv heads are repeated where `tensor` has more devices."""
    shards = axis_size("tensor")
    return config.num_attention_heads // shards, max(config.num_key_value_heads // shards, 1)


def head_rows(config: ModelConfig, shards: int) -> np.ndarray:
    """int [shards, rows]: the rows of the fused projection that each tensor rank computes."""
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    ranks = np.arange(shards)[:, None]
    q = ranks * (heads // shards) + np.arange(heads // shards)
    kv = ranks * groups // shards + np.arange(max(groups // shards, 1))
    units = np.concatenate([q, heads + kv, heads + groups + kv], axis=1)
    return (units[:, :, None] * width + np.arange(width)).reshape(shards, -1)


class QueryKeyValue(nnx.Module):
    """The fused projection; its rows are all H queries, all G keys, all G values; to serve, `head_rows` of each tensor
    rank in turn."""

    def __init__(self, config: ModelConfig, init: Init):
        rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        self.config, self.mesh = config, init.mesh
        if init.serving:
            arranged = head_rows(config, init.mesh.tensor).size
            self.weight = init.normal((arranged, config.hidden_size), ("heads", "hidden"))
        else:
            self.weight = init.normal((rows, config.hidden_size), ("qkv_heads", "qkv_inputs"))
        self.bias = init.zeros(rows, "qkv_heads") if config.use_qkv_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., rows of this device's heads]."""
        rows_PR = head_rows(self.config, axis_size("tensor"))
        weight = as_weight(self.weight.get_value())
        if not self.weight.split[0]:  # else they are this device's already
            weight = tensor_rows(weight, rows_PR)
        weight = gather_weight(weight, self.weight.axes, self.weight.split, x.dtype, self.mesh.reduce_dtype)
        y = weight.linear(x)
        if self.bias is None:
            return y
        return y + self.bias.get_value()[jnp.asarray(rows_PR)[axis_index("tensor")]].astype(y.dtype)


class Attention(nnx.Module):
    """Softmax attention (spec 2.3)."""

    def __init__(self, config: ModelConfig, init: Init):
        c = self.config = config
        self.query_key_value = QueryKeyValue(c, init)
        self.mesh = init.mesh
        inner = c.num_attention_heads * c.head_dim
        self.dense = Linear(inner, c.hidden_size, ("hidden", "heads"), init, c.use_bias)
        head_norm = partial(RMSNorm, c.head_dim, c.rms_norm_eps, init.dtype, "head_dim")
        self.query_layernorm = head_norm() if c.use_qk_norm else None
        self.key_layernorm = head_norm() if c.use_qk_norm else None

    def heads(self, rows: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Cuts the fused projection's rows [B, T, ...] into this device's q [B, T, H, C], k and v [B, T, G, C]; queries
        and keys are normed and turned."""
        c = self.config
        heads, groups = local_heads(c)
        qkv = rows.reshape(*rows.shape[:2], heads + 2 * groups, c.head_dim)
        q_BTHC, k_BTGC, v_BTGC = qkv[:, :, :heads], qkv[:, :, heads : heads + groups], qkv[:, :, heads + groups :]
        if self.query_layernorm is not None and self.key_layernorm is not None:
            q_BTHC, k_BTGC = self.query_layernorm(q_BTHC), self.key_layernorm(k_BTGC)
        return apply_rope(q_BTHC, context.rope), apply_rope(k_BTGC, context.rope), v_BTGC

    def __call__(self, x_BTD: jax.Array, context: Context, cache: Any = None) -> MixerOutput:
        """Returns [B, T, D] and the cache with this call's keys and values appended."""
        q_BTHC, k_BTGC, v_BTGC = self.heads(self.query_key_value(x_BTD), context)
        scale = self.config.head_dim**-0.5
        if cache is None and axis_size("context") > 1:
            method = self.mesh.context_method
            out_BTHC = context_attention(q_BTHC, k_BTGC, v_BTGC, context.segments_BT, scale, method)
        elif cache is None:
            out_BTHC = attention(q_BTHC, k_BTGC, v_BTGC, context.segments_BT, scale)
        else:
            slots_BT = context.positions_BT
            written_BT = jnp.where(context.segments_BT > 0, slots_BT, jnp.iinfo(jnp.int32).max)
            cache = cache.append(k_BTGC, v_BTGC, written_BT)
            stacks = cache.k_LBSGC, cache.v_LBSGC
            out_BTHC = cached_attention(q_BTHC, *stacks, slots_BT, scale, layer=cache.layer)
        return MixerOutput(self.dense(out_BTHC.reshape(*x_BTD.shape[:2], -1)), cache)
