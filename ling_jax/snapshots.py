"""Weights and expert biases of a run without its moments, saved at an interval of tokens and merged.

They lie in `snapshots/` of the run's folder, and each is a checkpoint: `convert.py merge --source RUN/snapshots`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from ling_jax.checkpoint import Checkpointer, DamagedCheckpoint, read_mean
from ling_jax.config import CheckpointConfig

SNAPSHOTS = "snapshots"  # of a run's folder


class Snapshots:
    """The snapshots of one run. All processes make the same calls, each from one thread."""

    def __init__(self, run_dir: epath.Path, config: CheckpointConfig):
        self._folder, self._config = run_dir / SNAPSHOTS, config
        kept = dataclasses.replace(config, keep_last=config.keep_snapshots, keep_every=0)
        self._saved = Checkpointer(str(self._folder), kept)

    def begin(self, step: int) -> None:
        """Removes those of steps after the one at which the run goes on."""
        self._saved.drop_after(step)

    def is_due(self, before: int, tokens: int) -> bool:
        """Whether a step that reads the tokens from `before` to `tokens` ends with one."""
        every = self._config.snapshot_tokens
        return tokens // every > before // every

    def save(self, step: int, params: dict, bias: dict, meta: Mapping[str, Any]) -> None:
        """Copies off the devices and writes in the background; ValueError as `Checkpointer.save`."""
        self._saved.save(step, {"params": params, "bias": bias}, dict(meta))

    def merged(self, params: dict, bias: dict) -> tuple[dict, dict] | None:
        """The mean of the last `merge_snapshots`, of as many as there are; placed as the weights that are given. None
        where there are fewer than two, or none is asked for. ValueError, with the remedy, for one that is damaged."""
        self._saved.wait()
        steps = self._saved.all_steps()[-self._config.merge_snapshots :] if self._config.merge_snapshots else []
        if len(steps) < 2:
            return None
        weights = {"params": params, "bias": bias}
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), weights)
        try:
            mean = read_mean([self._folder / str(step) for step in steps], like)
        except DamagedCheckpoint as error:
            raise ValueError(f"{error}. A run goes on without its snapshots: move {self._folder} away") from error
        return mean["params"], mean["bias"]

    def close(self) -> None:
        """Waits for the last one, with its error."""
        self._saved.close()
