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


def _chunk(queries: int) -> int:
    """Queries per chunk: an eighth of the row in whole 128s, at most QUERY_CHUNK."""
    return min(max(queries // 8 // 128, 1) * 128, QUERY_CHUNK)


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
    same_row: bool = False,
) -> jax.Array:
    """Softmax attention of each query over the keys of its own segment at its own or an earlier slot.

    Slots are places in the row (or in the cache), not RoPE positions. Scores and softmax are float32
    (spec 2.3). Queries go in chunks, recomputed in the backward pass where there are more than 1024, so that
    memory grows with S and not with T x S.

    Args:
      same_row: keys are the queries' own tokens in slot order, so no chunk needs keys after its end: half
        of the products fall away.
    Returns:
      [B, T, H, C] in q's dtype.
    """
    queries = q_BTHC.shape[1]
    size = _chunk(queries)
    attend = jax.checkpoint(_attend, static_argnums=(7,)) if queries > QUERY_CHUNK else _attend
    parts = []
    for start in range(0, queries, size):
        mine = slice(start, min(start + size, queries))
        seen = slice(0, mine.stop if same_row else None)
        q = q_BTHC[:, mine], q_slots_BT[:, mine], q_segments_BT[:, mine]
        kv = k_BSGC[:, seen], v_BSGC[:, seen], kv_slots_BS[:, seen], kv_segments_BS[:, seen]
        parts.append(attend(q[0], kv[0], kv[1], q[1], kv[2], q[2], kv[3], scale))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
