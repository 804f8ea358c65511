"""The cache of decoding: the states of all layers, by kind, and how many tokens of each row they stand for.

Legend: L layers of a kind, B rows, R some of them, T new tokens.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ling_jax.config import ModelConfig, layer_kinds
from ling_jax.config.layers import MTP_KIND
from ling_jax.generate.states import STATES, LayerStates, Room
from ling_jax.parallel.mesh import BATCH_AXES

MTP = "mtp"  # the MTP layer's place among the kinds; its entry for a token holds the next token too


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """All layers' states, a carry of the layer scan."""

    kinds: dict[str, LayerStates]
    length_B: jax.Array  # int32 tokens of each row; the next one's RoPE position

    def positions(self, valid_BT: jax.Array) -> jax.Array:
        """[B, T]: positions of the next tokens, of which those not `valid` are padding and take none."""
        return jnp.maximum(self.length_B[:, None] + jnp.cumsum(valid_BT, axis=1, dtype=jnp.int32) - 1, 0)

    def extend(self, valid_BT: jax.Array) -> "Cache":
        """A cache that counts these tokens; layers add them to their states one by one."""
        return dataclasses.replace(self, length_B=self.length_B + valid_BT.sum(1, dtype=jnp.int32))

    def of_length(self, length_B: jax.Array) -> "Cache":
        """A cache of the first `length` tokens of each row: drafts that fell are taken back."""
        return dataclasses.replace(self, length_B=length_B)

    def layer(self, kind: str, index: int | jax.Array) -> LayerStates:
        """The states of a kind's layers, for its layer `index` to read and write."""
        return dataclasses.replace(self.kinds[kind], layer=jnp.asarray(index, jnp.int32))

    def with_layer(self, kind: str, states: LayerStates) -> "Cache":
        """A cache with what a layer made of its kind's states."""
        return dataclasses.replace(self, kinds={**self.kinds, kind: states})

    def rows(self, rows_R: jax.Array) -> "Cache":
        """Some rows, as a cache of their own."""
        return self._each(lambda a: a[:, rows_R], self.length_B[rows_R])

    def with_rows(self, rows_R: jax.Array, some: "Cache") -> "Cache":
        """The inverse of `rows`."""
        length_B = self.length_B.at[rows_R].set(some.length_B, mode="drop")
        return self._each(lambda a, b: a.at[:, rows_R].set(b, mode="drop"), length_B, some)

    def copied(self, source: jax.Array, row: jax.Array, length: int | jax.Array) -> "Cache":
        """A cache whose `row` has the first `length` tokens of row `source`; unchanged if there is no such row."""
        length_B = self.length_B.at[row].set(length, mode="drop")
        kinds = {kind: states.copied(source, row, length) for kind, states in self.kinds.items()}
        return Cache(kinds, length_B)

    def usable(self, common: int, held: int, prompt: int) -> int:
        """How many tokens of a row can serve a request; arguments as in `states.LayerStates.usable`."""
        return min(states.usable(common, held, prompt) for states in self.kinds.values())

    def specs(self) -> Any:
        """How each array is split over a mesh."""
        rows: Any = PartitionSpec(BATCH_AXES)
        return Cache({kind: states.specs() for kind, states in self.kinds.items()}, rows)

    def _each(self, f: Callable[..., jax.Array], length_B: jax.Array, *others: "Cache") -> "Cache":
        """`f` of the arrays [L, B, ...] of this cache and of the others."""

        def of(a: jax.Array, *same: jax.Array) -> jax.Array:
            return f(a, *same) if a.ndim else a  # but for the number of the layer

        return Cache(jax.tree.map(of, self.kinds, *(other.kinds for other in others)), length_B)


def empty_cache(
    config: ModelConfig,
    batch: int,
    slots: int,
    dtype: jnp.dtype,
    *,
    drafts: int = 0,
    tensor: int = 1,
) -> Cache:
    """A cache for `batch` rows of up to `slots` tokens, with the MTP layer's where it drafts.

    Args: see `generate.states.Room`.
    """
    counts = Counter(layer_kinds(config))
    room = Room(0, batch, slots, drafts, tensor, dtype)
    kinds = {kind.key: STATES[kind.mixer](config, room._replace(layers=n)) for kind, n in counts.items()}
    if drafts:
        kinds[MTP] = STATES[MTP_KIND.mixer](config, room._replace(layers=1))
    return Cache(kinds, jnp.zeros(batch, jnp.int32))


def cache_bytes(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype) -> int:
    """Bytes of the states of an `empty_cache` on one device: 2 L B S G C elements of keys and values."""
    cache = jax.eval_shape(lambda: empty_cache(config, batch, slots, dtype))
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(cache.kinds) if a.ndim)
