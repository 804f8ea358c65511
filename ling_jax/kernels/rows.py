"""Rows sorted by group: where each token's pairs go, there and back.

Legend: N tokens, D hidden, E groups (experts), K choices per token, R rows (pairs, each group's padded to whole
blocks).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ling_jax.kernels.grouped import padded_rows


class RowPlan(NamedTuple):
    """Where each (token, choice) pair goes among the sorted rows, and back."""

    ids_NK: jax.Array  # int32, of which it is made; E or more for none
    row_of_NK: jax.Array  # int32; R for a pair of no group
    pair_of_R: jax.Array  # int32, n * K + k; N * K for a row that only pads
    group_sizes_E: jax.Array  # int32 rows of each expert, padding included


def plan_rows(ids_NK: jax.Array, num_experts: int, block: int) -> RowPlan:
    """Sorts pairs by expert, tokens in order within each, by counting: no sort is run, nothing is dropped.

    A choice of `num_experts` is none: it gets no row.
    """
    tokens, choices = ids_NK.shape
    chosen_NE = (ids_NK[:, :, None] == jnp.arange(num_experts)).any(1)
    upto_NE = jnp.cumsum(chosen_NE, axis=0, dtype=jnp.int32)
    group_sizes_E = -(-upto_NE[-1] // block) * block
    starts_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    pairs = tokens * choices
    rows = padded_rows(pairs, num_experts, block)
    row_of_NK = jnp.take_along_axis(upto_NE - 1 + starts_E, ids_NK, axis=1, mode="fill", fill_value=rows)
    pair_of_R = (
        jnp.full(rows, pairs, jnp.int32).at[row_of_NK.reshape(-1)].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop")
    )
    return RowPlan(ids_NK, row_of_NK, pair_of_R, group_sizes_E)


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index], zeros for an index past the end."""
    return x.at[index].get(mode="fill", fill_value=0)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def table_rows(table_VD: jax.Array, index: jax.Array, dtype: Any) -> jax.Array:
    """`take_rows` of a weight, in `dtype`. The gradient is summed in float32 whatever the weight is: a token may be in
    a batch a thousand times, and a bfloat16 sum stands still once it is 256 times what is added."""
    return take_rows(table_VD, index).astype(dtype)


def _table_rows_fwd(table_VD: jax.Array, index: jax.Array, dtype: jnp.dtype):
    return table_rows(table_VD, index, dtype), (index, table_VD[:, :0])  # of the table, only its length and dtype


def _table_rows_bwd(dtype: jnp.dtype, saved: Any, g: jax.Array):
    index, hollow_V0 = saved
    zeros_VD = jnp.zeros((hollow_V0.shape[0], g.shape[-1]), jnp.float32)
    return zeros_VD.at[index].add(g.astype(jnp.float32), mode="drop").astype(hollow_V0.dtype), None


table_rows.defvjp(_table_rows_fwd, _table_rows_bwd)


def gather_rows(x_ND: jax.Array, plan: RowPlan) -> jax.Array:
    """[R, D]: each row its token's state, zeros where a row only pads. `sum_choices` is its transpose."""
    return take_rows(x_ND, plan.pair_of_R // plan.row_of_NK.shape[1])


def sum_choices(y_RD: jax.Array, row_of_NK: jax.Array, weights_NK: jax.Array | None = None) -> jax.Array:
    """float32 [N, D]: the sum of each token's rows, weighted if asked."""
    total = 0.0
    for k in range(row_of_NK.shape[1]):  # unrolled: a third of the time of one gather and a sum
        term = take_rows(y_RD, row_of_NK[:, k]).astype(jnp.float32)
        total += term if weights_NK is None else term * weights_NK[:, k, None]
    return jnp.asarray(total)


def combine_rows(y_RD: jax.Array, weights_NK: jax.Array, plan: RowPlan) -> jax.Array:
    """[N, D]: each token's rows, weighted and summed in float32, in y's dtype (spec 2.5)."""
    return sum_choices(y_RD, plan.row_of_NK, weights_NK).astype(y_RD.dtype)
