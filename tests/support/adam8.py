"""Batches and placed arrays of the tests of 8-bit AdamW."""

from typing import Any

import jax
import numpy as np

from ling_jax.train.state import Trainer


def placed(trainer: Trainer) -> Any:
    """A state's shapes on its mesh."""
    shapes = jax.eval_shape(trainer.init)
    return jax.tree.map(lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), shapes, trainer.shardings())


V, B, T = 512, 16, 32


def batches(first: int, last: int) -> list[dict[str, np.ndarray]]:
    """Rows of a chain in which a token has eight successors, the most frequent tokens a thousand times as often as the
    rarest."""
    draw = np.random.default_rng(0)
    weights = 1 / np.arange(1, V + 1)
    successors_V8 = draw.choice(V, size=(V, 8), p=weights / weights.sum())
    found = []
    for seed in range(first, last):
        draw = np.random.default_rng(seed)
        tokens = draw.integers(V, size=(B, T + 1), dtype=np.int32)
        for i in range(T):
            tokens[:, i + 1] = successors_V8[tokens[:, i], np.minimum(draw.geometric(0.4, B) - 1, 7)]
        places = np.tile(np.arange(T, dtype=np.int32), (B, 1))
        segments = np.ones((B, T), np.int32)
        found.append(dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], positions=places, segment_ids=segments))
    return found
