"""The loss of pre-training, as sums and counts, and log-probabilities of tokens.

Legend: B rows, T tokens, D hidden, L MoE layers, E experts.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ling_jax.config import ModelConfig
from ling_jax.kernels.precision import under_own_switches
from ling_jax.model.inputs import checked_batch, known
from ling_jax.model.model import Ling, split_model
from ling_jax.model.router import Routing, replayed
from ling_jax.parallel.context import shift_left
from ling_jax.train.objective import MODEL_FIELDS, Batch, Metrics, logprobs

IGNORE = -100  # a target that is none


class TargetCounts(NamedTuple):
    """float32 scalars: how many targets and MTP targets a batch has."""

    targets: jax.Array
    mtp_targets: jax.Array


class Sums(NamedTuple):
    """float32 scalars summed over a batch, in nats."""

    nll: jax.Array
    mtp_nll: jax.Array


def shift_targets(targets_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """The MTP layer's targets: token t+2 at position t, where it lies in the same document and row."""
    same_BT = segment_ids_BT == shift_left(segment_ids_BT, -1)
    return jnp.where(same_BT, shift_left(targets_BT, IGNORE), IGNORE)


def target_nll(model: Ling, hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """float32 scalar: the summed cross-entropy of all targets that are not IGNORE."""
    return -jnp.where(targets_BT >= 0, logprobs(model, hidden_BTD, targets_BT), 0).sum()


class NextToken(NamedTuple):
    """Cross-entropy of the next token and, with an MTP layer, of the one after it (spec 2.6, 2.9)."""

    config: ModelConfig

    @property
    def fields(self) -> Mapping[str, str]:
        return {**MODEL_FIELDS, "targets": "BT"}

    def counts(self, batch: Batch) -> TargetCounts:
        mtp = shift_targets(batch["targets"], batch["segment_ids"])
        return TargetCounts(*(x.sum(dtype=jnp.float32) for x in (batch["targets"] >= 0, mtp >= 0)))

    def sums(self, model: Ling, batch: Batch, mtp_targets_BT: jax.Array | None = None) -> tuple[Sums, Routing | None]:
        """`mtp_targets_BT` replaces the shifted targets (the reference's own are flawed at row ends, spec 2.6)."""
        out = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
        with jax.named_scope("loss"):
            main = target_nll(model, out.hidden_BTD, batch["targets"])
            mtp = jnp.zeros((), jnp.float32)
            if out.mtp_hidden_BTD is not None:
                if mtp_targets_BT is None:
                    mtp_targets_BT = shift_targets(batch["targets"], batch["segment_ids"])
                mtp = target_nll(model, out.mtp_hidden_BTD, mtp_targets_BT)
        return Sums(main, mtp), out.routing

    def loss(self, sums: Sums, counts: TargetCounts) -> jax.Array:
        """CE + mtp_loss_scaling_factor * MTP CE (spec 2.9), each a mean over the step's targets."""
        loss = sums.nll / jnp.maximum(counts.targets, 1)
        if self.config.num_nextn_predict_layers:
            loss += self.config.mtp_loss_scaling_factor * sums.mtp_nll / jnp.maximum(counts.mtp_targets, 1)
        return loss

    def metrics(self, sums: Sums, counts: TargetCounts) -> Metrics:
        metrics = {"train/loss": sums.nll / jnp.maximum(counts.targets, 1)}
        if self.config.num_nextn_predict_layers:
            metrics["train/mtp_loss"] = sums.mtp_nll / jnp.maximum(counts.mtp_targets, 1)
        return metrics


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
    found = logprobs(model, out.hidden_BTD[:, :-1], tokens_BT[:, 1:])
    same = (segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1]) & (segment_ids_BT[:, 1:] > 0)
    return jnp.where(same, found, 0)


_compiled_logprobs = jax.jit(row_logprobs, static_argnums=0)
