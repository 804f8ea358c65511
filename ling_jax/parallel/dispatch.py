"""Tokens to the ranks that hold their experts, and back: dropless, in buffers of bounded size.

Each rank of the `expert` axis holds E/P experts and its own N tokens. The pairs (token, chosen expert) that a rank is
to work on form a queue, the same in everybody's reckoning, of which it takes R = buffer_factor times the mean at once;
what lies beyond goes in further rounds (`mesh.overflow`), which a balanced router never needs. These are smaller, R /
FURTHER, since their buffers stand beside the first round's results. Weights are made whole in here, so that each
round's gradients are scattered to their shards at once.

Two dispatchers, each a linear map and its transpose: `spread` (tokens to the form that is exchanged) and `collect`,
`fetch` (the rows of one round) and `put`. The forward pass is collect . put . experts . fetch . spread; the
hand-written backward pass applies the same four to cotangents, and recomputes the experts round by round.

Legend: N tokens, D hidden, K experts per token, E experts, e local experts, P ranks, A = N*K pairs of this rank,
M = P*N tokens of all ranks, R rows of one round.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ling_jax.config import MeshConfig
from ling_jax.kernels.grouped import block_rows
from ling_jax.kernels.rows import RowPlan, combine_rows, gather_rows, plan_rows, take_rows
from ling_jax.parallel.mesh import WORK_AXES, axis_index, axis_size, pmax
from ling_jax.parallel.ragged import Routes, ragged_all_to_all

AXIS = "expert"
FURTHER = 4

# expert_fn(rows_RD, weights, group_sizes_e, block) -> [R, D]
ExpertFn = Callable[[jax.Array, Any, jax.Array, int], jax.Array]


def _exclusive(a: jax.Array, axis: int) -> jax.Array:
    return jnp.cumsum(a, axis) - a


class RaggedQueue(NamedTuple):
    """Pairs sorted by expert on their own rank, sent to the experts' ranks; queues are ordered by source rank."""

    plan: RowPlan  # of this rank's A pairs
    counts_Pe: jax.Array  # int32 pairs of each rank for each of this rank's experts
    to_PP: jax.Array  # int32 pairs from rank (row) to rank (column)

    def spread(self, x_ND: jax.Array) -> jax.Array:
        return gather_rows(x_ND, self.plan)

    def collect(self, y_AD: jax.Array) -> jax.Array:
        ones_NK = jnp.ones(self.plan.row_of_NK.shape, jnp.float32)
        return combine_rows(y_AD, ones_NK, self.plan)

    def spread_weights(self, weights_NK: jax.Array) -> jax.Array:
        return take_rows(weights_NK.reshape(-1, 1), self.plan.pair_of_R)

    def collect_weights(self, dw_A1: jax.Array) -> jax.Array:
        return take_rows(dw_A1, self.plan.row_of_NK)[..., 0]

    def _routes(self, start: jax.Array, rows: int) -> tuple[Routes, Routes]:
        """There and back: of each rank's queue, the rows from `start` on."""
        me = axis_index(AXIS)
        at_PP = _exclusive(self.to_PP, 0)  # where a source's pairs begin in a queue
        first_PP, last_PP = (jnp.clip(start + r - at_PP, 0, self.to_PP) for r in (0, rows))
        size_PP = last_PP - first_PP
        sent_PP = _exclusive(self.to_PP, 1) + first_PP  # where they begin among the source's pairs
        got_PP = jnp.where(size_PP > 0, at_PP + first_PP - start, 0)  # and in the buffer
        there = Routes(sent_PP[me], size_PP[me], got_PP[me], size_PP[:, me])
        back = Routes(got_PP[:, me], size_PP[:, me], sent_PP[:, me], size_PP[me])
        return there, back

    def fetch(self, source: jax.Array, start: jax.Array, rows: int) -> jax.Array:
        empty = jnp.zeros((rows, source.shape[1]), source.dtype)
        return ragged_all_to_all(source, empty, self._routes(start, rows)[0], AXIS)

    fetch_weights = fetch

    def put(self, total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
        return ragged_all_to_all(part, total, self._routes(start, part.shape[0])[1], AXIS)

    put_weights = put

    def zeros(self, width: int, dtype: Any) -> jax.Array:
        return jnp.zeros((self.plan.pair_of_R.size, width), dtype)

    def zero_weights(self) -> jax.Array:
        return self.zeros(1, jnp.float32)

    def experts(self, start: jax.Array, rows: int) -> jax.Array:
        """int32 [R]: the local expert of each row of a round; e for a row that is none."""
        place_R = start + jnp.arange(rows)
        segment_R = jnp.searchsorted(jnp.cumsum(self.counts_Pe.reshape(-1)), place_R, side="right")
        local = self.counts_Pe.shape[1]
        return jnp.where(place_R < self.length(), segment_R % local, local).astype(jnp.int32)

    def length(self) -> jax.Array:
        return self.counts_Pe.sum()


def _ragged_queue(ids_NK: jax.Array, num_experts: int) -> RaggedQueue:
    plan = plan_rows(ids_NK, num_experts, 1)
    counts_PPe = jax.lax.all_gather(plan.group_sizes_E, AXIS).reshape(axis_size(AXIS), axis_size(AXIS), -1)
    return RaggedQueue(plan, counts_PPe[:, axis_index(AXIS)], counts_PPe.sum(-1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GatheredQueue:
    """All ranks' tokens gathered on each; a queue holds its experts' pairs in token order."""

    expert_MK: jax.Array  # int32 local expert of each pair; e for one of another rank
    place_MK: jax.Array  # int32 place in the queue
    local: int = field(metadata={"static": True})  # e

    def spread(self, x_ND: jax.Array) -> jax.Array:
        return jax.lax.all_gather(x_ND, AXIS, tiled=True)

    def collect(self, y_MD: jax.Array) -> jax.Array:
        return jax.lax.psum_scatter(y_MD, AXIS, tiled=True)

    spread_weights, collect_weights = spread, collect

    def _pairs(self, start: jax.Array, rows: int) -> jax.Array:
        """int32 [R]: the pair, m * K + k, of each row of a round; M * K where there is none."""
        row = self.place_MK - start
        row = jnp.where((self.expert_MK < self.local) & (row >= 0), row, rows).reshape(-1)
        return jnp.full(rows, row.size, jnp.int32).at[row].set(jnp.arange(row.size, dtype=jnp.int32), mode="drop")

    def fetch(self, source: jax.Array, start: jax.Array, rows: int) -> jax.Array:
        return take_rows(source, self._pairs(start, rows) // self.place_MK.shape[1])

    def fetch_weights(self, source_MK: jax.Array, start: jax.Array, rows: int) -> jax.Array:
        return take_rows(source_MK.reshape(-1, 1), self._pairs(start, rows))

    def put(self, total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
        token_R = self._pairs(start, part.shape[0]) // self.place_MK.shape[1]
        return total + jax.ops.segment_sum(part.astype(total.dtype), token_R, total.shape[0], indices_are_sorted=True)

    def put_weights(self, total_MK: jax.Array, part_R1: jax.Array, start: jax.Array) -> jax.Array:
        pair_R = self._pairs(start, part_R1.shape[0])
        return total_MK.reshape(-1).at[pair_R].set(part_R1[:, 0], mode="drop").reshape(total_MK.shape)

    def zeros(self, width: int, dtype: Any) -> jax.Array:
        return jnp.zeros((self.place_MK.shape[0], width), jnp.float32)  # terms are added in it, as one device does

    def zero_weights(self) -> jax.Array:
        return jnp.zeros(self.place_MK.shape, jnp.float32)

    def experts(self, start: jax.Array, rows: int) -> jax.Array:
        return self.expert_MK.reshape(-1).at[self._pairs(start, rows)].get(mode="fill", fill_value=self.local)

    def length(self) -> jax.Array:
        return (self.expert_MK < self.local).sum(dtype=jnp.int32)


def _gathered_queue(ids_NK: jax.Array, num_experts: int) -> GatheredQueue:
    local = num_experts // axis_size(AXIS)
    expert_MK = jax.lax.all_gather(ids_NK, AXIS, tiled=True) - axis_index(AXIS) * local
    expert_MK = jnp.where((expert_MK >= 0) & (expert_MK < local), expert_MK, local)
    mine = (expert_MK < local).reshape(-1)
    return GatheredQueue(expert_MK, _exclusive(mine.astype(jnp.int32), 0).reshape(expert_MK.shape), local)


QUEUES: dict[str, Callable[[jax.Array, int], Any]] = {
    "ragged_all_to_all": _ragged_queue,
    "all_gather": _gathered_queue,
}


class Exchange(NamedTuple):
    """What is known before the first row moves."""

    expert_fn: ExpertFn
    whole: Callable[[Any], Any]  # shards of this rank's experts' weights -> the weights
    rows: int  # R
    further: int  # rows of a further round
    bounded: bool  # whether R can be too few
    rounds: bool  # whether what lies beyond goes in further rounds
    block: int  # rows per block of the grouped product


def _work(exchange: Exchange, experts_R, local: int, rows_RD, scale_R1, weights) -> jax.Array:
    """[R, D]: the rows of one round through their experts, scaled."""
    with jax.named_scope("sort_rows"):
        plan = plan_rows(experts_R[:, None], local, exchange.block)
        sorted_RD = gather_rows(rows_RD, plan)
    y_RD = exchange.expert_fn(sorted_RD, weights, plan.group_sizes_E, exchange.block)
    with jax.named_scope("sort_rows"):
        return combine_rows(y_RD, scale_R1, plan)


def _further_rounds(exchange: Exchange, queue: Any, body: Callable, carry: Any) -> Any:
    """`body(start, carry)` for all rounds after the first; none, and no loop, where one always suffices."""
    if not (exchange.bounded and exchange.rounds):
        return carry
    # All devices go round equally often: a collective in a loop must not wait for one that has left it.
    count = pmax(-(-(queue.length() - exchange.rows) // exchange.further), *WORK_AXES)
    return jax.lax.fori_loop(0, count, lambda i, carry: body(exchange.rows + i * exchange.further, carry), carry)


def _local(weights: Any) -> int:
    return jax.tree.leaves(weights)[0].shape[0]


def _forward(
    exchange: Exchange, queue: Any, x_ND: jax.Array, scale_NK: jax.Array, shards: Any
) -> tuple[jax.Array, jax.Array]:
    """The result, and the first round's rows, by the name that `train.remat` save_dispatch keeps."""
    weights = exchange.whole(shards)
    with jax.named_scope("dispatch"):
        x, scale = queue.spread(x_ND), queue.spread_weights(scale_NK)
        first_RD = checkpoint_name(queue.fetch(x, 0, exchange.rows), "dispatch")

    def one_round(start, total, rows_RD):
        with jax.named_scope("dispatch"):
            scale_R1 = queue.fetch_weights(scale, start, len(rows_RD))
        experts_R = queue.experts(start, len(rows_RD))
        y_RD = _work(exchange, experts_R, _local(weights), rows_RD, scale_R1, weights)
        with jax.named_scope("combine"):
            return queue.put(total, y_RD, start)

    def further(start, total):
        with jax.named_scope("dispatch"):
            rows_RD = queue.fetch(x, start, exchange.further)
        return one_round(start, total, rows_RD)

    total = one_round(0, queue.zeros(x_ND.shape[1], x_ND.dtype), first_RD)
    total = _further_rounds(exchange, queue, further, total)
    with jax.named_scope("combine"):
        return queue.collect(total).astype(x_ND.dtype), first_RD


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(exchange: Exchange, queue: Any, x_ND: jax.Array, scale_NK: jax.Array, shards: Any) -> jax.Array:
    return _forward(exchange, queue, x_ND, scale_NK, shards)[0]


def _run_fwd(exchange, queue, x_ND, scale_NK, shards):
    y_ND, first_RD = _forward(exchange, queue, x_ND, scale_NK, shards)
    return y_ND, (queue, x_ND, scale_NK, shards, first_RD)


def _run_bwd(exchange, saved, g_ND):
    """Round by round: the same rows and their cotangents, the experts' own gradients, and the way back."""
    queue, x_ND, scale_NK, shards, first_RD = saved
    weights, to_shards = jax.vjp(exchange.whole, shards)
    with jax.named_scope("dispatch"):
        x, g, scale = queue.spread(x_ND), queue.spread(g_ND), queue.spread_weights(scale_NK)

    def one_round(start, rows_RD, dx, dscale):
        with jax.named_scope("dispatch"):
            g_RD = queue.fetch(g, start, len(rows_RD))
            scale_R1 = queue.fetch_weights(scale, start, len(rows_RD))
        work = partial(_work, exchange, queue.experts(start, len(rows_RD)), _local(weights))
        drows_RD, dscale_R1, dweights = jax.vjp(work, rows_RD, scale_R1, weights)[1](g_RD)
        with jax.named_scope("combine"):
            dx, dscale = queue.put(dx, drows_RD, start), queue.put_weights(dscale, dscale_R1, start)
        return dx, dscale, to_shards(dweights)[0]

    def further(start, carry):
        with jax.named_scope("dispatch"):
            rows_RD = queue.fetch(x, start, exchange.further)
        dx, dscale, dshards = one_round(start, rows_RD, *carry[:2])
        return dx, dscale, jax.tree.map(jnp.add, carry[2], dshards)

    carry = one_round(0, first_RD, queue.zeros(x_ND.shape[1], x_ND.dtype), queue.zero_weights())
    dx, dscale, dshards = _further_rounds(exchange, queue, further, carry)
    with jax.named_scope("combine"):
        return None, queue.collect(dx).astype(x_ND.dtype), queue.collect_weights(dscale), dshards


_run.defvjp(_run_fwd, _run_bwd)


def dispatch(
    x_ND: jax.Array,
    ids_NK: jax.Array,
    scale_NK: jax.Array,
    shards: Any,
    expert_fn: ExpertFn,
    num_experts: int,
    mesh: MeshConfig,
    whole: Callable[[Any], Any] = lambda weights: weights,
) -> tuple[jax.Array, jax.Array]:
    """sum_k scale_k expert_k(x) with the experts spread over the mesh; for a manual region over `expert`.

    Args:
      x_ND: this device's tokens.  ids_NK: int32 experts of each, distinct.  scale_NK: float32.
      shards: pytree of this device's parts of its rank's experts' weights, [e, ...] each.
      expert_fn: what an expert does to rows sorted by expert.
      mesh: `dispatcher`, `buffer_factor` and `overflow` are read.
      whole: makes weights of the shards (a linear map).
    Returns:
      [N, D] in x's dtype, and the int32 number of pairs that this rank's buffer had no room for (0 unless
      `mesh.overflow` is "drop").
    """
    ranks, local = axis_size(AXIS), num_experts // axis_size(AXIS)
    tokens, choices = ids_NK.shape
    worst = ranks * tokens * min(choices, local)
    rows = min(math.ceil(mesh.buffer_factor * tokens * choices), worst)
    block = block_rows(tokens * choices, local)
    further = math.ceil(rows / FURTHER)
    exchange = Exchange(expert_fn, whole, rows, further, rows < worst, mesh.overflow == "rounds", block)
    with jax.named_scope("plan"):
        queue = QUEUES[mesh.dispatcher](ids_NK, num_experts)
        dropped = jnp.zeros((), jnp.int32) if exchange.rounds else jnp.maximum(queue.length() - rows, 0)
    return _run(exchange, queue, x_ND, scale_NK, shards), dropped
