"""The routed experts: rows sorted by expert, grouped SwiGLU, weighted sum back per token.

Legend: N tokens, D hidden, E experts, K experts per token, F expert width, R rows (token-expert pairs,
each expert's padded to whole blocks).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ling_jax.config import ModelConfig
from ling_jax.kernels.grouped import block_rows, grouped_linear
from ling_jax.kernels.rows import combine_rows, gather_rows, plan_rows
from ling_jax.model.linear import Init
from ling_jax.model.router import Routing
from ling_jax.parallel.dispatch import dispatch
from ling_jax.parallel.mesh import axis_size
from ling_jax.parallel.rules import gather


class ExpertWeights(nnx.Module):
    """One projection of all experts, [E, out, in]."""

    def __init__(self, config: ModelConfig, inputs: int, outputs: int, axes: tuple[str, str], init: Init):
        self.weight = init.normal((config.num_experts, outputs, inputs), ("expert", *axes))


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
        params = [projection.weight for projection in (self.gate_proj, self.up_proj, self.down_proj)]
        shards, dtypes = tuple(param[...] for param in params), (x_ND.dtype, self.mesh.reduce_dtype)

        def whole(shards: Any) -> Any:
            """This device's experts, [e, out, in] each."""
            return tuple(gather(w, p.axes, p.split, *dtypes) for w, p in zip(shards, params, strict=True))

        if axis_size("expert") > 1:
            return dispatch(x_ND, routing.ids, routing.weights, shards, swiglu_rows, self.num_experts, self.mesh, whole)
        weights = whole(shards)
        block = block_rows(routing.ids.size, self.num_experts)
        with jax.named_scope("dispatch"):
            plan = plan_rows(routing.ids, self.num_experts, block)
            rows_RD = gather_rows(x_ND, plan)
        out_RD = swiglu_rows(rows_RD, weights, plan.group_sizes_E, block)
        with jax.named_scope("combine"):
            return combine_rows(out_RD, routing.weights, plan), jnp.zeros((), jnp.int32)
