"""What a training step carries from one step to the next: a plain tree of arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ling_jax.config import RunConfig
from ling_jax.model.model import Ling, abstract_model, split_model
from ling_jax.train.optimizer import decays, learning_rate, make_optimizer


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
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    options: dict[str, Any]  # of Ling: dtypes, initial std, remat

    def init(self) -> TrainState:
        """A new state; every random number in it follows from `train.seed`."""
        seed = self.config.train.seed
        model = Ling(self.config.model, rngs=nnx.Rngs(seed), **self.options)
        _, params, bias = split_model(model)
        return self.start(params, bias)

    def start(self, params: dict, bias: dict) -> TrainState:
        """A state at step 0 with the given weights."""
        step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))  # donated, so each its own
        return TrainState(step, params, bias, self.optimizer.init(params), skipped, in_a_row)

    def model(self, params: dict, bias: dict) -> Ling:
        return nnx.merge(self.graph, params, bias)


def make_trainer(config: RunConfig) -> Trainer:
    train = config.train
    options = dict(
        dtype=jnp.dtype(train.dtype),
        param_dtype=jnp.dtype(train.param_dtype),
        init_std=train.init_std,
        remat=train.remat,
        unroll=train.unroll_layers,
    )
    model = abstract_model(config.model, **options)
    graph, params, _ = split_model(model)
    axes = jax.tree.map(
        lambda variable: variable.get_metadata()["axes"],
        nnx.state(model, nnx.Param),
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    schedule = learning_rate(config.schedule, train.steps)
    mask = decays(params, nnx.to_pure_dict(axes))
    return Trainer(config, graph, make_optimizer(config.optimizer, schedule, mask), schedule, options)
