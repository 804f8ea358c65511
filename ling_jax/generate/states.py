"""The states that layers keep of the rows being decoded: a protocol, and keys and values.

Legend: L layers of a kind, B rows, S slots, T new tokens, G kv heads, C head_dim.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ling_jax.config import ModelConfig
from ling_jax.config.layers import MTP_KIND
from ling_jax.parallel.mesh import BATCH_AXES


class Room(NamedTuple):
    """How much is to be kept.

    Attributes:
      layers: of the kind.
      rows: rows side by side.
      slots: tokens of a row, at most.
      drafts: tokens that a step may run and then take back.
      tensor: devices that share a layer's heads; each has one at least.
      dtype: of activations.
    """

    layers: int
    rows: int
    slots: int
    drafts: int
    tensor: int
    dtype: jnp.dtype


class LayerStates(Protocol):
    """The states of all layers of one kind, a registered dataclass: arrays [L, B, ...], of which a `Cache` takes rows
    out, puts them back and copies them, and the layer that is being run, int32 [].

    How many of its tokens a row still has is the cache's `length_B`, and the positions of new tokens begin there: a
    state must be right for every length from that before the last call to that after it, `Room.drafts` tokens apart at
    most. A row of no tokens has zeros everywhere. How a mixer reads and writes its states is between the two.

    Attributes:
      goes_back: how many tokens a row can always be shortened by to serve a request that shares only its beginning.
    """

    goes_back: ClassVar[int]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def layer(self) -> jax.Array: ...

    def specs(self) -> Any:
        """How each array is split over a mesh, a `PartitionSpec` in its place: rows over BATCH_AXES."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeysAndValues:
    """Keys and values of every token. A token's slot is its position in its row, so rows of any lengths lie side by
    side, and a row's first tokens are its first slots: lowering a length takes tokens back."""

    k_LBSGC: jax.Array
    v_LBSGC: jax.Array
    layer: jax.Array

    goes_back: ClassVar[int] = 2**31 - 1

    @classmethod
    def empty(cls, config: ModelConfig, room: Room) -> Self:
        heads = max(config.num_key_value_heads, room.tensor)
        shape = (room.layers, room.rows, room.slots, heads, config.head_dim)
        return cls(jnp.zeros(shape, room.dtype), jnp.zeros(shape, room.dtype), jnp.zeros((), jnp.int32))

    def append(
        self, k_BTGC: jax.Array, v_BTGC: jax.Array, slots_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array, "KeysAndValues"]:
        """Writes T tokens, those with a slot; returns this layer's keys and values [B, S, G, C] and the new states."""
        at = (self.layer, jnp.arange(slots_BT.shape[0])[:, None], slots_BT)
        k = self.k_LBSGC.at[at].set(k_BTGC.astype(self.k_LBSGC.dtype), mode="drop")
        v = self.v_LBSGC.at[at].set(v_BTGC.astype(self.v_LBSGC.dtype), mode="drop")
        mine = (jax.lax.dynamic_index_in_dim(a, self.layer, keepdims=False) for a in (k, v))
        return *mine, dataclasses.replace(self, k_LBSGC=k, v_LBSGC=v)

    def specs(self) -> "KeysAndValues":
        """Heads over `tensor`."""
        heads: Any = PartitionSpec(None, BATCH_AXES, None, "tensor")
        nowhere: Any = PartitionSpec()
        return KeysAndValues(heads, heads, nowhere)


# The empty states of a kind's layers, by its mixer.
STATES: dict[str, Callable[[ModelConfig, Room], LayerStates]] = {MTP_KIND.mixer: KeysAndValues.empty}
