"""The routed experts' SwiGLU, whose gradients are written by hand.

With y = W_down a, a = silu(gate) * up and a row's scale s, the gradient of s is g . y = (W_down^T g) . a: the backward
pass needs no y, neither kept nor recomputed, and scales rows of width F instead of D.

Legend: N tokens, D hidden, K experts per token, E experts, F expert width, R rows sorted by expert.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ling_jax.kernels import native
from ling_jax.kernels.choose import by_platform, for_cpu
from ling_jax.kernels.rows import RowPlan, combine_rows, gather_rows, sum_choices, take_rows
from ling_jax.kernels.weight import Carrier, LayerWeight, PlainWeight, StackedLayer, Weight, as_weight

Projections = tuple[Weight, ...]  # gate and up [E, F, D], down [E, D, F]
Stacks = tuple[jax.Array, ...]  # of all layers, in the same order
Inner = tuple[jax.Array, jax.Array]  # gate and up [R, F]


def block_for(weights: Sequence[Weight], num_rows: int, num_experts: int) -> int:
    """Rows that each expert's are padded to a multiple of."""
    return max(weight.block(num_rows, num_experts) for weight in weights)


def _gated(inner: Inner) -> jax.Array:
    gate_RF, up_RF = inner
    return jax.nn.silu(gate_RF) * up_RF


def swiglu(rows_RD: jax.Array, weights: Projections, group_sizes_E: jax.Array, block: int) -> tuple[jax.Array, Inner]:
    """[R, D]: each row through its expert; and (gate, up), which `weight_gradients` may be given.
    `group_sizes_E` and `block` as in `kernels.grouped`; spec 2.4."""
    gate_EFD, up_EFD, down_EDF = weights
    with jax.named_scope("experts"):
        inner = (
            gate_EFD.product(rows_RD, group_sizes_E, block, 1),
            up_EFD.product(rows_RD, group_sizes_E, block, 1),
        )
        return down_EDF.product(_gated(inner), group_sizes_E, block, 1), inner


def weight_gradients(
    rows_RD: jax.Array,
    weights: Projections,
    group_sizes_E: jax.Array,
    block: int,
    g_RD: jax.Array,
    scale_R: jax.Array,
    inner: Inner | None = None,
) -> tuple[Projections, jax.Array, Inner]:
    """Gradients of sum_r g_r . (scale_r y_r): those of the weights, of the scales [R], and of (gate, up), from
    which `row_gradients` goes on; `inner` is recomputed if None."""
    gate_EFD, up_EFD, down_EDF = weights
    with jax.named_scope("experts"):
        if inner is None:
            inner = (
                gate_EFD.product(rows_RD, group_sizes_E, block, 1),
                up_EFD.product(rows_RD, group_sizes_E, block, 1),
            )
        gated_RF, to_inner = jax.vjp(_gated, inner)
        da_RF = down_EDF.product(g_RD, group_sizes_E, block, 2)
        dscale_R = (da_RF.astype(jnp.float32) * gated_RF.astype(jnp.float32)).sum(-1)

        def scaled(a_RF: jax.Array) -> jax.Array:
            return (a_RF * scale_R[:, None]).astype(a_RF.dtype)

        ddown_EDF = down_EDF.gradient(g_RD, scaled(gated_RF), group_sizes_E, block)
        dinner = to_inner(scaled(da_RF))[0]
        dgate_EFD, dup_EFD = (
            w.gradient(d, rows_RD, group_sizes_E, block) for d, w in zip(dinner, weights[:2], strict=True)
        )
        return (dgate_EFD, dup_EFD, ddown_EDF), dscale_R, dinner


def row_gradients(dinner: Inner, weights: Projections, group_sizes_E: jax.Array, block: int) -> jax.Array:
    """[R, D], see `weight_gradients`."""
    with jax.named_scope("experts"):
        terms = [w.product(d, group_sizes_E, block, 2) for d, w in zip(dinner, weights[:2], strict=True)]
        return terms[0] + terms[1]


def _forward(
    x_ND: jax.Array, scale_NK: jax.Array, weights: Projections, plan: RowPlan, block: int
) -> tuple[jax.Array, Inner]:
    with jax.named_scope("dispatch"):
        rows_RD = gather_rows(x_ND, plan)
    y_RD, inner = swiglu(rows_RD, weights, plan.group_sizes_E, block)
    with jax.named_scope("combine"):
        return combine_rows(y_RD, scale_NK, plan), inner


def _backward(
    x_ND: jax.Array,
    scale_NK: jax.Array,
    weights: Projections,
    plan: RowPlan,
    inner: Inner,
    g_ND: jax.Array,
    block: int,
) -> tuple[jax.Array, jax.Array, Projections]:
    """Gradients of x, scales and weights. Rows are gathered again: kept, they would be the largest arrays of a
    layer."""
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


# All three products at once, with one layer of three stacks. Gradients of weights are written into the layer's places
# in three other stacks, which may be of that one layer. So is, on CPU, what the backward pass needs of gate and up: in
# stacks of all layers that come with the weights (`kernels.weight.Carrier`), of this layer, or of no rows at all.


class Saved(NamedTuple):
    """The arrays that the backward pass needs: `weights`, or where one kernel computes everything `stacks` and
    `layer`."""

    x_ND: jax.Array
    scale_NK: jax.Array
    weights: Projections
    stacks: Stacks
    layer: jax.Array | None
    plan: RowPlan
    inner: Inner | None  # None: the carriers have it; in stacks [1, R, F] if they are of a CPU's kernel


def _layer_of(stacks: Stacks, layer: jax.Array) -> Projections:
    return tuple(PlainWeight(jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)) for stack in stacks)


def _put(into: Stacks, parts: Sequence[jax.Array], layer: jax.Array) -> Stacks:
    """`parts` in their places in stacks."""
    pairs = zip(into, parts, strict=True)
    return tuple(jax.lax.dynamic_update_index_in_dim(a, d.astype(a.dtype), layer, 0) for a, d in pairs)


def _forward_in_xla(
    x_ND: jax.Array, scale_NK: jax.Array, stacks: Stacks, layer: jax.Array, plan: RowPlan, *, block: int
) -> tuple[jax.Array, Inner]:
    return _forward(x_ND, scale_NK, _layer_of(stacks, layer), plan, block)


def _backward_in_xla(
    saved: Saved, inner: Inner, g_ND: jax.Array, into: Stacks, *, block: int
) -> tuple[jax.Array, jax.Array, Stacks]:
    x_ND, scale_NK, _, stacks, layer, plan, _ = saved
    assert layer is not None
    weights = _layer_of(stacks, layer)
    dx_ND, dscale_NK, dweights = _backward(x_ND, scale_NK, weights, plan, inner, g_ND, block)
    return dx_ND, dscale_NK, _put(into, jax.tree.leaves(dweights), layer)


def _forward_in_cpp(
    x_ND: jax.Array, scale_NK: jax.Array, stacks: Stacks, layer: jax.Array, plan: RowPlan, kept: Inner, *, block: int
) -> tuple[jax.Array, Inner]:
    with jax.named_scope("experts"):
        y_ND, *inner = native.experts(x_ND, scale_NK, plan.ids_NK, *stacks, layer, *kept)
        return y_ND, (inner[0], inner[1])


def _forward_without_cpp(
    x_ND: jax.Array, scale_NK: jax.Array, stacks: Stacks, layer: jax.Array, plan: RowPlan, kept: Inner, *, block: int
) -> tuple[jax.Array, Inner]:
    weights = _layer_of(stacks, layer)
    if block == 1:  # few rows: no layer is cut out whole
        weights = tuple(LayerWeight(PlainWeight(stack), layer) for stack in stacks)
    y_ND, inner = _forward(x_ND, scale_NK, weights, plan, block)
    if not kept[0].shape[1]:
        return y_ND, kept
    gate_LRF, up_LRF = _put(kept, inner, layer)
    return y_ND, (gate_LRF, up_LRF)


def _backward_in_cpp(
    saved: Saved, kept: Inner, g_ND: jax.Array, into: Stacks, *, block: int
) -> tuple[jax.Array, jax.Array, Stacks]:
    x_ND, scale_NK, _, stacks, layer, plan, _ = saved
    assert layer is not None
    wide = all(a.dtype == jnp.float32 for a in into)
    to = into if wide else tuple(jnp.zeros((1, *a.shape[1:]), jnp.float32) for a in into)
    with jax.named_scope("experts"):
        args = x_ND, scale_NK, plan.ids_NK, *stacks, layer, *kept, g_ND
        dx_ND, dscale_NK, *new = native.experts_gradients(*args, *to)
    return dx_ND, dscale_NK, tuple(new) if wide else _put(into, [d[0] for d in new], layer)


def _backward_without_cpp(
    saved: Saved, kept: Inner, g_ND: jax.Array, into: Stacks, *, block: int
) -> tuple[jax.Array, jax.Array, Stacks]:
    assert saved.layer is not None
    inner = tuple(jax.lax.dynamic_index_in_dim(a, saved.layer, keepdims=False) for a in kept)
    return _backward_in_xla(saved, (inner[0], inner[1]), g_ND, into, block=block)


_cpu_forward = native.or_else("routed_swiglu", _forward_in_cpp, _forward_without_cpp)
_cpu_backward = native.or_else("routed_swiglu_gradients", _backward_in_cpp, _backward_without_cpp)


def _in_cpp(x_ND: jax.Array, stacks: Stacks) -> bool:
    """Whether this is C++'s to compute."""
    one_dtype = len({a.dtype for a in stacks}) == 1
    return for_cpu() and one_dtype and x_ND.dtype in native.DTYPES and stacks[0].dtype in native.DTYPES


def _zeros(like: jax.Array, *, number: int) -> jax.Array:
    return jnp.zeros_like(like)


_cpu_empty = native.or_else("empty", native.empty, _zeros)


def unwritten(like: Sequence[Any], first: int = 0) -> Stacks:
    """Arrays that are all to be written; on CPU nothing fills them before. They are numbered from `first` on: those of
    one shape with one number are one memory."""
    return tuple(
        by_platform(a, cpu=partial(_cpu_empty, number=i), rest=partial(_zeros, number=i))
        for i, a in enumerate(like, first)
    )


@jax.custom_vjp
def gradients_start_here(x: Any, carriers: Any) -> Any:
    """`x`. `carriers` are what came through all layers with `LayerWeight`s: their gradients begin here, as memory that
    nothing has filled, and on the way back every layer writes its part. What they kept goes back as it is, in the place
    of a gradient."""
    return x


def _gradients_start(carriers: Any, g: Any) -> tuple[Any, Any]:
    leaves, tree = jax.tree.flatten(carriers, is_leaf=lambda leaf: isinstance(leaf, Carrier))
    starts = unwritten([carrier.stack_LEOI for carrier in leaves])
    pairs = zip(leaves, starts, strict=True)
    return g, jax.tree.unflatten(tree, [carrier._replace(stack_LEOI=start) for carrier, start in pairs])


gradients_start_here.defvjp(lambda x, carriers: (x, carriers), _gradients_start)


def routed_swiglu(
    x_ND: jax.Array, scale_NK: jax.Array, weights: Sequence[Any], plan: RowPlan, block: int
) -> tuple[jax.Array, tuple[Carrier, ...]]:
    """sum_k scale_k expert_k(x), [N, D] in x's dtype, of the experts that `plan` gives each token; `scale_NK` float32,
    the sum float32 (spec 2.5). And the carriers of `LayerWeight`s that train, for the next layer.

    Args:
      weights: gate, up and down of all experts, whatever `kernels.weight.as_weight` takes.
    """
    return _routed(x_ND, scale_NK, tuple(map(as_weight, weights)), plan, block)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _routed(
    x_ND: jax.Array, scale_NK: jax.Array, weights: Projections, plan: RowPlan, block: int
) -> tuple[jax.Array, tuple[Carrier, ...]]:
    return _run(x_ND, scale_NK, weights, plan, block, keep=False)[0]


def _run(
    x_ND: jax.Array, scale_NK: jax.Array, weights: Projections, plan: RowPlan, block: int, *, keep: bool
) -> tuple[Any, Saved]:
    """The results, and what the backward pass needs if it is to `keep` it."""
    found = [weight.in_stack() for weight in weights]
    in_stacks: list[StackedLayer] = [stack for stack in found if stack is not None]
    if len(in_stacks) < len(weights):
        y_ND, inner = _forward(x_ND, scale_NK, weights, plan, block)
        return (y_ND, ()), Saved(x_ND, scale_NK, tuple(w.kept() for w in weights), (), None, plan, inner)
    stacks, layer = tuple(stack.array_LEOI for stack in in_stacks), in_stacks[0].layer
    carriers = tuple(stack.carrier for stack in in_stacks if stack.carrier is not None)
    if not _in_cpp(x_ND, stacks):
        y_ND, inner = _forward_in_xla(x_ND, scale_NK, stacks, layer, plan, block=block)
        return (y_ND, carriers), Saved(x_ND, scale_NK, (), stacks, layer, plan, inner)
    of_all = [carrier.kept_LRO for carrier in carriers if carrier.kept_LRO is not None] if keep else []
    room = [jnp.zeros((1, plan.pair_of_R.size if keep else 0, stacks[0].shape[2]), x_ND.dtype)] * 2
    kept = of_all or (unwritten(room) if keep else room)
    y_ND, inner = _cpu_forward(x_ND, scale_NK, stacks, layer, plan, (kept[0], kept[1]), block=block)
    if of_all:
        pairs = zip(carriers, (*inner, None), strict=True)
        carriers, inner = tuple(carrier._replace(kept_LRO=new) for carrier, new in pairs), None
    return (y_ND, carriers), Saved(x_ND, scale_NK, (), stacks, layer, plan, inner)


def _routed_fwd(
    x_ND: jax.Array, scale_NK: jax.Array, weights: Projections, plan: RowPlan, block: int
) -> tuple[Any, Saved]:
    return _run(x_ND, scale_NK, weights, plan, block, keep=True)


def _routed_bwd(block: int, saved: Saved, g: Any) -> tuple[jax.Array, jax.Array, Any, None]:
    g_ND, carriers = g
    if saved.weights:
        x_ND, scale_NK, weights, _, _, plan, inner = saved
        assert inner is not None
        return *_backward(x_ND, scale_NK, weights, plan, inner, g_ND, block), None
    inner = saved.inner or (carriers[0].kept_LRO, carriers[1].kept_LRO)
    backward = _cpu_backward if _in_cpp(saved.x_ND, saved.stacks) else _backward_in_xla
    to = tuple(c.stack_LEOI for c in carriers) or unwritten([stack[:1] for stack in saved.stacks])
    dx_ND, dscale_NK, new = backward(saved._replace(inner=None), inner, g_ND, to, block=block)
    if not carriers:
        return dx_ND, dscale_NK, tuple(PlainWeight(d[0]) for d in new), None
    pairs = zip(carriers, new, strict=True)
    return dx_ND, dscale_NK, tuple(LayerWeight.cotangent(c._replace(stack_LEOI=d)) for c, d in pairs), None


_routed.defvjp(_routed_fwd, _routed_bwd)
