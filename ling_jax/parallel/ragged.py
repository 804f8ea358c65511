"""Rows sent to the ranks of a mesh axis, a different number to each.

Legend: P ranks, R rows.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Routes(NamedTuple):
    """What this rank sends and gets; each int32 [P], entry p about rank p."""

    input_offsets: jax.Array  # first row, in this rank's operand, of what goes to p
    send_sizes: jax.Array  # rows that go to p
    output_offsets: jax.Array  # where they begin in p's output
    recv_sizes: jax.Array  # rows that come from p


def _emulated(operand, output, routes: Routes, axis: str):
    """Gathers everything and takes this rank's rows: exact, and as costly as it sounds."""
    me = jax.lax.axis_index(axis)
    operands_PR, all_routes = jax.lax.all_gather((operand, routes), axis)
    first_P, size_P = all_routes.output_offsets[:, me], all_routes.send_sizes[:, me]
    place_R = jnp.arange(output.shape[0])
    from_PR = (place_R >= first_P[:, None]) & (place_R < (first_P + size_P)[:, None])
    source_R = from_PR.argmax(0)
    row_R = place_R - first_P[source_R] + all_routes.input_offsets[source_R, me]
    rows = operands_PR[source_R, jnp.where(from_PR.any(0), row_R, 0)]
    return jnp.where(from_PR.any(0).reshape(-1, *[1] * (output.ndim - 1)), rows, output)


def _native(operand, output, routes: Routes, axis: str):
    return jax.lax.ragged_all_to_all(operand, output, *routes, axis_name=axis)


def ragged_all_to_all(operand: jax.Array, output: jax.Array, routes: Routes, axis: str) -> jax.Array:
    """`output` with the rows that the ranks of `axis` send to this one written into it.

    XLA:CPU has no such collective; programs lowered for it get an exact emulation fed with the same offsets.

    Args:
      operand, output: [R, ...] of one dtype and row shape; R may differ between the two.
    """
    branches = partial(_emulated, axis=axis), partial(_native, axis=axis)
    return jax.lax.platform_dependent(operand, output, routes, cpu=branches[0], default=branches[1])
