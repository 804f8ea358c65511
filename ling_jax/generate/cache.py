"""The key/value cache, as a carry of the layer scan.

Legend: L layers of a kind, B rows, S slots, T new tokens, G kv heads, C head_dim.

A token's slot is its position in its row, so rows of any lengths lie side by side, and a row's first `length_B` slots
are all there is of it: lowering a length takes tokens back, and copying slots gives a row another's beginning.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ling_jax.config import ModelConfig, layer_kinds
from ling_jax.parallel.mesh import BATCH_AXES

MTP = "mtp"  # the MTP layer's place among the kinds; its entry for a token holds the next token too


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys and values of all layers of one kind, and which of them is being run."""

    k_LBSGC: jax.Array
    v_LBSGC: jax.Array
    layer: jax.Array  # int32 []

    def append(
        self, k_BTGC: jax.Array, v_BTGC: jax.Array, slots_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array, "LayerCache"]:
        """Writes T tokens, those with a slot in the cache; returns this layer's [B, S, G, C] keys and values and the
        new cache."""
        at = (self.layer, jnp.arange(slots_BT.shape[0])[:, None], slots_BT)
        k = self.k_LBSGC.at[at].set(k_BTGC.astype(self.k_LBSGC.dtype), mode="drop")
        v = self.v_LBSGC.at[at].set(v_BTGC.astype(self.v_LBSGC.dtype), mode="drop")
        mine = (jax.lax.dynamic_index_in_dim(a, self.layer, keepdims=False) for a in (k, v))
        return *mine, dataclasses.replace(self, k_LBSGC=k, v_LBSGC=v)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """All layers' caches, by kind of layer."""

    kinds: dict[str, LayerCache]
    length_B: jax.Array  # int32 tokens of each row; the next one's slot and RoPE position

    @property
    def slots(self) -> int:
        return next(iter(self.kinds.values())).k_LBSGC.shape[2]

    def positions(self, valid_BT: jax.Array) -> jax.Array:
        """[B, T]: slots of the next tokens, of which those not `valid` are padding and take none."""
        return jnp.maximum(self.length_B[:, None] + jnp.cumsum(valid_BT, axis=1, dtype=jnp.int32) - 1, 0)

    def extend(self, valid_BT: jax.Array) -> "Cache":
        """With these tokens; their keys and values follow layer by layer."""
        return dataclasses.replace(self, length_B=self.length_B + valid_BT.sum(1, dtype=jnp.int32))

    def of_length(self, length_B: jax.Array) -> "Cache":
        """With the first `length` tokens of each row."""
        return dataclasses.replace(self, length_B=length_B)

    def layer(self, kind: str, index: jax.Array) -> LayerCache:
        return dataclasses.replace(self.kinds[kind], layer=jnp.asarray(index, jnp.int32))

    def with_layer(self, kind: str, layer: LayerCache) -> "Cache":
        return dataclasses.replace(self, kinds={**self.kinds, kind: layer})

    def rows(self, rows_R: jax.Array) -> "Cache":
        """Some rows, as a cache of their own."""
        return self._each(lambda a: a[:, rows_R], self.length_B[rows_R])

    def with_rows(self, rows_R: jax.Array, some: "Cache") -> "Cache":
        """The inverse of `rows`."""
        length_B = self.length_B.at[rows_R].set(some.length_B, mode="drop")
        return self._each(lambda a, b: a.at[:, rows_R].set(b, mode="drop"), length_B, some)

    def copied(self, source: jax.Array, row: jax.Array, length: int | jax.Array) -> "Cache":
        """With the first `length` tokens of row `source` in `row`; unchanged if there is no such row."""
        length_B = self.length_B.at[row].set(length, mode="drop")
        return self._each(lambda a: a.at[:, row].set(a[:, source], mode="drop"), length_B)

    def specs(self) -> Any:
        """How each array is split over a mesh: rows, and heads over `tensor`."""
        by_dims = {0: (), 1: (BATCH_AXES,), 5: (None, BATCH_AXES, None, "tensor")}
        return jax.tree.map(lambda a: PartitionSpec(*by_dims[a.ndim]), self)

    def _each(self, f: Callable[..., jax.Array], length_B: jax.Array, *others: "Cache") -> "Cache":
        """`f` of the [L, B, S, G, C] arrays of this cache and of the others."""
        kinds = {}
        for kind, mine in self.kinds.items():
            theirs = [other.kinds[kind] for other in others]
            k = f(mine.k_LBSGC, *(other.k_LBSGC for other in theirs))
            v = f(mine.v_LBSGC, *(other.v_LBSGC for other in theirs))
            kinds[kind] = dataclasses.replace(mine, k_LBSGC=k, v_LBSGC=v)
        return Cache(kinds, length_B)


def _layers(config: ModelConfig, mtp: bool) -> Counter[str]:
    return Counter(layer_kinds(config)) + Counter({MTP: int(mtp)})


def cache_bytes(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype, mtp: bool = False) -> int:
    """2 L B S G C elements: keys and values of every layer, if asked the MTP layer's too."""
    per_slot = 2 * _layers(config, mtp).total() * config.num_key_value_heads * config.head_dim
    return per_slot * batch * slots * jnp.dtype(dtype).itemsize


def empty_cache(
    config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype, mtp: bool = False, tensor: int = 1
) -> Cache:
    """A cache of `slots` tokens for each of `batch` rows, if asked for the MTP layer too. Each of `tensor` devices has
    a head at least."""
    heads = max(config.num_key_value_heads, tensor)
    kinds = {}
    for kind, count in _layers(config, mtp).items():
        shape = (count, batch, slots, heads, config.head_dim)
        kinds[kind] = LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))
    return Cache(kinds, jnp.zeros(batch, jnp.int32))
