"""Draws how the expert bias balances the load: python -m scripts.expert_load_figure [--path docs/expert_load.png]

Two runs that differ in `train.bias_update_rate` alone, on text from a random Markov chain; under a minute on 2 cores.
"""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from ling_jax.config import DataConfig, ModelConfig, RunConfig, ScheduleConfig, TrainConfig
from ling_jax.train.figures import expert_load_figure
from ling_jax.train.state import make_trainer
from ling_jax.train.step import make_train_step

VOCAB = 64
CONFIG = RunConfig(
    model=ModelConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=32, num_experts_per_tok=2, n_group=4, topk_group=2,
        moe_intermediate_size=16, max_position_embeddings=64, pad_token_id=None, eos_token_id=None,
    ),
    data=DataConfig(sequence_length=32, global_batch_size=16),
    schedule=ScheduleConfig(peak_lr=0.03, warmup_steps=5),
    train=TrainConfig(steps=120, remat="none", init_std=0.02),
)  # fmt: skip
RATE = 0.01  # ten times the report's, for a run a thousand times as short


def batches(config: DataConfig) -> Iterator[dict[str, np.ndarray]]:
    """Rows of a Markov chain in which a token has a handful of likely successors; int32 [rows, length]."""
    draw = np.random.default_rng(config.seed)
    rows, length = config.global_batch_size, config.sequence_length
    cumulative_VV = draw.dirichlet(np.full(VOCAB, 0.1), size=VOCAB).cumsum(-1)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    while True:
        tokens = draw.integers(VOCAB, size=(rows, length + 1), dtype=np.int32)
        for i in range(length):
            below = draw.random((rows, 1)) > cumulative_VV[tokens[:, i]]
            tokens[:, i + 1] = np.minimum(below.sum(-1), VOCAB - 1)
        yield {
            "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions,
            "segment_ids": np.ones_like(positions),
        }  # fmt: skip


def expert_loads(bias_update_rate: float) -> list[dict[str, Any]]:
    """Trains, and returns each step's `moe/load_max_over_mean`."""
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, bias_update_rate=bias_update_rate))
    trainer = make_trainer(config)
    state, step_fn, data = trainer.new_state(), make_train_step(trainer), batches(config.data)
    loads = []
    for _ in range(config.train.steps):
        state, metrics = step_fn(state, next(data))
        loads.append(metrics["moe/load_max_over_mean"])
    return [{"step": i, "moe/load_max_over_mean": float(load)} for i, load in enumerate(jax.device_get(loads), 1)]


def main(path: Path = Path("docs/expert_load.png")) -> None:
    """Trains twice and draws both runs into `path`."""
    runs = {"without the bias update": expert_loads(0.0), "with the bias update": expert_loads(RATE)}
    path.parent.mkdir(parents=True, exist_ok=True)
    expert_load_figure(runs, path)
    logging.info("wrote %s", path)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tyro.cli(main)
