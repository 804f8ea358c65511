"""Weights that stay where they lie.

A scan copies what it iterates over, and keeps it once more for the backward pass. Experts' weights are too large for
that: where one device computes alone, or decodes, a layer is given its number in their stack instead, and reads them
there (see `kernels.weight.LayerWeight`). So is it with all matrices where a CPU decodes, whose time is that of reading
them.

Legend: L layers, E experts.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ling_jax.config.parameters import EXPERT
from ling_jax.kernels.choose import for_cpu
from ling_jax.kernels.grouped import block_rows, padded_rows
from ling_jax.kernels.swiglu import unwritten
from ling_jax.kernels.weight import Carrier, LayerWeight, as_weight
from ling_jax.model.experts import PROJECTIONS


def _stays(axes: tuple[str, ...], decoding: bool) -> bool:
    """Whether a weight with these dims stays in its stack."""
    return EXPERT in axes or (decoding and for_cpu() and len(axes) == 2)


def _kept(f: Callable[..., Any], decoding: bool, params: nnx.State, *others: nnx.State) -> Any:
    """`params` with f(projection's name, value) of every weight that stays in its stack."""

    def of(path: Any, param: nnx.Variable, *same: nnx.Variable) -> nnx.Variable:
        if not _stays(param.get_metadata()["axes"], decoding):
            return param
        return param.replace(f(path[-2].key, param.get_value(), *(other.get_value() for other in same)))

    def is_leaf(leaf: Any) -> bool:
        return isinstance(leaf, nnx.Variable)

    return jax.tree_util.tree_map_with_path(of, params, *others, is_leaf=is_leaf)


def numbered(stack: nnx.State, decoding: bool) -> nnx.State:
    """A stack of layers without the weights that stay, so that a scan copies none: in their places are the layers'
    numbers [L], or on CPU, where every operation counts, nothing."""

    def number(name: str, w: Any) -> jax.Array | None:
        return None if decoding and for_cpu() else jnp.arange(w.shape[0], dtype=jnp.int32)

    return _kept(number, decoding, stack)


def in_stack(
    layer: nnx.State, stack: nnx.State, place: jax.Array, decoding: bool, carriers: Mapping[str, Carrier]
) -> nnx.State:
    """One layer of what `numbered` gave, with its weights where they lie in `stack`.

    Args:
      place: int32 [], the layer's number there.
      carriers: to train them there, what the layer before gave; {} to compute with them only.
    """

    def in_place(name: str, number: jax.Array | None, w: Any) -> LayerWeight:
        number = place if number is None else number
        if not carriers:
            return LayerWeight(as_weight(w), number)
        return LayerWeight(as_weight(jax.lax.stop_gradient(w)), number, carriers[name])

    return _kept(in_place, decoding, layer, stack)


def first_carriers(stack: nnx.Module, pairs: int, dtype: jnp.dtype, number: int = 0) -> dict[str, Carrier]:
    """The carriers for the first layer of a stack that trains its experts' weights in place, by their projections'
    names. {} without experts, or unless all are arrays: those in FP8 train as they come.

    Args:
      pairs: of tokens and experts, whose gate and up in `dtype` are to be kept in stacks of all layers; 0 for none.
      number: of this stack of layers among all.
    """
    found: dict[str, Any] = {}

    def note(name: str, w: Any) -> Any:
        found[name] = w
        return w

    _kept(note, False, nnx.state(stack, nnx.Param))
    if not all(isinstance(w, jax.Array) for w in found.values()):
        return {}
    inwards = [name for name in PROJECTIONS[:2] if name in found and pairs]
    shapes = {name: found[name].shape for name in inwards}
    room = [
        jnp.zeros((layers, padded_rows(pairs, experts, block_rows(pairs, experts)), outputs), dtype)
        for layers, experts, outputs, _ in shapes.values()
    ]
    kept = dict(zip(inwards, unwritten(room, 2 * number), strict=True))
    return {name: Carrier(w, kept.get(name)) for name, w in found.items()}
