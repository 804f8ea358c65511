"""The key/value cache, as a carry of the layer scan.

Legend: L layers of a kind, B rows, S slots, T new tokens, G kv heads, C head_dim.

Slots are filled left to right, the same for every row; a shorter prompt is padded on the left with
segment 0, which no token attends to. Lowering `used` (and `tokens_B`) takes tokens back.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ling_jax.config import ModelConfig, layer_kinds


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys and values of all layers of one kind, and which of them is being run."""

    k_LBSGC: jax.Array
    v_LBSGC: jax.Array
    layer: jax.Array  # int32 []
    used: jax.Array  # int32 [] slots filled once this call's tokens are in

    def append(self, k_BTGC: jax.Array, v_BTGC: jax.Array) -> tuple[jax.Array, jax.Array, "LayerCache"]:
        """Writes T new slots; returns this layer's [B, S, G, C] keys and values and the new cache."""
        at = (self.layer, 0, self.used - k_BTGC.shape[1], 0, 0)
        k = jax.lax.dynamic_update_slice(self.k_LBSGC, k_BTGC[None].astype(self.k_LBSGC.dtype), at)
        v = jax.lax.dynamic_update_slice(self.v_LBSGC, v_BTGC[None].astype(self.v_LBSGC.dtype), at)
        mine = (jax.lax.dynamic_index_in_dim(a, self.layer, keepdims=False) for a in (k, v))
        return *mine, dataclasses.replace(self, k_LBSGC=k, v_LBSGC=v)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """All layers' caches, by kind of layer."""

    kinds: dict[str, LayerCache]
    segment_ids_BS: jax.Array  # int32; 0 for padding and for slots not yet filled
    tokens_B: jax.Array  # int32 real tokens of each row so far: the next RoPE position
    used: jax.Array  # int32 [] slots filled

    @property
    def kv_slots_BS(self) -> jax.Array:
        return jnp.broadcast_to(jnp.arange(self.segment_ids_BS.shape[1]), self.segment_ids_BS.shape)

    def extend(self, segment_ids_BT: jax.Array) -> "Cache":
        """Makes room for T tokens; their keys and values follow layer by layer."""
        at = (0, self.used)
        return dataclasses.replace(
            self,
            segment_ids_BS=jax.lax.dynamic_update_slice(self.segment_ids_BS, segment_ids_BT, at),
            tokens_B=self.tokens_B + (segment_ids_BT > 0).sum(1, dtype=jnp.int32),
            used=self.used + segment_ids_BT.shape[1],
        )

    def q_slots(self, segment_ids_BT: jax.Array) -> jax.Array:
        """[B, T]: the slots of the tokens that `extend` was just called for."""
        count = segment_ids_BT.shape[1]
        return jnp.broadcast_to(self.used - count + jnp.arange(count), segment_ids_BT.shape)

    def positions(self, segment_ids_BT: jax.Array) -> jax.Array:
        """[B, T]: RoPE positions of those tokens, counted over real tokens only."""
        real_BT = (segment_ids_BT > 0).astype(jnp.int32)
        before_B = self.tokens_B - real_BT.sum(1)
        return jnp.maximum(before_B[:, None] + jnp.cumsum(real_BT, axis=1) - 1, 0)

    def layer(self, kind: str, index: jax.Array) -> LayerCache:
        return dataclasses.replace(self.kinds[kind], layer=jnp.asarray(index, jnp.int32), used=self.used)

    def with_layer(self, kind: str, layer: LayerCache) -> "Cache":
        return dataclasses.replace(self, kinds={**self.kinds, kind: layer})


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """A cache of `slots` tokens for each of `batch` rows."""
    zero = jnp.zeros((), jnp.int32)
    kinds = {}
    for kind, count in Counter(layer_kinds(config)).items():
        shape = (count, batch, slots, config.num_key_value_heads, config.head_dim)
        kinds[kind] = LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), zero, zero)
    return Cache(kinds, jnp.zeros((batch, slots), jnp.int32), jnp.zeros(batch, jnp.int32), zero)
