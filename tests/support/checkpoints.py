"""Checkpoints of a run that never was, written for tests of what reads several."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ling_jax.checkpoint import Checkpointer, read_arrays
from ling_jax.config import CheckpointConfig, DataConfig, RunConfig
from tests.support.helpers import random_weights, small

Arrays = dict[tuple[str, ...], np.ndarray]
CONFIG = RunConfig(model=small(), data=DataConfig(sequence_length=32, global_batch_size=4))


def weights_at(step: int, dtype: np.dtype | None = None) -> Arrays:
    """Params, and zero-mean expert biases, by their paths."""
    _, params, bias = random_weights(CONFIG.model, step)
    params = jax.tree.map(lambda a: np.asarray(a, dtype), params)
    bias = jax.tree.map(lambda a: np.asarray(a - a.mean(-1, keepdims=True)), bias)
    return flatten_dict({"params": params, "bias": bias})


def write_run(folder: Path, states: Mapping[int, Mapping[tuple[str, ...], Any]], **meta: Any) -> Path:
    """A run's folder with these states, whose moments are a lie: nobody may read them."""
    checkpoints = Checkpointer(str(folder / "checkpoints"), CheckpointConfig(keep_last=99))
    for step, arrays in states.items():
        state = unflatten_dict({**arrays, ("optimizer", "mu"): np.full(7, step, np.float32)})
        about = {"data": {"next_step": step, "next_row": 4 * step}, "tokenizer": "that", **meta}
        checkpoints.save(step, state, {"config": dataclasses.asdict(CONFIG), **about})
    checkpoints.close()
    for file in folder.glob("checkpoints/*/state/optimizer.mu/*"):
        file.unlink()
    return folder


def result(folder: Path) -> Arrays:
    return flatten_dict(read_arrays(folder))
