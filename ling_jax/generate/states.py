"""The states that layers keep of the rows being decoded: what all have in common, keys and values, linear attention's.

Legend: L layers of a kind, B rows, S slots, T new tokens, H heads, G kv heads, C head_dim, P pending tokens.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ling_jax.config import ModelConfig
from ling_jax.config.layers import MTP_KIND
from ling_jax.kernels.lightning import lightning
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


@dataclass(frozen=True)
class LayerStates:
    """The states of all layers of one kind, a registered dataclass: arrays [L, B, ...], of which a `Cache` takes rows
    out, puts them back and copies them, and the layer that is being run, int32 [].

    How many of its tokens a row still has is the cache's `length_B`, and the positions of new tokens begin there: a
    state must be right for every length from that before the last call to that after it, `Room.drafts` tokens apart at
    most. A row of no tokens has zeros everywhere. How a mixer reads and writes its states is between the two.
    """

    def specs(self) -> Any:
        """How each array is split over a mesh, a `PartitionSpec` in its place: rows over BATCH_AXES."""
        raise NotImplementedError

    def usable(self, common: int, held: int, prompt: int) -> int:
        """How many tokens of a row can serve a request that begins with `common` of its `held` ones; on the host.

        Args:
          prompt: how many it had when its prompt's last piece had been run; 0 if that was of `Room.drafts` + 1 tokens
            or less, or if fewer than those were new to the row.
        """
        raise NotImplementedError

    def taken(self, source: jax.Array, length: int | jax.Array) -> Self:
        """The states of a row's first `length` tokens, as many as `usable` said: arrays without the dim of rows."""
        return jax.tree.map(lambda a: a[:, source] if a.ndim else a, self)

    def copied(self, source: jax.Array, row: jax.Array, length: int | jax.Array) -> Self:
        """States whose `row` has the first `length` tokens of row `source`; unchanged if there is no such row."""
        some = jnp.asarray(length) > 0

        def put(all_rows: jax.Array, value: jax.Array) -> jax.Array:
            return all_rows.at[:, row].set(jnp.where(some, value, 0), mode="drop") if all_rows.ndim else all_rows

        return jax.tree.map(put, self, self.taken(source, length))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeysAndValues(LayerStates):
    """Keys and values of every token. A token's slot is its position in its row, so rows of any lengths lie side by
    side, and a row's first tokens are its first slots: lowering a length takes tokens back."""

    k_LBSGC: jax.Array
    v_LBSGC: jax.Array
    layer: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, room: Room) -> Self:
        heads = max(config.num_key_value_heads, room.tensor)
        shape = (room.layers, room.rows, room.slots, heads, config.head_dim)
        return cls(jnp.zeros(shape, room.dtype), jnp.zeros(shape, room.dtype), jnp.zeros((), jnp.int32))

    def append(self, k_BTGC: jax.Array, v_BTGC: jax.Array, slots_BT: jax.Array) -> "KeysAndValues":
        """Returns the states with T tokens more; a token whose slot is past the last one is left out."""
        at = (self.layer, jnp.arange(slots_BT.shape[0])[:, None], slots_BT)
        k = self.k_LBSGC.at[at].set(k_BTGC.astype(self.k_LBSGC.dtype), mode="drop")
        v = self.v_LBSGC.at[at].set(v_BTGC.astype(self.v_LBSGC.dtype), mode="drop")
        return dataclasses.replace(self, k_LBSGC=k, v_LBSGC=v)

    def specs(self) -> "KeysAndValues":
        """Heads over `tensor`."""
        heads: Any = PartitionSpec(None, BATCH_AXES, None, "tensor")
        nowhere: Any = PartitionSpec()
        return KeysAndValues(heads, heads, nowhere)

    def usable(self, common: int, held: int, prompt: int) -> int:
        """Any number of tokens can."""
        return common


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearStates(LayerStates):
    """The state of linear attention after a row's first tokens, and keys and values of the last few, which can be taken
    back. A prompt's state is kept beside it, so that others that begin with the prompt can start there."""

    state_LBHCC: jax.Array  # float32, after the first `folded` tokens
    folded_LB: jax.Array  # int32
    k_LBPHC: jax.Array  # of the tokens that follow, in their order
    v_LBPHC: jax.Array
    kept_LBHCC: jax.Array  # float32: the state when a large piece had last been run
    kept_at_LB: jax.Array  # int32, after so many tokens
    layer: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, room: Room) -> Self:
        heads, width, rows = config.num_attention_heads, config.head_dim, (room.layers, room.rows)
        state = jnp.zeros((*rows, heads, width, width), jnp.float32)
        pending = jnp.zeros((*rows, room.drafts + 1, heads, width), room.dtype)
        places = jnp.zeros(rows, jnp.int32)
        return cls(state, places, pending, pending, state, places, jnp.zeros((), jnp.int32))

    @property
    def pending(self) -> int:
        """How many tokens a row keeps keys and values of: one more than drafts, so that what is kept of a prompt comes
        before its last token, which every request runs anew."""
        return self.k_LBPHC.shape[2]

    def attend(
        self,
        q_BTHC: jax.Array,
        k_BTHC: jax.Array,
        v_BTHC: jax.Array,
        slopes_H: jax.Array,
        positions_BT: jax.Array,
        valid_BT: jax.Array,
        scale: float,
    ) -> tuple[jax.Array, "LinearStates"]:
        """Runs T tokens, those that are valid; returns what each is given, float32 [B, T, H, C], and the new states."""
        mine = jax.tree.map(lambda a: a[self.layer] if a.ndim else a, self)
        count, end_B = self.pending, positions_BT[:, -1] + 1
        first_B = end_B - valid_BT.sum(1, dtype=jnp.int32)  # tokens before these
        before_BP = mine.folded_LB[:, None] + jnp.arange(count)
        places_BS = jnp.concatenate([before_BP, positions_BT], 1)
        there_BS = jnp.concatenate([before_BP < first_B[:, None], valid_BT], 1)
        k_BSHC = jnp.concatenate([mine.k_LBPHC, k_BTHC.astype(mine.k_LBPHC.dtype)], 1)
        v_BSHC = jnp.concatenate([mine.v_LBPHC, v_BTHC.astype(mine.v_LBPHC.dtype)], 1)
        q_BSHC = jnp.pad(q_BTHC, ((0, 0), (count, 0), (0, 0), (0, 0)))
        folded_B = jnp.maximum(mine.folded_LB, end_B - count)
        fold_BS = there_BS & (places_BS < folded_B[:, None])
        run = partial(lightning, q_BSHC, k_BSHC, v_BSHC, slopes_H, state_BHCD=mine.state_LBHCC, scale=scale)
        out_BSHC, _ = run(segments_BT=there_BS.astype(jnp.int32))
        _, state_BHCC = run(segments_BT=fold_BS.astype(jnp.int32))
        slots_BS = jnp.where(there_BS & ~fold_BS, places_BS - folded_B[:, None], count)
        at = jnp.arange(q_BTHC.shape[0])[:, None], slots_BS
        k_BPHC, v_BPHC = (jnp.zeros_like(x[:, :count]).at[at].set(x, mode="drop") for x in (k_BSHC, v_BSHC))
        new = {"state_LBHCC": state_BHCC, "folded_LB": folded_B, "k_LBPHC": k_BPHC, "v_LBPHC": v_BPHC}
        if q_BTHC.shape[1] > count:  # a piece of a prompt, not a step of decoding
            new |= {"kept_LBHCC": state_BHCC, "kept_at_LB": folded_B}
        put = {name: getattr(self, name).at[self.layer].set(value) for name, value in new.items()}
        return out_BSHC[:, count:], dataclasses.replace(self, **put)

    def specs(self) -> Any:
        """Heads over `tensor`."""
        state: Any = PartitionSpec(None, BATCH_AXES, "tensor")
        pending: Any = PartitionSpec(None, BATCH_AXES, None, "tensor")
        rows: Any = PartitionSpec(None, BATCH_AXES)
        nowhere: Any = PartitionSpec()
        return LinearStates(state, rows, pending, pending, state, rows, nowhere)

    def usable(self, common: int, held: int, prompt: int) -> int:
        """All tokens but the last, which no step folds in, or those that the prompt's kept state stands for."""
        kept = prompt - self.pending
        return common if held - common <= 1 else kept if 0 < kept <= common else 0

    def taken(self, source: jax.Array, length: int | jax.Array) -> Self:
        """Where the row's own state has more tokens, it is the kept one that has so many."""
        row = super().taken(source, length)
        later_L = row.folded_LB > length
        state = jnp.where(later_L.reshape(-1, 1, 1, 1), row.kept_LBHCC, row.state_LBHCC)
        return dataclasses.replace(row, state_LBHCC=state, folded_LB=jnp.where(later_L, row.kept_at_LB, row.folded_LB))


# The empty states of a kind's layers, by its mixer.
STATES: dict[str, Callable[[ModelConfig, Room], LayerStates]] = {
    MTP_KIND.mixer: KeysAndValues.empty,
    "linear": LinearStates.empty,
}
