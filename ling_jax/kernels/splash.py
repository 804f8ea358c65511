"""The splash attention kernels that JAX ships for TPU, as `kernels.attention` needs them: with the sums of a softmax
going out of the forward pass and, over perhaps more keys than these, into the backward pass.

Legend: B rows, T queries, S keys, H query heads, G kv heads, C head_dim.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

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


def _segments(q_segments_BT, kv_segments_BS) -> kernels.SegmentIds:
    return kernels.SegmentIds(q=_fill(q_segments_BT, PADDED), kv=_fill(kv_segments_BS, PADDED))


def _kernel(q_BHTC, k_BGSC, causal: bool, interpret: bool) -> kernels.SplashAttentionKernel:
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
def splash(q_BTHC, k_BSGC, v_BSGC, q_segments_BT, kv_segments_BS, *, scale, causal, interpret):
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
    q_BTHC, k_BSGC, v_BSGC, q_segments_BT, kv_segments_BS, out_BTHC, lse_BTH, g_BTHC, *, scale, causal, interpret
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
