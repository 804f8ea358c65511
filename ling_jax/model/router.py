"""The router: which experts a token goes to, and with which weights; float32 throughout.

Legend: N tokens, D hidden, E experts, K experts per token, G groups; of a batch L layers, B rows, T tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from ling_jax.config import ModelConfig, routed_layers
from ling_jax.kernels import native
from ling_jax.kernels.choose import for_cpu
from ling_jax.model.linear import Init, weight_of


class ExpertBias(nnx.Variable):
    """The balance bias. Its type keeps it out of gradients and weight decay; only `train.balance` writes it."""


class Routing(NamedTuple):
    """One router's choice; stacked over layers in a model's output ([L, ...])."""

    ids: jax.Array  # int32 [..., K], best first
    weights: jax.Array  # float32 [..., K]
    counts: jax.Array  # int32 [E]: tokens routed to each expert, padding left out
    z_sum: jax.Array  # float32 []: sum over those tokens of logsumexp(logits)^2
    dropped: jax.Array  # int32 []: token-expert pairs left out by the dispatch


def _chosen(biased_NE: jax.Array, *, groups: int, open_groups: int, choices: int) -> jax.Array:
    """-inf where a group is closed, since a biased score may be negative."""
    tokens, experts = biased_NE.shape
    grouped_NGe = biased_NE.reshape(tokens, groups, experts // groups)
    worth_NG = jax.lax.top_k(grouped_NGe, 2)[0].sum(-1)
    _, chosen = jax.lax.top_k(worth_NG, open_groups)
    open_NG = (chosen[:, :, None] == jnp.arange(groups)).any(1)
    limited_NGe = jnp.where(open_NG[:, :, None], grouped_NGe, -jnp.inf)
    return jax.lax.top_k(limited_NGe.reshape(tokens, experts), choices)[1]


_chosen_on_cpu = native.or_else("choose", native.choose, _chosen)


def _select(biased_NE: jax.Array, config: ModelConfig) -> jax.Array:
    """[N, K] ids: the best K among the experts of the best `topk_group` groups, a group being worth the
    sum of its two best scores (spec 2.5)."""
    choose = _chosen_on_cpu if for_cpu() and biased_NE.size else _chosen
    sizes = dict(groups=config.n_group, open_groups=config.topk_group, choices=config.num_experts_per_tok)
    return choose(biased_NE, **sizes)


def route(
    logits_NE: jax.Array,
    bias_E: jax.Array,
    valid_N: jax.Array,
    config: ModelConfig,
    ids_NK: jax.Array | None = None,
) -> Routing:
    """Chooses experts (Ling 2.0 report, section 2; spec 2.5).

    Args:
      logits_NE: float32.
      bias_E: float32 balance bias; it changes which experts win, never their weights.
      valid_N: bool, False for padding, which is routed but not counted.
      ids_NK: a choice to replay instead (reinforcement learning trains on the rollout's experts), -1 for none.
    Returns:
      Routing; a token's weights sum to `routed_scaling_factor` (top-1 keeps its own score, scaled).
    """
    scores_NE = jax.nn.sigmoid(logits_NE)
    own_NK = _select(jax.lax.stop_gradient(scores_NE + bias_E), config)
    ids_NK = own_NK if ids_NK is None else jnp.where(ids_NK < 0, own_NK, ids_NK)
    weights_NK = jnp.take_along_axis(scores_NE, ids_NK, axis=-1)
    if config.norm_topk_prob and config.num_experts_per_tok > 1:
        weights_NK = weights_NK / (weights_NK.sum(-1, keepdims=True) + 1e-20)
    chosen_NE = (ids_NK[:, :, None] == jnp.arange(config.num_experts)).any(1) & valid_N[:, None]
    z_N = jax.nn.logsumexp(logits_NE, axis=-1) ** 2
    return Routing(
        ids=ids_NK,
        weights=weights_NK * config.routed_scaling_factor,
        counts=chosen_NE.sum(0, dtype=jnp.int32),
        z_sum=jnp.where(valid_N, z_N, 0).sum(),
        dropped=jnp.zeros((), jnp.int32),
    )


def replayed(ids_LBTK: jax.Array | np.ndarray, config: ModelConfig, shape: tuple[int, ...], mtp: bool) -> jax.Array:
    """A routing to replay, as every layer that routes takes it: int32 [L, B, T, K], -1 where it chooses for itself.

    Args:
      ids_LBTK: integers of the trunk's MoE layers, and the MTP layer's last or left out; of T tokens, or all but each
        row's last; of each token K different experts, or K times -1. Values that are traced are not looked at.
      shape: [B, T] of the tokens.  mtp: whether the MTP layer runs; those of one that does not are dropped.
    Raises:
      ValueError: for another shape or dtype, an expert that is none, or one that a token has twice.
    """
    ids_LBTK = ids_LBTK if isinstance(ids_LBTK, jax.Array) else np.asarray(ids_LBTK)
    layers, known = routed_layers(config, mtp=False), routed_layers(config, mtp=True)
    (rows, tokens), choices = shape, config.num_experts_per_tok
    allowed = [(n, rows, t, choices) for n in {layers, known} for t in (tokens, tokens - 1)]
    if ids_LBTK.shape not in allowed:
        more = " (the last may be left out: the MTP layer's)" if known > layers else ""
        raise ValueError(
            f"routing_ids has the shape {list(ids_LBTK.shape)}, not [layers, rows, tokens, experts per token]: this "
            f"model routes in {known} layers{more}, {choices} experts per token, and was given {rows} rows of "
            f"{tokens} tokens (of which each row's last may be left out)"
        )
    if not jnp.issubdtype(ids_LBTK.dtype, jnp.integer):
        raise ValueError(f"routing_ids is {ids_LBTK.dtype}: experts are integers")
    if not isinstance(ids_LBTK, Tracer) and getattr(ids_LBTK, "is_fully_addressable", True):
        _check_choices(np.asarray(jax.device_get(ids_LBTK)), config.num_experts)
    ids_LBTK = jnp.asarray(ids_LBTK, jnp.int32)[: layers + mtp]
    missing = [(0, layers + mtp - ids_LBTK.shape[0]), (0, 0), (0, tokens - ids_LBTK.shape[2]), (0, 0)]
    return jnp.pad(ids_LBTK, missing, constant_values=-1)


def _check_choices(ids_LBTK: np.ndarray, experts: int) -> None:
    sorted_LBTK = np.sort(ids_LBTK, axis=-1)
    different = (sorted_LBTK[..., 1:] > sorted_LBTK[..., :-1]).all(-1) & (sorted_LBTK[..., 0] >= 0)
    good = (sorted_LBTK[..., -1] < experts) & (different | (ids_LBTK == -1).all(-1))
    if not good.all():
        place = tuple(int(i) for i in np.argwhere(~good)[0])
        raise ValueError(
            f"routing_ids[{', '.join(map(str, place))}] = {ids_LBTK[place].tolist()}: give each token of each layer "
            f"different experts from 0 to {experts - 1}, or -1 throughout where the router is to choose"
        )


class Router(nnx.Module):
    """Weight [E, D] and the expert bias [E] (float32 whatever the parameters' dtype)."""

    def __init__(self, config: ModelConfig, init: Init):
        self.config, self.mesh = config, init.mesh
        self.weight = init.normal((config.num_experts, config.hidden_size), ("expert_row", "hidden"))
        self.expert_bias = ExpertBias(jnp.zeros(config.num_experts, jnp.float32), axes=("expert_row",), split=((),))

    def __call__(
        self, x_ND: jax.Array, valid_N: jax.Array, ids_NK: jax.Array | None = None
    ) -> tuple[Routing, jax.Array]:
        """Returns the routing and the float32 logits [N, E]."""
        logits_NE = weight_of(self.weight, jnp.dtype(jnp.float32), self.mesh).linear(x_ND.astype(jnp.float32))
        return route(logits_NE, self.expert_bias.get_value(), valid_N, self.config, ids_NK), logits_NE
