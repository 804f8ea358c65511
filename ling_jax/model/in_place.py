"""Experts' weights that stay where they lie.

A scan copies what it iterates over, and keeps it once more for the backward pass. Experts' weights are too large for
that: where one device computes alone, or decodes, a layer is given its number in their stack instead, and reads them
there (see `kernels.weight.LayerWeight`).

Legend: L layers, E experts.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ling_jax.config.parameters import EXPERT
from ling_jax.kernels.weight import LayerWeight, as_weight


def _experts(f: Callable[..., Any], params: nnx.State, *others: nnx.State) -> Any:
    """`params` with f(projection's name, value) of every weight that has a dim of experts."""

    def of(path: Any, param: nnx.Variable, *same: nnx.Variable) -> nnx.Variable:
        if EXPERT not in param.get_metadata()["axes"]:
            return param
        return param.replace(f(path[-2].key, param.get_value(), *(other.get_value() for other in same)))

    def is_leaf(leaf: Any) -> bool:
        return isinstance(leaf, nnx.Variable)

    return jax.tree_util.tree_map_with_path(of, params, *others, is_leaf=is_leaf)


def without_experts(stack: nnx.State) -> nnx.State:
    """A stack of layers with the layers' numbers [L] in place of experts' weights, so that a scan copies none."""
    return _experts(lambda name, w: jnp.arange(w.shape[0], dtype=jnp.int32), stack)


def with_experts(layer: nnx.State, stack: nnx.State, carriers: Mapping[str, jax.Array]) -> nnx.State:
    """One layer of what `without_experts` gave, with its experts' weights where they lie in `stack`.

    Args:
      carriers: to train them there, what the layer before gave; {} to compute with them only.
    """

    def in_place(name: str, number: jax.Array, w: Any) -> LayerWeight:
        if not carriers:
            return LayerWeight(as_weight(w), number)
        return LayerWeight(as_weight(jax.lax.stop_gradient(w)), number, carriers[name])

    return _experts(in_place, layer, stack)


def first_carriers(stack: nnx.Module) -> dict[str, jax.Array]:
    """The carriers for the first layer of a stack that trains its experts' weights in place: the stacks themselves, by
    their projections' names. {} without experts, or unless all are arrays: those in FP8 train as they come."""
    found: dict[str, Any] = {}

    def note(name: str, w: Any) -> Any:
        found[name] = w
        return w

    _experts(note, nnx.state(stack, nnx.Param))
    return found if all(isinstance(w, jax.Array) for w in found.values()) else {}
