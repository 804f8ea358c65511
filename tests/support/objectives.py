"""Two objectives that a user might write: preferences of pairs, and a policy gradient.

Legend: B rows, T tokens, S documents of a row (2: the chosen and the rejected answer), L layers, K experts per token.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ling_jax.model.model import Ling
from ling_jax.model.router import Routing
from ling_jax.train.objective import (
    MODEL_FIELDS,
    Batch,
    Metrics,
    document_share,
    document_sums,
    logprobs,
    logprobs_and_entropy,
)


class PairSums(NamedTuple):
    loss: jax.Array
    right: jax.Array  # pairs whose chosen answer gained more


class Preference(NamedTuple):
    """Direct preference optimisation (arXiv 2305.18290): a row is a pair, document 1 chosen and document 2 rejected."""

    beta: float = 0.1

    @property
    def fields(self) -> Mapping[str, str]:
        """`reference` is float32 [B, S]: each answer's log-probability under the reference model."""
        return {**MODEL_FIELDS, "targets": "BT", "reference": "BS"}

    def answers(self, model: Ling, batch: Batch) -> tuple[jax.Array, Routing | None]:
        """float32 [B, S] log-probabilities of whole answers, on every device that holds a piece of them."""
        out = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], mtp=False)
        values_BT = logprobs(model, out.hidden_BTD, batch["targets"])
        values_BT = jnp.where(batch["targets"] >= 0, values_BT, 0)
        return document_sums(values_BT, batch["segment_ids"], 2), out.routing

    def counts(self, batch: Batch) -> jax.Array:
        return (batch["segment_ids"] == 2).any(1).sum(dtype=jnp.float32)

    def sums(self, model: Ling, batch: Batch) -> tuple[PairSums, Routing | None]:
        answers_BS, routing = self.answers(model, batch)
        tokens_BS = document_sums(jnp.ones_like(batch["tokens"]), batch["segment_ids"], 2)
        found = self.of_answers(answers_BS, batch["reference"], tokens_BS[:, 1] > 0)
        return PairSums(*map(document_share, found)), routing

    def of_answers(self, answers_BS: jax.Array, reference_BS: jax.Array, real_B: jax.Array) -> PairSums:
        gains_BS = answers_BS - reference_BS
        margin_B = self.beta * (gains_BS[:, 0] - gains_BS[:, 1])
        loss_B = jnp.where(real_B, -jax.nn.log_sigmoid(margin_B), 0)
        return PairSums(loss_B.sum(), ((margin_B > 0) & real_B).sum(dtype=jnp.float32))

    def loss(self, sums: PairSums, counts: jax.Array) -> jax.Array:
        return sums.loss / jnp.maximum(counts, 1)

    def metrics(self, sums: PairSums, counts: jax.Array) -> Metrics:
        pairs = jnp.maximum(counts, 1)
        return {"train/loss": sums.loss / pairs, "train/right": sums.right / pairs}


class TokenSums(NamedTuple):
    policy: jax.Array
    entropy: jax.Array


class PolicyGradient(NamedTuple):
    """Clipped importance ratios times each token's weight, with a bonus for entropy (arXiv 1707.06347).

    Answers run through the experts that they were drawn with.
    """

    clip: float = 0.2
    bonus: float = 0.01
    mtp: bool = False  # whether the MTP layer runs too, which nothing here needs

    @property
    def fields(self) -> Mapping[str, str]:
        """`weights`, 0 for what was not drawn, and `old`, log-probabilities, are of the token that a place predicts."""
        return {**MODEL_FIELDS, "targets": "BT", "weights": "BT", "old": "BT", "routing_ids": "LBTK"}

    def counts(self, batch: Batch) -> jax.Array:
        return (batch["weights"] != 0).sum(dtype=jnp.float32)

    def values(self, model: Ling, batch: Batch) -> tuple[jax.Array, jax.Array, Routing | None]:
        """float32 [B, T] log-probabilities and entropies of the tokens that places predict."""
        inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
        out = model.hidden(*inputs, routing_ids=batch["routing_ids"], mtp=self.mtp)
        return *logprobs_and_entropy(model, out.hidden_BTD, batch["targets"]), out.routing

    def sums(self, model: Ling, batch: Batch) -> tuple[TokenSums, Routing | None]:
        *values, routing = self.values(model, batch)
        return self.of_values(*values, batch["old"], batch["weights"]), routing

    def of_values(
        self, logprobs_BT: jax.Array, entropy_BT: jax.Array, old_BT: jax.Array, weights_BT: jax.Array
    ) -> TokenSums:
        drawn_BT = weights_BT != 0
        ratio_BT = jnp.exp(jnp.where(drawn_BT, logprobs_BT - old_BT, 0))
        clipped_BT = jnp.clip(ratio_BT, 1 - self.clip, 1 + self.clip)
        policy_BT = jnp.minimum(ratio_BT * weights_BT, clipped_BT * weights_BT)
        return TokenSums(policy_BT.sum(), jnp.where(drawn_BT, entropy_BT, 0).sum())

    def loss(self, sums: TokenSums, counts: jax.Array) -> jax.Array:
        return -(sums.policy + self.bonus * sums.entropy) / jnp.maximum(counts, 1)

    def metrics(self, sums: TokenSums, counts: jax.Array) -> Metrics:
        return {"train/loss": self.loss(sums, counts), "train/entropy": sums.entropy / jnp.maximum(counts, 1)}
