"""One optimizer step: the same however it is cut, balanced once, and harmless when numbers are lost.

Legend: L MoE layers, E experts.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ling_jax.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from ling_jax.model.model import split_model
from ling_jax.train.balance import balance_bias, balance_biases
from ling_jax.train.loss import IGNORE
from ling_jax.train.state import TrainState, make_trainer
from ling_jax.train.step import make_train_step
from tests.support.helpers import (
    QUICK,
    assert_close,
    assert_gradients_close,
    assert_trees_equal,
    documents,
    loss_and_grads,
    make_model,
    pack,
    random_weights,
    small,
    tiny,
)

RATE = 0.01  # of the balance update
DOCUMENTS = documents([15, 8, 7, 2, 9, 2, 4])
# Three microbatches of two rows: full, almost empty, half full.
BATCH = pack([DOCUMENTS[:1], DOCUMENTS[1:3], DOCUMENTS[3:4], [], DOCUMENTS[4:6], DOCUMENTS[6:]], 15)
POISON = 58  # an id that only the batch `poisoned` has
assert not (BATCH["tokens"] == POISON).any()


class Run:
    """A compiled step, and states at its start."""

    def __init__(self, model: ModelConfig, data: dict[str, int] | None = None, **train):
        data = {"sequence_length": 15, "global_batch_size": 6} | (data or {})
        config = RunConfig(
            model=model,
            data=DataConfig(**data),
            optimizer=OptimizerConfig(eps=1e-6),
            schedule=ScheduleConfig(peak_lr=0.01, warmup_steps=4),
            train=TrainConfig(**{"bias_update_rate": RATE, "remat": "none", **train}),
        )
        self.trainer = make_trainer(config)
        batch = {name: array[: data["global_batch_size"]] for name, array in BATCH.items()}
        self.compiled = make_train_step(self.trainer).lower(self.start(), batch).compile(compiler_options=QUICK)

    def start(self) -> TrainState:
        return self.trainer.start(*random_weights(self.trainer.config.model)[1:])

    def step(self, state: TrainState, batch=BATCH):
        """(state, metrics) as numpy; `state` stays as it was, though the step is given its arrays to reuse."""
        return jax.device_get(self.compiled(jax.tree.map(jnp.array, state), batch))


@pytest.fixture(scope="module")
def in_parts():
    """Three microbatches, layers recomputed."""
    return Run(tiny(), microbatches=3, remat="full")


@pytest.fixture(scope="module")
def first_step(in_parts):
    """(state, metrics)."""
    return in_parts.step(in_parts.start())


@pytest.fixture(scope="module")
def whole_batch():
    """(loss, sums, gradients, their norm) of all six rows at once, nothing recomputed."""
    loss, sums, grads = jax.device_get(loss_and_grads(make_model(tiny()), BATCH))
    return loss, sums, grads, np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))


# A batch that grows.


def test_a_growing_batch_is_one_program_whose_steps_are_those_of_programs_made_for_each_size():
    """Bit for bit: microbatches of padding alone are not computed."""
    ramp = dict(batch_ramp_from=2, batch_ramp_by=2, batch_ramp_tokens=100)
    model = tiny(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    growing = Run(model, microbatches=3, data=ramp)
    blank = {name: np.full_like(array, IGNORE if name == "targets" else 0) for name, array in BATCH.items()}
    for rows in (2, 4):
        padded = {name: np.concatenate([BATCH[name][:rows], blank[name][rows:]]) for name in BATCH}
        state, metrics = growing.step(growing.start(), padded)
        own = Run(model, microbatches=rows // 2, data=dict(global_batch_size=rows))
        want, metrics_of_own = own.step(own.start(), {name: array[:rows] for name, array in BATCH.items()})
        assert_trees_equal((state.params, state.bias, state.optimizer), (want.params, want.bias, want.optimizer))
        assert_trees_equal(metrics, metrics_of_own)


# Microbatches of uneven token counts.


def test_microbatches_give_the_losses_and_loads_of_the_whole_batch(first_step, whole_batch):
    _, metrics = first_step
    loss, sums, _, _ = whole_batch
    assert_close(metrics["train/total_loss"], loss)
    assert_close(metrics["train/loss"], sums.objective.nll / (BATCH["targets"] >= 0).sum())
    assert_close(metrics["train/mtp_loss"], sums.objective.mtp_nll / sum(max(len(d) - 2, 0) for d in DOCUMENTS))
    counts = sums.router.expert_counts_LE
    assert_close(metrics["moe/load_max_over_mean_per_layer"], counts.max(-1) / counts.mean(-1))
    assert metrics["train/tokens"] == sum(map(len, DOCUMENTS))


def test_the_number_of_microbatches_changes_no_logged_number(first_step):
    """Theirs have unequal numbers of targets: a mean of means would be another."""
    run = Run(tiny())
    _, metrics = run.step(run.start())
    for name in ("train/loss", "train/mtp_loss", "train/grad_norm"):
        assert metrics[name] == pytest.approx(first_step[1][name], rel=1e-5), name


def test_microbatches_give_the_gradients_of_the_whole_batch(first_step, whole_batch):
    """The first moments of a first step are the clipped gradients, but for a factor."""
    state, metrics = first_step
    _, _, grads, norm = whole_batch
    assert norm > 1
    assert_close(metrics["train/grad_norm"], norm)
    assert_gradients_close(state.optimizer[1].mu, jax.tree.map(lambda g: 0.1 * g / norm, grads))
    assert_gradients_close(state.optimizer[1].nu, jax.tree.map(lambda g: 0.05 * (g / norm) ** 2, grads))


def test_microbatches_give_the_parameters_of_the_whole_batch(in_parts, first_step, whole_batch):
    rate = 0.01 / 4  # the first of four warmup steps
    updates = jax.tree.map(lambda g: g / whole_batch[3], whole_batch[2])
    before, after, updates = (flatten_dict(tree) for tree in (in_parts.start().params, first_step[0].params, updates))
    for path, p in before.items():
        decay = 0 if "norm" in path[-2] else 0.1
        want = p - rate * (updates[path] / (np.abs(updates[path]) + 1e-6) + decay * p)
        limit = 1e-5 * np.abs(p).max() + 1e-2 * rate  # design.md: of max|p|, and of the learning rate
        assert np.abs(after[path] - want).max() <= limit, path


def test_a_step_moves_nothing_between_host_and_device(in_parts):
    state, batch = jax.device_put((jax.tree.map(np.array, in_parts.start()), BATCH))
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(in_parts.compiled(state, batch))


def test_a_state_made_from_given_weights_can_be_trained(in_parts):
    leaves = jax.tree.leaves(in_parts.start())
    places = {leaf.unsafe_buffer_pointer() for leaf in leaves}
    assert len(places) == len(leaves)


def test_twenty_steps_learn_a_batch_by_heart(in_parts):
    state, losses = in_parts.start(), []
    for _ in range(20):
        state, metrics = in_parts.step(state)
        losses.append(metrics["train/loss"])
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 20 and int(state.skipped) == 0


@pytest.mark.parametrize("microbatches", [1, 3])
def test_a_step_keeps_every_dtype_and_shape_of_its_state(microbatches):
    """Also for bfloat16 parameters: another dtype would compile the second step anew and donate nothing."""
    config = RunConfig(
        model=small(),
        data=DataConfig(sequence_length=15, global_batch_size=6),
        train=TrainConfig(param_dtype="bfloat16", dtype="bfloat16", microbatches=microbatches),
    )
    trainer = make_trainer(config)
    before = jax.eval_shape(trainer.init)
    after, _ = jax.eval_shape(make_train_step(trainer), before, BATCH)
    changed = {
        jax.tree_util.keystr(path): (old, new)
        for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
        if (old.shape, old.dtype) != (new.shape, new.dtype)
    }
    assert not changed


# The balance of experts.


def test_the_update_raises_idle_experts_and_lowers_busy_ones_by_the_rate():
    counts = np.array([[1, 5, 3, 3], [0, 0, 0, 12]], np.int32)
    bias = np.array([[1, 2, 3, 4], [0, 0, 0, 0]], np.float32)
    got = balance_bias(jnp.array(bias), jnp.array(counts), 0.1) - bias
    assert_close(got, [[0.1, -0.1, 0, 0], [0.05, 0.05, 0.05, -0.15]])


def test_the_update_has_mean_zero():
    counts = np.random.default_rng(0).integers(0, 100, (6, 16)).astype(np.int32)
    got = balance_bias(jnp.zeros((6, 16)), jnp.array(counts), 0.5)
    assert np.abs(np.asarray(got).mean(1)).max() < 1e-6 and np.abs(got).max() > 0.1


def test_every_layers_bias_is_moved_by_its_own_counts():
    """Two MoE layers and the MTP layer, whose counts are the last."""
    _, _, bias = random_weights(tiny())
    counts = np.eye(3, 8, dtype=np.int32)  # layer i has all its tokens at expert i
    moved = balance_biases(jax.tree.map(jnp.zeros_like, bias), jnp.array(counts), 1.0, tiny())
    moved = {path[0]: np.asarray(leaf) for path, leaf in flatten_dict(moved).items()}
    assert moved["layers"].argmin(-1).tolist() == [0, 1] and moved["mtp"].argmin() == 2


def test_a_step_moves_the_biases_once_by_the_counts_of_its_whole_batch(in_parts, first_step, whole_batch):
    """Though layers are recomputed and the batch comes in three parts."""
    counts = whole_batch[1].router.expert_counts_LE
    want = balance_biases(in_parts.start().bias, counts, RATE, tiny())
    assert np.abs(counts - counts.mean(-1, keepdims=True)).max() > 5
    for got, expected in zip(jax.tree.leaves(first_step[0].bias), jax.tree.leaves(want), strict=True):
        assert_close(got, expected)


def test_scoring_a_batch_leaves_the_biases_alone():
    model = make_model(tiny())
    _, _, before = jax.device_get(split_model(model))
    loss_and_grads(model, BATCH)
    assert_trees_equal(jax.device_get(split_model(model)[2]), before)


ONE_LAYER = small(num_hidden_layers=1, first_k_dense_replace=0)


@pytest.mark.parametrize(
    "run",
    [
        partial(Run, ONE_LAYER, bias_update_rate=0.0),
        partial(Run, dataclasses.replace(ONE_LAYER, moe_router_enable_expert_bias=False)),
    ],
    ids=["bias_update_rate=0", "moe_router_enable_expert_bias=False"],
)
def test_nothing_but_the_balance_update_writes_a_bias(run):
    run = run()
    start = run.start()
    state, _ = run.step(start)
    assert_trees_equal(state.bias, jax.device_get(start.bias))
    assert not np.array_equal(state.params["norm"]["weight"], start.params["norm"]["weight"])


# Lost numbers.


def poisoned():
    tokens = BATCH["tokens"].copy()
    tokens[2, 1] = POISON  # in the second of three microbatches
    return dict(BATCH, tokens=tokens)


def with_poison(state: TrainState, value: float) -> TrainState:
    """`state` with an embedding that no token of BATCH looks up."""
    table = np.array(state.params["word_embeddings"]["weight"])
    table[POISON] = value
    return state._replace(params=state.params | {"word_embeddings": {"weight": table}})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_without_finite_loss_or_gradient_changes_nothing_but_is_counted(in_parts, value):
    start = with_poison(in_parts.step(in_parts.start())[0], value)
    state, metrics = in_parts.step(start, poisoned())
    assert not (np.isfinite(metrics["train/total_loss"]) and np.isfinite(metrics["train/grad_norm"]))
    for name in ("params", "bias", "optimizer"):
        assert_trees_equal(getattr(state, name), jax.device_get(getattr(start, name)))
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (2, 1, 1)
    assert (metrics["train/skipped_steps"], metrics["train/skipped_in_a_row"]) == (1, 1)


def test_skipped_steps_in_a_row_are_counted_until_a_good_one(in_parts):
    state, counted = with_poison(in_parts.start(), np.nan), []
    for batch in (poisoned(), poisoned(), BATCH, poisoned()):
        state, metrics = in_parts.step(state, batch)
        counted.append((int(metrics["train/skipped_steps"]), int(metrics["train/skipped_in_a_row"])))
    assert counted == [(1, 1), (2, 2), (2, 0), (3, 1)]


def test_a_good_step_after_a_skipped_one_is_as_if_it_were_the_first(in_parts):
    """Moments, bias correction and learning rate included."""
    start = with_poison(in_parts.start(), np.nan)
    want, want_metrics = in_parts.step(start)
    state, metrics = in_parts.step(in_parts.step(start, poisoned())[0])
    assert_trees_equal(state._replace(step=0, skipped=0), want._replace(step=0, skipped=0))
    assert metrics["train/learning_rate"] == want_metrics["train/learning_rate"] == np.float32(0.01 / 4)
