"""Losses as sums and counts, never means: accumulation and sharding cannot change them.

Legend: B rows, T tokens, D hidden, L MoE layers, E experts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ling_jax.config import ModelConfig
from ling_jax.kernels.cross_entropy import target_logprobs
from ling_jax.kernels.precision import under_own_switches
from ling_jax.model.inputs import checked_batch, known
from ling_jax.model.model import Ling, split_model
from ling_jax.model.router import replayed
from ling_jax.parallel.context import shift_left
from ling_jax.parallel.mesh import axis_size

IGNORE = -100  # a target that is none

Batch = dict[str, jax.Array]  # tokens, targets, positions, segment_ids: int32 [B, T]


class Counts(NamedTuple):
    """float32 scalars: how many targets, MTP targets and (non-padding) tokens a batch has."""

    targets: jax.Array
    mtp_targets: jax.Array
    tokens: jax.Array


class Sums(NamedTuple):
    """float32 scalars summed over a batch, in nats; and the experts' token counts."""

    nll: jax.Array
    mtp_nll: jax.Array
    z: jax.Array  # of logsumexp(router logits)^2, over tokens and MoE layers
    expert_counts_LE: jax.Array  # int32
    dropped: jax.Array  # int32 [] token-expert pairs left out by the dispatch


def shift_targets(targets_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """The MTP layer's targets: token t+2 at position t, where it lies in the same document and row."""
    same_BT = segment_ids_BT == shift_left(segment_ids_BT, -1)
    return jnp.where(same_BT, shift_left(targets_BT, IGNORE), IGNORE)


def count_targets(batch: Batch) -> Counts:
    """Counts over all dims of `batch`, microbatches included."""
    rows = {k: v.reshape(-1, v.shape[-1]) for k, v in batch.items()}
    mtp = shift_targets(rows["targets"], rows["segment_ids"])
    return Counts(*(x.sum(dtype=jnp.float32) for x in (rows["targets"] >= 0, mtp >= 0, rows["segment_ids"] > 0)))


def _logprobs(model: Ling, hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    flat_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    vocab_axis = "tensor" if axis_size("tensor") > 1 else None
    logprobs_N = target_logprobs(flat_ND, *model.head(flat_ND.dtype), targets_BT.reshape(-1), vocab_axis)
    return logprobs_N.reshape(targets_BT.shape)


def loss_sums(model: Ling, batch: Batch, mtp_targets_BT: jax.Array | None = None) -> Sums:
    """Cross-entropy of the next token, of the one after it (MTP, spec 2.6) and the router's z term.

    `mtp_targets_BT` replaces the shifted targets (the reference's own are flawed at row ends, spec 2.6).
    """
    out = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
    targets_BT = batch["targets"]

    def nll(hidden_BTD, targets_BT):
        return -jnp.where(targets_BT >= 0, _logprobs(model, hidden_BTD, targets_BT), 0).sum()

    with jax.named_scope("loss"):
        main = nll(out.hidden_BTD, targets_BT)
        mtp = jnp.zeros((), jnp.float32)
        if out.mtp_hidden_BTD is not None:
            if mtp_targets_BT is None:
                mtp_targets_BT = shift_targets(targets_BT, batch["segment_ids"])
            mtp = nll(out.mtp_hidden_BTD, mtp_targets_BT)
    if out.routing is None:
        no_counts_LE = jnp.zeros((0, model.config.num_experts), jnp.int32)
        return Sums(main, mtp, jnp.zeros((), jnp.float32), no_counts_LE, jnp.zeros((), jnp.int32))
    return Sums(main, mtp, out.routing.z_sum.sum(), out.routing.counts, out.routing.dropped.sum())


def total_loss(sums: Sums, counts: Counts, config: ModelConfig, z_loss_coefficient: float = 0.0) -> jax.Array:
    """CE + mtp_loss_scaling_factor * MTP CE + z_loss_coefficient * z (spec 2.9), each a mean over the
    counts of the whole step, so that summing this over microbatches gives the step's loss."""
    loss = sums.nll / jnp.maximum(counts.targets, 1)
    if config.num_nextn_predict_layers:
        loss += config.mtp_loss_scaling_factor * sums.mtp_nll / jnp.maximum(counts.mtp_targets, 1)
    if z_loss_coefficient:
        loss += z_loss_coefficient * sums.z / jnp.maximum(counts.tokens, 1)
    return loss


@under_own_switches
def token_logprobs(
    model: Ling,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    *,
    routing_ids: jax.Array | None = None,
) -> jax.Array:
    """float32 [B, T-1]: log-probability of each token after the first given those before it.

    Chunked over the vocabulary, differentiable; compiled once for each number of rows and each of few lengths, to which
    shorter rows are padded; the MTP layer does not run. Arguments as in `Ling.hidden`, lists taken too. Where the next
    token is of another document, or padding, the value is 0.

    Raises:
      ValueError: for tokens that are no [B, T] of ids of the vocabulary, or more than the model has positions.
    """
    inputs = checked_batch(model.config, tokens_BT, positions_BT, segment_ids_BT)
    graph, params, bias = split_model(model)
    if jax.sharding.get_abstract_mesh().manual_axes:  # of a program over a mesh, where rows may be in pieces
        return row_logprobs(graph, params, bias, *inputs, routing_ids)
    tokens, positions, segments = inputs
    length = tokens.shape[1]
    segments = np.ones(tokens.shape, np.int32) if segments is None else segments
    padded = [None if x is None else _pad(x, bucket(length), 1) for x in (tokens, positions, segments)]
    ids = None if routing_ids is None else replayed(routing_ids, model.config, tokens.shape, mtp=False)
    ids = None if ids is None else _pad(ids, bucket(length), 2, -1)
    return _compiled_logprobs(graph, params, bias, *padded, ids)[:, : length - 1]


def _pad(array: Any, length: int, axis: int, value: int = 0) -> Any:
    """An array of which one dim is `length`, by padding at its end; on the host where its values are known."""
    widths = [(0, length - size if dim == axis else 0) for dim, size in enumerate(array.shape)]
    pad, array = (np.pad, jax.device_get(array)) if known(array) else (jnp.pad, array)
    return pad(array, widths, constant_values=value)


def bucket(length: int) -> int:
    """The next number of 16, 24, 32, 48, 64, 96, ...: lengths that are padded to these are few, and half longer at
    most."""
    whole = max(1 << (length - 1).bit_length(), 16)
    return whole * 3 // 4 if length <= whole * 3 // 4 and whole > 16 else whole


def row_logprobs(graph, params, bias, tokens_BT, positions_BT, segment_ids_BT, routing_ids) -> jax.Array:
    """`token_logprobs` of a model that has been split, for a program to be compiled of."""
    model: Ling = nnx.merge(graph, params, bias)
    tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones_like(tokens_BT)
    out = model.hidden(tokens_BT, positions_BT, segment_ids_BT, routing_ids=routing_ids, mtp=False)
    logprobs = _logprobs(model, out.hidden_BTD[:, :-1], tokens_BT[:, 1:])
    same = (segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1]) & (segment_ids_BT[:, 1:] > 0)
    return jnp.where(same, logprobs, 0)


_compiled_logprobs = jax.jit(row_logprobs, static_argnums=0)
