"""Linear: a weight in HF's [out, in] orientation and what products are made with of it."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from ling_jax.config.mesh import ONE_DEVICE, MeshConfig, split_of
from ling_jax.kernels.weight import Weight, as_weight
from ling_jax.parallel.mesh import psum
from ling_jax.parallel.rules import gather_weight


@dataclass(frozen=True)
class Init:
    """How parameters are made: normal(0, std) matrices of dtype `dtype` (report, section 3.2.1), split over `mesh`;
    `serving`: as they are computed with, so that no step of decoding gathers weights."""

    rngs: nnx.Rngs
    std: float
    dtype: jnp.dtype
    mesh: MeshConfig = ONE_DEVICE
    serving: bool = False

    def normal(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        """A random parameter; `axes` names each dim for the sharding table."""
        value = self.std * jax.random.normal(self.rngs.params(), shape, jnp.float32)
        return nnx.Param(value.astype(self.dtype), axes=axes, split=split_of(shape, axes, self.mesh, not self.serving))

    def zeros(self, size: int, axis: str) -> nnx.Param:
        """A bias."""
        return nnx.Param(jnp.zeros(size, self.dtype), axes=(axis,), split=((),))


def weight_of(param: nnx.Param, dtype: jnp.dtype, mesh: MeshConfig) -> Weight:
    """The weight that this device computes with: its shard, gathered (`parallel.rules`) and sent as `dtype`."""
    return gather_weight(as_weight(param.get_value()), param.axes, param.split, dtype, mesh.reduce_dtype)


class Linear(nnx.Module):
    """Weight [outputs, inputs], optional bias [outputs].

    Where its inputs are split over `tensor`, the outputs are summed over it.
    """

    def __init__(self, inputs: int, outputs: int, axes: tuple[str, str], init: Init, bias: bool = False):
        self.weight = init.normal((outputs, inputs), axes)
        self.bias = init.zeros(outputs, axes[0]) if bias else None
        self.mesh = init.mesh

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.partial(x)
        if "tensor" in self.weight.split[1]:
            y = psum(y, "tensor")
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)

    def partial(self, x: jax.Array) -> jax.Array:
        """Without the sum over `tensor` and the bias."""
        return weight_of(self.weight, x.dtype, self.mesh).linear(x)


@partial(jax.checkpoint, prevent_cse=False)  # the backward pass keeps these two arrays, not five
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)), no bias (spec 2.4)."""

    def __init__(self, hidden: int, width: int, init: Init):
        self.gate_proj = Linear(hidden, width, ("ffn", "hidden"), init)
        self.up_proj = Linear(hidden, width, ("ffn", "hidden"), init)
        self.down_proj = Linear(width, hidden, ("hidden", "ffn"), init)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(self._inner(x))

    def partial(self, x: jax.Array) -> jax.Array:
        """This device's part of the sum over `tensor`."""
        return self.down_proj.partial(self._inner(x))

    def _inner(self, x: jax.Array) -> jax.Array:
        return _gated(self.gate_proj(x), self.up_proj(x))
