"""One optimizer step: microbatches, update, balance; pure and jitted.

Legend: A microbatches, B rows, T tokens, L MoE layers, E experts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from ling_jax.config import ModelConfig
from ling_jax.config.parameters import ParamPath
from ling_jax.parallel.mesh import TOKEN_AXES, WORK_AXES, axis_size, psum
from ling_jax.train.balance import balance_biases, in_layer_order
from ling_jax.train.fp8 import Trained, unwatched, watch_weights, with_codes
from ling_jax.train.objective import (
    Batch,
    Metrics,
    RouterSums,
    StepCounts,
    StepSums,
    step_counts,
    step_sums,
    total_loss,
)
from ling_jax.train.state import Trainer, TrainState


def _local_gradients(
    trainer: Trainer, trained: Trained, bias: dict, batch: Batch, counts: StepCounts
) -> tuple[StepSums, Trained]:
    """Sums and float32 gradients of this device's part of all microbatches [A, B, ...], not yet summed over devices
    (but for what `parallel.rules.gather` has scattered). Weights are quantised once for all of them.

    Each microbatch is divided by the step's counts, not its own, so A does not change the result.
    """
    compute, objective = trainer.compute, trainer.objective
    quantised = compute.quantise(trained.params)

    def loss(trained, rows):
        params = with_codes(trainer.without_frozen(trained.params), quantised, trained.watch)
        sums = step_sums(objective, compute.model(params, bias), rows)
        # Devices along `tensor` compute the same loss: the objective is the sum over all devices.
        return total_loss(objective, sums, counts, trainer.config.train.z_loss_coefficient) / axis_size("tensor"), sums

    gradient = jax.grad(loss, has_aux=True)
    if batch["tokens"].shape[0] == 1:
        grads, sums = gradient(trained, jax.tree.map(lambda a: a[0], batch))
        return sums, grads

    def body(total, rows):
        grads, sums = gradient(trained, rows)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, (sums, grads)), None

    first = jax.tree.map(lambda a: a[0], batch)
    _, sums = jax.eval_shape(gradient, trained, first)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), sums)
    start = (zeros, jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained))
    if counts.microbatches is None:
        return jax.lax.scan(body, start, batch)[0]
    return jax.lax.fori_loop(
        0, counts.microbatches, lambda i, t: body(t, jax.tree.map(lambda a: a[i], batch))[0], start
    )


def counts_of(trainer: Trainer, batch: Batch) -> StepCounts:
    """All that a step counts of its whole batch. While the batch grows (`data.batch_ramp_from`) its last microbatches
    are padding alone, and are not computed: one program serves every size of the batch."""
    counts = step_counts(trainer.objective, batch)
    if not trainer.config.data.batch_ramp_tokens:
        return counts
    used_B = (batch["segment_ids"] > 0).any(1)
    used_A = used_B.reshape(trainer.config.train.microbatches, -1).any(1)
    last = jnp.max(jnp.where(used_A, jnp.arange(1, len(used_A) + 1), 0))
    return counts._replace(microbatches=last)


def make_watcher(trainer: Trainer) -> jax.stages.Wrapped:
    """Returns watcher(params, bias, batch) -> sums of what FP8 loses, by weight: float32 [L, WATCHED, SUMS]; one more
    forward and backward pass, jitted."""

    fp8 = trainer.compute.fp8

    def run(params, bias, batch, counts):
        trained = Trained(params, unwatched(params, fp8))
        watched = _local_gradients(trainer, trained, bias, batch, counts)[1].watch
        weights = watch_weights(params, fp8)
        both = {path: jnp.concatenate([watched[path], weights[path][..., None, :]], -2) for path in watched}
        return psum(both, *WORK_AXES)

    def watcher(params: dict, bias: dict, batch: Batch) -> dict[ParamPath, jax.Array]:
        counts = counts_of(trainer, batch)
        return _on_microbatches(trainer, run, PartitionSpec())(params, bias, batch, counts)

    return jax.jit(watcher)


def _on_microbatches(trainer: Trainer, f: Callable, out_specs: Any) -> Callable:
    """f(params, bias, microbatches, counts) on every device, as a function of whole batches."""
    parts, fields = trainer.config.train.microbatches, trainer.objective.fields
    on_shards = trainer.compute.on_shards(f, {name: f"A{dims}" for name, dims in fields.items()}, out_specs)

    def cut(array: jax.Array, rows: int) -> jax.Array:
        """[..., B, ...], of which B is dim `rows`, as [A, ..., B/A, ...]."""
        shape = array.shape
        cut = array.reshape(*shape[:rows], parts, shape[rows] // parts, *shape[rows + 1 :])
        return jnp.moveaxis(cut, rows, 0)

    def run(params: dict, bias: dict, batch: Batch, counts: StepCounts) -> Any:
        batch = {name: cut(batch[name], dims.index("B")) for name, dims in fields.items()}
        return on_shards(params, bias, batch, counts)

    return run


def accumulate_gradients(
    trainer: Trainer, params: dict, bias: dict, batch: Batch, counts: StepCounts
) -> tuple[StepSums, dict]:
    """Sums and gradients of a whole step over the mesh; gradients are split as the parameters are.

    A weight that is split only to be stored has its gradients reduced and scattered where it is gathered; what is
    left, once per step, is the sum over the axes that the parameter is whole on.
    """
    reduce_dtype = jnp.dtype(trainer.config.mesh.reduce_dtype)

    def reduce(g: jax.Array, spec: PartitionSpec) -> jax.Array:
        split = {axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)}
        axes = [axis for axis in WORK_AXES if axis not in split]
        return psum(g.astype(reduce_dtype), *axes).astype(g.dtype) if axis_size(*axes) > 1 else g

    specs = trainer.compute.param_specs

    def run(params, bias, batch, counts):
        sums, (grads, _) = _local_gradients(trainer, Trained(params, {}), bias, batch, counts)
        with jax.named_scope("reduce_gradients"):
            return psum(sums, *TOKEN_AXES), jax.tree.map(reduce, grads, specs)

    return _on_microbatches(trainer, run, (PartitionSpec(), specs))(params, bias, batch, counts)


def _moe_metrics(sums: RouterSums, bias: dict, config: ModelConfig) -> Metrics:
    counts_LE = sums.expert_counts_LE
    if not counts_LE.size:
        return {}
    mean_L = jnp.maximum(counts_LE.mean(-1), 1e-9)
    load_L = counts_LE.max(-1) / mean_L
    bias_LE = in_layer_order(bias, config)
    return {
        "moe/load_max_over_mean": load_L.max(),
        "moe/load_max_over_mean_per_layer": load_L,
        "moe/dropped": sums.dropped,
        "moe/bias_abs_max": jnp.abs(bias_LE).max(),
        "moe/bias_min_per_layer": bias_LE.min(-1),
        "moe/bias_max_per_layer": bias_LE.max(-1),
    }


def apply_gradients(
    trainer: Trainer, state: TrainState, sums: StepSums, grads: dict, counts: StepCounts
) -> tuple[TrainState, Metrics]:
    """The state after a step whose sums, gradients and counts are given, and the step's metrics.

    A step whose loss or gradient is not finite leaves weights, moments and biases as they were and is counted.
    """
    config = trainer.config
    loss = total_loss(trainer.objective, sums, counts, config.train.z_loss_coefficient)
    norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
    ok = jnp.isfinite(loss) & jnp.isfinite(norm)
    with jax.named_scope("optimizer"):
        params, optimizer = trainer.update(state.params, state.optimizer, grads, norm, ok)
    bias = state.bias
    if config.model.moe_router_enable_expert_bias and config.train.bias_update_rate > 0 and not config.train.only:
        bias = balance_biases(bias, sums.router.expert_counts_LE, config.train.bias_update_rate, config.model)
    bias = jax.tree.map(lambda new, old: jnp.where(ok, new, old), bias, state.bias)
    failed = 1 - ok.astype(jnp.int32)
    in_a_row = jnp.where(ok, 0, state.skipped_in_a_row + 1)
    metrics = {
        **trainer.objective.metrics(sums.objective, counts.objective),
        "train/total_loss": loss,
        "train/grad_norm": norm,
        "train/learning_rate": trainer.schedule(_update_count(state)),
        "train/tokens": counts.tokens,
        "train/skipped_steps": state.skipped + failed,
        "train/skipped_in_a_row": in_a_row,
        **_moe_metrics(sums.router, bias, config.model),
    }
    return TrainState(state.step + 1, params, bias, optimizer, state.skipped + failed, in_a_row), metrics


def make_train_step(trainer: Trainer) -> jax.stages.Wrapped:
    """Returns step(state, batch) -> (state, metrics), jitted, with `state` donated.

    `batch` has the arrays of the objective's `fields`, B being the global batch.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        counts = counts_of(trainer, batch)
        sums, grads = accumulate_gradients(trainer, state.params, state.bias, batch, counts)
        return apply_gradients(trainer, state, sums, grads, counts)

    everywhere = NamedSharding(trainer.compute.mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(trainer.shardings(), everywhere))


def _update_count(state: TrainState) -> jax.Array:
    """Updates done so far, as the schedule counts them: skipped steps are none."""
    return state.step - state.skipped
