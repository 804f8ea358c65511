"""Matrix products, their precision, and the switches of JAX under which they mean what they say.

On CPU a bfloat16 product that returns float32 is ten times faster than one that returns bfloat16.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

F = TypeVar("F", bound=Callable[..., Any])


def under_own_switches(f: F) -> F:
    """`f` under JAX's defaults for 64-bit numbers and for promotions of ranks and dtypes, whatever its caller set."""

    @functools.wraps(f)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with jax.enable_x64(False), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return f(*args, **kwargs)

    decorated: Any = wrapped
    return decorated


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
