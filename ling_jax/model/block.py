"""One layer: pre-norm attention, pre-norm FFN (dense or MoE), residuals.

Legend: B rows, T tokens, N = B*T, D hidden, K experts per token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ling_jax.config import LayerKind, ModelConfig
from ling_jax.kernels.weight import Carrier
from ling_jax.model.attention import Attention, Context, MixerOutput
from ling_jax.model.experts import Experts
from ling_jax.model.linear import Init, SwiGLU
from ling_jax.model.linear_attention import LinearAttention
from ling_jax.model.norm import RMSNorm
from ling_jax.model.router import Router, Routing
from ling_jax.parallel.mesh import psum

# What mixes the tokens of a row, by its name in `config.layers`. A mixer is made as mixer(config, init) and called as
# mixer(x_BTD, context, cache).
MIXERS: dict[str, Callable[[ModelConfig, Init], Callable[..., MixerOutput]]] = {
    "softmax": Attention,
    "linear": LinearAttention,
}


class LayerOutput(NamedTuple):
    """The results of a layer.

    Attributes:
      hidden_BTD: the next layer's input.
      routing: None for a dense layer.
      cache: the states of decoding with these tokens, None where there are none.
      carriers: see `model.experts.ExpertsOutput`.
      captured: every intermediate that `capture` can name.
    """

    hidden_BTD: jax.Array
    routing: Routing | None
    cache: Any
    carriers: dict[str, Carrier]
    captured: dict[str, jax.Array]


class MoEOutput(NamedTuple):
    """The results of a sparse FFN."""

    y_BTD: jax.Array
    routing: Routing
    logits_BTE: jax.Array  # float32, of the router
    carriers: dict[str, Carrier]


class SparseMoE(nnx.Module):
    """Routed experts plus the shared expert, which is neither scaled nor gated (spec 2.5)."""

    def __init__(self, config: ModelConfig, init: Init):
        self.gate = Router(config, init)
        self.experts = Experts(config, init)
        width = config.shared_intermediate_size
        self.shared_experts = SwiGLU(config.hidden_size, width, init) if width else None

    def __call__(
        self, x_BTD: jax.Array, valid_BT: jax.Array, ids_BTK: jax.Array | None, skip: bool = False
    ) -> MoEOutput:
        """The shared expert's output and the chosen experts' together; to `skip` is to give padding no experts."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        ids_NK = None if ids_BTK is None else ids_BTK.reshape(x_ND.shape[0], -1)
        with jax.named_scope("router"):
            routing, logits_NE = self.gate(x_ND, valid_BT.reshape(-1), ids_NK)
        ids_NK = routing.ids
        if skip:
            ids_NK = jnp.where(valid_BT.reshape(-1, 1), ids_NK, self.experts.num_experts)
        y_ND, dropped, carriers = self.experts(x_ND, ids_NK, routing.weights)
        if self.shared_experts is not None:  # needs nothing of the dispatch, so it can run while rows travel
            with jax.named_scope("shared_expert"):
                y_ND = y_ND + self.shared_experts.partial(x_ND)
        y_ND = psum(y_ND, "tensor")
        rows = x_BTD.shape[:2]
        ids_BTK, weights_BTK = (a.reshape(*rows, -1) for a in (routing.ids, routing.weights))
        routing = routing._replace(ids=ids_BTK, weights=weights_BTK, dropped=dropped)
        return MoEOutput(y_ND.reshape(x_BTD.shape), routing, logits_NE.reshape(*rows, -1), carriers)


class Block(nnx.Module):
    """A layer of a kind named in the layer plan (spec 2.2)."""

    def __init__(self, config: ModelConfig, kind: LayerKind, init: Init):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, init.dtype)
        self.attention = MIXERS[kind.mixer](config, init)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, init.dtype)
        if kind.routed:
            self.mlp = SparseMoE(config, init)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, init)

    def __call__(
        self, x_BTD: jax.Array, context: Context, ids_BTK: jax.Array | None = None, cache: Any = None
    ) -> LayerOutput:
        with jax.named_scope("attention"):
            mixed = self.attention(self.input_layernorm(x_BTD), context, cache)
        captured = {"hidden_states": x_BTD, "attn_out": mixed.y_BTD, **mixed.captured}
        x_BTD = x_BTD + mixed.y_BTD
        normed_BTD = self.post_attention_layernorm(x_BTD)
        routing, carriers = None, {}
        if isinstance(self.mlp, SparseMoE):
            y_BTD, routing, captured["router_logits"], carriers = self.mlp(
                normed_BTD, context.segments_BT > 0, ids_BTK, skip=cache is not None
            )
        else:
            with jax.named_scope("dense_ffn"):
                y_BTD = self.mlp(normed_BTD)
        return LayerOutput(x_BTD + y_BTD, routing, mixed.cache, carriers, captured)
