"""RMSNorm."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx


@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)  # the backward pass keeps x alone
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last dim (spec 2.1): statistics in float32, the result cast back to
    x's dtype and only then multiplied by the weight."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Weight [size], ones at init; `axis` names its dim in the sharding table."""

    def __init__(self, size: int, eps: float, param_dtype: jnp.dtype, axis: str = "hidden"):
        self.weight = nnx.Param(jnp.ones(size, param_dtype), axes=(axis,), split=((),))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight.get_value(), self.eps)
