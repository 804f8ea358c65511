"""Log-probabilities of target tokens without ever holding the logits.

Legend: N tokens, D hidden, V vocabulary, c a chunk of it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ling_jax.kernels.precision import dot

VOCAB_CHUNK = 4096


def _chunks(vocab: int) -> tuple[int, int]:
    """(number of equal chunks, width of each) that cover all but a tail narrower than one chunk. Whole tiles: with
    chunks of 4030 rows XLA took a minute longer to compile Ling's head for a TPU."""
    width = min(vocab, VOCAB_CHUNK)
    return vocab // width, width


def _scan_vocab(w_VD: jax.Array, step: Any, carry: Any):
    """Runs step(carry, w_cD, first id) over the vocabulary; stacks what it returns back to V rows."""
    count, width = _chunks(w_VD.shape[0])
    main = count * width
    xs = (w_VD[:main].reshape(count, width, -1), jnp.arange(count) * width)
    carry, ys = jax.lax.scan(lambda c, x: step(c, *x), carry, xs)
    ys = None if ys is None else ys.reshape(main, -1)
    if main < w_VD.shape[0]:
        carry, tail = step(carry, w_VD[main:], main)
        ys = None if ys is None else jnp.concatenate([ys, tail])
    return carry, ys


@partial(jax.custom_vjp, nondiff_argnums=(2, 4))
def target_logprobs(
    x_ND: jax.Array,
    w_VD: jax.Array,
    whole_rows: Callable[[jax.Array], jax.Array],
    targets_N: jax.Array,
    vocab_axis: str | None = None,
) -> jax.Array:
    """log softmax(x w^T)[target] for each token, chunked over the vocabulary.

    Args:
      x_ND: hidden states.  w_VD: the head, or a device's shard of it, whose rows
      whole_rows: makes whole [c, D], chunk by chunk; they are cast to x's dtype.
      targets_N: int32 ids; an id outside the vocabulary (-100 for "none") gives minus the logsumexp: mask such tokens.
      vocab_axis: the mesh axis of a manual region over whose devices the vocabulary is split, in order.
    Returns:
      float32 [N]. The backward pass recomputes the logits chunk by chunk.
    """
    return _forward(x_ND, w_VD, whole_rows, targets_N, vocab_axis)[0]


def _local_targets(targets_N: jax.Array, w_VD: jax.Array, vocab_axis: str | None):
    return targets_N if vocab_axis is None else targets_N - jax.lax.axis_index(vocab_axis) * w_VD.shape[0]


@partial(jax.custom_vjp, nondiff_argnums=(2, 4))
def target_logprobs_and_entropy(
    x_ND: jax.Array,
    w_VD: jax.Array,
    whole_rows: Callable[[jax.Array], jax.Array],
    targets_N: jax.Array,
    vocab_axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`target_logprobs`, and the entropy of softmax(x w^T) in nats: float32 [N] both, chunked and differentiable."""
    return _fwd_with_entropy(x_ND, w_VD, whole_rows, targets_N, vocab_axis)[0]


def target_scores(
    x_ND: jax.Array,
    w_VD: jax.Array,
    whole_rows: Callable[[jax.Array], jax.Array],
    targets_N: jax.Array,
    vocab_axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(float32 [N], bool [N]): `target_logprobs`, and whether no token is likelier than the target."""
    swept = _sweep(x_ND, w_VD, whole_rows, targets_N, vocab_axis)
    return swept.picked_N - swept.lse_N, swept.picked_N >= swept.top_N


def _forward(x_ND: jax.Array, w_VD: jax.Array, whole_rows: Any, targets_N: jax.Array, vocab_axis: str | None):
    swept = _sweep(x_ND, w_VD, whole_rows, targets_N, vocab_axis)
    return swept.picked_N - swept.lse_N, swept.lse_N


class _Swept(NamedTuple):
    """The sums that one pass over the vocabulary gives: float32 [N] each."""

    picked_N: jax.Array  # the targets' logits
    lse_N: jax.Array  # the logsumexps
    top_N: jax.Array  # the largest logits
    means: list[jax.Array]  # one, the logits' mean under the softmax, where it is asked for


def _sweep(
    x_ND: jax.Array, w_VD: jax.Array, whole_rows: Any, targets_N: jax.Array, vocab_axis: str | None, mean: bool = False
) -> _Swept:
    targets_N = _local_targets(targets_N, w_VD, vocab_axis)

    def step(carry, w_cD, start):
        top_N, total_N, picked_N, weighted = carry
        logits_Nc = dot(x_ND, whole_rows(w_cD).astype(x_ND.dtype), ((1,), (1,)))
        new_top_N = jnp.maximum(top_N, logits_Nc.max(axis=1))
        total_N = total_N * jnp.exp(top_N - new_top_N) + jnp.exp(logits_Nc - new_top_N[:, None]).sum(axis=1)
        weighted = [
            sum_N * jnp.exp(top_N - new_top_N) + (jnp.exp(logits_Nc - new_top_N[:, None]) * logits_Nc).sum(axis=1)
            for sum_N in weighted
        ]
        at_N = targets_N - start
        hit_N = (at_N >= 0) & (at_N < w_cD.shape[0])
        picked_N += jnp.where(hit_N, jnp.take_along_axis(logits_Nc, jnp.where(hit_N, at_N, 0)[:, None], 1)[:, 0], 0)
        return (new_top_N, total_N, picked_N, weighted), None

    zeros_N = jnp.zeros(x_ND.shape[0], jnp.float32)
    start = zeros_N - jnp.inf, zeros_N, zeros_N, [zeros_N] * mean
    (top_N, total_N, picked_N, weighted), _ = _scan_vocab(w_VD, step, start)
    if vocab_axis is not None:
        whole_top_N = jax.lax.pmax(top_N, vocab_axis)
        shrink_N = jnp.exp(top_N - whole_top_N)
        parts = total_N * shrink_N, picked_N, [sum_N * shrink_N for sum_N in weighted]
        top_N, (total_N, picked_N, weighted) = whole_top_N, jax.lax.psum(parts, vocab_axis)
    return _Swept(picked_N, top_N + jnp.log(total_N), top_N, [sum_N / total_N for sum_N in weighted])


def _fwd(x_ND: jax.Array, w_VD: jax.Array, whole_rows: Any, targets_N: jax.Array, vocab_axis: str | None):
    logprobs_N, lse_N = _forward(x_ND, w_VD, whole_rows, targets_N, vocab_axis)
    return logprobs_N, (x_ND, w_VD, targets_N, lse_N)


def _bwd(whole_rows: Any, vocab_axis: str | None, saved: Any, g_N: jax.Array):
    return _backward(whole_rows, vocab_axis, saved, g_N)


def _fwd_with_entropy(x_ND: jax.Array, w_VD: jax.Array, whole_rows: Any, targets_N: jax.Array, vocab_axis: str | None):
    swept = _sweep(x_ND, w_VD, whole_rows, targets_N, vocab_axis, mean=True)
    [mean_N] = swept.means
    return (swept.picked_N - swept.lse_N, swept.lse_N - mean_N), ((x_ND, w_VD, targets_N, swept.lse_N), mean_N)


def _bwd_with_entropy(whole_rows: Any, vocab_axis: str | None, saved: Any, g: jax.Array):
    saved, mean_N = saved
    logprobs_g_N, entropy_g_N = g
    return _backward(whole_rows, vocab_axis, saved, logprobs_g_N, (entropy_g_N, mean_N))


def _backward(
    whole_rows: Any,
    vocab_axis: str | None,
    saved: Any,
    g_N: jax.Array,
    entropy: tuple[jax.Array, jax.Array] | None = None,
):
    """Gradients of x and w, from those of the log-probabilities; `entropy`: those of the entropies, and the logits'
    means."""
    x_ND, w_VD, targets_N, lse_N = saved
    targets_N = _local_targets(targets_N, w_VD, vocab_axis)
    if vocab_axis is not None:
        g_N = jax.lax.psum(g_N, vocab_axis)  # every device's objective has its share of each logprob
        entropy = entropy and (jax.lax.psum(entropy[0], vocab_axis), entropy[1])

    # Logits lie across: no product then contracts the first dim of a large operand, which CPUs are slow at.
    def step(dx_DN, w_cD, start):
        whole_cD, shard_of = jax.vjp(whole_rows, w_cD)
        whole_cD = whole_cD.astype(x_ND.dtype)
        logits_cN = dot(whole_cD, x_ND, ((1,), (1,)))
        hit_cN = targets_N == start + jnp.arange(w_cD.shape[0])[:, None]
        share_cN = jnp.exp(logits_cN - lse_N)
        dlogits_cN = (hit_cN - share_cN) * g_N
        if entropy is not None:
            entropy_g_N, mean_N = entropy
            dlogits_cN -= share_cN * (logits_cN - mean_N) * entropy_g_N
        dlogits_cN = dlogits_cN.astype(x_ND.dtype)
        dw_cD = dot(dlogits_cN, x_ND, ((1,), (0,))).astype(w_VD.dtype)
        return dx_DN + dot(whole_cD, dlogits_cN, ((0,), (0,))), shard_of(dw_cD)[0]

    dx_DN, dw_VD = _scan_vocab(w_VD, step, jnp.zeros(x_ND.shape[::-1], jnp.float32))
    return dx_DN.T.astype(x_ND.dtype), dw_VD, None


target_logprobs.defvjp(_fwd, _bwd)
target_logprobs_and_entropy.defvjp(_fwd_with_entropy, _bwd_with_entropy)
