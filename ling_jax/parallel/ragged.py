"""Rows sent to the ranks of a mesh axis, a different number to each.

Legend: P ranks, R rows, s slices that go to each rank.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ling_jax.kernels.choose import by_platform


class Routes(NamedTuple):
    """The rows that this rank sends and gets; each int32 [P * s], entries p * s to p * s + s - 1 about rank p."""

    input_offsets: jax.Array  # first row, in this rank's operand, of a slice that goes to p
    send_sizes: jax.Array  # its rows
    output_offsets: jax.Array  # where it begins in p's output
    recv_sizes: jax.Array  # rows of a slice that comes from p


def _emulated(operand, output, routes: Routes, axis: str):
    """Gathers everything and takes this rank's rows: exact, and as costly as it sounds."""
    me, ranks = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    operands_PR, all_routes = jax.lax.all_gather((operand, routes), axis)
    slices = routes.send_sizes.size // ranks

    def to_me(a: jax.Array) -> jax.Array:  # [P * s]
        return a.reshape(ranks, ranks, slices)[:, me].reshape(-1)

    first, size, begin = map(to_me, (all_routes.output_offsets, all_routes.send_sizes, all_routes.input_offsets))
    place_R = jnp.arange(output.shape[0])
    from_R = (place_R >= first[:, None]) & (place_R < (first + size)[:, None])  # [P * s, R]
    slice_R, any_R = from_R.argmax(0), from_R.any(0)
    row_R = jnp.where(any_R, place_R - first[slice_R] + begin[slice_R], 0)
    rows = operands_PR[slice_R // slices, row_R]
    return jnp.where(any_R.reshape(-1, *[1] * (output.ndim - 1)), rows, output)


def _native(operand, output, routes: Routes, axis: str):
    return jax.lax.ragged_all_to_all(operand, output, *routes, axis_name=axis)


def ragged_all_to_all(operand: jax.Array, output: jax.Array, routes: Routes, axis: str) -> jax.Array:
    """`output` with the rows that the ranks of `axis` send to this one written into it.

    XLA:CPU has no such collective; programs lowered for it get an exact emulation fed with the same offsets.

    Args:
      operand, output: [R, ...] of one dtype and row shape; R may differ between the two.
    """
    return by_platform(operand, output, routes, cpu=partial(_emulated, axis=axis), rest=partial(_native, axis=axis))
