"""The state of training: a plain tree of arrays that goes from one step to the next."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ling_jax.config import RunConfig
from ling_jax.model.model import Ling, split_model
from ling_jax.train.adam8 import Coded, block_dims, moment_sharding
from ling_jax.train.compute import Compute, make_compute
from ling_jax.train.fp8 import module_of
from ling_jax.train.loss import NextToken
from ling_jax.train.objective import Objective, check_fields
from ling_jax.train.optimizer import OptimizerUpdate, decays, learning_rate, make_optimizer, trained_modules


class TrainState(NamedTuple):
    step: jax.Array  # int32 [] batches consumed, skipped ones included
    params: dict[str, Any]
    bias: dict[str, Any]  # expert biases, float32
    optimizer: optax.OptState
    skipped: jax.Array  # int32 [] steps skipped so far because loss or gradient was not finite
    skipped_in_a_row: jax.Array  # int32 []


class Trainer(NamedTuple):
    """The unchanging half of a run: what computes, what is optimised, the optimizer, the settings."""

    config: RunConfig
    compute: Compute
    objective: Objective
    update: OptimizerUpdate
    schedule: optax.Schedule
    fallen: tuple[str, ...] = ()  # modules that lost too much in FP8 (`train.fp8_max_lost`)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return self.update.optimizer

    def without_frozen(self, params: dict) -> dict:
        """`params`, of which no gradient is taken but of those that `train.only` leaves to be trained."""
        if self.update.trained is None:
            return params
        return jax.tree.map(lambda t, p: p if t else jax.lax.stop_gradient(p), self.update.trained, params)

    def new_state(self) -> TrainState:
        """`init`, each device making only its own shards."""
        return jax.jit(self.init, out_shardings=self.shardings())()

    def shardings(self) -> Any:
        """A TrainState of where each array lives: moments with their parameters, the rest on every device."""
        mesh, specs = self.compute.mesh, self.compute.param_specs
        whole = NamedSharding(mesh, PartitionSpec())
        params = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
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

    def init(self) -> TrainState:
        """A new state; every random number in it follows from `train.seed`."""
        seed = self.config.train.seed
        model = Ling(self.config.model, rngs=nnx.Rngs(seed), **self.compute.options)
        _, params, bias = split_model(model)
        return self.start(params, bias)

    def start(self, params: dict, bias: dict) -> TrainState:
        """A state at step 0 with the given weights: matrices in `train.param_dtype`, vectors in float32. They take no
        memory to speak of, and a norm's weights, near 1, move by less than half of bfloat16's last place there."""
        narrow = self.compute.options["param_dtype"]
        params = jax.tree.map(lambda p, matrix: p.astype(narrow if matrix else jnp.float32), params, self.update.mask)
        step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))  # donated, so each its own
        return TrainState(step, params, bias, self.optimizer.init(params), skipped, in_a_row)

    def without_fp8(self, modules: Sequence[str]) -> "Trainer":
        """The same, but for modules that are no longer computed with in FP8."""
        kept = {path: dims for path, dims in self.compute.fp8.items() if module_of(path) not in modules}
        compute = self.compute._replace(fp8=kept)
        return self._replace(compute=compute, fallen=tuple(sorted({*self.fallen, *modules})))


def make_trainer(
    config: RunConfig, devices: Sequence[Any] | None = None, objective: Objective | None = None
) -> Trainer:
    """The trainer of `config` on `devices` (default: all).

    Args:
      objective: what it optimises; by default `NextToken`.
    Raises:
      ValueError: if the mesh does not fit the devices, an array of the objective has no rows, or a pattern of
        `train.only` matches nothing.
    """
    objective = NextToken(config.model) if objective is None else objective
    check_fields(objective.fields)
    train, compute = config.train, make_compute(config.model, config.train, config.mesh, devices)
    schedule, mask = learning_rate(config.schedule, train.steps), decays(compute.shapes, compute.dims)
    optimizer = make_optimizer(config.optimizer, schedule, mask, block_dims(compute.shapes, compute.dims))
    trained = trained_modules(compute.shapes, train.only)
    update = OptimizerUpdate(optimizer, config.optimizer, schedule, mask, compute.mesh.size == 1, train.seed, trained)
    return Trainer(config, compute, objective, update, schedule)
