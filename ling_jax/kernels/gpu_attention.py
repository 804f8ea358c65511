"""Flash attention on GPU (FlashAttention-2, arXiv 2307.08691): scores of a tile of queries and a tile of keys at a
time, which never leave the processor.

Arrays stay as they are, tokens before heads: a tile is 128 to 256 bytes of each of its rows. Tiles of keys that no
query of a tile can see, by causality or by the range of their segments, are never read. The backward pass is two
kernels, one for queries and one for keys and values, so that every sum has one writer: no atomics, the same bits each
time.

Legend: B rows, T queries, S keys, H query heads, G kv heads, C head_dim, Q tiles of queries, K tiles of keys.
Lower case t, s, c: a tile of T, of S, and C filled up to a power of two.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ling_jax.kernels import gpu_tiles, work
from ling_jax.kernels.gpu_tiles import SMALLEST, Effort, Span, call, load, store, tile, tiles
from ling_jax.kernels.precision import dot

MASKED = -1e30  # as in `kernels.attention`
LOG2_E, LN_2 = math.log2(math.e), math.log(2)  # processors have powers of two, not of e
NO_QUERY, NO_KEY = -1, -2  # segments past the end of a row: no token's, nor one another's
WIDEST = 256
PROGRAMS = 256  # a GPU has 108 to 148 processors


class Softmax(NamedTuple):
    """The softmax of the keys met so far, for each query of a tile."""

    top_t: jax.Array  # the largest score, times log2(e)
    total_t: jax.Array
    out_tc: jax.Array  # not divided by the total yet


class Job(NamedTuple):
    """The part of a call that its kernels are compiled for."""

    scale: float
    causal: bool
    queries: int  # a tile
    keys: int

    def seen(self, t: Span, s: Span, q_segments_t: jax.Array, kv_segments_s: jax.Array) -> jax.Array:
        """[t, s]: whether each query sees each key."""
        seen_ts = q_segments_t[:, None] == kv_segments_s[None, :]
        return seen_ts & (s.places[None, :] <= t.places[:, None]) if self.causal else seen_ts

    def scores(self, q_tc: jax.Array, k_sc: jax.Array, seen_ts: jax.Array) -> jax.Array:
        """Scores times log2(e); with keys for queries and the other way round, their transpose."""
        return jnp.where(seen_ts, dot(q_tc, k_sc, ((1,), (1,))) * (self.scale * LOG2_E), MASKED)


def takes(q_BTHC: jax.Array, k_BSGC: jax.Array, v_BSGC: jax.Array, *others: jax.Array) -> bool:
    """Whether the kernels can be had, for these dtypes and this width."""
    return gpu_tiles.takes(q_BTHC, k_BSGC, v_BSGC) and q_BTHC.shape[-1] <= WIDEST


def add_keys(so_far: Softmax, scores_ts: jax.Array, v_sc: jax.Array) -> Softmax:
    """The softmax with a tile of keys more."""
    top_t = jnp.maximum(so_far.top_t, scores_ts.max(1))
    weights_ts, kept_t = jnp.exp2(scores_ts - top_t[:, None]), jnp.exp2(so_far.top_t - top_t)
    out_tc = so_far.out_tc * kept_t[:, None] + dot(weights_ts.astype(v_sc.dtype), v_sc, ((1,), (0,)))
    return Softmax(top_t, so_far.total_t * kept_t + weights_ts.sum(1), out_tc)


def finish(softmax: Softmax) -> tuple[jax.Array, jax.Array]:
    """(out [t, c], lse [t]); zeros and MASKED for queries that met no tile of keys."""
    total_t = jnp.where(softmax.total_t == 0, 1, softmax.total_t)
    lse_t = jnp.where(softmax.top_t <= MASKED, MASKED, softmax.top_t * LN_2 + jnp.log(total_t))
    return softmax.out_tc / total_t[:, None], lse_t


def add_query_gradient(
    dq_tc: jax.Array, weights_ts: jax.Array, g_tc: jax.Array, delta_t: jax.Array, k_sc: jax.Array, v_sc: jax.Array
) -> jax.Array:
    """dq, up to the scale, with a tile of keys more."""
    dscores_ts = weights_ts * (dot(g_tc, v_sc, ((1,), (1,))) - delta_t[:, None])
    return dq_tc + dot(dscores_ts.astype(k_sc.dtype), k_sc, ((1,), (0,)))


def add_key_gradients(
    so_far: tuple[jax.Array, jax.Array],
    weights_st: jax.Array,
    g_tc: jax.Array,
    delta_t: jax.Array,
    q_tc: jax.Array,
    v_sc: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(dk, up to the scale, dv) with a tile of queries more."""
    dk_sc, dv_sc = so_far
    dscores_st = weights_st * (dot(v_sc, g_tc, ((1,), (1,))) - delta_t[None, :])
    dk_sc += dot(dscores_st.astype(q_tc.dtype), q_tc, ((1,), (0,)))
    return dk_sc, dv_sc + dot(weights_st.astype(g_tc.dtype), g_tc, ((1,), (0,)))


def _filled(width: int) -> int:
    return max(SMALLEST, 1 << (width - 1).bit_length())


def _width(x_BTHC: Any) -> Span:
    """A head's whole width. Its start is computed, since a constant one may not reach past the end."""
    return Span(jnp.zeros((), jnp.int32), _filled(x_BTHC.shape[-1]), x_BTHC.shape[-1])


def _forward_kernel(
    q_BTHC: Any, k_BSGC: Any, v_BSGC: Any, q_segments_BT: Any, kv_segments_BS: Any, first_BQ: Any, end_BQ: Any,
    out_BTHC: Any, lse_BHT: Any, *, job: Job,
):  # fmt: skip
    """The last tiles of a row come first: under causality they take longest."""
    number, h, b = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1), pl.program_id(2)
    t, c = Span(number * job.queries, job.queries, q_BTHC.shape[1]), _width(q_BTHC)
    g = h // (q_BTHC.shape[2] // k_BSGC.shape[2])
    q_tc, segments_t = load(q_BTHC, b, t, h, c), load(q_segments_BT, b, t, fill=NO_QUERY)

    def add(step, so_far):
        s = Span(step * job.keys, job.keys, k_BSGC.shape[1])
        seen_ts = job.seen(t, s, segments_t, load(kv_segments_BS, b, s, fill=NO_KEY))
        scores_ts = job.scores(q_tc, load(k_BSGC, b, s, g, c), seen_ts)
        return add_keys(so_far, scores_ts, load(v_BSGC, b, s, g, c))

    nothing_t = jnp.zeros(job.queries, jnp.float32)
    nothing = Softmax(nothing_t + MASKED, nothing_t, jnp.zeros((job.queries, c.size), jnp.float32))
    out_tc, lse_t = finish(jax.lax.fori_loop(first_BQ[b, number], end_BQ[b, number], add, nothing))
    store(out_BTHC, out_tc, b, t, h, c)
    store(lse_BHT, lse_t, b, h, t)


def _query_gradient_kernel(
    q_BTHC: Any, k_BSGC: Any, v_BSGC: Any, q_segments_BT: Any, kv_segments_BS: Any, first_BQ: Any, end_BQ: Any,
    g_BTHC: Any, lse_BHT: Any, delta_BHT: Any, dq_BTHC: Any, *, job: Job,
):  # fmt: skip
    number, h, b = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1), pl.program_id(2)
    t, c = Span(number * job.queries, job.queries, q_BTHC.shape[1]), _width(q_BTHC)
    g = h // (q_BTHC.shape[2] // k_BSGC.shape[2])
    q_tc, segments_t = load(q_BTHC, b, t, h, c), load(q_segments_BT, b, t, fill=NO_QUERY)
    g_tc, lse_t, delta_t = load(g_BTHC, b, t, h, c), load(lse_BHT, b, h, t) * LOG2_E, load(delta_BHT, b, h, t)

    def add(step, dq_tc):
        s = Span(step * job.keys, job.keys, k_BSGC.shape[1])
        seen_ts = job.seen(t, s, segments_t, load(kv_segments_BS, b, s, fill=NO_KEY))
        k_sc = load(k_BSGC, b, s, g, c)
        weights_ts = jnp.exp2(job.scores(q_tc, k_sc, seen_ts) - lse_t[:, None])
        return add_query_gradient(dq_tc, weights_ts, g_tc, delta_t, k_sc, load(v_BSGC, b, s, g, c))

    zeros = jnp.zeros((job.queries, c.size), jnp.float32)
    dq_tc = jax.lax.fori_loop(first_BQ[b, number], end_BQ[b, number], add, zeros)
    store(dq_BTHC, dq_tc * job.scale, b, t, h, c)


def _key_gradients_kernel(
    q_BTHC: Any, k_BSGC: Any, v_BSGC: Any, q_segments_BT: Any, kv_segments_BS: Any, first_BK: Any, end_BK: Any,
    g_BTHC: Any, lse_BHT: Any, delta_BHT: Any, dk_BSGC: Any, dv_BSGC: Any, *, job: Job,
):  # fmt: skip
    """Sums over all queries of all heads that share the keys."""
    number, g, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    s, c = Span(number * job.keys, job.keys, k_BSGC.shape[1]), _width(q_BTHC)
    heads = q_BTHC.shape[2] // k_BSGC.shape[2]
    k_sc, v_sc = load(k_BSGC, b, s, g, c), load(v_BSGC, b, s, g, c)
    segments_s = load(kv_segments_BS, b, s, fill=NO_KEY)
    first, end = first_BK[b, number], end_BK[b, number]

    def add_head(head, so_far):
        h = g * heads + head

        def add(step, so_far):
            t = Span(step * job.queries, job.queries, q_BTHC.shape[1])
            seen_ts = job.seen(t, s, load(q_segments_BT, b, t, fill=NO_QUERY), segments_s)
            q_tc, lse_t = load(q_BTHC, b, t, h, c), load(lse_BHT, b, h, t) * LOG2_E
            weights_st = jnp.exp2(job.scores(k_sc, q_tc, seen_ts.T) - lse_t[None, :])
            return add_key_gradients(so_far, weights_st, load(g_BTHC, b, t, h, c), load(delta_BHT, b, h, t), q_tc, v_sc)

        return jax.lax.fori_loop(first, end, add, so_far)

    zeros = jnp.zeros((job.keys, c.size), jnp.float32)
    dk_sc, dv_sc = jax.lax.fori_loop(0, heads, add_head, (zeros, zeros))
    store(dk_BSGC, dk_sc * job.scale, b, s, g, c)
    store(dv_BSGC, dv_sc, b, s, g, c)


def _range(segments_BT: jax.Array, side: int) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest segment of each tile."""
    missing = -segments_BT.shape[1] % side
    filled = jnp.pad(segments_BT, ((0, 0), (0, missing)), mode="edge").reshape(segments_BT.shape[0], -1, side)
    return filled.min(2), filled.max(2)


def _meetings(q_segments_BT: jax.Array, kv_segments_BS: jax.Array, job: Job) -> jax.Array:
    """[B, Q, K]: whether any query of a tile may see any key of another. A bit for 8,192 scores and more."""
    (q_low, q_high), (k_low, k_high) = _range(q_segments_BT, job.queries), _range(kv_segments_BS, job.keys)
    meet_BQK = (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    if not job.causal:
        return meet_BQK
    last_Q = (jnp.arange(q_low.shape[1]) + 1) * job.queries - 1
    return meet_BQK & (jnp.arange(k_low.shape[1]) * job.keys <= last_Q[:, None])


def _turns(meet_BQK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int32 [B, Q]: the first and the end of the tiles K that each tile Q meets; the end is 0 if there is none."""
    places = jnp.arange(meet_BQK.shape[2], dtype=jnp.int32)
    return jnp.where(meet_BQK, places, places.size).min(2), jnp.where(meet_BQK, places + 1, 0).max(2)


def _job(q: jax.Array, scale: float, causal: bool, lengths: tuple[int, int], most: tuple[int, int]) -> Job:
    """Tiles of `most` (queries, keys) for bfloat16 and heads of up to 128; smaller ones for more bytes, and for the
    sums and products of float32, which are held in registers and would spill.

    Args:
      lengths: of queries and keys.
    """
    itemsize = q.dtype.itemsize
    parts = -(-_filled(q.shape[-1]) * itemsize // 256) * (itemsize // 2)
    sides = (tile(length, max(SMALLEST, side // parts)) for length, side in zip(lengths, most, strict=True))
    return Job(scale, causal, *sides)


@partial(jax.jit, static_argnames=("scale", "causal", "interpret"))
def flash(
    q_BTHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGC: jax.Array,
    q_segments_BT: jax.Array,
    kv_segments_BS: jax.Array,
    *,
    scale: float,
    causal: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of `attention.attend`.

    jit only keeps what was traced: the same shapes come back with every layer and every pass.
    """
    batch, length, heads, _ = q_BTHC.shape
    job = _job(q_BTHC, scale, causal, (length, k_BSGC.shape[1]), (128, 64))
    turns = _turns(_meetings(q_segments_BT, kv_segments_BS, job))
    outs = [
        jax.ShapeDtypeStruct(q_BTHC.shape, jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
    ]
    args = (q_BTHC, k_BSGC, v_BSGC, q_segments_BT, kv_segments_BS, *turns)
    with jax.named_scope("causal" if causal else "whole"):
        out_BTHC, lse_BHT = call(
            partial(_forward_kernel, job=job), (tiles(length, job.queries), heads, batch), outs, *args,
            name="gpu_attention", effort=Effort(warps=8, stages=2), interpret=interpret,
        )  # fmt: skip
    return out_BTHC, lse_BHT.swapaxes(1, 2)


@partial(jax.jit, static_argnames=("scale", "causal", "interpret"))
def flash_bwd(
    q_BTHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGC: jax.Array,
    q_segments_BT: jax.Array,
    kv_segments_BS: jax.Array,
    out_BTHC: jax.Array,
    lse_BTH: jax.Array,
    g_BTHC: jax.Array,
    *,
    scale: float,
    causal: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`attention.attend_bwd`."""
    delta_BTH = (g_BTHC.astype(jnp.float32) * out_BTHC.astype(jnp.float32)).sum(-1)
    five = (q_BTHC, k_BSGC, v_BSGC, q_segments_BT, kv_segments_BS)
    rows = (g_BTHC.astype(q_BTHC.dtype), lse_BTH.swapaxes(1, 2), delta_BTH.swapaxes(1, 2))
    of_q, of_kv = (jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q_BTHC, k_BSGC))
    (batch, queries, heads, _), (_, keys, groups, _) = q_BTHC.shape, k_BSGC.shape
    with jax.named_scope("causal" if causal else "whole"):
        job = _job(q_BTHC, scale, causal, (queries, keys), (128, 64))
        turns = _turns(_meetings(q_segments_BT, kv_segments_BS, job))
        [dq_BTHC] = call(
            partial(_query_gradient_kernel, job=job), (tiles(queries, job.queries), heads, batch), [of_q],
            *five, *turns, *rows, name="gpu_attention_q", effort=Effort(warps=8, stages=2), interpret=interpret,
        )  # fmt: skip
        job = _job(q_BTHC, scale, causal, (queries, keys), (64, 128))
        turns = _turns(_meetings(q_segments_BT, kv_segments_BS, job).swapaxes(1, 2))
        dk_BSGC, dv_BSGC = call(
            partial(_key_gradients_kernel, job=job), (tiles(keys, job.keys), groups, batch), [of_kv, of_kv],
            *five, *turns, *rows, name="gpu_attention_kv", effort=Effort(warps=8, stages=2), interpret=interpret,
        )  # fmt: skip
    return dq_BTHC, dk_BSGC, dv_BSGC


def _cached_kernel(
    q_BGRC: Any, k_BSGC: Any, v_BSGC: Any, slots_BR: Any, end_BQ: Any, out_PBGRC: Any, lse_PBGR: Any, *, job: Job
):
    """A part of the keys that a tile of a group's queries sees, of as many parts as there are."""
    groups, splits = k_BSGC.shape[2], out_PBGRC.shape[0]
    number, g = pl.program_id(1) // groups, pl.program_id(1) % groups
    split, b = pl.program_id(0), pl.program_id(2)
    r, c = Span(number * job.queries, job.queries, q_BGRC.shape[2]), _width(q_BGRC)
    q_rc, slots_r = load(q_BGRC, b, g, r, c), load(slots_BR, b, r, fill=-1)

    def add(step, so_far):
        s = Span(step * job.keys, job.keys, k_BSGC.shape[1])
        scores_rs = job.scores(q_rc, load(k_BSGC, b, s, g, c), s.places[None, :] <= slots_r[:, None])
        return add_keys(so_far, scores_rs, load(v_BSGC, b, s, g, c))

    turns = end_BQ[b, number]
    first, end = split * turns // splits, (split + 1) * turns // splits
    nothing_r = jnp.zeros(job.queries, jnp.float32)
    nothing = Softmax(nothing_r + MASKED, nothing_r, jnp.zeros((job.queries, c.size), jnp.float32))
    out_rc, lse_r = finish(jax.lax.fori_loop(first, end, add, nothing))
    store(out_PBGRC, out_rc, split, b, g, r, c)
    store(lse_PBGR, lse_r, split, b, g, r)


@partial(jax.jit, static_argnames=("scale", "interpret"))
def cached(
    q_BTHC: jax.Array, k_BSGC: jax.Array, v_BSGC: jax.Array, slots_BT: jax.Array, *, scale: float, interpret: bool
) -> jax.Array:
    """float32 out of `attention.cached_attention`. Each key is read once for all heads of its group, and none after the
    last slot of a tile's queries. Few rows share their keys out among `PROGRAMS` and their answers are merged."""
    (batch, queries, heads, width), (_, slots, groups, _) = q_BTHC.shape, k_BSGC.shape
    rows = queries * heads // groups  # R: a group's, of one query after another
    q_BGRC = q_BTHC.reshape(batch, queries, groups, -1, width).swapaxes(1, 2).reshape(batch, groups, rows, width)
    slots_BR = jnp.repeat(jnp.minimum(slots_BT, slots - 1), heads // groups, axis=1)
    job = _job(q_BGRC, scale, False, (rows, slots), (64, 64))
    row_tiles = tiles(rows, job.queries)
    splits = min(max(PROGRAMS // (batch * groups * row_tiles), 1), tiles(slots, job.keys))
    end_BQ = _range(slots_BR, job.queries)[1] // job.keys + 1
    outs = [jax.ShapeDtypeStruct((splits, *shape), jnp.float32) for shape in (q_BGRC.shape, q_BGRC.shape[:3])]
    args, grid = (q_BGRC, k_BSGC, v_BSGC, slots_BR, end_BQ), (splits, row_tiles * groups, batch)
    out_PBGRC, lse_PBGR = call(
        partial(_cached_kernel, job=job), grid, outs, *args,
        name="gpu_attention_cached", effort=Effort(warps=4, stages=2), interpret=interpret,
    )  # fmt: skip
    shares = jax.nn.softmax(lse_PBGR, axis=0)[..., None]
    out_BGRC = (out_PBGRC * shares).sum(0)
    return out_BGRC.reshape(batch, groups, queries, -1, width).swapaxes(1, 2).reshape(q_BTHC.shape)


def _cost(call: work.KernelCall, products: int) -> work.Cost:
    """So many matrix products of all scores, 2 B H T S C each; half of them where a query sees no key after it."""
    q, k = [a for a in call.operands if a.ndim == 4][:2]
    batch, queries, heads, width = q.shape
    seen = 0.5 if "causal" in call.scopes else 1.0
    return work.Cost({q.dtype.name: 2.0 * products * batch * heads * queries * k.shape[1] * width * seen})


work.register("gpu_attention|gpu_attention_cached", partial(_cost, products=2))  # scores, values
work.register("gpu_attention_q", partial(_cost, products=3))  # scores, their cotangent, dq
work.register("gpu_attention_kv", partial(_cost, products=4))  # scores, their cotangent, dk, dv
