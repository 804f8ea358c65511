"""The routed experts' SwiGLU, whose gradients are written by hand.

With y = W_down a, a = silu(gate) * up and a row's scale s, the gradient of s is g . y = (W_down^T g) . a: the backward
pass needs no y, neither kept nor recomputed, and scales rows of width F instead of D.

Legend: N tokens, D hidden, K experts per token, E experts, F expert width, R rows sorted by expert.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ling_jax.kernels import blockwise, native
from ling_jax.kernels.blockwise import MasterWeight, quantise_tiles
from ling_jax.kernels.fp8 import BLOCK
from ling_jax.kernels.grouped import LayerWeight, block_rows, grouped_product, grouped_weight_gradient
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


def _forward(x_ND, scale_NK, weights: Weights, plan: RowPlan, block: int) -> tuple[jax.Array, Inner]:
    with jax.named_scope("dispatch"):
        rows_RD = gather_rows(x_ND, plan)
    y_RD, inner = swiglu(rows_RD, weights, plan.group_sizes_E, block)
    with jax.named_scope("combine"):
        return combine_rows(y_RD, scale_NK, plan), inner


def _backward(
    x_ND, scale_NK, weights: Weights, plan: RowPlan, inner: Inner, g_ND, block: int
) -> tuple[jax.Array, jax.Array, Weights]:
    """Of x, scales and weights. Rows are gathered again: kept, they would be the largest arrays of a layer."""
    sizes_E = plan.group_sizes_E
    with jax.named_scope("dispatch"):
        rows_RD = gather_rows(x_ND, plan)
    with jax.named_scope("combine"):
        g_RD = gather_rows(g_ND, plan)
        scale_R = take_rows(scale_NK.reshape(-1), plan.pair_of_R)
    dweights, dscale_R, dinner = weight_gradients(rows_RD, weights, sizes_E, block, g_RD, scale_R, inner)
    drows_RD = row_gradients(dinner, weights, sizes_E, block)
    with jax.named_scope("dispatch"):
        dx_ND = sum_choices(drows_RD, plan.row_of_NK).astype(g_ND.dtype)
        return dx_ND, take_rows(dscale_R, plan.row_of_NK), dweights


# Primitives take arrays: x, scales, three stacks of weights and the layer; the plan. The backward ones then gate, up
# and g, and the stacks that the layer's gradients are written into, which they return; these may be of the one layer.


def _cut_out(stacks: Sequence[jax.Array], layer: jax.Array) -> Weights:
    return tuple(LayerWeight(stack, layer).own() for stack in stacks)


def _put(into: Sequence[jax.Array], parts: Sequence[jax.Array], layer: jax.Array) -> Weights:
    """`parts` in their places in stacks."""
    pairs = zip(into, parts, strict=True)
    return tuple(jax.lax.dynamic_update_index_in_dim(a, d.astype(a.dtype), layer, 0) for a, d in pairs)


def _forward_in_cpp(x_ND, scale_NK, gate_LEFD, up_LEFD, down_LEDF, layer, ids_NK, _, pair_of_R, _sizes_E, block):
    with jax.named_scope("experts"):
        return native.experts(x_ND, scale_NK, ids_NK, gate_LEFD, up_LEFD, down_LEDF, layer, rows=pair_of_R.size)


def _forward_in_xla(x_ND, scale_NK, gate_LEFD, up_LEFD, down_LEDF, layer, *plan, block):
    weights = _cut_out((gate_LEFD, up_LEFD, down_LEDF), layer)
    y_ND, inner = _forward(x_ND, scale_NK, weights, RowPlan(*plan), block)
    return y_ND, *inner


def _backward_in_cpp(x_ND, scale_NK, gate_LEFD, up_LEFD, down_LEDF, layer, ids_NK, *rest, block):
    gate_RF, up_RF, g_ND, *into = rest[3:]
    stacks = gate_LEFD, up_LEFD, down_LEDF
    wide = all(a.dtype == jnp.float32 for a in into)
    to = into if wide else [jnp.zeros((1, *a.shape[1:]), jnp.float32) for a in into]
    with jax.named_scope("experts"):
        dx_ND, dscale_NK, *new = native.experts_gradients(
            x_ND, scale_NK, ids_NK, *stacks, layer, gate_RF, up_RF, g_ND, *to
        )
    return dx_ND, dscale_NK, *(new if wide else _put(into, [d[0] for d in new], layer))


def _backward_in_xla(x_ND, scale_NK, gate_LEFD, up_LEFD, down_LEDF, layer, *rest, block):
    plan, inner, g_ND, into = RowPlan(*rest[:4]), rest[4:6], rest[6], rest[7:]
    weights = _cut_out((gate_LEFD, up_LEFD, down_LEDF), layer)
    dx_ND, dscale_NK, dweights = _backward(x_ND, scale_NK, weights, plan, inner, g_ND, block)
    return dx_ND, dscale_NK, *_put(into, dweights, layer)


_cpu_forward = native.or_else("routed_swiglu", _forward_in_cpp, _forward_in_xla)
_cpu_backward = native.or_else("routed_swiglu_gradients", _backward_in_cpp, _backward_in_xla)


def _zeros(like: jax.Array, *, number: int) -> jax.Array:
    return jnp.zeros_like(like)


_cpu_empty = native.or_else("empty", native.empty, _zeros)


def _unwritten(like: Sequence[jax.Array]) -> list[jax.Array]:
    """Arrays that are all to be written; on CPU nothing fills them before."""
    return [
        jax.lax.platform_dependent(a, cpu=partial(_cpu_empty, number=i), default=partial(_zeros, number=i))
        for i, a in enumerate(like)
    ]


def _stacks(weights: Weights) -> tuple[jax.Array, ...]:
    """Three stacks of layers and the layer."""
    if isinstance(weights[0], LayerWeight):
        return *(w.stack_LEOI for w in weights), weights[0].layer
    return *(w[None] for w in weights), jnp.zeros((), jnp.int32)


@jax.custom_vjp
def after_all(x: Any, through: Any) -> Any:
    """`x`; `through` is what came through all layers. Gradients go the other way, into memory that nothing has filled:
    every layer writes its part."""
    return x


def _after_all_bwd(through, g):
    return g, jax.tree.unflatten(jax.tree.structure(through), _unwritten(jax.tree.leaves(through)))


after_all.defvjp(lambda x, through: (x, through), _after_all_bwd)


def _by_platform(in_cpp: Callable[..., Any], in_xla: Callable[..., Any], block: int, *args: jax.Array) -> Any:
    known = args[0].dtype in native.DTYPES and args[2].dtype in native.DTYPES and len({w.dtype for w in args[2:5]}) == 1
    cpu, default = partial(in_cpp if known else in_xla, block=block), partial(in_xla, block=block)
    return jax.lax.platform_dependent(*args, cpu=cpu, default=default)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def routed_swiglu(
    x_ND: jax.Array, scale_NK: jax.Array, weights: Weights, plan: RowPlan, block: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """sum_k scale_k expert_k(x), [N, D] in x's dtype, of the experts that `plan` gives each token; `scale_NK` float32,
    the sum float32 (spec 2.5). And what goes `through` weights that train in their stacks, for the next layer."""
    return _routed_fwd(x_ND, scale_NK, weights, plan, block)[0]


def _routed_fwd(x_ND, scale_NK, weights, plan, block):
    if any(isinstance(w, MasterWeight) or (isinstance(w, LayerWeight) and w.through_LEOI is None) for w in weights):
        y_ND, inner = _forward(x_ND, scale_NK, weights, plan, block)
        kept = tuple(w.hollow() if isinstance(w, MasterWeight) else w for w in weights)
        return (y_ND, ()), (x_ND, scale_NK, kept, plan, inner)
    stacks = _stacks(weights)
    through: Any = tuple(w.through_LEOI for w in weights if isinstance(w, LayerWeight))
    y_ND, *inner = _by_platform(_cpu_forward, _forward_in_xla, block, x_ND, scale_NK, *stacks, *plan)
    return (y_ND, through), (x_ND, scale_NK, stacks, plan, tuple(inner))


def _routed_bwd(block, saved, g):
    (x_ND, scale_NK, weights, plan, inner), (g_ND, into) = saved, g
    if any(isinstance(w, MasterWeight) for w in weights):
        return *_backward(x_ND, scale_NK, weights, plan, inner, g_ND, block), None
    to = into or _unwritten([w[:1] for w in weights[:3]])
    args = x_ND, scale_NK, *weights, *plan, *inner, g_ND, *to
    dx_ND, dscale_NK, *new = _by_platform(_cpu_backward, _backward_in_xla, block, *args)
    nothing: Any = None  # for what is only read
    return dx_ND, dscale_NK, tuple(LayerWeight(nothing, nothing, d) if into else d[0] for d in new), None


routed_swiglu.defvjp(_routed_fwd, _routed_bwd)
