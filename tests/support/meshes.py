"""A training step on any mesh, to be compared with one device's."""

from functools import cache
from typing import Any

import jax
import numpy as np

from ling_jax.config import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from ling_jax.parallel.mesh import place_batch, rows_here
from ling_jax.train.state import make_trainer
from ling_jax.train.step import accumulate_gradients, apply_gradients, counts_of
from tests.support.helpers import (
    assert_close,
    assert_gradients_close,
    documents,
    jit,
    pack,
    random_weights,
    tiny,
)

WHOLE = tiny(vocab_size=64)
# Where neither a dense nor an MTP layer adds anything: a third of what there is to compile.
SPARSE = tiny(vocab_size=64, num_hidden_layers=2, first_k_dense_replace=0, num_nextn_predict_layers=0)
LENGTH = 16
DOCUMENTS = documents([16, 9, 6, 3, 16, 5, 11, 7, 2, 4, 1, 12, 14])
# Eight rows: full, packed, and one that is all padding.
CUTS = [(0, 1), (1, 3), (3, 4), (4, 5), (5, 7), (7, 11), (0, 0), (12, 13)]
BATCH = pack([DOCUMENTS[first:last] for first, last in CUTS], LENGTH)
# A batch that is to grow to eight rows: the second of two microbatches is padding alone.
GROWING = {"data": dict(batch_ramp_from=4, batch_ramp_by=4, batch_ramp_tokens=1000), "microbatches": 2}
HALF = pack([DOCUMENTS[first:last] for first, last in (*CUTS[:4], *[(0, 0)] * 4)], LENGTH)


class Run:
    """Gradients and one step of a model on a mesh."""

    def __init__(self, model: ModelConfig, mesh: MeshConfig, hot: bool = False, data: Any = None, **train: Any):
        self.batch = BATCH if data is None else HALF
        self.config = RunConfig(
            model=model,
            mesh=mesh,
            data=DataConfig(sequence_length=LENGTH, global_batch_size=8, **(data or {})),
            optimizer=OptimizerConfig(eps=1e-6),
            schedule=ScheduleConfig(peak_lr=0.01, warmup_steps=4),
            train=TrainConfig(**{"bias_update_rate": 0.01, "z_loss_coefficient": 0.01, "remat": "full", **train}),
        )
        self.trainer = make_trainer(self.config)
        _, params, bias = random_weights(model)
        if hot:  # one expert that every token takes, and some that none does
            bias = jax.tree.map(lambda b: b.at[..., 1].set(9.0).at[..., 4:6].set(-9.0), bias)
        self.state = self.trainer.new_state_from(params, bias)

    def outcome(self):
        """(sums, gradients, state after the step, its metrics): what `make_train_step` does, with the gradients."""
        here = rows_here(self.trainer.compute.mesh, 8)
        rows, objective = {k: v[here] for k, v in self.batch.items()}, self.trainer.objective
        placed = place_batch(self.trainer.compute.mesh, rows, objective.fields, here, 8)

        def run(state, batch):
            counts = counts_of(self.trainer, batch)
            sums, grads = accumulate_gradients(self.trainer, state.params, state.bias, batch, counts)
            return sums, grads, *apply_gradients(self.trainer, state, sums, grads, counts)

        return jax.device_get(jit(run)(self.state, placed))


@cache
def one_device(model: ModelConfig, hot: bool = False, **train: Any):
    """The outcome of a run on one device."""
    return Run(model, MeshConfig(), hot, **train).outcome()


def compare(run: Run, want) -> None:
    (sums, grads, state, metrics), (want_sums, want_grads, want_state, want_metrics) = run.outcome(), want
    for got, expected in zip((*sums.objective, sums.router.z), (*want_sums.objective, want_sums.router.z), strict=True):
        assert_close(got, expected)
    np.testing.assert_array_equal(sums.router.expert_counts_LE, want_sums.router.expert_counts_LE)
    assert sums.router.dropped == 0
    assert_gradients_close(grads, want_grads)
    assert_close(metrics["train/total_loss"], want_metrics["train/total_loss"])
    assert_gradients_close(state.optimizer[1].mu, want_state.optimizer[1].mu)
    assert_gradients_close(state.optimizer[1].nu, want_state.optimizer[1].nu, 2e-5)
    jax.tree.map(np.testing.assert_array_equal, state.bias, want_state.bias)
