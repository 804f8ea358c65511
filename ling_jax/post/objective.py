"""One policy objective over units of an answer: tokens (PPO, GRPO, DAPO), sentences (LPO) or whole answers (GSPO).

A unit has one importance ratio, the exponential of the mean log-ratio of its tokens. It enters straight through: its
value is the unit's, its gradient each token's own. So a token that is left out (weight 0) gets no gradient from its
unit, and where weights are equal inside a unit the gradient is that of the unit's ratio itself.

The host decides all that is divided by, and gives each token a weight; here everything is only summed. So neither
microbatches, nor packing, nor a mesh can change a result.

Legend: B rows, T tokens, U units of a row, L MoE layers, K experts per token.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ling_jax.model.model import Ling
from ling_jax.model.router import Routing
from ling_jax.parallel.mesh import axis_size, psum
from ling_jax.train.objective import MODEL_FIELDS, Batch, Metrics, logprobs_and_entropy


class PolicySums(NamedTuple):
    """float32 scalars over a batch.

    Attributes:
      policy: weight * min(ratio * advantage, clipped ratio * advantage).
      reference: weight * KL to the reference, by the estimator k3 (Schulman 2020).
      clipped_low, clipped_high: tokens whose ratio is below or above the bounds, where that stops the gradient.
      drift, drift_squared: log-ratios to the old policy, and their squares.
      entropy: of each token's whole distribution, in nats.
    """

    policy: jax.Array
    reference: jax.Array
    clipped_low: jax.Array
    clipped_high: jax.Array
    drift: jax.Array
    drift_squared: jax.Array
    entropy: jax.Array


def unit_means(values_BT: jax.Array, units_BT: jax.Array) -> jax.Array:
    """[B, T]: the mean of the values over each token's unit, wherever in the row its tokens are; 0 outside of units.

    Args:
      units_BT: int32, a unit's number in its row, from 1 to T; 0 for tokens of none.
    """
    rows, tokens = units_BT.shape
    most = tokens * axis_size("context") + 1
    row_BT = jnp.broadcast_to(jnp.arange(rows)[:, None], units_BT.shape)
    both = jnp.stack([values_BT, jnp.ones_like(values_BT)], -1)
    sums_BU2 = psum(jnp.zeros((rows, most, 2), both.dtype).at[row_BT, units_BT].add(both), "context")
    means_BU = sums_BU2[..., 0] / jnp.maximum(sums_BU2[..., 1], 1)
    return jnp.where(units_BT > 0, means_BU[row_BT, units_BT], 0)


def unit_ratios(logprobs_BT: jax.Array, old_BT: jax.Array, units_BT: jax.Array) -> jax.Array:
    """[B, T]: each token's ratio: the value of its unit's, and the gradient of its own; 1 outside of units."""
    drawn_BT = units_BT > 0
    logs_BT = jnp.where(drawn_BT, logprobs_BT - old_BT, 0)
    own_BT = jnp.exp(logs_BT - jax.lax.stop_gradient(logs_BT))  # 1, with the gradient of the log-probability
    return jax.lax.stop_gradient(jnp.exp(unit_means(logs_BT, units_BT))) * own_BT


def k3(logprobs_BT: jax.Array, reference_BT: jax.Array) -> jax.Array:
    """[B, T]: an unbiased estimate of the KL to the reference that is never negative."""
    logs_BT = reference_BT - logprobs_BT
    return jnp.exp(logs_BT) - logs_BT - 1


class PolicyObjective(NamedTuple):
    """The clipped policy objective (LPO: Ling 2.0 report, section 4.2.2), with a KL to a reference policy.

    Attributes:
      low, high: how far a ratio may be below and above 1; infinite: it is not clipped.
      kl: the weight of the KL to the reference; 0: batches have no reference.
      temperature: answers were drawn at; logits are divided by it.
      replay: answers run through the experts that they were drawn with.
    """

    low: float
    high: float
    kl: float = 0.0
    temperature: float = 1.0
    replay: bool = False

    @property
    def fields(self) -> Mapping[str, str]:
        """Each value is of the token that a place predicts: `units`, 0 for what was not drawn; `weights`, which hold
        the whole normalisation; `advantages`; `old` and `reference`, log-probabilities."""
        fields = {**MODEL_FIELDS, **dict.fromkeys(("targets", "units", "weights", "advantages", "old"), "BT")}
        fields |= {"reference": "BT"} if self.kl else {}
        return fields | ({"routing_ids": "LBTK"} if self.replay else {})

    def counts(self, batch: Batch) -> jax.Array:
        """float32 scalar: tokens that were drawn."""
        return (batch["units"] > 0).sum(dtype=jnp.float32)

    def values(self, model: Ling, batch: Batch) -> tuple[jax.Array, jax.Array, Routing | None]:
        """float32 [B, T] log-probabilities and entropies of the tokens that places predict, at the temperature."""
        inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
        out = model.hidden(*inputs, routing_ids=batch.get("routing_ids"), mtp=False)
        hidden_BTD = out.hidden_BTD if self.temperature == 1 else out.hidden_BTD / self.temperature
        with jax.named_scope("loss"):
            return *logprobs_and_entropy(model, hidden_BTD, batch["targets"]), out.routing

    def sums(self, model: Ling, batch: Batch) -> tuple[PolicySums, Routing | None]:
        logprobs_BT, entropy_BT, routing = self.values(model, batch)
        return self.of_values(logprobs_BT, jax.lax.stop_gradient(entropy_BT), batch), routing

    def of_values(self, logprobs_BT: jax.Array, entropy_BT: jax.Array, batch: Mapping[str, jax.Array]) -> PolicySums:
        """The sums as a function of log-probabilities, weights and advantages alone."""
        drawn_BT, old_BT, weights_BT = batch["units"] > 0, batch["old"], batch["weights"]
        advantages_BT = batch["advantages"]
        ratio_BT = unit_ratios(logprobs_BT, old_BT, batch["units"])
        clipped_BT = jnp.clip(ratio_BT, 1 - self.low, 1 + self.high)
        policy_BT = weights_BT * jnp.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
        stopped_BT = drawn_BT & (weights_BT != 0)
        low_BT = stopped_BT & (advantages_BT < 0) & (ratio_BT < 1 - self.low)
        high_BT = stopped_BT & (advantages_BT > 0) & (ratio_BT > 1 + self.high)
        drift_BT = jax.lax.stop_gradient(jnp.where(drawn_BT, logprobs_BT - old_BT, 0))
        reference = jnp.zeros((), logprobs_BT.dtype)
        if self.kl:
            reference = (weights_BT * jnp.where(drawn_BT, k3(logprobs_BT, batch["reference"]), 0)).sum()
        return PolicySums(
            policy=jnp.where(drawn_BT, policy_BT, 0).sum(),
            reference=reference,
            clipped_low=low_BT.sum(dtype=logprobs_BT.dtype),
            clipped_high=high_BT.sum(dtype=logprobs_BT.dtype),
            drift=drift_BT.sum(),
            drift_squared=(drift_BT**2).sum(),
            entropy=jnp.where(drawn_BT, entropy_BT, 0).sum(),
        )

    def loss(self, sums: PolicySums, counts: jax.Array) -> jax.Array:
        return self.kl * sums.reference - sums.policy if self.kl else -sums.policy

    def metrics(self, sums: PolicySums, counts: jax.Array) -> Metrics:
        tokens = jnp.maximum(counts, 1)
        found = {
            "train/loss": self.loss(sums, counts),
            "policy/clip_fraction_low": sums.clipped_low / tokens,
            "policy/clip_fraction_high": sums.clipped_high / tokens,
            "policy/kl_old": -sums.drift / tokens,
            "policy/log_ratio_rms": jnp.sqrt(sums.drift_squared / tokens),
            "policy/entropy": sums.entropy / tokens,
        }
        return found | ({"policy/kl_reference": sums.reference} if self.kl else {})
