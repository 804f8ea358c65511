"""Matrix products and their precision.

On CPU a bfloat16 product that returns float32 is ten times faster than one that returns bfloat16.
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
    """`a` times `b` over the dims `contract`, accumulated and returned in float32."""
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision_of(a.dtype), preferred_element_type=jnp.float32
    )
