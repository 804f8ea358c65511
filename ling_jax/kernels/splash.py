"""The splash attention kernels that JAX ships for TPU, as `kernels.attention` needs them: with the sums of a softmax
going out of the forward pass and, over perhaps more keys than these, into the backward pass.

Legend: B rows, T queries, S keys, H query heads, G kv heads, C head_dim.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from ling_jax.kernels import work
from ling_jax.kernels.precision import kernel_precision

TILE = 128
BLOCKS = (512, 384, 256, 128)
PADDED = -1  # segment of what only fills a tile: no token's, so no token sees it


def _block(length: int) -> int:
    """Rows or keys per block: the largest of BLOCKS that divides. 512 x 512 scores keep the matrix unit busy while the
    next keys arrive (512 FLOPs a byte in bfloat16), fit VMEM in float32, and waste an eighth of a causal row of 4096
    at its diagonal."""
    return next(size for size in BLOCKS if length % size == 0)


def _fill(x: jax.Array, value: int = 0) -> jax.Array:
    """[B, T, ...] with T in whole tiles; no copy where it is."""
    missing = -x.shape[1] % TILE
    if not missing:
        return x
    return jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)], constant_values=value)


def _heads_first(x_BTHC: jax.Array) -> jax.Array:
    return _fill(x_BTHC).swapaxes(1, 2)


def _tokens_first(x_BHTC: jax.Array, length: int) -> jax.Array:
    """float32 [B, `length`, H, C]."""
    return x_BHTC.swapaxes(1, 2)[:, :length].astype(jnp.float32)


def _segments(q_segments_BT: jax.Array, kv_segments_BS: jax.Array) -> kernels.SegmentIds:
    return kernels.SegmentIds(q=_fill(q_segments_BT, PADDED), kv=_fill(kv_segments_BS, PADDED))


def _kernel(q_BHTC: jax.Array, k_BGSC: jax.Array, causal: bool, interpret: bool) -> kernels.SplashAttentionKernel:
    (heads, queries), keys = q_BHTC.shape[1:3], k_BGSC.shape[2]
    mask = masks.CausalMask((queries, queries)) if causal else masks.FullMask((queries, keys))
    q, kv = _block(queries), _block(keys)
    # Two backward kernels: one that does both writes a dq for each block of keys, which is memory of T x S / 512.
    blocks = kernels.BlockSizes(
        block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv,
        block_kv_dkv_compute=kv,
    )  # fmt: skip
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        save_residuals=True,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


@partial(jax.jit, static_argnames=("scale", "causal", "interpret"))
def splash(
    q_BTHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGC: jax.Array,
    q_segments_BT: jax.Array,
    kv_segments_BS: jax.Array,
    *,
    scale: float,
    causal: bool,
    interpret: bool,
):
    """(out, lse) of `attention.attend`; T and S are padded to whole tiles. The lse of a query that sees no key is
    hugely negative.

    jit only keeps what was traced: the same shapes come back with every layer and every pass.
    """
    q_BHTC, k_BGSC, v_BGSC = _heads_first(q_BTHC * scale), _heads_first(k_BSGC), _heads_first(v_BSGC)
    kernel = _kernel(q_BHTC, k_BGSC, causal, interpret)
    with kernel_precision(q_BTHC.dtype), jax.named_scope("causal" if causal else "whole"):
        out_BHTC, (lse_BHT,) = jax.vmap(kernel)(q_BHTC, k_BGSC, v_BGSC, _segments(q_segments_BT, kv_segments_BS))
    length = q_BTHC.shape[1]
    return _tokens_first(out_BHTC, length), _tokens_first(lse_BHT, length)


@partial(jax.jit, static_argnames=("scale", "causal", "interpret"))
def splash_bwd(
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
):
    """`attention.attend_bwd`."""
    q_BHTC, k_BGSC, v_BGSC = _heads_first(q_BTHC * scale), _heads_first(k_BSGC), _heads_first(v_BSGC)
    out_BHTC, lse_BHT, g_BHTC = (_heads_first(x) for x in (out_BTHC, lse_BTH, g_BTHC))
    kernel = _kernel(q_BHTC, k_BGSC, causal, interpret)

    def backward(q, k, v, segments, out, lse, g):
        saved = (q, k, v, segments, None, out, lse, kernel.dq_mask_info, kernel.dkv_mask_info)
        return kernels._splash_attention_bwd(**kernel.kwargs, res=saved, do=g)[3:6]

    with kernel_precision(q_BTHC.dtype), jax.named_scope("causal" if causal else "whole"):
        segments = _segments(q_segments_BT, kv_segments_BS)
        dq, dk, dv = jax.vmap(backward)(q_BHTC, k_BGSC, v_BGSC, segments, out_BHTC, lse_BHT, g_BHTC)
    queries, keys = q_BTHC.shape[1], k_BSGC.shape[1]
    return _tokens_first(dq, queries) * scale, _tokens_first(dk, keys), _tokens_first(dv, keys)


def _cost(call: work.KernelCall, products: int) -> work.Cost:
    """So many matrix products of all scores, 2 H T S C each; half of them where a query sees no key after it."""
    q, k = [a for a in call.operands if a.ndim >= 2 and a.dtype.kind != "i"][:2]
    *heads, queries, width = q.shape
    seen = 0.5 if "causal" in call.scopes else 1.0
    return work.Cost({q.dtype.name: 2.0 * products * math.prod(heads) * queries * k.shape[-2] * width * seen})


work.register(".*_fwd.*", partial(_cost, products=2))  # scores, values
work.register(".*_dkv.*", partial(_cost, products=4))  # scores, their cotangent, dk, dv
work.register(".*_dq.*", partial(_cost, products=3))  # scores, their cotangent, dq
