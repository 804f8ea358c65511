"""A model that computes over a mesh: all that scoring needs, and half of what training needs."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from ling_jax.config import ONE_DEVICE, MeshConfig, ModelConfig, TrainConfig
from ling_jax.config.parameters import ParamPath
from ling_jax.kernels.fp8 import FP8Weight
from ling_jax.model.model import Ling, abstract_model, param_specs, split_model
from ling_jax.parallel.context import zigzag_order
from ling_jax.parallel.mesh import BATCH_AXES, make_mesh, manual
from ling_jax.train.fp8 import Dims, quantise, weights_in_fp8

LETTERS = {"B": BATCH_AXES, "T": "context"}  # the mesh axes of a batch's dims; others are whole on each device


class Compute(NamedTuple):
    """A model without its arrays, and the mesh it computes on."""

    graph: nnx.GraphDef
    options: dict[str, Any]  # of Ling: dtypes, initial std, remat, mesh
    mesh: jax.sharding.Mesh
    shapes: dict[str, Any]  # a ShapeDtypeStruct for each parameter
    dims: dict[str, Any]  # the names of each parameter's own dims
    param_specs: dict[str, Any]  # a PartitionSpec for each parameter
    fp8: Mapping[ParamPath, Dims] = MappingProxyType({})  # the weights that are computed with in FP8

    def model(self, params: dict, bias: dict) -> Ling:
        return nnx.merge(self.graph, params, bias)

    def quantise(self, params: dict) -> dict[ParamPath, FP8Weight]:
        """FP8 blocks of this device's shards, in a manual region over the mesh."""
        return quantise(params, self.fp8)

    def on_shards(self, f: Callable, fields: Mapping[str, str], out_specs: Any) -> Callable:
        """f(params, bias, batch, *same) as a manual region over the mesh.

        It is given this device's shards of the parameters, its part of a batch, and what is the same on all devices.

        Args:
          fields: the dims of each array of a batch (see `train.objective.Objective.fields`). The tokens of a row are in
            zig-zag order over the context axis.
          out_specs: of what `f` returns.
        """
        specs = {name: PartitionSpec(*map(LETTERS.get, dims)) for name, dims in fields.items()}

        def run(params: dict, bias: dict, batch: dict, *same: Any) -> Any:
            batch = {name: self._in_order(batch[name], dims) for name, dims in fields.items()}
            whole = jax.tree.map(lambda _: PartitionSpec(), (bias, *same))
            in_specs = (self.param_specs, whole[0], specs, *whole[1:])
            return manual(f, self.mesh, in_specs, out_specs)(params, bias, batch, *same)

        return run

    def _in_order(self, array: jax.Array, dims: str) -> jax.Array:
        """An array of a batch with its tokens in the order of the context axis."""
        ranks, place = self.mesh.shape["context"], dims.find("T")
        if ranks == 1 or place < 0:
            return jnp.asarray(array)
        return array[(slice(None),) * place + (zigzag_order(array.shape[place], ranks),)]


def make_compute(
    model: ModelConfig, train: TrainConfig, mesh: MeshConfig = ONE_DEVICE, devices: Sequence[Any] | None = None
) -> Compute:
    """Makes what computes a model as `train` says, over a mesh of `devices` (default: all).

    Raises:
      ValueError: if the mesh does not fit the devices.
    """
    device_mesh = make_mesh(mesh, devices)
    options = dict(
        dtype=jnp.dtype(train.dtype),
        param_dtype=jnp.dtype(train.param_dtype),
        init_std=train.init_std,
        remat=train.remat,
        unroll=train.unroll_layers,
        mesh=mesh,
    )
    abstract = abstract_model(model, **options)
    graph, shapes, _ = split_model(abstract)
    dims = jax.tree.map(
        lambda variable: variable.get_metadata()["axes"],
        nnx.state(abstract, nnx.Param),
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    fp8 = weights_in_fp8(abstract, train.fp8_except) if train.fp8 else {}
    return Compute(graph, options, device_mesh, shapes, nnx.to_pure_dict(dims), param_specs(abstract), fp8)
