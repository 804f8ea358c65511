"""What a training step carries from one step to the next: a plain tree of arrays."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ling_jax.config import RunConfig
from ling_jax.kernels.fp8 import FP8Weight
from ling_jax.model.model import Ling, abstract_model, param_specs, split_model
from ling_jax.parallel.context import zigzag_order
from ling_jax.parallel.mesh import BATCH_AXES, make_mesh, manual
from ling_jax.train.adam8 import Coded, block_dims, moment_sharding
from ling_jax.train.fp8 import Dims, Path, module_of, quantise, weights_in_fp8
from ling_jax.train.optimizer import Update, decays, learning_rate, make_optimizer


class TrainState(NamedTuple):
    step: jax.Array  # int32 [] batches consumed, skipped ones included
    params: dict[str, Any]
    bias: dict[str, Any]  # expert biases, float32
    optimizer: optax.OptState
    skipped: jax.Array  # int32 [] steps skipped so far because loss or gradient was not finite
    skipped_in_a_row: jax.Array  # int32 []


class Trainer(NamedTuple):
    """The unchanging half of a run: the model's graph, the optimizer, the settings."""

    config: RunConfig
    graph: nnx.GraphDef
    update: Update
    schedule: optax.Schedule
    options: dict[str, Any]  # of Ling: dtypes, initial std, remat, mesh
    mesh: jax.sharding.Mesh
    param_specs: dict[str, Any]  # a PartitionSpec for each parameter
    fp8: Mapping[Path, Dims] = MappingProxyType({})  # the weights that are computed with in FP8
    fallen: tuple[str, ...] = ()  # modules that lost too much in it (`train.fp8_max_lost`)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return self.update.optimizer

    def new_state(self) -> TrainState:
        """`init`, each device making only its own shards."""
        return jax.jit(self.init, out_shardings=self.shardings())()

    def shardings(self) -> Any:
        """A TrainState of where each array lives: moments with their parameters, the rest on every device."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        params = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.param_specs)
        shapes = jax.eval_shape(self.init)
        optimizer = optax.tree_utils.tree_map_params(
            self.optimizer,
            moment_sharding,
            shapes.optimizer,
            params,
            transform_non_params=lambda _: whole,
            is_leaf=lambda x: isinstance(x, Coded),
        )
        bias = jax.tree.map(lambda _: whole, shapes.bias)
        fields: Any = (whole, params, bias, optimizer, whole, whole)
        return TrainState(*fields)

    def new_state_from(self, params: dict, bias: dict) -> TrainState:
        """`start`, on the mesh."""
        return jax.jit(self.start, out_shardings=self.shardings())(params, bias)

    def new_mtp(self) -> tuple[dict, dict]:
        """The MTP layer's weights and biases of `new_state`; the rest is not made."""

        def make() -> tuple[dict, dict]:
            state = self.init()
            return state.params["mtp"], state.bias["mtp"]

        places = self.shardings()
        return jax.jit(make, out_shardings=(places.params["mtp"], places.bias["mtp"]))()

    def on_shards(self, f: Callable, out_specs: Any) -> Callable:
        """f(params, bias, batch) as a manual region over the mesh, given this device's shards and its part of a batch
        of arrays [..., B, T]; the tokens of a row are in zig-zag order over the context axis."""

        def run(params: dict, bias: dict, batch: dict) -> Any:
            order = zigzag_order(next(iter(batch.values())).shape[-1], self.config.mesh.context)
            batch = {k: v[..., order] if self.config.mesh.context > 1 else jnp.asarray(v) for k, v in batch.items()}
            lead = [None] * (next(iter(batch.values())).ndim - 2)
            rows = {name: PartitionSpec(*lead, BATCH_AXES, "context") for name in batch}
            bias_specs = jax.tree.map(lambda _: PartitionSpec(), bias)
            return manual(f, self.mesh, (self.param_specs, bias_specs, rows), out_specs)(params, bias, batch)

        return run

    def init(self) -> TrainState:
        """A new state; every random number in it follows from `train.seed`."""
        seed = self.config.train.seed
        model = Ling(self.config.model, rngs=nnx.Rngs(seed), **self.options)
        _, params, bias = split_model(model)
        return self.start(params, bias)

    def start(self, params: dict, bias: dict) -> TrainState:
        """A state at step 0 with the given weights: matrices in `train.param_dtype`, vectors in float32. They take no
        memory to speak of, and a norm's weights, near 1, move by less than half of bfloat16's last place there."""
        narrow = self.options["param_dtype"]
        params = jax.tree.map(lambda p, matrix: p.astype(narrow if matrix else jnp.float32), params, self.update.mask)
        step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))  # donated, so each its own
        return TrainState(step, params, bias, self.optimizer.init(params), skipped, in_a_row)

    def without_fp8(self, modules: Sequence[str]) -> "Trainer":
        """The same, but for modules that are no longer computed with in FP8."""
        kept = {path: dims for path, dims in self.fp8.items() if module_of(path) not in modules}
        return self._replace(fp8=kept, fallen=tuple(sorted({*self.fallen, *modules})))

    def quantise(self, params: dict) -> dict[Path, FP8Weight]:
        """FP8 blocks of this device's shards, in a manual region over the mesh."""
        return quantise(params, self.fp8)

    def model(self, params: dict, bias: dict) -> Ling:
        return nnx.merge(self.graph, params, bias)


def make_trainer(config: RunConfig, devices: Sequence[Any] | None = None) -> Trainer:
    """The trainer of `config` on `devices` (default: all); ValueError if its mesh does not fit them."""
    train, mesh = config.train, make_mesh(config.mesh, devices)
    options = dict(
        dtype=jnp.dtype(train.dtype),
        param_dtype=jnp.dtype(train.param_dtype),
        init_std=train.init_std,
        remat=train.remat,
        unroll=train.unroll_layers,
        mesh=config.mesh,
    )
    model = abstract_model(config.model, **options)
    graph, params, _ = split_model(model)
    axes = jax.tree.map(
        lambda variable: variable.get_metadata()["axes"],
        nnx.state(model, nnx.Param),
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    schedule = learning_rate(config.schedule, train.steps)
    names = nnx.to_pure_dict(axes)
    mask = decays(params, names)
    optimizer = make_optimizer(config.optimizer, schedule, mask, block_dims(params, names))
    update = Update(optimizer, config.optimizer, schedule, mask, mesh.size == 1, train.seed)
    fp8 = weights_in_fp8(model, train.fp8_except) if train.fp8 else {}
    return Trainer(config, graph, update, schedule, options, mesh, param_specs(model), fp8)
