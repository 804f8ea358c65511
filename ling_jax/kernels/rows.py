"""Rows sorted by group: where each token's pairs go, there and back.

Legend: N tokens, D hidden, E groups (experts), K choices per token, R rows (pairs, each group's padded to whole
blocks).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ling_jax.kernels.grouped import padded_rows


class RowPlan(NamedTuple):
    """Where each (token, choice) pair goes among the sorted rows, and back."""

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
    return RowPlan(row_of_NK, pair_of_R, group_sizes_E)


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index], zeros for an index past the end."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def gather_rows(x_ND: jax.Array, plan: RowPlan) -> jax.Array:
    """[R, D]: each row its token's state, zeros where a row only pads. The backward pass gathers too:
    XLA's transpose of a gather is a slow scatter."""
    return take_rows(x_ND, plan.pair_of_R // plan.row_of_NK.shape[1])


def _gather_fwd(x_ND, plan):
    return gather_rows(x_ND, plan), plan


def _sum_choices(y_RD, row_of_NK, weights_NK=None):
    total = 0.0
    for k in range(row_of_NK.shape[1]):  # unrolled: a third of the time of one gather and a sum
        term = take_rows(y_RD, row_of_NK[:, k]).astype(jnp.float32)
        total += term if weights_NK is None else term * weights_NK[:, k, None]
    return jnp.asarray(total)


def _gather_bwd(plan, g_RD):
    return _sum_choices(g_RD, plan.row_of_NK).astype(g_RD.dtype), None


gather_rows.defvjp(_gather_fwd, _gather_bwd)


@jax.custom_vjp
def combine_rows(y_RD: jax.Array, weights_NK: jax.Array, plan: RowPlan) -> jax.Array:
    """[N, D]: each token's rows, weighted and summed in float32, in y's dtype (spec 2.5)."""
    return _sum_choices(y_RD, plan.row_of_NK, weights_NK).astype(y_RD.dtype)


def _combine_fwd(y_RD, weights_NK, plan):
    return combine_rows(y_RD, weights_NK, plan), (y_RD, weights_NK, plan)


def _combine_bwd(saved, g_ND):
    y_RD, weights_NK, plan = saved
    choices = weights_NK.shape[1]
    weights_R = take_rows(weights_NK.reshape(-1), plan.pair_of_R)
    dy_RD = (take_rows(g_ND, plan.pair_of_R // choices) * weights_R[:, None]).astype(y_RD.dtype)
    g32_ND = g_ND.astype(jnp.float32)
    dw = [(take_rows(y_RD, plan.row_of_NK[:, k]).astype(jnp.float32) * g32_ND).sum(-1) for k in range(choices)]
    return dy_RD, jnp.stack(dw, axis=1), None


combine_rows.defvjp(_combine_fwd, _combine_bwd)
