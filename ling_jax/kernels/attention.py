"""Causal attention inside segments, with grouped key/value heads.

`attend` and `attend_bwd` are one block of queries over one block of keys; whole rows and rows cut over devices
(`parallel.context`) are made of them.

Legend: B rows, T queries, t of a chunk, S keys, H query heads, G kv heads, M = H/G, R = M*t, C head_dim.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ling_jax.kernels import gpu_attention, native
from ling_jax.kernels.choose import Kernel, pallas
from ling_jax.kernels.precision import precision_of
from ling_jax.kernels.splash import splash, splash_bwd

QUERY_CHUNK = 1024
MASKED = -1e30  # finite: a row that sees no key gives a mean, not NaN


class PartialAttention(NamedTuple):
    """Attention over some keys, to be merged with that over others."""

    out_BTHC: jax.Array  # float32
    lse_BTH: jax.Array  # float32: logarithm of the sum of the exponentiated scores


Gradients = tuple[jax.Array, jax.Array, jax.Array]


def _product(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(form, a, b, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)


def _rows(x_BtHC: jax.Array, groups: int) -> jax.Array:
    """[B, G, R, C]: the t queries of a group's M heads under one another. On CPU products of such plain matrices take
    half the time of those over [B, t, G, M, C]."""
    batch, queries, _, width = x_BtHC.shape
    return x_BtHC.reshape(batch, queries, groups, -1, width).transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, width)


def _unrows(x_BGRC: jax.Array, queries: int) -> jax.Array:
    batch, groups, _, width = x_BGRC.shape
    x_BtGMC = x_BGRC.reshape(batch, groups, -1, queries, width).transpose(0, 3, 1, 2, 4)
    return x_BtGMC.reshape(batch, queries, -1, width)


def _scores(q_BGRC: jax.Array, k_BGSC: jax.Array, seen_BtS: jax.Array, scale: float):
    """float32 [B, G, R, S]."""
    repeats = q_BGRC.shape[2] // seen_BtS.shape[1]
    seen_B1RS = jnp.tile(seen_BtS, (1, repeats, 1))[:, None]
    return jnp.where(seen_B1RS, _product("bgrc,bgsc->bgrs", q_BGRC, k_BGSC) * scale, MASKED)


def _answer(
    q_BtHC: jax.Array, k_BGSC: jax.Array, v_BGSC: jax.Array, seen_BtS: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """The fields of an Answer; a query that sees no key gets the mean of all values."""
    scores = _scores(_rows(q_BtHC, k_BGSC.shape[1]), k_BGSC, seen_BtS, scale)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = _product("bgrs,bgsc->bgrc", weights.astype(v_BGSC.dtype), v_BGSC) / total
    queries = q_BtHC.shape[1]
    return _unrows(out, queries), _unrows(top + jnp.log(total), queries)[..., 0]


def _gradients(
    q_BtHC: jax.Array,
    k_BGSC: jax.Array,
    v_BGSC: jax.Array,
    seen_BtS: jax.Array,
    lse_BtH: jax.Array,
    delta_BtH: jax.Array,
    g_BtHC: jax.Array,
    scale: float,
) -> Gradients:
    """dq [B, t, H, C], dk and dv [B, G, S, C]."""
    q, lse, delta, g = (_rows(x, k_BGSC.shape[1]) for x in (q_BtHC, lse_BtH[..., None], delta_BtH[..., None], g_BtHC))
    weights = jnp.exp(_scores(q, k_BGSC, seen_BtS, scale) - lse)
    dscores = weights * (_product("bgrc,bgsc->bgrs", g, v_BGSC) - delta) * scale
    dscores, weights = dscores.astype(q.dtype), weights.astype(q.dtype)
    dq_BtHC = _unrows(_product("bgrs,bgsc->bgrc", dscores, k_BGSC), q_BtHC.shape[1])
    return dq_BtHC, _product("bgrs,bgrc->bgsc", dscores, q), _product("bgrs,bgrc->bgsc", weights, g)


def _chunks(queries: int) -> list[slice]:
    """Queries in chunks of an eighth of the row in whole 128s, at most QUERY_CHUNK."""
    size = min(max(queries // 8 // 128, 1) * 128, QUERY_CHUNK)
    return [slice(start, min(start + size, queries)) for start in range(0, queries, size)]


def _seen(q_segments_BT: jax.Array, kv_segments_BS: jax.Array, mine: slice, causal: bool) -> tuple[slice, jax.Array]:
    """The keys that a chunk of queries can need, and whether each query sees each of them."""
    keys = slice(0, mine.stop if causal else None)
    seen_BtS = kv_segments_BS[:, None, keys] == q_segments_BT[:, mine, None]
    if causal:
        seen_BtS &= jnp.arange(mine.stop) <= jnp.arange(mine.start, mine.stop)[:, None]
    return keys, seen_BtS


def _xla(
    q_BTHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGC: jax.Array,
    q_segments_BT: jax.Array,
    kv_segments_BS: jax.Array,
    *,
    scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """In chunks of queries, so that memory grows with S and not with T x S."""
    k_BGSC, v_BGSC = k_BSGC.swapaxes(1, 2), v_BSGC.swapaxes(1, 2)
    parts = []
    for mine in _chunks(q_BTHC.shape[1]):
        keys, seen_BtS = _seen(q_segments_BT, kv_segments_BS, mine, causal)
        parts.append(_answer(q_BTHC[:, mine], k_BGSC[:, :, keys], v_BGSC[:, :, keys], seen_BtS, scale))
    out, lse = (jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    return out, lse


def _xla_bwd(
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
) -> Gradients:
    k_BGSC, v_BGSC = k_BSGC.swapaxes(1, 2), v_BSGC.swapaxes(1, 2)
    delta_BTH = (g_BTHC.astype(jnp.float32) * out_BTHC.astype(jnp.float32)).sum(-1)
    dq, dk, dv = [], jnp.zeros(k_BGSC.shape, jnp.float32), jnp.zeros(v_BGSC.shape, jnp.float32)
    for mine in _chunks(q_BTHC.shape[1]):
        keys, seen_BtS = _seen(q_segments_BT, kv_segments_BS, mine, causal)
        rows = lse_BTH[:, mine], delta_BTH[:, mine], g_BTHC[:, mine]
        part = _gradients(q_BTHC[:, mine], k_BGSC[:, :, keys], v_BGSC[:, :, keys], seen_BtS, *rows, scale)
        dq.append(part[0])
        dk, dv = dk.at[:, :, keys].add(part[1]), dv.at[:, :, keys].add(part[2])
    return jnp.concatenate(dq, axis=1), dk.swapaxes(1, 2), dv.swapaxes(1, 2)


_native = native.or_else("attention", native.attention, _xla)
_native_bwd = native.or_else("attention_gradients", native.attention_gradients, _xla_bwd)


def _in_cpp(*args: jax.Array, **static: Any) -> tuple[jax.Array, jax.Array]:
    return (_native if _known(*args) else _xla)(*args, **static)


def _in_cpp_bwd(*args: jax.Array, **static: Any) -> Gradients:
    return (_native_bwd if _known(*args) else _xla_bwd)(*args, **static)


def _known(q: jax.Array, k: jax.Array, v: jax.Array, *others: jax.Array) -> bool:
    return q.dtype in native.DTYPES and q.dtype == k.dtype == v.dtype


def _triton(*args: jax.Array, interpret: bool, **static: Any) -> tuple[jax.Array, jax.Array]:
    kernel = partial(gpu_attention.flash, interpret=interpret) if gpu_attention.takes(*args) else _xla
    return kernel(*args, **static)


def _triton_bwd(*args: jax.Array, interpret: bool, **static: Any) -> Gradients:
    kernel = partial(gpu_attention.flash_bwd, interpret=interpret) if gpu_attention.takes(*args) else _xla_bwd
    return kernel(*args, **static)


_FORWARD = Kernel(
    cpu=_in_cpp,
    tpu=partial(splash, interpret=False),
    nvidia=partial(_triton, interpret=False),
    rest=_xla,
    named={
        "native": Kernel(cpu=_in_cpp, rest=_xla),
        "splash": pallas(splash),
        "triton": pallas(_triton),
        "xla": _xla,
    },
)
_BACKWARD = Kernel(
    cpu=_in_cpp_bwd,
    tpu=partial(splash_bwd, interpret=False),
    nvidia=partial(_triton_bwd, interpret=False),
    rest=_xla_bwd,
    named={
        "native": Kernel(cpu=_in_cpp_bwd, rest=_xla_bwd),
        "splash": pallas(splash_bwd),
        "triton": pallas(_triton_bwd),
        "xla": _xla_bwd,
    },
)


def attend(
    q_BTHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGC: jax.Array,
    q_segments_BT: jax.Array,
    kv_segments_BS: jax.Array,
    *,
    scale: float,
    causal: bool,
    implementation: str = "auto",
) -> PartialAttention:
    """Softmax attention of each query over those of the given keys that are of its segment (spec 2.3).

    Scores and softmax are float32. Not differentiable: see `attend_bwd`.

    Args:
      q_segments_BT, kv_segments_BS: int32, not negative.
      causal: queries and keys are the same tokens, and a query sees none after its own; else it sees all.
      implementation: "native" (C++, for CPU; "xla" where it cannot be built), "splash" (Pallas, for TPU) and "triton"
        (Pallas, for NVIDIA GPUs), both interpreted on CPU, "xla" (for the rest) or "auto".
    Returns:
      A query that sees no key has out 0 and an lse of MASKED, which counts for nothing in a merge.
    """
    args = (q_BTHC, k_BSGC, v_BSGC, q_segments_BT, kv_segments_BS)
    answer = PartialAttention(*_FORWARD(*args, implementation=implementation, scale=scale, causal=causal))
    if causal:
        return answer  # each query sees itself
    lonely_BTH = answer.lse_BTH < MASKED / 2
    return PartialAttention(
        jnp.where(lonely_BTH[..., None], 0, answer.out_BTHC), jnp.where(lonely_BTH, MASKED, answer.lse_BTH)
    )


def attend_bwd(
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
    implementation: str = "auto",
) -> Gradients:
    """float32 (dq, dk, dv) through these keys' part of a softmax over perhaps more of them, with the weights computed
    anew (FlashAttention, arXiv 2205.14135, section 3.1).

    Args:
      out_BTHC, lse_BTH: attention over all keys, these and others.  g_BTHC: the cotangent of `out`.
      The rest as `attend` took it.
    """
    lse_BTH = jnp.where(lse_BTH < MASKED / 2, 0, lse_BTH)  # weights of 0, not of 1, where no key is seen
    args = (q_BTHC, k_BSGC, v_BSGC, q_segments_BT, kv_segments_BS, out_BTHC, lse_BTH, g_BTHC)
    return _BACKWARD(*args, implementation=implementation, scale=scale, causal=causal)


def keep(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`arrays`, by the name that `train.remat` save_attention keeps: with them no kernel runs twice."""
    return tuple(checkpoint_name(x, "attention") for x in arrays)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attention(
    q_BTHC: jax.Array,
    k_BTGC: jax.Array,
    v_BTGC: jax.Array,
    segments_BT: jax.Array,
    scale: float,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention of each token over its own segment up to itself, differentiable; arguments as in `attend`.

    Returns:
      [B, T, H, C] in q's dtype.
    """
    return _attention_fwd(q_BTHC, k_BTGC, v_BTGC, segments_BT, scale, implementation)[0]


def _attention_fwd(
    q_BTHC: jax.Array, k_BTGC: jax.Array, v_BTGC: jax.Array, segments_BT: jax.Array, scale: float, implementation: str
):
    args = (q_BTHC, k_BTGC, v_BTGC, segments_BT, segments_BT)
    answer = attend(*args, scale=scale, causal=True, implementation=implementation)
    out_BTHC, lse_BTH = keep(answer.out_BTHC.astype(q_BTHC.dtype), answer.lse_BTH)
    return out_BTHC, (*args, out_BTHC, lse_BTH)


def _attention_bwd(scale: float, implementation: str, saved: Any, g_BTHC: jax.Array):
    q_BTHC, k_BTGC, v_BTGC, q_segments_BT, kv_segments_BT, out_BTHC, lse_BTH = saved
    dq, dk, dv = attend_bwd(
        q_BTHC, k_BTGC, v_BTGC, q_segments_BT, kv_segments_BT, out_BTHC, lse_BTH, g_BTHC,
        scale=scale, causal=True, implementation=implementation,
    )  # fmt: skip
    return dq.astype(q_BTHC.dtype), dk.astype(k_BTGC.dtype), dv.astype(v_BTGC.dtype), None


attention.defvjp(_attention_fwd, _attention_bwd)


def _cached(
    q_BTHC: jax.Array, k_LBSGC: jax.Array, v_LBSGC: jax.Array, layer: jax.Array, slots_BT: jax.Array, *, scale: float
) -> jax.Array:
    k_BGSC, v_BGSC = (_of_layer(a, layer).swapaxes(1, 2) for a in (k_LBSGC, v_LBSGC))
    parts = []
    for mine in _chunks(q_BTHC.shape[1]):
        seen_BtS = jnp.arange(k_BGSC.shape[2]) <= slots_BT[:, mine, None]
        parts.append(_answer(q_BTHC[:, mine], k_BGSC, v_BGSC, seen_BtS, scale)[0])
    return jnp.concatenate(parts, axis=1)


def _of_layer(stack_LBSGC: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack_LBSGC, layer, keepdims=False)


def _cached_triton(
    q_BTHC: jax.Array,
    k_LBSGC: jax.Array,
    v_LBSGC: jax.Array,
    layer: jax.Array,
    slots_BT: jax.Array,
    *,
    scale: float,
    interpret: bool,
) -> jax.Array:
    k_BSGC, v_BSGC = _of_layer(k_LBSGC, layer), _of_layer(v_LBSGC, layer)
    if not gpu_attention.takes(q_BTHC, k_BSGC, v_BSGC):
        return _cached(q_BTHC, k_LBSGC, v_LBSGC, layer, slots_BT, scale=scale)
    return gpu_attention.cached(q_BTHC, k_BSGC, v_BSGC, slots_BT, scale=scale, interpret=interpret)


_cached_native = native.or_else("cached_attention", native.cached_attention, _cached)


def _cached_in_cpp(*args: jax.Array, scale: float) -> jax.Array:
    return (_cached_native if _known(*args) else _cached)(*args, scale=scale)


_CACHED = Kernel(
    cpu=_cached_in_cpp,
    nvidia=partial(_cached_triton, interpret=False),
    rest=_cached,
    named={
        "native": Kernel(cpu=_cached_in_cpp, rest=_cached),
        "triton": pallas(_cached_triton),
        "xla": _cached,
    },
)


def cached_attention(
    q_BTHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGC: jax.Array,
    slots_BT: jax.Array,
    scale: float,
    implementation: str = "auto",
    *,
    layer: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of each query over the keys at its own and all earlier slots of its row of a cache.

    Scores and softmax are float32. Differentiable as "xla" only.

    Args:
      slots_BT: int32, not negative.
      layer: int32 []; with it k and v hold many layers, [L, B, S, G, C], and this one's are read where they lie: cut
        out for a kernel they would be copied.
      implementation: "native" (C++, for CPU; "xla" where it cannot be built), "triton" (Pallas, for NVIDIA GPUs;
        interpreted on CPU), "xla" (for the rest) or "auto".
    Returns:
      [B, T, H, C] in q's dtype.
    """
    if layer is None:
        k_BSGC, v_BSGC, layer = k_BSGC[None], v_BSGC[None], jnp.zeros((), jnp.int32)
    args = q_BTHC, k_BSGC, v_BSGC, layer, slots_BT
    return _CACHED(*args, implementation=implementation, scale=scale).astype(q_BTHC.dtype)
