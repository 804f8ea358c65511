"""The routed experts: rows sorted by expert, grouped SwiGLU, weighted sum back per token.

Legend: N tokens, D hidden, E experts, K experts per token, F expert width, R rows (token-expert pairs,
each expert's padded to whole blocks).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ling_jax.config import ModelConfig
from ling_jax.kernels.rows import plan_rows
from ling_jax.kernels.swiglu import block_for, routed_swiglu
from ling_jax.kernels.weight import Carrier, as_weight
from ling_jax.model.linear import Init
from ling_jax.parallel.dispatch import dispatch
from ling_jax.parallel.mesh import axis_size
from ling_jax.parallel.rules import gather_weight

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")  # as `kernels.swiglu` takes their weights


class ExpertsOutput(NamedTuple):
    """The results of the routed experts.

    Attributes:
      y_ND: in the dtype of the input; this device's part of it under tensor parallelism.
      dropped: int32, how many token-expert pairs were left out.
      carriers: of the weights that train in their stacks, by their projections' names, for the next layer; {} if none
        does. See `kernels.weight.LayerWeight`.
    """

    y_ND: jax.Array
    dropped: jax.Array
    carriers: dict[str, Carrier]


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

    def __call__(self, x_ND: jax.Array, ids_NK: jax.Array, weights_NK: jax.Array) -> ExpertsOutput:
        """The sum over k of weight_k expert_k(x) for every token; id `num_experts` is none."""
        params = [getattr(self, name).weight for name in PROJECTIONS]
        dtypes = dict(wire_dtype=x_ND.dtype, reduce_dtype=self.mesh.reduce_dtype)
        shards = tuple(as_weight(param.get_value()) for param in params)
        whole = tuple(partial(gather_weight, names=param.axes, split=param.split, **dtypes) for param in params)
        if axis_size("expert") > 1:
            y_ND, dropped = dispatch(x_ND, ids_NK, weights_NK, shards, self.num_experts, self.mesh, whole)
            return ExpertsOutput(y_ND, dropped, {})
        block = block_for(shards, ids_NK.size, self.num_experts)
        with jax.named_scope("plan"):
            plan = plan_rows(ids_NK, self.num_experts, block)
        weights = tuple(make(shard) for make, shard in zip(whole, shards, strict=True))
        y_ND, carriers = routed_swiglu(x_ND, weights_NK, weights, plan, block)
        return ExpertsOutput(y_ND, jnp.zeros((), jnp.int32), dict(zip(PROJECTIONS, carriers, strict=False)))
