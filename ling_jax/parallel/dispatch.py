"""Tokens to the ranks that hold their experts, and back: dropless, in buffers of bounded size.

Each rank of the `expert` axis holds E/P experts and its own N tokens. The pairs (token, chosen expert) that a rank is
to work on form a queue, by expert, then by source rank, then by token, the same in everybody's reckoning, of which it
takes R = buffer_factor times the mean at once; what lies beyond goes in further rounds (`mesh.overflow`), which a
balanced router never needs. These are smaller, R / FURTHER, since their buffers stand beside the first round's results.
Rows arrive sorted by expert, each expert's padded to whole blocks, so nothing is sorted where they are worked on.
Weights are made whole in here, so that each round's gradients are scattered to their shards at once.

Two dispatchers, each a linear map and its transpose: `spread` (tokens to the form that is exchanged) and `collect`,
`fetch` (the rows of one round) and `put`. The forward pass is collect . put . experts . fetch . spread; the
hand-written backward pass applies the same four to cotangents, and recomputes the experts round by round.

Legend: N tokens, D hidden, K experts per token, E experts, e local experts, P ranks (S of them as sources, Q as those
that work), A = N*K pairs of this rank, M = P*N tokens of all ranks, R rows of one round.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ling_jax.config import MeshConfig
from ling_jax.kernels.choose import for_nvidia
from ling_jax.kernels.grouped import padded_rows
from ling_jax.kernels.rows import RowPlan, gather_rows, plan_rows, sum_choices, take_rows
from ling_jax.kernels.swiglu import block_for, row_gradients, swiglu, weight_gradients
from ling_jax.kernels.weight import Weight, as_weight
from ling_jax.parallel.mesh import WORK_AXES, axis_index, axis_size, pmax
from ling_jax.parallel.ragged import Routes, ragged_all_to_all

AXIS = "expert"
FURTHER = 4


def _exclusive(a: jax.Array, axis: int) -> jax.Array:
    return jnp.cumsum(a, axis) - a


class Round(NamedTuple):
    """Part of a queue, and the buffer it is worked on in."""

    start: jax.Array | int  # the first pair's place in the queue
    pairs: int  # at most
    local: int  # e
    block: int  # an expert's rows are padded to whole blocks

    @property
    def rows(self) -> int:
        """R, of the buffer."""
        return padded_rows(self.pairs, self.local, self.block)

    def place(self, counts_eS: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """For pairs of each expert and source: how many of them come before this round, how many are of it, and the
        buffer's row of the first of these, all int32 [e, S]; and the rows of each expert, padding included [e]."""
        at_eS = _exclusive(counts_eS.reshape(-1), 0).reshape(counts_eS.shape)
        before_eS, upto_eS = (jnp.clip(self.start + n - at_eS, 0, counts_eS) for n in (0, self.pairs))
        size_eS = upto_eS - before_eS
        group_sizes_e = -(-size_eS.sum(1) // self.block) * self.block
        return before_eS, size_eS, _exclusive(group_sizes_e, 0)[:, None] + _exclusive(size_eS, 1), group_sizes_e


class RaggedQueue(NamedTuple):
    """Pairs sorted by expert on their own rank, sent to the experts' ranks, a slice for each expert."""

    plan: RowPlan  # of this rank's A pairs
    counts_SQe: jax.Array  # int32 pairs of each rank for each rank's experts

    def spread(self, x_ND: jax.Array) -> jax.Array:
        return gather_rows(x_ND, self.plan)

    def collect(self, y_AD: jax.Array) -> jax.Array:
        return sum_choices(y_AD, self.plan.row_of_NK)

    def spread_weights(self, weights_NK: jax.Array) -> jax.Array:
        return take_rows(weights_NK.reshape(-1, 1), self.plan.pair_of_R)

    def collect_weights(self, dw_A1: jax.Array) -> jax.Array:
        return take_rows(dw_A1, self.plan.row_of_NK)[..., 0]

    def _routes(self, part: Round) -> tuple[Routes, Routes]:
        """There and back."""
        me = axis_index(AXIS)
        before_QeS, size_QeS, row_QeS, _ = jax.vmap(part.place)(self.counts_SQe.transpose(1, 2, 0))
        at_SQe = _exclusive(self.counts_SQe.reshape(len(self.counts_SQe), -1), 1).reshape(self.counts_SQe.shape)
        sent_QeS = at_SQe.transpose(1, 2, 0) + before_QeS  # where they begin among the source's pairs
        mine = [a[..., me].reshape(-1) for a in (sent_QeS, size_QeS, row_QeS)]  # as the source: [Q * e]
        sent_Se, size_Se, row_Se = (a[me].T.reshape(-1) for a in (sent_QeS, size_QeS, row_QeS))  # as the worker
        return Routes(*mine, recv_sizes=size_Se), Routes(row_Se, size_Se, sent_Se, recv_sizes=mine[1])

    def fetch(self, source: jax.Array, part: Round) -> jax.Array:
        empty = jnp.zeros((part.rows, source.shape[1]), source.dtype)
        return ragged_all_to_all(source, empty, self._routes(part)[0], AXIS)

    fetch_weights = fetch

    def put(self, total: jax.Array, rows: jax.Array, part: Round) -> jax.Array:
        return ragged_all_to_all(rows, total, self._routes(part)[1], AXIS)

    put_weights = put

    def zeros(self, width: int, dtype: Any) -> jax.Array:
        return jnp.zeros((self.plan.pair_of_R.size, width), dtype)

    def zero_weights(self) -> jax.Array:
        return self.zeros(1, jnp.float32)

    def counts(self) -> jax.Array:
        """int32 [e, S]: this rank's queue."""
        return self.counts_SQe[:, axis_index(AXIS)].T


def _ragged_queue(ids_NK: jax.Array, num_experts: int) -> RaggedQueue:
    plan = plan_rows(ids_NK, num_experts, 1)
    ranks = axis_size(AXIS)
    queue = RankQueue if for_nvidia() else RaggedQueue
    return queue(plan, jax.lax.all_gather(plan.group_sizes_E, AXIS).reshape(ranks, ranks, -1))


class RankQueue(RaggedQueue):
    """As `RaggedQueue`, but with one slice for each rank, whose rows are sorted by expert once they have arrived. NCCL
    takes some 12 us for a slice, even an empty one, and Ling has 256 experts."""

    def _slices(self, part: Round) -> tuple[jax.Array, jax.Array, jax.Array]:
        """int32 [Q, S]: where a source's slice for a worker begins among the source's pairs, which are sorted by
        expert; its rows; and where they arrive, source after source."""
        before_QeS, size_QeS, _, _ = jax.vmap(part.place)(self.counts_SQe.transpose(1, 2, 0))
        pairs_SQ, size_QS = self.counts_SQe.sum(2), size_QeS.sum(1)
        return _exclusive(pairs_SQ, 1).T + before_QeS.sum(1), size_QS, _exclusive(size_QS, 1)

    def _routes(self, part: Round) -> tuple[Routes, Routes]:
        me = axis_index(AXIS)
        sent_QS, size_QS, begin_QS = self._slices(part)
        there = Routes(sent_QS[:, me], size_QS[:, me], begin_QS[:, me], recv_sizes=size_QS[me])
        return there, Routes(begin_QS[me], size_QS[me], sent_QS[me], recv_sizes=size_QS[:, me])

    def _runs(self, part: Round) -> tuple[jax.Array, jax.Array, jax.Array]:
        """int32 [e, S]: the pairs of an expert and a source: where they lie as they arrive, where once sorted, and how
        many they are."""
        _, size_eS, row_eS, _ = part.place(self.counts())
        return _exclusive(size_eS.sum(0), 0) + _exclusive(size_eS, 0), row_eS, size_eS

    def fetch(self, source: jax.Array, part: Round) -> jax.Array:
        arrived = RaggedQueue.fetch(self, source, part._replace(block=1))
        arrived_eS, row_eS, size_eS = self._runs(part)
        return take_rows(arrived, _moved(row_eS, arrived_eS, size_eS, part.rows, arrived.shape[0]))

    fetch_weights = fetch

    def put(self, total: jax.Array, rows: jax.Array, part: Round) -> jax.Array:
        arrived_eS, row_eS, size_eS = self._runs(part)
        ordered = _moved(arrived_eS.T, row_eS.T, size_eS.T, part._replace(block=1).rows, rows.shape[0])
        return RaggedQueue.put(self, total, take_rows(rows, ordered), part)

    put_weights = put


def _moved(to: jax.Array, start: jax.Array, sizes: jax.Array, rows: int, nothing: int) -> jax.Array:
    """int32 [rows]: which row comes to each place, where runs of `sizes` rows move from `start` to the places from `to`
    on, which ascend; `nothing` for a place that gets none."""
    place_R = jnp.arange(rows, dtype=jnp.int32)
    # An empty run begins where the next one does.
    run_R = jnp.searchsorted(to.reshape(-1), place_R, side="right", method="compare_all") - 1
    nth_R = place_R - to.reshape(-1)[run_R]
    return jnp.where(nth_R < sizes.reshape(-1)[run_R], start.reshape(-1)[run_R] + nth_R, nothing)


class GatheredQueue(NamedTuple):
    """All ranks' tokens gathered on each."""

    expert_MK: jax.Array  # int32 local expert of each pair; e for one of another rank
    place_MK: jax.Array  # int32 place in the queue
    counts_e: jax.Array  # int32 pairs of each expert

    def spread(self, x_ND: jax.Array) -> jax.Array:
        return jax.lax.all_gather(x_ND, AXIS, tiled=True)

    def collect(self, y_MD: jax.Array) -> jax.Array:
        return jax.lax.psum_scatter(y_MD, AXIS, tiled=True)

    spread_weights, collect_weights = spread, collect

    def _pairs(self, part: Round) -> jax.Array:
        """int32 [R]: the pair, m * K + k, of each row of a round; M * K where there is none."""
        before_e, size_e, row_e, _ = (a.reshape(-1) for a in part.place(self.counts()))
        first_e = _exclusive(self.counts_e, 0) + before_e
        nth_MK = self.place_MK - first_e.at[self.expert_MK].get(mode="fill", fill_value=0)  # of its expert's rows
        inside_MK = (nth_MK >= 0) & (nth_MK < size_e.at[self.expert_MK].get(mode="fill", fill_value=0))
        row_MK = jnp.where(inside_MK, nth_MK + row_e.at[self.expert_MK].get(mode="fill", fill_value=0), part.rows)
        pairs = jnp.arange(row_MK.size, dtype=jnp.int32)
        return jnp.full(part.rows, row_MK.size, jnp.int32).at[row_MK.reshape(-1)].set(pairs, mode="drop")

    def fetch(self, source: jax.Array, part: Round) -> jax.Array:
        return take_rows(source, self._pairs(part) // self.place_MK.shape[1])

    def fetch_weights(self, source_MK: jax.Array, part: Round) -> jax.Array:
        return take_rows(source_MK.reshape(-1, 1), self._pairs(part))

    def put(self, total: jax.Array, rows: jax.Array, part: Round) -> jax.Array:
        token_R = self._pairs(part) // self.place_MK.shape[1]
        return total.at[token_R].add(rows.astype(total.dtype), mode="drop")

    def put_weights(self, total_MK: jax.Array, rows_R1: jax.Array, part: Round) -> jax.Array:
        flat = total_MK.reshape(-1).at[self._pairs(part)].set(rows_R1[:, 0], mode="drop")
        return flat.reshape(total_MK.shape)

    def zeros(self, width: int, dtype: Any) -> jax.Array:
        return jnp.zeros((self.place_MK.shape[0], width), jnp.float32)  # terms are added in it, as one device does

    def zero_weights(self) -> jax.Array:
        return jnp.zeros(self.place_MK.shape, jnp.float32)

    def counts(self) -> jax.Array:
        return self.counts_e[:, None]


def _gathered_queue(ids_NK: jax.Array, num_experts: int) -> GatheredQueue:
    local = num_experts // axis_size(AXIS)
    expert_MK = jax.lax.all_gather(ids_NK, AXIS, tiled=True) - axis_index(AXIS) * local
    expert_MK = jnp.where((expert_MK >= 0) & (expert_MK < local), expert_MK, local)
    plan = plan_rows(expert_MK, local, 1)
    return GatheredQueue(expert_MK, plan.row_of_NK, plan.group_sizes_E)


QUEUES: dict[str, Callable[[jax.Array, int], Any]] = {
    "ragged_all_to_all": _ragged_queue,
    "all_gather": _gathered_queue,
}


def dispatcher_of(mesh: MeshConfig, ranks: int, choices: int) -> str:
    """The name of the dispatcher that `mesh.dispatcher` means. On NVIDIA GPUs "auto" is what moves fewer bytes, tokens
    in bfloat16 (docs/meshes.md counts them); elsewhere it is "ragged_all_to_all"."""
    if mesh.dispatcher != "auto":
        return mesh.dispatcher
    gathered, sent = 14 * (ranks - 1), 10 * choices * (ranks - 1) / ranks
    return "all_gather" if for_nvidia() and gathered < sent else "ragged_all_to_all"


Whole = tuple[Callable[[Weight], Weight], ...]  # makes this rank's experts' gate, up and down of their shards


class Exchange(NamedTuple):
    """The plan of an exchange, known before the first row moves."""

    whole: Whole
    first: Round
    further: Round  # each but the first; its start is the first round's end
    bounded: bool  # whether the first can be too small
    rounds: bool  # whether what lies beyond goes in further rounds


def _further_rounds(exchange: Exchange, queue: Any, body: Callable, tokens: tuple[jax.Array, ...], carry: Any) -> Any:
    """`body(part, spread, carry)` for all rounds after the first, with `tokens` spread anew, so that they are not kept
    during the first; no loop where one round always suffices."""
    if not (exchange.bounded and exchange.rounds):
        return carry
    tokens, carry = jax.lax.optimization_barrier((tokens, carry))
    with jax.named_scope("dispatch"):
        spread = [queue.spread(x_ND) for x_ND in tokens]
    # All devices go round equally often: a collective in a loop must not wait for one that has left it.
    size, start = exchange.further.pairs, exchange.further.start
    count = pmax(-(-(queue.counts().sum() - start) // size), *WORK_AXES)

    def run(i, carry):
        return body(exchange.further._replace(start=start + i * size), spread, carry)

    return jax.lax.fori_loop(0, count, run, carry)


def _forward(
    exchange: Exchange, queue: Any, x_ND: jax.Array, scale_NK: jax.Array, shards: Any
) -> tuple[jax.Array, jax.Array]:
    """The result, and the first round's rows, by the name that `train.remat` save_dispatch keeps."""
    weights = tuple(whole(shard) for whole, shard in zip(exchange.whole, shards, strict=True))
    with jax.named_scope("dispatch"):
        scale = queue.spread_weights(scale_NK)
        first_RD = checkpoint_name(queue.fetch(queue.spread(x_ND), exchange.first), "dispatch")

    def one_round(part: Round, total, rows_RD):
        with jax.named_scope("dispatch"):
            scale_R1 = queue.fetch_weights(scale, part)
        y_RD = swiglu(rows_RD, weights, part.place(queue.counts())[3], part.block)[0]
        with jax.named_scope("combine"):
            return queue.put(total, (y_RD * scale_R1).astype(y_RD.dtype), part)

    def further(part: Round, spread, total):
        with jax.named_scope("dispatch"):
            rows_RD = queue.fetch(spread[0], part)
        return one_round(part, total, rows_RD)

    total = one_round(exchange.first, queue.zeros(x_ND.shape[1], x_ND.dtype), first_RD)
    total = _further_rounds(exchange, queue, further, (x_ND,), total)
    with jax.named_scope("combine"):
        return queue.collect(total).astype(x_ND.dtype), first_RD


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(exchange: Exchange, queue: Any, x_ND: jax.Array, scale_NK: jax.Array, shards: Any) -> jax.Array:
    return _forward(exchange, queue, x_ND, scale_NK, shards)[0]


def _run_fwd(exchange, queue, x_ND, scale_NK, shards):
    y_ND, first_RD = _forward(exchange, queue, x_ND, scale_NK, shards)
    return y_ND, (queue, x_ND, scale_NK, shards, first_RD)


def _run_bwd(exchange, saved, g_ND):
    """Round by round: the same rows and their cotangents, the experts' own gradients, and the way back.

    Weights' gradients come first, and rows' only when two of three are scattered: by then the rows themselves and their
    cotangents, the largest buffers, are no longer needed.
    """
    queue, x_ND, scale_NK, shards, first_RD = saved
    pairs = [shard.pulled_back(whole) for whole, shard in zip(exchange.whole, shards, strict=True)]
    weights, to_shards = tuple(w for w, _ in pairs), [f for _, f in pairs]
    with jax.named_scope("dispatch"):
        scale = queue.spread_weights(scale_NK)
        first_g_RD = queue.fetch(queue.spread(g_ND), exchange.first)

    def one_round(part: Round, rows_RD, g_RD, dx, dscale):
        with jax.named_scope("dispatch"):
            scale_R1 = queue.fetch_weights(scale, part)
        sizes_e, block = part.place(queue.counts())[3], part.block
        dweights, dscale_R, dinner = weight_gradients(rows_RD, weights, sizes_e, block, g_RD, scale_R1[:, 0])
        dgate, dup, ddown = dweights
        scattered = to_shards[0](dgate), to_shards[2](ddown)
        dinner, dup, (dgate, ddown) = jax.lax.optimization_barrier((dinner, dup, scattered))
        drows_RD = row_gradients(dinner, weights, sizes_e, block)
        with jax.named_scope("combine"):
            dx, dscale = queue.put(dx, drows_RD, part), queue.put_weights(dscale, dscale_R[:, None], part)
        # Behind a barrier, or XLA scatters after the loop and adds up whole gradients in it.
        return dx, dscale, jax.lax.optimization_barrier((dgate, to_shards[1](dup), ddown))

    def further(part: Round, spread, carry):
        with jax.named_scope("dispatch"):
            rows_RD, g_RD = (queue.fetch(source, part) for source in spread)
        dx, dscale, dshards = one_round(part, rows_RD, g_RD, *carry[:2])
        return dx, dscale, jax.tree.map(jnp.add, carry[2], dshards)

    zeros = queue.zeros(x_ND.shape[1], x_ND.dtype), queue.zero_weights()
    carry = one_round(exchange.first, first_RD, first_g_RD, *zeros)
    dx, dscale, dshards = _further_rounds(exchange, queue, further, (x_ND, g_ND), carry)
    with jax.named_scope("combine"):
        return None, queue.collect(dx).astype(x_ND.dtype), queue.collect_weights(dscale), dshards


_run.defvjp(_run_fwd, _run_bwd)


def dispatch(
    x_ND: jax.Array,
    ids_NK: jax.Array,
    scale_NK: jax.Array,
    shards: Any,
    num_experts: int,
    mesh: MeshConfig,
    whole: Whole = (lambda weight: weight,) * 3,
) -> tuple[jax.Array, jax.Array]:
    """sum_k scale_k expert_k(x) with the experts spread over the mesh; for a manual region over `expert`.

    Args:
      x_ND: this device's tokens.  ids_NK: int32 experts of each, distinct; `num_experts` is none.  scale_NK: float32.
      shards: this device's parts of its rank's experts' gate, up and down, [e, ...] each; what
        `kernels.weight.as_weight` takes.
      mesh: `dispatcher`, `buffer_factor` and `overflow` are read.
      whole: makes each weight, as `kernels.swiglu` has them, of its shard (a linear map).
    Returns:
      [N, D] in x's dtype, and the int32 number of pairs that this rank's buffer had no room for (0 unless
      `mesh.overflow` is "drop").
    """
    shards = tuple(map(as_weight, shards))
    ranks, local = axis_size(AXIS), num_experts // axis_size(AXIS)
    tokens, choices = ids_NK.shape
    worst = ranks * tokens * min(choices, local)
    pairs = min(math.ceil(mesh.buffer_factor * tokens * choices), worst)
    first = Round(0, pairs, local, block_for(shards, tokens * choices, local))
    further = first._replace(start=pairs, pairs=math.ceil(pairs / FURTHER))
    exchange = Exchange(whole, first, further, pairs < worst, mesh.overflow == "rounds")
    with jax.named_scope("plan"):
        queue = QUEUES[dispatcher_of(mesh, ranks, choices)](ids_NK, num_experts)
        dropped = jnp.zeros((), jnp.int32) if exchange.rounds else jnp.maximum(queue.counts().sum() - pairs, 0)
    return _run(exchange, queue, x_ND, scale_NK, shards), dropped
