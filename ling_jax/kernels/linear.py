"""Matrix products with weights in HF's [out, in] orientation.

Legend: I inputs, O outputs.
"""

from typing import Any

import jax

from ling_jax.kernels.choose import by_platform
from ling_jax.kernels.precision import dot


@jax.custom_vjp
def linear(x: jax.Array, w_OI: jax.Array) -> jax.Array:
    """x w^T.

    Args:
      x: [..., I], the compute dtype.  w_OI: any float dtype, cast to it.
    Returns:
      [..., O] in x's dtype, accumulated in float32; weight gradients keep the float32 sum.
    """
    return dot(x, w_OI.astype(x.dtype), ((x.ndim - 1,), (1,))).astype(x.dtype)


def _linear_fwd(x: jax.Array, w_OI: jax.Array) -> tuple[jax.Array, Any]:
    return linear(x, w_OI), (x, w_OI)


def _linear_bwd(saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w_OI = saved
    dx = dot(g, w_OI.astype(g.dtype), ((x.ndim - 1,), (0,))).astype(x.dtype)
    return dx, _weight_gradient(g, x).astype(w_OI.dtype)  # float32 sums reach float32 weights unrounded


def _weight_gradient(g: jax.Array, x: jax.Array) -> jax.Array:
    """float32 [O, I]. XLA:CPU writes the first operand once more, transposed: it is to be the narrower one, and the
    barrier keeps XLA from turning that round again."""
    rows = tuple(range(x.ndim - 1))

    def turned(g, x):
        return jax.lax.optimization_barrier(dot(x, g, (rows, rows))).T

    def straight(g, x):
        return dot(g, x, (rows, rows))

    if g.shape[-1] <= x.shape[-1]:
        return straight(g, x)
    return by_platform(g, x, cpu=turned, rest=straight)


linear.defvjp(_linear_fwd, _linear_bwd)
