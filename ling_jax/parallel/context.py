"""Rows cut over the context axis: which tokens a rank holds, what follows them, and attention across ranks.

A row's T tokens are cut in 2c pieces for c ranks; rank i holds pieces i and 2c-1-i (zig-zag). Causality then leaves
every rank the same work: against another rank's two pieces a rank computes two products of pieces, never four.

Legend: B rows, T tokens of a row, t of them here, h = t/2 of a piece, G kv heads, M query heads of each, C head_dim,
c ranks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ling_jax.kernels.attention import MASKED
from ling_jax.kernels.linear import precision_of
from ling_jax.parallel.mesh import axis_index, axis_size

AXIS = "context"


def zigzag_order(tokens: int, shards: int) -> np.ndarray:
    """int [T]: the natural place of each token once the row is in zig-zag order, `shards` equal parts in a line.

    Raises:
      ValueError: if the row cannot be cut in two pieces for each shard.
    """
    if shards == 1:
        return np.arange(tokens)
    if tokens % (2 * shards):
        raise ValueError(
            f"a row of {tokens} tokens must be a multiple of 2 * mesh.context = {2 * shards} long: change either"
        )
    pieces = np.arange(tokens).reshape(2 * shards, -1)
    return np.concatenate([pieces[[i, 2 * shards - 1 - i]].reshape(-1) for i in range(shards)])


def _pieces_of(rank: Any) -> tuple[Any, Any]:
    return rank, 2 * axis_size(AXIS) - 1 - rank


def local_slots(tokens: int) -> jax.Array:
    """int32 [t]: the natural places in their row of the `tokens` that this rank holds."""
    if axis_size(AXIS) == 1:
        return jnp.arange(tokens)
    half = tokens // 2
    return jnp.concatenate([piece * half + jnp.arange(half) for piece in _pieces_of(axis_index(AXIS))])


def shift_left(x_BT: jax.Array, fill: int) -> jax.Array:
    """The value of each token's successor in its row, `fill` for the row's last, also across pieces and ranks."""
    ranks, half = axis_size(AXIS), x_BT.shape[1] // 2
    if ranks == 1:
        return jnp.roll(x_BT, -1, axis=1).at[:, -1].set(fill)
    first_cB2 = jax.lax.all_gather(x_BT[:, jnp.array([0, half])], AXIS)
    order = np.concatenate([first for first in (np.arange(ranks) * 2, np.arange(ranks)[::-1] * 2 + 1)])
    first_PB = first_cB2.transpose(0, 2, 1).reshape(2 * ranks, -1)[order]  # of every piece, in natural order
    first_PB = jnp.concatenate([first_PB, jnp.full_like(first_PB[:1], fill)])
    moved_BT = jnp.roll(x_BT, -1, axis=1)
    early, late = _pieces_of(axis_index(AXIS))
    return moved_BT.at[:, half - 1].set(first_PB[early + 1]).at[:, -1].set(first_PB[late + 1])


class Piece(NamedTuple):
    """Consecutive tokens of each row."""

    segments_Bs: jax.Array  # int32
    slots_s: jax.Array  # int32 natural places
    k_BsGC: jax.Array
    v_BsGC: jax.Array


class Queries(NamedTuple):
    segments_Bh: jax.Array
    slots_h: jax.Array
    q_BhGMC: jax.Array


class Answer(NamedTuple):
    """Attention over the keys met so far."""

    out_BhGMC: jax.Array  # float32
    lse_BGMh: jax.Array  # float32: logarithm of the sum of the exponentiated scores


def _product(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(form, a, b, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)


def _scores(queries: Queries, keys: Piece, scale: float) -> jax.Array:
    """float32 [B, G, M, h, s]."""
    scores = _product("bhgmc,bsgc->bgmhs", queries.q_BhGMC, keys.k_BsGC) * scale
    seen_Bhs = keys.slots_s[None, None, :] <= queries.slots_h[None, :, None]
    seen_Bhs &= keys.segments_Bs[:, None, :] == queries.segments_Bh[:, :, None]
    return jnp.where(seen_Bhs[:, None, None], scores, MASKED)


def _attend(queries: Queries, keys: Piece, scale: float) -> Answer:
    scores = _scores(queries, keys, scale)
    top = scores.max(-1)
    weights = jnp.exp(scores - top[..., None])
    total = weights.sum(-1)
    out = _product("bgmhs,bsgc->bhgmc", weights.astype(keys.v_BsGC.dtype), keys.v_BsGC)
    return Answer(out / total.transpose(0, 3, 1, 2)[..., None], top + jnp.log(total))


def _merge(a: Answer, b: Answer, counts: Any = True) -> Answer:
    """Attention over the keys of both; `b` is left out unless `counts`."""
    b_lse = jnp.where(counts, b.lse_BGMh, MASKED)
    lse = jnp.logaddexp(a.lse_BGMh, b_lse)
    share_a, share_b = (jnp.exp(x - lse).transpose(0, 3, 1, 2)[..., None] for x in (a.lse_BGMh, b_lse))
    return Answer(a.out_BhGMC * share_a + b.out_BhGMC * share_b, lse)


def _attend_bwd(queries, keys, scale, lse_BGMh, g_BhGMC, delta_BhGM):
    """float32 gradients (dq, dk, dv) through the keys' part of the softmax whose sums are in `lse`."""
    weights = jnp.exp(_scores(queries, keys, scale) - lse_BGMh[..., None])
    dweights = _product("bhgmc,bsgc->bgmhs", g_BhGMC, keys.v_BsGC)
    dscores = weights * (dweights - delta_BhGM.transpose(0, 2, 3, 1)[..., None]) * scale
    dscores, weights = (x.astype(g_BhGMC.dtype) for x in (dscores, weights))
    dq = _product("bgmhs,bsgc->bhgmc", dscores, keys.k_BsGC)
    dk = _product("bgmhs,bhgmc->bsgc", dscores, queries.q_BhGMC)
    return dq, dk, _product("bgmhs,bhgmc->bsgc", weights, g_BhGMC)


def _halves(x: jax.Array, axis: int = 1) -> tuple[jax.Array, jax.Array]:
    first, second = jnp.split(x, 2, axis)
    return first, second


def _key_pieces(kv: tuple, rank: Any) -> tuple[Piece, Piece]:
    """Early and late piece of a rank from its (k, v, segments)."""
    k, v, segments = (_halves(x) for x in kv)
    half = segments[0].shape[1]
    early, late = (piece * half + jnp.arange(half) for piece in _pieces_of(rank))
    return Piece(segments[0], early, k[0], v[0]), Piece(segments[1], late, k[1], v[1])


def _query_pieces(q_BtGMC: jax.Array, segments_Bt: jax.Array) -> tuple[Queries, Queries]:
    q, segments, slots = _halves(q_BtGMC), _halves(segments_Bt), _halves(local_slots(q_BtGMC.shape[1]), 0)
    return Queries(segments[0], slots[0], q[0]), Queries(segments[1], slots[1], q[1])


def _choose(condition: jax.Array, a: Any, b: Any) -> Any:
    return jax.tree.map(partial(jnp.where, condition), a, b)


def _visit(method: str, kv: Any, state: Any, dkv: Any, fold: Callable) -> tuple[Any, Any]:
    """`state, part = fold(state, kv_j, j)` for every other rank j; `part`s are summed into j's `dkv`.

    "ring": keys, values and their gradients go round, one neighbour at a time. "all_gather": they are gathered at
    once and the gradients scattered at the end.
    """
    ranks, me = axis_size(AXIS), axis_index(AXIS)
    if method == "ring":
        shift = partial(jax.lax.ppermute, axis_name=AXIS, perm=[(i, (i + 1) % ranks) for i in range(ranks)])

        def step(distance, carry):
            kv, dkv, state = jax.tree.map(shift, carry[0]), jax.tree.map(shift, carry[1]), carry[2]
            state, part = fold(state, kv, (me - distance) % ranks)
            return kv, jax.tree.map(jnp.add, dkv, part), state

        _, dkv, state = jax.lax.fori_loop(1, ranks, step, (kv, dkv, state))
        return state, jax.tree.map(shift, dkv)
    all_kv = jax.lax.all_gather(kv, AXIS)
    all_dkv = jax.tree.map(lambda x: jnp.zeros((ranks, *x.shape), x.dtype).at[me].set(x), dkv)

    def look_up(distance, carry):
        all_dkv, state = carry
        rank = (me - distance) % ranks
        state, part = fold(state, jax.tree.map(lambda x: x[rank], all_kv), rank)
        return jax.tree.map(lambda total, x: total.at[rank].add(x), all_dkv, part), state

    all_dkv, state = jax.lax.fori_loop(1, ranks, look_up, (all_dkv, state))
    return state, jax.tree.map(lambda x: jax.lax.psum_scatter(x, AXIS), all_dkv)


def _forward(q_BtGMC, k_BtGC, v_BtGC, segments_Bt, scale, method) -> Answer:
    me, kv = axis_index(AXIS), (k_BtGC, v_BtGC, segments_Bt)
    q_early, q_late = _query_pieces(q_BtGMC, segments_Bt)
    k_early, k_late = _key_pieces(kv, me)
    late = _merge(_attend(q_late, k_early, scale), _attend(q_late, k_late, scale))

    def fold(state, kv, rank):
        early, late = state
        k_early, k_late = _key_pieces(kv, rank)
        late = _merge(late, _attend(q_late, k_early, scale))
        before = rank < me  # then its early piece is before ours, else its late piece is before our late one
        other = _attend(_choose(before, q_early, q_late), _choose(before, k_early, k_late), scale)
        return (_merge(early, other, before), _merge(late, other, ~before)), None

    (early, late), _ = _visit(method, kv, (_attend(q_early, k_early, scale), late), None, fold)
    return Answer(
        jnp.concatenate([early.out_BhGMC, late.out_BhGMC], axis=1),
        jnp.concatenate([early.lse_BGMh, late.lse_BGMh], axis=3),
    )


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q_BtGMC, k_BtGC, v_BtGC, segments_Bt, scale, method):
    return _forward(q_BtGMC, k_BtGC, v_BtGC, segments_Bt, scale, method).out_BhGMC.astype(q_BtGMC.dtype)


def _attention_fwd(q_BtGMC, k_BtGC, v_BtGC, segments_Bt, scale, method):
    answer = _forward(q_BtGMC, k_BtGC, v_BtGC, segments_Bt, scale, method)
    out = answer.out_BhGMC.astype(q_BtGMC.dtype)
    return out, (q_BtGMC, k_BtGC, v_BtGC, segments_Bt, out, answer.lse_BGMh)


def _attention_bwd(scale, method, saved, g_BtGMC):
    """Goes round once more with the weights recomputed (FlashAttention, arXiv 2205.14135, section 3.1)."""
    q_BtGMC, k_BtGC, v_BtGC, segments_Bt, out_BtGMC, lse_BGMt = saved
    me, kv = axis_index(AXIS), (k_BtGC, v_BtGC, segments_Bt)
    delta_BtGM = (g_BtGMC.astype(jnp.float32) * out_BtGMC.astype(jnp.float32)).sum(-1)
    queries = _query_pieces(q_BtGMC, segments_Bt)
    rest = zip(_halves(lse_BGMt, 3), _halves(g_BtGMC), _halves(delta_BtGM), strict=True)
    early, late = ((mine, *others) for mine, others in zip(queries, rest, strict=True))

    def back(side, keys):
        return _attend_bwd(side[0], keys, scale, *side[1:])

    def joined(a, b):
        return jnp.concatenate([a, b], axis=1)

    k_early, k_late = _key_pieces(kv, me)
    ee, le, ll = back(early, k_early), back(late, k_early), back(late, k_late)
    state = (ee[0], le[0] + ll[0])
    dkv = tuple(joined(ee[i] + le[i], ll[i]) for i in (1, 2))

    def fold(state, kv, rank):
        k_early, k_late = _key_pieces(kv, rank)
        before = rank < me
        le = back(late, k_early)
        dq, dk, dv = back(_choose(before, early, late), _choose(before, k_early, k_late))
        state = (state[0] + jnp.where(before, dq, 0), state[1] + le[0] + jnp.where(before, 0, dq))
        part = (joined(own + jnp.where(before, d, 0), jnp.where(before, 0, d)) for own, d in ((le[1], dk), (le[2], dv)))
        return state, tuple(part)

    state, (dk, dv) = _visit(method, kv, state, dkv, fold)
    return joined(*state).astype(q_BtGMC.dtype), dk.astype(k_BtGC.dtype), dv.astype(v_BtGC.dtype), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def context_attention(
    q_BtHC: jax.Array, k_BtGC: jax.Array, v_BtGC: jax.Array, segments_Bt: jax.Array, *, scale: float, method: str
) -> jax.Array:
    """`kernels.attention.attention` over whole rows, from a manual region over `context` with zig-zag shards.

    Args:
      q_BtHC, k_BtGC, v_BtGC: this rank's tokens, H a multiple of G.  segments_Bt: int32 documents.
      method: "ring" (keys and values pass from neighbour to neighbour) or "all_gather".
    Returns:
      [B, t, H, C] in q's dtype. Each score matrix is [t/2, t/2]; none is kept for the backward pass.
    """
    groups = k_BtGC.shape[2]
    q_BtGMC = q_BtHC.reshape(*q_BtHC.shape[:2], groups, -1, q_BtHC.shape[3])
    return _attention(q_BtGMC, k_BtGC, v_BtGC, segments_Bt, scale, method).reshape(q_BtHC.shape)
