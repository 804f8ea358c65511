"""The routed experts: rows sorted by expert, grouped SwiGLU, weighted sum back per token.

Legend: N tokens, D hidden, E experts, K experts per token, F expert width, R rows (token-expert pairs,
each expert's padded to whole blocks).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from ling_jax.config import ModelConfig
from ling_jax.kernels.grouped import block_rows, grouped_linear
from ling_jax.kernels.rows import combine_rows, gather_rows, plan_rows
from ling_jax.model.linear import Init, whole
from ling_jax.model.router import Routing
from ling_jax.parallel.dispatch import dispatch
from ling_jax.parallel.mesh import axis_size


class ExpertWeights(nnx.Module):
    """One projection of all experts, [E, out, in]."""

    def __init__(self, config: ModelConfig, inputs: int, outputs: int, axes: tuple[str, str], init: Init):
        self.weight = init.normal((config.num_experts, outputs, inputs), ("expert", *axes))
        self.mesh = init.mesh

    def __call__(self, dtype: jnp.dtype) -> jax.Array:
        """This device's experts, [e, out, in]."""
        return whole(self.weight, dtype, self.mesh)


def swiglu_rows(
    rows_RD: jax.Array, weights: tuple[jax.Array, jax.Array, jax.Array], group_sizes_E: jax.Array, block: int
) -> jax.Array:
    """[R, D]: each row through its expert (gate, up and down [E, out, in])."""
    gate_EFD, up_EFD, down_EDF = weights
    with jax.named_scope("experts"):
        gate_RF = grouped_linear(rows_RD, gate_EFD, group_sizes_E, block)
        up_RF = grouped_linear(rows_RD, up_EFD, group_sizes_E, block)
        return grouped_linear(jax.nn.silu(gate_RF) * up_RF, down_EDF, group_sizes_E, block)


class Experts(nnx.Module):
    """E SwiGLU experts of width F behind one grouped product each for gate, up and down."""

    def __init__(self, config: ModelConfig, init: Init):
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.num_experts, self.mesh = config.num_experts, init.mesh
        self.gate_proj = ExpertWeights(config, hidden, width, ("expert_ffn", "expert_hidden"), init)
        self.up_proj = ExpertWeights(config, hidden, width, ("expert_ffn", "expert_hidden"), init)
        self.down_proj = ExpertWeights(config, width, hidden, ("expert_hidden", "expert_ffn"), init)

    def __call__(self, x_ND: jax.Array, routing: Routing) -> tuple[jax.Array, jax.Array]:
        """sum_k weight_k expert_k(x) for every token, [N, D] in x's dtype (this device's part of it under tensor
        parallelism), and the int32 number of token-expert pairs that were dropped."""
        weights = (self.gate_proj(x_ND.dtype), self.up_proj(x_ND.dtype), self.down_proj(x_ND.dtype))
        if axis_size("expert") > 1:
            return dispatch(x_ND, routing.ids, routing.weights, weights, swiglu_rows, self.num_experts, self.mesh)
        block = block_rows(routing.ids.size, self.num_experts)
        with jax.named_scope("dispatch"):
            plan = plan_rows(routing.ids, self.num_experts, block)
            rows_RD = gather_rows(x_ND, plan)
        out_RD = swiglu_rows(rows_RD, weights, plan.group_sizes_E, block)
        with jax.named_scope("combine"):
            return combine_rows(out_RD, routing.weights, plan), jnp.zeros((), jnp.int32)
