"""The routed experts: rows sorted by expert, grouped SwiGLU, weighted sum back per token.

Legend: N tokens, D hidden, E experts, K experts per token, F expert width, R rows (token-expert pairs,
each expert's padded to whole blocks).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ling_jax.config import ModelConfig
from ling_jax.kernels.grouped import block_rows, grouped_linear, padded_rows
from ling_jax.model.linear import Init
from ling_jax.model.router import Routing


class RowPlan(NamedTuple):
    """Where each (token, choice) pair goes among the sorted rows, and back."""

    row_of_NK: jax.Array  # int32
    pair_of_R: jax.Array  # int32, n * K + k; N * K for a row that only pads
    group_sizes_E: jax.Array  # int32 rows of each expert, padding included


def plan_rows(ids_NK: jax.Array, num_experts: int, block: int) -> RowPlan:
    """Sorts pairs by expert, tokens in order within each, by counting: no sort is run, nothing is dropped."""
    tokens, choices = ids_NK.shape
    chosen_NE = (ids_NK[:, :, None] == jnp.arange(num_experts)).any(1)
    upto_NE = jnp.cumsum(chosen_NE, axis=0, dtype=jnp.int32)
    group_sizes_E = -(-upto_NE[-1] // block) * block
    starts_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    row_of_NK = jnp.take_along_axis(upto_NE - 1 + starts_E, ids_NK, axis=1)
    pairs = tokens * choices
    rows = padded_rows(pairs, num_experts, block)
    pair_of_R = (
        jnp.full(rows, pairs, jnp.int32)
        .at[row_of_NK.reshape(-1)]
        .set(jnp.arange(pairs, dtype=jnp.int32), unique_indices=True)
    )
    return RowPlan(row_of_NK, pair_of_R, group_sizes_E)


def _take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="fill", fill_value=0)  # an index past the end gives zeros


@jax.custom_vjp
def gather_rows(x_ND: jax.Array, plan: RowPlan) -> jax.Array:
    """[R, D]: each row its token's state, zeros where a row only pads. The backward pass gathers too:
    XLA's transpose of a gather is a slow scatter."""
    return _take_rows(x_ND, plan.pair_of_R // plan.row_of_NK.shape[1])


def _gather_fwd(x_ND, plan):
    return gather_rows(x_ND, plan), plan


def _sum_choices(y_RD, row_of_NK, weights_NK=None):
    total = 0.0
    for k in range(row_of_NK.shape[1]):  # unrolled: a third of the time of one gather and a sum
        term = y_RD[row_of_NK[:, k]].astype(jnp.float32)
        total += term if weights_NK is None else term * weights_NK[:, k, None]
    return jnp.asarray(total)


def _gather_bwd(plan, g_RD):
    return _sum_choices(g_RD, plan.row_of_NK).astype(g_RD.dtype), None


gather_rows.defvjp(_gather_fwd, _gather_bwd)


@jax.custom_vjp
def combine_rows(y_RD: jax.Array, weights_NK: jax.Array, plan: RowPlan) -> jax.Array:
    """[N, D]: each token's rows, weighted and summed in float32, in y's dtype (spec 2.5)."""
    return _sum_choices(y_RD, plan.row_of_NK, weights_NK).astype(y_RD.dtype)


def _combine_fwd(y_RD, weights_NK, plan):
    return combine_rows(y_RD, weights_NK, plan), (y_RD, weights_NK, plan)


def _combine_bwd(saved, g_ND):
    y_RD, weights_NK, plan = saved
    choices = weights_NK.shape[1]
    weights_R = _take_rows(weights_NK.reshape(-1), plan.pair_of_R)
    dy_RD = (_take_rows(g_ND, plan.pair_of_R // choices) * weights_R[:, None]).astype(y_RD.dtype)
    g32_ND = g_ND.astype(jnp.float32)
    dw = [(y_RD[plan.row_of_NK[:, k]].astype(jnp.float32) * g32_ND).sum(-1) for k in range(choices)]
    return dy_RD, jnp.stack(dw, axis=1), None


combine_rows.defvjp(_combine_fwd, _combine_bwd)


class ExpertWeights(nnx.Module):
    """One projection of all experts, [E, out, in]."""

    def __init__(self, config: ModelConfig, inputs: int, outputs: int, axes: tuple[str, str], init: Init):
        self.weight = init.normal((config.num_experts, outputs, inputs), ("expert", *axes))


class Experts(nnx.Module):
    """E SwiGLU experts of width F behind one grouped product each for gate, up and down."""

    def __init__(self, config: ModelConfig, init: Init):
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.num_experts = config.num_experts
        self.gate_proj = ExpertWeights(config, hidden, width, ("ffn", "hidden"), init)
        self.up_proj = ExpertWeights(config, hidden, width, ("ffn", "hidden"), init)
        self.down_proj = ExpertWeights(config, width, hidden, ("hidden", "ffn"), init)

    def __call__(self, x_ND: jax.Array, routing: Routing) -> jax.Array:
        """sum_k weight_k expert_k(x) for every token, dropless. Returns [N, D] in x's dtype."""
        block = block_rows(routing.ids.size, self.num_experts)
        with jax.named_scope("dispatch"):
            plan = plan_rows(routing.ids, self.num_experts, block)
            rows_RD = gather_rows(x_ND, plan)
        with jax.named_scope("experts"):
            gate_RF = grouped_linear(rows_RD, self.gate_proj.weight[...], plan.group_sizes_E, block)
            up_RF = grouped_linear(rows_RD, self.up_proj.weight[...], plan.group_sizes_E, block)
            act_RF = jax.nn.silu(gate_RF) * up_RF
            out_RD = grouped_linear(act_RF, self.down_proj.weight[...], plan.group_sizes_E, block)
        with jax.named_scope("combine"):
            return combine_rows(out_RD, routing.weights, plan)
