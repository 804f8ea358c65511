"""Matrix products with weights in HF's [out, in] orientation.

For CPU they are C++, which reads a layer's weights where they lie in the stack of all layers, few rows at the pace of
memory, and needs no operand transposed. For the rest they are XLA's.

Legend: R rows, I inputs, O outputs, L layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ling_jax.kernels import native
from ling_jax.kernels.choose import for_cpu
from ling_jax.kernels.precision import dot


def _in_cpp(x_RI: jax.Array, w_LOI: jax.Array, layer: jax.Array, *, out_dim: int) -> jax.Array:
    return native.product(x_RI, w_LOI, jnp.full(1, x_RI.shape[0]), layer, out_dim=out_dim)


def _in_xla(x_RI: jax.Array, w_LOI: jax.Array, layer: jax.Array, *, out_dim: int) -> jax.Array:
    w_OI = jax.lax.dynamic_index_in_dim(w_LOI, layer, keepdims=False)
    return dot(x_RI, w_OI.astype(x_RI.dtype), ((1,), (2 - out_dim,))).astype(x_RI.dtype)


def _gradient_in_cpp(g_RO: jax.Array, x_RI: jax.Array) -> jax.Array:
    return native.weight_gradient(g_RO, x_RI, jnp.full(1, x_RI.shape[0]))[0]


def _gradient_in_xla(g_RO: jax.Array, x_RI: jax.Array) -> jax.Array:
    """XLA:CPU writes the first operand once more, transposed: it is to be the narrower one, and the barrier keeps XLA
    from turning that round again."""
    if g_RO.shape[1] <= x_RI.shape[1]:
        return dot(g_RO, x_RI, ((0,), (0,)))
    return jax.lax.optimization_barrier(dot(x_RI, g_RO, ((0,), (0,)))).T


_cpu_product = native.or_else("linear", _in_cpp, _in_xla)
_cpu_gradient = native.or_else("linear_gradient", _gradient_in_cpp, _gradient_in_xla)


def _known(*arrays: jax.Array) -> bool:
    """Whether this is C++'s to compute."""
    return for_cpu() and all(a.dtype in native.DTYPES and a.size for a in arrays)


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _product(x: jax.Array, w_LOI: jax.Array, layer: jax.Array | int, out_dim: int) -> jax.Array:
    y = _cpu_product(_rows(x), w_LOI, jnp.asarray(layer, jnp.int32), out_dim=out_dim)
    return checkpoint_name(y.reshape(*x.shape[:-1], -1), "product")


def _forward(x: jax.Array, w_OI: jax.Array) -> jax.Array:
    if _known(x, w_OI):
        return _product(x, w_OI[None], 0, 1)
    return dot(x, w_OI.astype(x.dtype), ((x.ndim - 1,), (1,))).astype(x.dtype)


@jax.custom_vjp
def linear(x: jax.Array, w_OI: jax.Array) -> jax.Array:
    """x w^T.

    Args:
      x: [..., I], the compute dtype.  w_OI: any float dtype, cast to it.
    Returns:
      [..., O] in x's dtype, accumulated in float32; weight gradients keep the float32 sum.
    """
    return _forward(x, w_OI)


def _linear_fwd(x: jax.Array, w_OI: jax.Array) -> tuple[jax.Array, Any]:
    return _forward(x, w_OI), (x, w_OI)  # not `linear`, into which no policy of jax.checkpoint looks


def _linear_bwd(saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w_OI = saved
    if _known(x, w_OI):
        dw_OI = _cpu_gradient(_rows(g), _rows(x))
        return _product(g, w_OI[None], 0, 2), dw_OI.astype(w_OI.dtype)
    dx = dot(g, w_OI.astype(g.dtype), ((x.ndim - 1,), (0,))).astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    return dx, dot(g, x, (rows, rows)).astype(w_OI.dtype)  # float32 sums reach float32 weights unrounded


linear.defvjp(_linear_fwd, _linear_bwd)


def linear_in_float32(x: jax.Array, w_OI: jax.Array) -> jax.Array:
    """`linear` whose result is float32, of which nothing is rounded to x's dtype."""
    if _known(x, w_OI) and (x.dtype == jnp.float32 or w_OI.dtype == x.dtype):
        return linear(x.astype(jnp.float32), w_OI)
    return dot(x, w_OI.astype(x.dtype), ((x.ndim - 1,), (1,)))


def linear_of_layer(x: jax.Array, w_LOI: jax.Array, layer: jax.Array) -> jax.Array:
    """`linear` with one layer of a stack of weights; not differentiable."""
    if _known(x, w_LOI):
        return _product(x, w_LOI, layer, 1)
    return linear(x, jax.lax.dynamic_index_in_dim(w_LOI, layer, keepdims=False))
