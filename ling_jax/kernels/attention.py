"""Causal attention inside segments, with grouped key/value heads.

Legend: B rows, T queries, S keys, H query heads, G kv heads, M = H/G, C head_dim.
"""

import jax
import jax.numpy as jnp

from ling_jax.kernels.linear import precision_of

QUERY_CHUNK = 1024
MASKED = -1e30  # finite: a fully masked row (padding) gives a mean, not NaN


def _attend(q_BTHC, k_BSGC, v_BSGC, q_slots_BT, kv_slots_BS, q_segments_BT, kv_segments_BS, scale):
    batch, queries, heads, width = q_BTHC.shape
    groups = k_BSGC.shape[2]
    precision = precision_of(q_BTHC.dtype)
    q_BTGMC = q_BTHC.reshape(batch, queries, groups, heads // groups, width)
    scores = jnp.einsum("btgmc,bsgc->bgmts", q_BTGMC, k_BSGC, precision=precision, preferred_element_type=jnp.float32)
    seen_BTS = kv_slots_BS[:, None, :] <= q_slots_BT[:, :, None]
    seen_BTS &= kv_segments_BS[:, None, :] == q_segments_BT[:, :, None]
    scores = jnp.where(seen_BTS[:, None, None], scores * scale, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSGC.dtype)
    out = jnp.einsum("bgmts,bsgc->btgmc", weights, v_BSGC, precision=precision, preferred_element_type=jnp.float32)
    return out.reshape(q_BTHC.shape).astype(q_BTHC.dtype)


def attention(
    q_BTHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGC: jax.Array,
    *,
    q_slots_BT: jax.Array,
    kv_slots_BS: jax.Array,
    q_segments_BT: jax.Array,
    kv_segments_BS: jax.Array,
    scale: float,
) -> jax.Array:
    """Softmax attention of each query over the keys of its own segment at its own or an earlier slot.

    Slots are places in the row (or in the cache), not RoPE positions. Scores and softmax are float32
    (spec 2.3); more than 1024 queries go in chunks, recomputed in the backward pass, so that memory
    grows with S and not with T x S.

    Returns:
      [B, T, H, C] in q's dtype.
    """
    queries = q_BTHC.shape[1]
    if queries <= QUERY_CHUNK:
        return _attend(q_BTHC, k_BSGC, v_BSGC, q_slots_BT, kv_slots_BS, q_segments_BT, kv_segments_BS, scale)

    @jax.checkpoint
    def chunk(q, slots, segments):
        return _attend(q, k_BSGC, v_BSGC, slots, kv_slots_BS, segments, kv_segments_BS, scale)

    whole = queries - queries % QUERY_CHUNK

    def cut(a):  # [B, T, ...] -> [chunks, B, QUERY_CHUNK, ...]
        return a[:, :whole].reshape(a.shape[0], -1, QUERY_CHUNK, *a.shape[2:]).swapaxes(0, 1)

    parts = jax.lax.map(lambda args: chunk(*args), (cut(q_BTHC), cut(q_slots_BT), cut(q_segments_BT)))
    out = parts.swapaxes(0, 1).reshape(q_BTHC.shape[0], whole, *q_BTHC.shape[2:])
    if whole == queries:
        return out
    return jnp.concatenate([out, chunk(q_BTHC[:, whole:], q_slots_BT[:, whole:], q_segments_BT[:, whole:])], axis=1)
