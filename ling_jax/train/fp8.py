"""Training in blockwise FP8: which weights, and how they are put into the model (report, section 5.1; spec 6).

Legend: L layers of a stack.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from ling_jax.config.mesh import Split
from ling_jax.config.parameters import ParamPath, quantised
from ling_jax.kernels.blockwise import OPERANDS, SUMS
from ling_jax.kernels.fp8 import FP8Weight
from ling_jax.kernels.weight import MasterWeight
from ling_jax.model.model import Ling
from ling_jax.parallel.quantise import quantise_shard, watch_shard

WATCHED = (*OPERANDS, "weights")


class Dims(NamedTuple):
    """The dims of a weight: their names, and the mesh axes that split them."""

    names: tuple[str, ...]
    split: Split


class Trained(NamedTuple):
    """The arrays that a step's gradient is taken of."""

    params: dict[str, Any]
    watch: dict[ParamPath, jax.Array]  # see `MasterWeight.watch`; {} to watch nothing


def module_of(path: ParamPath) -> str:
    """The name that patterns of `train.fp8_except` and `train.only` are matched with, such as
    "layers.softmax_moe.mlp.experts.up_proj"."""
    return ".".join(path[:-1])


def weights_in_fp8(model: Ling, excepted: Sequence[str]) -> dict[ParamPath, Dims]:
    """All weights of attention and FFNs, those of the MTP layer too, but for modules that match a pattern.

    Raises:
      ValueError: for a pattern that matches nothing, with all names.
    """
    found: dict[ParamPath, Dims] = {}
    in_blocks = quantised(model.config)
    for path, variable in nnx.state(model, nnx.Param).flat_state():
        if (names := tuple(map(str, path))) in in_blocks:
            found[names] = Dims(variable.get_metadata()["axes"], variable.get_metadata()["split"])
    names = [module_of(path) for path in found]
    for pattern in excepted:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"train.fp8_except: {pattern!r} matches none of {', '.join(names)}")
    return {
        path: dims
        for path, dims in found.items()
        if not any(fnmatchcase(module_of(path), pattern) for pattern in excepted)
    }


def quantise(params: dict, weights: Mapping[ParamPath, Dims]) -> dict[ParamPath, FP8Weight]:
    """FP8 blocks of the shards of `weights`, which are of the whole weights' blocks."""
    flat: dict[ParamPath, Any] = flatten_dict(params)
    with jax.named_scope("quantise_weights"):
        return {path: jax.lax.stop_gradient(quantise_shard(flat[path], *dims)) for path, dims in weights.items()}


def with_codes(
    params: dict, quantised: Mapping[ParamPath, FP8Weight], watch: Mapping[ParamPath, jax.Array]
) -> dict[str, Any]:
    """Parameters whose products are made with `quantised` and whose gradients are their own."""
    flat: dict[ParamPath, Any] = flatten_dict(params)
    for path, codes in quantised.items():
        flat[path] = MasterWeight(flat[path], codes, watch.get(path))
    return unflatten_dict(flat)


def watch_weights(params: dict, weights: Mapping[ParamPath, Dims]) -> dict[ParamPath, jax.Array]:
    """[L, SUMS] of the weights themselves."""
    flat: dict[ParamPath, Any] = flatten_dict(params)
    return {path: watch_shard(flat[path], *dims) for path, dims in weights.items()}


def unwatched(params: dict, weights: Mapping[ParamPath, Dims]) -> dict[ParamPath, jax.Array]:
    """Zeros [L, OPERANDS, SUMS] for each weight in FP8 (without L for what is not stacked)."""
    flat: dict[ParamPath, Any] = flatten_dict(params)
    lead = {path: flat[path].shape[: flat[path].ndim - len(dims.names)] for path, dims in weights.items()}
    return {path: jnp.zeros((*shape, len(OPERANDS), len(SUMS)), jnp.float32) for path, shape in lead.items()}


class Loss(NamedTuple):
    """The loss by quantising one operand, in each layer: float64 [L]."""

    lost: np.ndarray  # share of its elements that became zero
    cosine: np.ndarray  # between it and its quantised form


def losses(sums: Mapping[ParamPath, np.ndarray]) -> dict[tuple[str, str], Loss]:
    """By module and operand, from the sums that `train.step.make_watcher` gives."""
    found = {}
    for path, sums_LOS in sums.items():
        for index, operand in enumerate(WATCHED):
            nonzero, lost, product, square, quantised = np.moveaxis(
                np.atleast_2d(np.asarray(sums_LOS, np.float64)[..., index, :]), -1, 0
            )
            with np.errstate(invalid="ignore", divide="ignore"):  # an expert without rows, a weight still zero
                cosine = np.where(square > 0, product / np.sqrt(square * quantised), 1.0)
            found[module_of(path), operand] = Loss(lost / np.maximum(nonzero, 1), np.nan_to_num(cosine))
    return found


def loss_metrics(found: Mapping[tuple[str, str], Loss]) -> dict[str, Any]:
    """The `fp8/...` metrics of a step; the list of each module has its layers in order."""
    metrics: dict[str, Any] = {
        "fp8/lost_max": max(float(loss.lost.max()) for loss in found.values()),
        "fp8/cosine_min": min(float(loss.cosine.min()) for loss in found.values()),
    }
    for (module, operand), loss in found.items():
        metrics[f"fp8/lost/{module}/{operand}"] = loss.lost.tolist()
        metrics[f"fp8/cosine/{module}/{operand}"] = loss.cosine.tolist()
    return metrics


def beyond(found: Mapping[tuple[str, str], Loss], max_lost: float, min_cosine: float) -> dict[str, str]:
    """Modules that lose more than they may, and of which operand how much."""
    return {
        module: f"of {operand}, {loss.lost.max():.1%} became zero, cosine {loss.cosine.min():.4f}"
        for (module, operand), loss in found.items()
        if loss.lost.max() > max_lost or loss.cosine.min() < min_cosine
    }
