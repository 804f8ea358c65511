"""Linear: a weight in HF's [out, in] orientation behind the `kernels.linear` seam."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from ling_jax.kernels.linear import linear


@dataclass(frozen=True)
class Init:
    """How parameters are made: normal(0, std) matrices of dtype `dtype` (report, section 3.2.1)."""

    rngs: nnx.Rngs
    std: float
    dtype: jnp.dtype

    def normal(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        """A random parameter; `axes` names each dim for the sharding table."""
        value = self.std * jax.random.normal(self.rngs.params(), shape, jnp.float32)
        return nnx.Param(value.astype(self.dtype), axes=axes)


class Linear(nnx.Module):
    """Weight [outputs, inputs], optional bias [outputs]."""

    def __init__(self, inputs: int, outputs: int, axes: tuple[str, str], init: Init, bias: bool = False):
        self.weight = init.normal((outputs, inputs), axes)
        self.bias = nnx.Param(jnp.zeros(outputs, init.dtype), axes=axes[:1]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return linear(x, self.weight[...], None if self.bias is None else self.bias[...])


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)), no bias (spec 2.4)."""

    def __init__(self, hidden: int, width: int, init: Init):
        self.gate_proj = Linear(hidden, width, ("ffn", "hidden"), init)
        self.up_proj = Linear(hidden, width, ("ffn", "hidden"), init)
        self.down_proj = Linear(width, hidden, ("hidden", "ffn"), init)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
