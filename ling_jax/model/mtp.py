"""The multi-token-prediction layer: predicts token t+2 at position t.

Legend: B rows, T tokens, D hidden.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ling_jax.config import ModelConfig
from ling_jax.config.layers import MTP_KIND
from ling_jax.model.attention import Context
from ling_jax.model.block import Block, LayerOutput
from ling_jax.model.linear import Init, Linear
from ling_jax.model.norm import RMSNorm
from ling_jax.parallel.context import shift_left


def next_tokens(tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """The token after each; id 0 at the row's end and where another document follows (padding is not one)."""
    following_BT = shift_left(segment_ids_BT, -1)
    crosses_BT = (following_BT != segment_ids_BT) & (following_BT != 0)
    return jnp.where(crosses_BT, 0, shift_left(tokens_BT, 0))


class MTP(nnx.Module):
    """One MoE layer over [next token's embedding ; trunk output after its final norm] (spec 2.6)."""

    def __init__(self, config: ModelConfig, init: Init):
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden, eps, init.dtype)
        self.hnorm = RMSNorm(hidden, eps, init.dtype)
        self.eh_proj = Linear(2 * hidden, hidden, ("hidden", "mtp_input"), init)
        self.block = Block(config, MTP_KIND, init)
        self.final_layernorm = RMSNorm(hidden, eps, init.dtype)

    def __call__(
        self,
        embedded_BTD: jax.Array,
        trunk_BTD: jax.Array,
        context: Context,
        ids_BTK: jax.Array | None = None,
        cache: Any = None,
    ) -> LayerOutput:
        """`embedded_BTD`: the next tokens' embeddings. The output's hidden state is after its final norm."""
        joined = jnp.concatenate([self.enorm(embedded_BTD), self.hnorm(trunk_BTD)], axis=-1)
        out = self.block(self.eh_proj(joined), context, ids_BTK, cache)
        return out._replace(hidden_BTD=self.final_layernorm(out.hidden_BTD))
