"""Decoding over a mesh: what each device holds and runs.

Training stores a weight in pieces and makes it whole when its layer runs; decoding would send every weight for every
token. To serve, weights lie as they are computed with: heads, dense FFNs and vocabulary split over `tensor`, experts
over `expert` (and `tensor`), the rest whole. Rows and their caches are split over data, fsdp and expert, kv heads over
`tensor`; devices that differ in `context` do the same work.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ling_jax.config import ModelConfig
from ling_jax.config.parameters import quantised
from ling_jax.kernels.fp8 import quantise_weight
from ling_jax.model.attention import head_rows
from ling_jax.model.model import Ling, abstract_model, param_specs, split_model
from ling_jax.parallel.mesh import BATCH_AXES, manual


class Program(NamedTuple):
    """A model without its arrays, and the mesh it is served on; what programs are compiled for."""

    graph: nnx.GraphDef
    mesh: Mesh | None  # None on one device

    @property
    def batch_shards(self) -> int:
        """Into so many parts rows are cut."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    def __call__(self, f: Callable[..., Any], params: Any, bias: Any, rows: Any, *args: Any, specs: Any = ()) -> Any:
        """f(model, rows, *args) -> rows, on every device; `specs` are of `args`."""

        def here(params, bias, rows, *args):
            return f(nnx.merge(self.graph, params, bias), rows, *args)

        if self.mesh is None:
            return here(params, bias, rows, *args)
        of_params = param_specs(nnx.merge(self.graph, params, bias))
        of_bias = jax.tree.map(lambda _: PartitionSpec(), bias)
        of_rows = row_specs(rows)
        return manual(here, self.mesh, (of_params, of_bias, of_rows, *specs), of_rows)(params, bias, rows, *args)


def row_specs(rows: Any) -> Any:
    """How `generate.rows.DecodingRows` are split: caches by `Cache.specs`, all else [B, ...] over rows."""
    others = jax.tree.map(lambda _: PartitionSpec(BATCH_AXES), rows._replace(cache=None))
    return others._replace(cache=rows.cache.specs())


def in_fp8(config: ModelConfig, params: Any) -> Any:
    """Parameters, those of `config.parameters.quantised` as `FP8Weight`."""
    in_blocks = quantised(config)

    def as_served(path: Any, value: jax.Array) -> Any:
        return quantise_weight(value) if tuple(key.key for key in path) in in_blocks else value

    return jax.tree_util.tree_map_with_path(as_served, params)


def serving_model(model: Ling) -> Ling:
    """A model for shapes only, of the layout to serve `model` in."""
    mesh = model.mesh
    # A decoding step has few tokens: with room for the worst case it never takes a second round.
    mesh = dataclasses.replace(mesh, buffer_factor=float(max(mesh.expert, 1)))
    param_dtype = model.word_embeddings.weight.get_value().dtype
    return abstract_model(model.config, dtype=model.dtype, param_dtype=param_dtype, mesh=mesh, serving=True)


def serve(model: Ling, mesh: Mesh | None, fp8: bool = False) -> tuple[Program, Any, Any]:
    """(program, params, bias) of a loaded model, on a mesh moved to where they are computed with, if asked in FP8."""
    graph, params, bias = split_model(model)
    if fp8:
        model.mesh.check_fp8(model.config)
    if mesh is None:
        return Program(graph, None), _quantised(model.config, params) if fp8 else params, bias
    graph, _, _ = split_model(serving_model(model))
    return Program(graph, mesh), _arranged(graph, mesh, fp8, params, bias), bias


_quantised = jax.jit(in_fp8, static_argnums=0)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _arranged(graph: nnx.GraphDef, mesh: Mesh, fp8: bool, params: Any, bias: Any) -> Any:
    """Parameters where and in the order in which a serving model computes with them; compiled once for all weights."""
    model = nnx.merge(graph, params, bias)
    heads, width = model.config.num_attention_heads, model.config.head_dim

    def arrange(path: Any, value: jax.Array) -> jax.Array:
        if not jax.tree_util.keystr(path, simple=True, separator=".").endswith("query_key_value.weight"):
            return value
        groups = (value.shape[-2] // width - heads) // 2  # of softmax or of linear attention
        multi = dataclasses.replace(model.config, num_key_value_heads=groups)
        return value[..., head_rows(multi, model.mesh.tensor).reshape(-1), :]

    params = jax.tree_util.tree_map_with_path(arrange, params)
    shardings = jax.tree.map(partial(NamedSharding, mesh), param_specs(model))
    return jax.lax.with_sharding_constraint(in_fp8(model.config, params) if fp8 else params, shardings)
