"""The seam between what is optimised and what optimises: an objective is a value that the training step is handed.

A step never sees a loss as such. An objective gives sums over a batch and counts of it, the step divides once, so that
neither microbatches nor a mesh can change a number. `train.loss.NextToken` is the objective of pre-training.

Inside `Objective.sums` a device holds some rows and, where `mesh.context` is more than 1, pieces of their tokens. What
it returns is its own share: over all devices the shares add up to the batch's sums. A sum over tokens is such a share
as it stands. A value of a whole document is not, if a nonlinearity comes after its sum: see `document_sums`.

Legend: B rows, T tokens of a row, D hidden, S documents of a row, L MoE layers, E experts.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ling_jax.config import ModelConfig, routed_layers
from ling_jax.kernels.cross_entropy import target_logprobs, target_logprobs_and_entropy
from ling_jax.model.model import Ling
from ling_jax.model.router import Routing
from ling_jax.parallel.mesh import axis_size, psum

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

MODEL_FIELDS = {"tokens": "BT", "positions": "BT", "segment_ids": "BT"}  # int32; every batch has what a model is given


class Objective(Protocol):
    """An objective: the loss that a training run optimises, and the arrays that its batches hold.

    `sums` and `counts` are pytrees of arrays of the objective's own choice.
    """

    @property
    def fields(self) -> Mapping[str, str]:
        """The dims of every array of a batch by name: MODEL_FIELDS and the objective's own.

        One letter each. B, which no array is without, is dealt over the mesh and over microbatches; T is cut over
        `mesh.context`; a dim of any other letter is whole on each device. "BT" has a value for each token, "B" for each
        row, "LBTK" is a routing to replay.
        """
        ...

    def counts(self, batch: Batch) -> Any:
        """The counts that sums are divided by, of a step's whole batch; runs outside the manual region, on rows in
        their order."""
        ...

    def sums(self, model: Ling, batch: Batch) -> tuple[Any, Routing | None]:
        """This device's share of the sums over one microbatch, and the routing of the model's call."""
        ...

    def loss(self, sums: Any, counts: Any) -> jax.Array:
        """float32 scalar, linear in `sums`: added over microbatches and devices, it is the step's loss."""
        ...

    def metrics(self, sums: Any, counts: Any) -> Metrics:
        """The metrics that a step logs, from the sums over its whole batch; `train/loss` is what progress shows."""
        ...


def check_fields(fields: Mapping[str, str]) -> None:
    """ValueError for an array that has no rows or twice the same dim, or for MODEL_FIELDS that are not all there."""
    for name, dims in fields.items():
        if "B" not in dims or len(set(dims)) < len(dims):
            raise ValueError(f"field {name!r} has the dims {dims!r}: one must be B, and each a letter of its own")
    if wrong := [name for name, dims in MODEL_FIELDS.items() if fields.get(name) != dims]:
        raise ValueError(f"fields lack {', '.join(wrong)}: a batch has {MODEL_FIELDS}, whatever else it has")


def check_batch(batch: Mapping[str, Any], fields: Mapping[str, str], rows: int) -> None:
    """ValueError for a batch that has not just the arrays of `fields`, or not `rows` rows in each."""
    if batch.keys() != fields.keys():
        raise ValueError(f"a batch has {', '.join(sorted(batch))}, the objective takes {', '.join(sorted(fields))}")
    for name, dims in fields.items():
        shape = batch[name].shape
        if len(shape) != len(dims) or shape[dims.index("B")] != rows:
            raise ValueError(f"{name} has the shape {list(shape)}; its dims are {dims}, with B = {rows} rows here")


class RouterSums(NamedTuple):
    """The sums over the routers that every objective's step makes."""

    z: jax.Array  # float32 []: logsumexp(router logits)^2, over tokens and MoE layers
    expert_counts_LE: jax.Array  # int32
    dropped: jax.Array  # int32 [] token-expert pairs left out by the dispatch


class StepSums(NamedTuple):
    objective: Any
    router: RouterSums


class StepCounts(NamedTuple):
    objective: Any
    tokens: jax.Array  # float32 [], padding left out
    microbatches: jax.Array | None = None  # int32 [], those that are not padding alone; None: all are computed


def step_sums(objective: Objective, model: Ling, batch: Batch) -> StepSums:
    """This device's share of all that a step sums over one microbatch."""
    sums, routing = objective.sums(model, batch)
    return StepSums(sums, _router_sums(routing, model.config))


def _router_sums(routing: Routing | None, config: ModelConfig) -> RouterSums:
    if routing is None:
        no_counts_LE = jnp.zeros((0, config.num_experts), jnp.int32)
        return RouterSums(jnp.zeros((), jnp.float32), no_counts_LE, jnp.zeros((), jnp.int32))
    idle = routed_layers(config, mtp=True) - routing.counts.shape[0]  # an MTP layer that did not run
    counts_LE = jnp.pad(routing.counts, [(0, idle), (0, 0)]) if idle else routing.counts
    return RouterSums(routing.z_sum.sum(), counts_LE, routing.dropped.sum())


def step_counts(objective: Objective, batch: Batch) -> StepCounts:
    """All that a step counts of its whole batch, whose rows are in their order."""
    return StepCounts(objective.counts(batch), (batch["segment_ids"] > 0).sum(dtype=jnp.float32))


def total_loss(objective: Objective, sums: StepSums, counts: StepCounts, z_loss_coefficient: float = 0.0) -> jax.Array:
    """The objective's loss and z_loss_coefficient times the routers' z term (spec 2.9), a mean over the step's tokens,
    so that summing this over microbatches gives the step's loss."""
    loss = objective.loss(sums.objective, counts.objective)
    if z_loss_coefficient:
        loss += z_loss_coefficient * sums.router.z / jnp.maximum(counts.tokens, 1)
    return loss


# What objectives are made of.


def logprobs(model: Ling, hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """float32 [B, T]: log-probability of a target at each place, chunked over the vocabulary, differentiable.

    Args:
      hidden_BTD: `Hidden.hidden_BTD` or `Hidden.mtp_hidden_BTD` of a call of `model`.
      targets_BT: int32 ids; the value of a place without one (`train.loss.IGNORE`) has no meaning: mask it.
    """
    flat_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    logprobs_N = target_logprobs(flat_ND, *model.head(flat_ND.dtype), targets_BT.reshape(-1), vocab_axis())
    return logprobs_N.reshape(targets_BT.shape)


def logprobs_and_entropy(model: Ling, hidden_BTD: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`logprobs`, and the entropy of the whole distribution at each place, in nats: float32 [B, T] both."""
    flat_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    both = target_logprobs_and_entropy(flat_ND, *model.head(flat_ND.dtype), targets_BT.reshape(-1), vocab_axis())
    logprobs_N, entropy_N = both
    return logprobs_N.reshape(targets_BT.shape), entropy_N.reshape(targets_BT.shape)


def vocab_axis() -> str | None:
    """The mesh axis over which the vocabulary is split, inside a manual region; None where it is whole."""
    return "tensor" if axis_size("tensor") > 1 else None


def document_sums(values_BT: jax.Array, segment_ids_BT: jax.Array, documents: int) -> jax.Array:
    """[B, S]: the sum of the values of each document 1 to `documents` of each row, wherever its tokens are.

    Every device that holds a piece of the row gets the whole document's sum. What is made of it is therefore no share:
    a sum of such values goes through `document_share`.
    """
    mine_BTS = segment_ids_BT[:, :, None] == jnp.arange(1, documents + 1)
    return psum(jnp.where(mine_BTS, values_BT[:, :, None], 0).sum(1), "context")


def document_share(value: jax.Array) -> jax.Array:
    """This device's share of what all devices that hold pieces of the same rows have computed alike."""
    return value / axis_size("context")
