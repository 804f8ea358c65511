"""Runs layers: those of one kind that follow one another are a scan over their part of the kind's stack, and where such
runs come again in the same order, they are all inside one scan over the repeats.

Legend: B rows, T tokens, D hidden, L layers that route, K experts per token.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ling_jax.config.layers import LayerGroup, LayerRun, layer_groups
from ling_jax.kernels.choose import for_cpu
from ling_jax.kernels.swiglu import gradients_start_here
from ling_jax.model.attention import Context
from ling_jax.model.block import LayerOutput
from ling_jax.model.in_place import first_carriers, in_stack, numbered

_POLICIES = jax.checkpoint_policies
# What the backward pass keeps of a layer, beside its weights ("none" keeps everything). The names are given to arrays
# by kernels.attention, kernels.linear, parallel.dispatch and below.
REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "full": _POLICIES.nothing_saveable,  # its input
    "minimal": _POLICIES.save_from_both_policies(  # the products with weights; "product" are those in C++
        _POLICIES.dots_with_no_batch_dims_saveable, _POLICIES.save_only_these_names("product")
    ),
    "save_attention": _POLICIES.save_only_these_names("attention"),
    "save_dispatch": _POLICIES.save_only_these_names("dispatch"),  # the rows that came to this device's experts
    "offload": _POLICIES.save_and_offload_only_these_names(  # its input, in the host's memory
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class How(NamedTuple):
    """How layers are run.

    Attributes:
      capture: the intermediates to keep, see `model.CAPTURES`.
      remat: what the backward pass keeps, "none" or a name of REMAT_POLICIES.
      unroll: as straight code instead of a scan.
      alone: one device computes without a cache, so experts' weights train in their stacks.
      choices: experts of each token.
    """

    capture: Sequence[str]
    remat: str
    unroll: bool
    alone: bool
    choices: int


def rematerialised(f: Callable, how: How) -> Callable:
    """`f`, of which the backward pass keeps only what `how.remat` says."""
    # Inside a scan the loop keeps forward and recomputation apart; straight code needs the barrier.
    if how.remat == "none":
        return f
    return jax.checkpoint(f, policy=REMAT_POLICIES[how.remat], prevent_cse=how.unroll)


def run_layers(
    stacks: Mapping[str, nnx.Module],
    runs: Sequence[LayerRun],
    x_BTD: jax.Array,
    context: Context,
    ids_LBTK: jax.Array | None,
    cache: Any,
    how: How,
) -> tuple[jax.Array, list[LayerOutput], Any]:
    """The output of some runs of layers, each layer's outputs in order, and the cache.

    Args:
      stacks: the layers of each kind, by its key.
      ids_LBTK: a routing to replay, of all layers of the model that route.
      cache: a `generate.cache.Cache`, or None.
    """
    # Of a layer that is computed again, the kept results would be kept once more for each layer.
    pairs = math.prod(x_BTD.shape[:2]) * how.choices if how.remat == "none" and for_cpu() else 0
    carriers = {
        key: first_carriers(stack, pairs, x_BTD.dtype, number) if how.alone else {}
        for number, (key, stack) in enumerate(stacks.items())
    }
    per_layer: list[LayerOutput] = []
    for group in layer_groups(runs):
        here = {run.kind.key: carriers[run.kind.key] for run in group.runs}
        (x_BTD, cache, here), outs = _run_group(stacks, group, (x_BTD, cache, here), context, ids_LBTK, how)
        carriers |= here
        for repeat in range(group.repeats):
            for run, out in zip(group.runs, outs, strict=True):
                places = [repeat * run.count + i for i in range(run.count)]
                per_layer += [jax.tree.map(lambda a, place=place: a[place], out) for place in places]
    return gradients_start_here(x_BTD, carriers), per_layer, cache


class _Layers(NamedTuple):
    """The layers of a run as a scan takes them, stacked: [L, ...], or [repeats, L, ...] where they come again."""

    params: Any
    ids_BTK: jax.Array | None
    place: np.ndarray  # in the kind's stack
    layer: np.ndarray  # among all of the trunk


def _layers_of(group: LayerGroup, run: LayerRun, params: Any, ids_LBTK: jax.Array | None) -> _Layers:
    """The layers of a run, in all repeats of its group."""
    many = group.repeats * run.count

    def shaped(a: Any) -> Any:
        return a if group.repeats == 1 else a.reshape(group.repeats, run.count, *a.shape[1:])

    repeat, inside = np.divmod(np.arange(many, dtype=np.int32), run.count)
    ids = None
    if ids_LBTK is not None and run.kind.routed:
        ids = shaped(ids_LBTK[run.routed_before + repeat * group.routed + inside])
    params = jax.tree.map(lambda a: shaped(a[run.first : run.first + many]), params)
    layer = run.layer + repeat * group.layers + inside
    return _Layers(params, ids, shaped(run.first + np.arange(many, dtype=np.int32)), shaped(layer))


def _run_group(
    stacks: Mapping[str, nnx.Module], group: LayerGroup, carry: Any, context: Context, ids_LBTK: Any, how: How
) -> tuple[Any, list[LayerOutput]]:
    """The carry (x_BTD, cache, carriers of each kind) after a group, and the outputs of each run's layers [L, ...]."""
    bodies, layers = [], []
    for run in group.runs:
        graph, whole = nnx.split(stacks[run.kind.key])
        decoding = carry[1] is not None
        stays = decoding or bool(carry[2][run.kind.key])  # experts' weights, at least, stay where they lie
        layers.append(_layers_of(group, run, numbered(whole, decoding) if stays else whole, ids_LBTK))
        bodies.append(_layer_body(run, graph, whole if stays else None, context, how))

    def once(carry: Any, layers: Any) -> tuple[Any, list[LayerOutput]]:
        outs = []
        for run, body, xs in zip(group.runs, bodies, layers, strict=True):
            if run.count == 1 and group.repeats > 1:  # a loop inside a loop takes long to compile
                carry, out = body(carry, jax.tree.map(lambda a: a[0], xs))
                outs.append(jax.tree.map(lambda a: a[None], out))
            else:
                carry, out = jax.lax.scan(body, carry, xs, unroll=run.count if how.unroll else 1)
                outs.append(out)
        return carry, outs

    if group.repeats == 1:
        return once(carry, layers)
    carry, outs = jax.lax.scan(once, carry, layers, unroll=group.repeats if how.unroll else 1)
    return carry, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outs)


def _layer_body(run: LayerRun, graph: Any, whole: Any, context: Context, how: How) -> Callable:
    """Makes one step of a run's scan; `whole` is the kind's stack if its experts' weights stay there."""
    key = run.kind.key

    def layer(params, x_BTD, ids_BTK, place, number, layer_cache, carriers):
        x_BTD = checkpoint_name(x_BTD, "layer_input")
        if whole is not None:
            params = in_stack(params, whole, place, layer_cache is not None, carriers)
        module = nnx.merge(graph, params)
        out = module(x_BTD, context._replace(layer=number), ids_BTK, layer_cache)
        return out._replace(captured={k: v for k, v in out.captured.items() if k in how.capture})

    def body(carry, xs: _Layers):
        x_BTD, cache, carriers = carry
        layer_cache = None if cache is None else cache.layer(key, xs.place)
        args = xs.params, x_BTD, xs.ids_BTK, xs.place, xs.layer, layer_cache, carriers[key]
        out = rematerialised(layer, how)(*args)
        cache = None if cache is None else cache.with_layer(key, out.cache)
        carry = out.hidden_BTD, cache, {**carriers, key: out.carriers}
        return carry, out._replace(hidden_BTD=None, cache=None, carriers={})

    return body
