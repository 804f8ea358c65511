"""The one seam for matrix products with weights in HF's [out, in] orientation.

Legend: I inputs, O outputs.
"""

from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision:
    """float32 products are float32 everywhere: a TPU would otherwise round the operands to bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def kernel_precision(dtype: jnp.dtype) -> AbstractContextManager:
    """The same inside a Pallas kernel that JAX ships: in what is traced under it, products of operands in `dtype`."""
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")


def dot(a: jax.Array, b: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """`a` times `b` over the dims `contract`, accumulated and returned in float32.

    On CPU a bfloat16 product that returns float32 is ten times faster than one that returns bfloat16.
    """
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision_of(a.dtype), preferred_element_type=jnp.float32
    )


@jax.custom_vjp
def linear(x: jax.Array, w_OI: jax.Array) -> jax.Array:
    """x w^T.

    Args:
      x: [..., I], the compute dtype.  w_OI: any float dtype, cast to it.
    Returns:
      [..., O] in x's dtype, accumulated in float32; weight gradients keep the float32 sum.
    """
    return dot(x, w_OI.astype(x.dtype), ((x.ndim - 1,), (1,))).astype(x.dtype)


def _linear_fwd(x: jax.Array, w_OI: jax.Array):
    return linear(x, w_OI), (x, w_OI)


def _linear_bwd(saved, g):
    x, w_OI = saved
    rows = tuple(range(x.ndim - 1))
    dx = dot(g, w_OI.astype(g.dtype), ((x.ndim - 1,), (0,))).astype(x.dtype)
    dw_OI = dot(g, x, (rows, rows)).astype(w_OI.dtype)  # float32 sums reach float32 weights unrounded
    return dx, dw_OI


linear.defvjp(_linear_fwd, _linear_bwd)
