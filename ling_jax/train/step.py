"""One optimizer step: microbatches, update, balance; pure and jitted.

Legend: A microbatches, B rows, T tokens, L MoE layers, E experts.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from ling_jax.parallel.mesh import TOKEN_AXES, WORK_AXES, axis_size, psum
from ling_jax.train.balance import balance_biases
from ling_jax.train.fp8 import Path, Trained, unwatched, watch_weights, with_codes
from ling_jax.train.loss import Batch, Counts, Sums, count_targets, loss_sums, total_loss
from ling_jax.train.state import Trainer, TrainState

Metrics = dict[str, jax.Array]


def _local_gradients(trainer: Trainer, trained: Trained, bias: dict, batch: Batch) -> tuple[Sums, Trained]:
    """Sums and float32 gradients of this device's part of all microbatches [A, B, T], not yet summed over devices
    (but for what `parallel.rules.gather` has scattered). Weights are quantised once for all of them.

    Each microbatch is divided by the step's counts, not its own, so A does not change the result.
    """
    counts = psum(count_targets(batch), *TOKEN_AXES)
    coefficient = trainer.config.train.z_loss_coefficient

    quantised = trainer.quantise(trained.params)

    def loss(trained, rows):
        params = with_codes(trained.params, quantised, trained.watch)
        sums = loss_sums(trainer.model(params, bias), rows)
        # Devices along `tensor` compute the same loss: the objective is the sum over all devices.
        return total_loss(sums, counts, trainer.config.model, coefficient) / axis_size("tensor"), sums

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
    return jax.lax.scan(body, start, batch)[0]


def make_watcher(trainer: Trainer) -> jax.stages.Wrapped:
    """Returns watcher(params, bias, batch) -> sums of what FP8 loses, by weight: float32 [L, WATCHED, SUMS]; one more
    forward and backward pass, jitted."""

    def run(params, bias, batch):
        trained = Trained(params, unwatched(params, trainer.fp8))
        watched, weights = _local_gradients(trainer, trained, bias, batch)[1].watch, watch_weights(params, trainer.fp8)
        both = {path: jnp.concatenate([watched[path], weights[path][..., None, :]], -2) for path in watched}
        return psum(both, *WORK_AXES)

    def watcher(params: dict, bias: dict, batch: Batch) -> dict[Path, jax.Array]:
        batch = in_microbatches(batch, trainer.config.train.microbatches)
        return trainer.on_shards(run, PartitionSpec())(params, bias, batch)

    return jax.jit(watcher)


def in_microbatches(batch: Batch, parts: int) -> Batch:
    """[B, T] arrays as [A, B/A, T]."""
    return {name: value.reshape(parts, -1, value.shape[-1]) for name, value in batch.items()}


def accumulate_gradients(trainer: Trainer, params: dict, bias: dict, batch: Batch) -> tuple[Sums, dict]:
    """Sums and gradients of a whole step over the mesh; gradients are split as the parameters are.

    A weight that is split only to be stored has its gradients reduced and scattered where it is gathered; what is
    left, once per step, is the sum over the axes that the parameter is whole on.
    """
    reduce_dtype = jnp.dtype(trainer.config.mesh.reduce_dtype)

    def reduce(g: jax.Array, spec: PartitionSpec) -> jax.Array:
        split = {axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)}
        axes = [axis for axis in WORK_AXES if axis not in split]
        return psum(g.astype(reduce_dtype), *axes).astype(g.dtype) if axis_size(*axes) > 1 else g

    def run(params, bias, batch):
        sums, (grads, _) = _local_gradients(trainer, Trained(params, {}), bias, batch)
        with jax.named_scope("reduce_gradients"):
            return psum(sums, *TOKEN_AXES), jax.tree.map(reduce, grads, trainer.param_specs)

    return trainer.on_shards(run, (PartitionSpec(), trainer.param_specs))(params, bias, batch)


def _moe_metrics(sums: Sums, bias: dict) -> Metrics:
    counts_LE = sums.expert_counts_LE
    if not counts_LE.size:
        return {}
    mean_L = jnp.maximum(counts_LE.mean(-1), 1e-9)
    load_L = counts_LE.max(-1) / mean_L
    rows = [leaf.reshape(-1, leaf.shape[-1]) for leaf in jax.tree.leaves(bias)]
    bias_LE = jnp.concatenate(rows)
    return {
        "moe/load_max_over_mean": load_L.max(),
        "moe/load_max_over_mean_per_layer": load_L,
        "moe/dropped": sums.dropped,
        "moe/bias_abs_max": jnp.abs(bias_LE).max(),
        "moe/bias_min_per_layer": bias_LE.min(-1),
        "moe/bias_max_per_layer": bias_LE.max(-1),
    }


def apply_gradients(
    trainer: Trainer, state: TrainState, sums: Sums, grads: dict, counts: Counts
) -> tuple[TrainState, Metrics]:
    """The state after a step whose sums, gradients and counts are given, and the step's metrics.

    A step whose loss or gradient is not finite leaves weights, moments and biases as they were and is counted.
    """
    config = trainer.config
    loss = total_loss(sums, counts, config.model, config.train.z_loss_coefficient)
    norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
    ok = jnp.isfinite(loss) & jnp.isfinite(norm)
    with jax.named_scope("optimizer"):
        params, optimizer = trainer.update(state.params, state.optimizer, grads, norm, ok)
    bias = state.bias
    if config.model.moe_router_enable_expert_bias and config.train.bias_update_rate > 0:
        bias = balance_biases(bias, sums.expert_counts_LE, config.train.bias_update_rate, config.model)
    bias = jax.tree.map(lambda new, old: jnp.where(ok, new, old), bias, state.bias)
    failed = 1 - ok.astype(jnp.int32)
    in_a_row = jnp.where(ok, 0, state.skipped_in_a_row + 1)
    metrics = {
        "train/loss": sums.nll / jnp.maximum(counts.targets, 1),
        "train/total_loss": loss,
        "train/grad_norm": norm,
        "train/learning_rate": trainer.schedule(_update_count(state)),
        "train/tokens": counts.tokens,
        "train/skipped_steps": state.skipped + failed,
        "train/skipped_in_a_row": in_a_row,
        **_moe_metrics(sums, bias),
    }
    if config.model.num_nextn_predict_layers:
        metrics["train/mtp_loss"] = sums.mtp_nll / jnp.maximum(counts.mtp_targets, 1)
    return TrainState(state.step + 1, params, bias, optimizer, state.skipped + failed, in_a_row), metrics


def make_train_step(trainer: Trainer) -> jax.stages.Wrapped:
    """Returns step(state, batch) -> (state, metrics), jitted, with `state` donated.

    `batch` is as `loss_sums` takes it, with B the global batch.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = in_microbatches(batch, trainer.config.train.microbatches)
        sums, grads = accumulate_gradients(trainer, state.params, state.bias, batch)
        return apply_gradients(trainer, state, sums, grads, count_targets(batch))

    everywhere = NamedSharding(trainer.mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(trainer.shardings(), everywhere))


def _update_count(state: TrainState) -> jax.Array:
    """Updates done so far, as the schedule counts them: skipped steps are none."""
    return state.step - state.skipped
