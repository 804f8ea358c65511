"""The routed experts' SwiGLU, whose gradients are written by hand.

With y = W_down a, a = silu(gate) * up and a row's scale s, the gradient of s is g . y = (W_down^T g) . a: the backward
pass needs no y, neither kept nor recomputed, and scales rows of width F instead of D.

Legend: N tokens, D hidden, K experts per token, E experts, F expert width, R rows sorted by expert.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ling_jax.kernels import blockwise
from ling_jax.kernels.blockwise import MasterWeight, quantise_tiles
from ling_jax.kernels.fp8 import BLOCK
from ling_jax.kernels.grouped import block_rows, grouped_product, grouped_weight_gradient
from ling_jax.kernels.rows import RowPlan, combine_rows, gather_rows, sum_choices, take_rows

Weights = tuple[Any, ...]  # gate and up [E, F, D], down [E, D, F]; arrays, or `MasterWeight` to train in FP8
Inner = tuple[jax.Array, jax.Array]  # gate and up [R, F]


def block_for(weights: Sequence[Any], num_rows: int, num_groups: int) -> int:
    """`block_rows`, or one tile of what is quantised along rows."""
    return BLOCK if any(isinstance(w, MasterWeight) for w in weights) else block_rows(num_rows, num_groups)


def _product(x_RI: jax.Array, w_EOI: Any, group_sizes_E: jax.Array, block: int, out_dim: int) -> jax.Array:
    if isinstance(w_EOI, MasterWeight):
        return blockwise.product(quantise_tiles(x_RI, 1), w_EOI.quantised, group_sizes_E, out_dim, x_RI.dtype)
    return grouped_product(x_RI, w_EOI, group_sizes_E, block, out_dim)


def _gradient(g_RO: jax.Array, x_RI: jax.Array, w_EOI: Any, group_sizes_E: jax.Array, block: int) -> Any:
    """Of the weight, in its dtype."""
    if isinstance(w_EOI, MasterWeight):
        return blockwise.gradients(g_RO, x_RI, w_EOI, group_sizes_E)
    return grouped_weight_gradient(g_RO, x_RI, group_sizes_E, block).astype(w_EOI.dtype)


def _gated(inner: Inner) -> jax.Array:
    gate_RF, up_RF = inner
    return jax.nn.silu(gate_RF) * up_RF


def swiglu(rows_RD: jax.Array, weights: Weights, group_sizes_E: jax.Array, block: int) -> tuple[jax.Array, Inner]:
    """[R, D]: each row through its expert; and (gate, up), which `weight_gradients` may be given.
    `group_sizes_E` and `block` as in `kernels.grouped`; spec 2.4."""
    gate_EFD, up_EFD, down_EDF = weights
    with jax.named_scope("experts"):
        inner = (
            _product(rows_RD, gate_EFD, group_sizes_E, block, 1),
            _product(rows_RD, up_EFD, group_sizes_E, block, 1),
        )
        return _product(_gated(inner), down_EDF, group_sizes_E, block, 1), inner


def weight_gradients(
    rows_RD: jax.Array,
    weights: Weights,
    group_sizes_E: jax.Array,
    block: int,
    g_RD: jax.Array,
    scale_R: jax.Array,
    inner: Inner | None = None,
) -> tuple[Weights, jax.Array, Inner]:
    """Of sum_r g_r . (scale_r y_r): gradients of the weights, of the scales [R], and those of (gate, up), from
    which `row_gradients` goes on; `inner` is recomputed if None."""
    gate_EFD, up_EFD, down_EDF = weights
    product = partial(_product, group_sizes_E=group_sizes_E, block=block)
    gradient = partial(_gradient, group_sizes_E=group_sizes_E, block=block)
    with jax.named_scope("experts"):
        if inner is None:
            inner = product(rows_RD, gate_EFD, out_dim=1), product(rows_RD, up_EFD, out_dim=1)
        gated_RF, to_inner = jax.vjp(_gated, inner)
        da_RF = product(g_RD, down_EDF, out_dim=2)
        dscale_R = (da_RF.astype(jnp.float32) * gated_RF.astype(jnp.float32)).sum(-1)

        def scaled(a_RF: jax.Array) -> jax.Array:
            return (a_RF * scale_R[:, None]).astype(a_RF.dtype)

        ddown_EDF = gradient(g_RD, scaled(gated_RF), down_EDF)
        dinner = to_inner(scaled(da_RF))[0]
        dgate_EFD, dup_EFD = (gradient(d, rows_RD, w) for d, w in zip(dinner, weights[:2], strict=True))
        return (dgate_EFD, dup_EFD, ddown_EDF), dscale_R, dinner


def row_gradients(dinner: Inner, weights: Weights, group_sizes_E: jax.Array, block: int) -> jax.Array:
    """[R, D], see `weight_gradients`."""
    with jax.named_scope("experts"):
        terms = [_product(d, w, group_sizes_E, block, 2) for d, w in zip(dinner, weights[:2], strict=True)]
        return terms[0] + terms[1]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def routed_swiglu(x_ND: jax.Array, scale_NK: jax.Array, weights: Weights, plan: RowPlan, block: int) -> jax.Array:
    """sum_k scale_k expert_k(x), [N, D] in x's dtype, of the experts that `plan` gives each token; `scale_NK` float32,
    the sum float32 (spec 2.5)."""
    return _routed_fwd(x_ND, scale_NK, weights, plan, block)[0]


def _routed_fwd(x_ND, scale_NK, weights, plan, block):
    with jax.named_scope("dispatch"):
        rows_RD = gather_rows(x_ND, plan)
    y_RD, inner = swiglu(rows_RD, weights, plan.group_sizes_E, block)
    with jax.named_scope("combine"):
        y_ND = combine_rows(y_RD, scale_NK, plan)
    kept = tuple(w.hollow() if isinstance(w, MasterWeight) else w for w in weights)
    return y_ND, (rows_RD, inner, scale_NK, kept, plan)


def _routed_bwd(block, saved, g_ND):
    rows_RD, inner, scale_NK, weights, plan = saved
    with jax.named_scope("combine"):
        g_RD = gather_rows(g_ND, plan)
        scale_R = take_rows(scale_NK.reshape(-1), plan.pair_of_R)
    sizes_E = plan.group_sizes_E
    dweights, dscale_R, dinner = weight_gradients(rows_RD, weights, sizes_E, block, g_RD, scale_R, inner)
    drows_RD = row_gradients(dinner, weights, sizes_E, block)
    with jax.named_scope("dispatch"):
        dx_ND = sum_choices(drows_RD, plan.row_of_NK).astype(g_ND.dtype)
        return dx_ND, take_rows(dscale_R, plan.row_of_NK), dweights, None


routed_swiglu.defvjp(_routed_fwd, _routed_bwd)
