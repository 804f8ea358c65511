"""The routed experts: rows sorted by expert, grouped SwiGLU, weighted sum back per token.

Legend: N tokens, D hidden, E experts, K experts per token, F expert width, R rows (token-expert pairs,
each expert's padded to whole blocks).
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from ling_jax.config import ModelConfig
from ling_jax.kernels.rows import plan_rows
from ling_jax.kernels.swiglu import block_for, routed_swiglu
from ling_jax.model.linear import Init
from ling_jax.parallel.dispatch import dispatch
from ling_jax.parallel.mesh import axis_size
from ling_jax.parallel.rules import gather


class ExpertWeights(nnx.Module):
    """One projection of all experts, [E, out, in]."""

    def __init__(self, config: ModelConfig, inputs: int, outputs: int, axes: tuple[str, str], init: Init):
        self.weight = init.normal((config.num_experts, outputs, inputs), ("expert", *axes))


class Experts(nnx.Module):
    """E SwiGLU experts of width F behind one grouped product each for gate, up and down."""

    def __init__(self, config: ModelConfig, init: Init):
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.num_experts, self.mesh = config.num_experts, init.mesh
        self.gate_proj = ExpertWeights(config, hidden, width, ("expert_ffn", "expert_hidden"), init)
        self.up_proj = ExpertWeights(config, hidden, width, ("expert_ffn", "expert_hidden"), init)
        self.down_proj = ExpertWeights(config, width, hidden, ("expert_hidden", "expert_ffn"), init)

    def __call__(self, x_ND: jax.Array, ids_NK: jax.Array, weights_NK: jax.Array) -> tuple[jax.Array, jax.Array]:
        """sum_k weight_k expert_k(x) for every token, [N, D] in x's dtype (this device's part of it under tensor
        parallelism), and the int32 number of token-expert pairs that were dropped. Id `num_experts` is none. Of
        weights that train in their stacks, what goes through is afterwards what to give the next layer."""
        params = [projection.weight for projection in (self.gate_proj, self.up_proj, self.down_proj)]
        dtypes = dict(wire_dtype=x_ND.dtype, reduce_dtype=self.mesh.reduce_dtype)
        shards = tuple(param[...] for param in params)
        whole = tuple(partial(gather, names=param.axes, split=param.split, **dtypes) for param in params)
        if axis_size("expert") > 1:
            return dispatch(x_ND, ids_NK, weights_NK, shards, self.num_experts, self.mesh, whole)
        block = block_for(shards, ids_NK.size, self.num_experts)
        with jax.named_scope("plan"):
            plan = plan_rows(ids_NK, self.num_experts, block)
        weights = tuple(make(shard) for make, shard in zip(whole, shards, strict=True))
        y_ND, through = routed_swiglu(x_ND, weights_NK, weights, plan, block)
        for param, stack in zip(params, through, strict=False):  # none unless weights train in their stacks
            param.set_value(dataclasses.replace(param.get_value(), through_LEOI=stack))
        return y_ND, jnp.zeros((), jnp.int32)
