"""Rows cut over the context axis: which tokens a rank holds, what follows them, and attention across ranks, softmax and
linear.

A row's T tokens are cut in 2c pieces for c ranks; rank i holds pieces i and 2c-1-i (zig-zag). Causality then leaves
every rank the same work: against another rank's two pieces a rank computes two products of pieces, never four.

Legend: B rows, T tokens of a row, t of them here, H query heads, G kv heads, C head_dim, c ranks, P = 2c pieces.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ling_jax.kernels.attention import MASKED, PartialAttention, attend, attend_bwd, keep
from ling_jax.kernels.lightning import added_state, lightning
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


def _natural_order(ranks: int) -> np.ndarray:
    """int [P]: where each piece of a row is among all ranks' two, rank by rank."""
    return np.concatenate([np.arange(ranks) * 2, np.arange(ranks)[::-1] * 2 + 1])


def _pieces_of(rank: Any) -> tuple[Any, Any]:
    return rank, 2 * axis_size(AXIS) - 1 - rank


def shift_left(x_BT: jax.Array, fill: int) -> jax.Array:
    """The value of each token's successor in its row, `fill` for the row's last, also across pieces and ranks."""
    ranks, half = axis_size(AXIS), x_BT.shape[1] // 2
    if ranks == 1:
        return jnp.roll(x_BT, -1, axis=1).at[:, -1].set(fill)
    first_PB = jax.lax.all_gather(x_BT[:, jnp.array([0, half])].T, AXIS, tiled=True)[_natural_order(ranks)]
    first_PB = jnp.concatenate([first_PB, jnp.full_like(first_PB[:1], fill)])
    moved_BT = jnp.roll(x_BT, -1, axis=1)
    early, late = _pieces_of(axis_index(AXIS))
    return moved_BT.at[:, half - 1].set(first_PB[early + 1]).at[:, -1].set(first_PB[late + 1])


def _merge(a: PartialAttention, b: PartialAttention, counts: Any = True) -> PartialAttention:
    """Attention over the keys of both; `b` is left out unless `counts`."""
    b_lse = jnp.where(counts, b.lse_BTH, MASKED)
    lse = jnp.logaddexp(a.lse_BTH, b_lse)
    share_a, share_b = (jnp.exp(x - lse)[..., None] for x in (a.lse_BTH, b_lse))
    return PartialAttention(a.out_BTHC * share_a + b.out_BTHC * share_b, lse)


def _pieces(*arrays: jax.Array) -> tuple[tuple, tuple]:
    """The early and the late piece of each [B, t, ...]."""
    early, late = zip(*(jnp.split(x, 2, axis=1) for x in arrays), strict=True)
    return early, late


def _join(early: Any, late: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), early, late)


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


def _forward(q_BtHC, k_BtGC, v_BtGC, segments_Bt, scale, method, implementation) -> PartialAttention:
    me, kv = axis_index(AXIS), (k_BtGC, v_BtGC, segments_Bt)

    def product(queries, keys, causal=False):
        args = queries[0], keys[0], keys[1], queries[1], keys[2]
        return attend(*args, scale=scale, causal=causal, implementation=implementation)

    q_early, q_late = _pieces(q_BtHC, segments_Bt)
    k_early, k_late = _pieces(*kv)
    home = product(q_early, k_early, True), _merge(product(q_late, k_late, True), product(q_late, k_early))

    def fold(state, kv, rank):
        early, late = state
        k_early, k_late = _pieces(*kv)
        late = _merge(late, product(q_late, k_early))
        before = rank < me  # then its early piece is before ours, else its late piece is before our late one
        other = product(_choose(before, q_early, q_late), _choose(before, k_early, k_late))
        return (_merge(early, other, before), _merge(late, other, ~before)), None

    state, _ = _visit(method, kv, home, None, fold)
    return _join(*state)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def context_attention(
    q_BtHC: jax.Array,
    k_BtGC: jax.Array,
    v_BtGC: jax.Array,
    segments_Bt: jax.Array,
    scale: float,
    method: str,
    implementation: str = "auto",
) -> jax.Array:
    """`kernels.attention.attention` over whole rows, from a manual region over `context` with zig-zag shards.

    Args:
      q_BtHC, k_BtGC, v_BtGC: this rank's tokens, H a multiple of G.  segments_Bt: int32 documents.
      method: "ring" (keys and values pass from neighbour to neighbour) or "all_gather".
      implementation: of each product of pieces, see `kernels.attention.attend`.
    Returns:
      [B, t, H, C] in q's dtype. No product is larger than [t/2, t/2]; no score is kept for the backward pass.
    """
    return _attention_fwd(q_BtHC, k_BtGC, v_BtGC, segments_Bt, scale, method, implementation)[0]


def _attention_fwd(q_BtHC, k_BtGC, v_BtGC, segments_Bt, scale, method, implementation):
    answer = _forward(q_BtHC, k_BtGC, v_BtGC, segments_Bt, scale, method, implementation)
    out_BtHC, lse_BtH = keep(answer.out_BTHC.astype(q_BtHC.dtype), answer.lse_BTH)
    return out_BtHC, (q_BtHC, k_BtGC, v_BtGC, segments_Bt, out_BtHC, lse_BtH)


def _attention_bwd(scale, method, implementation, saved, g_BtHC):
    """Goes round once more; each product of pieces gives its part of the gradients."""
    q_BtHC, k_BtGC, v_BtGC, segments_Bt, out_BtHC, lse_BtH = saved
    me, kv = axis_index(AXIS), (k_BtGC, v_BtGC, segments_Bt)

    def back(queries, keys, causal=False):
        args = queries[0], keys[0], keys[1], queries[1], keys[2], *queries[2:]
        return attend_bwd(*args, scale=scale, causal=causal, implementation=implementation)

    q_early, q_late = _pieces(q_BtHC, segments_Bt, out_BtHC, lse_BtH, g_BtHC)
    k_early, k_late = _pieces(*kv)
    ee, le, ll = back(q_early, k_early, True), back(q_late, k_early), back(q_late, k_late, True)
    dq = ee[0], le[0] + ll[0]
    dkv = tuple(_join(ee[i] + le[i], ll[i]) for i in (1, 2))

    def fold(dq, kv, rank):
        k_early, k_late = _pieces(*kv)
        before = rank < me
        le = back(q_late, k_early)
        other = back(_choose(before, q_early, q_late), _choose(before, k_early, k_late))
        nothing = jax.tree.map(jnp.zeros_like, other)
        early, late = _choose(before, other, nothing), _choose(before, nothing, other)
        part = tuple(_join(le[i] + early[i], late[i]) for i in (1, 2))
        return (dq[0] + early[0], dq[1] + le[0] + late[0]), part

    dq, (dk, dv) = _visit(method, kv, dq, dkv, fold)
    return _join(*dq).astype(q_BtHC.dtype), dk.astype(k_BtGC.dtype), dv.astype(v_BtGC.dtype), None


context_attention.defvjp(_attention_fwd, _attention_bwd)


# Linear attention.


class _Ends(NamedTuple):
    """The facts about pieces that are needed to carry states over them, int32 [P, B]."""

    first: jax.Array  # the document of the first token that is no padding, 0 if there is none
    last: jax.Array  # and of the last
    tokens: jax.Array  # that are no padding

    @classmethod
    def of(cls, segments_PBt: jax.Array) -> "_Ends":
        valid = segments_PBt > 0
        places = jnp.arange(valid.shape[-1])
        ends = jnp.argmax(valid, -1), jnp.argmax(jnp.where(valid, places, -1), -1)
        first, last = (jnp.take_along_axis(segments_PBt, at[..., None], -1)[..., 0] for at in ends)
        return cls(first, last, valid.sum(-1, dtype=jnp.int32))


def _states_before(added_PBHCC: jax.Array, ends: _Ends, slopes_H: jax.Array) -> jax.Array:
    """float32 [P, B, H, C, C]: the state before each piece of its first document, of what every piece adds to the state
    of its last one."""
    after_PB = jnp.cumsum(ends.tokens, axis=0)
    steps_PPB = (after_PB - ends.tokens)[:, None] - after_PB[None]
    order = np.arange(len(added_PBHCC))
    earlier_PP1 = jnp.asarray(order[:, None] > order[None])[..., None]
    same_PPB = earlier_PP1 & (ends.first[:, None] == ends.last[None]) & (ends.first[:, None] > 0)
    weights_PPBH = jnp.exp(-slopes_H * jnp.maximum(steps_PPB, 0)[..., None]) * same_PPB[..., None]
    return jnp.einsum("nmbh,mbhcd->nbhcd", weights_PPBH, added_PBHCC, precision=jax.lax.Precision.HIGHEST)


def context_lightning(
    q_BtHC: jax.Array, k_BtHC: jax.Array, v_BtHC: jax.Array, slopes_H: jax.Array, segments_Bt: jax.Array, scale: float
) -> jax.Array:
    """`kernels.lightning.lightning` over whole rows, from a manual region over `context` with zig-zag shards.

    What each piece adds to its state goes to the rank that has its heads, of all pieces; there the states before the
    pieces are summed up, and go back. H must be a multiple of the ranks.

    Returns:
      float32 [B, t, H, C], 0 at padding.
    """
    ranks, rows = axis_size(AXIS), q_BtHC.shape[0]
    order = _natural_order(ranks)
    q, k, v, segments = (jnp.concatenate(jnp.split(x, 2, axis=1)) for x in (q_BtHC, k_BtHC, v_BtHC, segments_Bt))
    added = added_state(k, v, slopes_H, segments)
    added_2BHCC = added.reshape(2, rows, *added.shape[1:])
    ends = _Ends.of(segments.reshape(2, rows, -1))
    ends = jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, tiled=True)[order], ends)
    with jax.named_scope("exchange_states"):
        all_PBHCC = jax.lax.all_to_all(added_2BHCC, AXIS, split_axis=2, concat_axis=0, tiled=True)[order]
        mine_H = slopes_H.reshape(ranks, -1)[axis_index(AXIS)]
        before = _states_before(all_PBHCC, ends, mine_H)[np.argsort(order)]
        before = jax.lax.all_to_all(before, AXIS, split_axis=0, concat_axis=2, tiled=True)
    out, _ = lightning(q, k, v, slopes_H, segments, before.reshape(added.shape), scale)
    return jnp.concatenate(jnp.split(out, 2), axis=1)
