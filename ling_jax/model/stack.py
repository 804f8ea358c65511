"""Runs layers: those of one kind that follow one another are a scan over their part of the kind's stack.

Legend: B rows, T tokens, D hidden, L layers that route, K experts per token.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ling_jax.config import LayerRun
from ling_jax.kernels.swiglu import gradients_start_here
from ling_jax.model.attention import Context
from ling_jax.model.block import LayerOutput
from ling_jax.model.in_place import first_carriers, with_experts, without_experts

_POLICIES = jax.checkpoint_policies
# What the backward pass keeps of a layer, beside its weights ("none" keeps everything). The names are given to arrays
# by kernels.attention, parallel.dispatch and below.
REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "full": _POLICIES.nothing_saveable,  # its input
    "minimal": _POLICIES.dots_with_no_batch_dims_saveable,  # the products with weights
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
    """

    capture: Sequence[str]
    remat: str
    unroll: bool
    alone: bool


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
    carriers = {key: first_carriers(stack) if how.alone else {} for key, stack in stacks.items()}
    per_layer: list[LayerOutput] = []
    for run in runs:
        key, last = run.kind.key, run.routed_before + run.count
        ids = None if ids_LBTK is None or not run.kind.routed else ids_LBTK[run.routed_before : last]
        carry = x_BTD, cache, carriers[key]
        (x_BTD, cache, carriers[key]), outs = _scan(stacks[key], run, carry, context, ids, how)
        per_layer += [jax.tree.map(lambda a, i=i: a[i], outs) for i in range(run.count)]
    return gradients_start_here(x_BTD, carriers), per_layer, cache


def _scan(stack: nnx.Module, run: LayerRun, carry: Any, context: Context, ids_LBTK: Any, how: How) -> tuple[Any, Any]:
    """The carry (x_BTD, cache, carriers) after a run, and its layers' outputs, stacked."""
    graph, whole = nnx.split(stack)
    stays = carry[1] is not None or bool(carry[2])  # experts' weights stay where they lie
    params = without_experts(whole) if stays else whole
    params = jax.tree.map(lambda a: a[run.first : run.first + run.count], params)

    def layer(params, x_BTD, ids_BTK, layer_cache, carriers):
        x_BTD = checkpoint_name(x_BTD, "layer_input")
        module = nnx.merge(graph, with_experts(params, whole, carriers) if stays else params)
        out = module(x_BTD, context, ids_BTK, layer_cache)
        return out._replace(captured={k: v for k, v in out.captured.items() if k in how.capture})

    def body(carry, xs):
        (x_BTD, cache, carriers), (params, ids_BTK, place) = carry, xs
        layer_cache = None if cache is None else cache.layer(run.kind.key, run.first + place)
        out = rematerialised(layer, how)(params, x_BTD, ids_BTK, layer_cache, carriers)
        cache = None if cache is None else cache.with_layer(run.kind.key, out.cache)
        return (out.hidden_BTD, cache, out.carriers), out._replace(hidden_BTD=None, cache=None, carriers={})

    xs = params, ids_LBTK, jnp.arange(run.count)
    return jax.lax.scan(body, carry, xs, unroll=run.count if how.unroll else 1)
