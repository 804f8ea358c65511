"""Saves the whole state of a run, and restores it onto any mesh."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from etils import epath
from flax.serialization import from_state_dict, to_state_dict
from flax.traverse_util import flatten_dict

from ling_jax.checkpoint import Checkpointer, read_arrays, read_meta, read_shapes
from ling_jax.config import RunConfig
from ling_jax.data.mixture import DataState
from ling_jax.data.pipeline import DataBatch
from ling_jax.snapshots import Snapshots
from ling_jax.train.state import Trainer, TrainState


@dataclasses.dataclass
class RunSaver:
    """Saves whole training states: weights, biases, moments and counters as arrays, the rest as JSON.

    Every random draw follows from `train.seed` and `data.seed`, both in the config.
    """

    checkpointer: Checkpointer
    config: RunConfig
    tokenizer: str = ""  # its fingerprint
    text: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the facts of what it reads
    snapshots: Snapshots | None = None
    origin: epath.Path | None = None  # the checkpoint of another run that a new one continues
    read: DataState = DataState(0, 0, 0, {}, {}, {})  # up to the batch that was handed out last
    step_read: int = 0  # tokens up to the step that was done last

    def watching(self, batches: Iterator[DataBatch]) -> Iterator[DataBatch]:
        """The batches; each is what has been read when its step is saved."""
        for batch in batches:
            self.read = batch.state
            yield batch

    def save(self, state: TrainState, fallen: Sequence[str] = ()) -> None:
        step = int(state.step)
        self.checkpointer.save(step, to_state_dict(state), self._meta(step) | {"fp8_fallen": list(fallen)})

    def _meta(self, step: int) -> dict[str, Any]:
        read = self.read
        return {
            "config": dataclasses.asdict(self.config),
            "data": {"next_step": step, "next_row": read.rows, "text": self.text, "read": read.to_json()},
            "tokenizer": self.tokenizer,
            "versions": {"jax": jax.__version__, "flax": flax.__version__},
        }

    def after_step(self, state: TrainState) -> None:
        before, self.step_read = self.step_read, self.read.tokens
        if self.snapshots is not None and self.snapshots.is_due(before, self.step_read):
            step = int(state.step)
            self.snapshots.save(step, state.params, state.bias, self._meta(step))

    def merged(self, state: TrainState) -> tuple[dict, dict] | None:
        return None if self.snapshots is None else self.snapshots.merged(state.params, state.bias)

    def wait(self) -> None:
        self.checkpointer.wait()

    def close(self) -> None:
        """Waits for what is being written, and ends the background threads."""
        with contextlib.closing(self.checkpointer):
            if self.snapshots is not None:
                self.snapshots.close()

    def begin(self, step: int, facts: Mapping[str, Any]) -> None:
        """Goes on at a step whose state was restored, or begins at 0; `facts` tell what is read."""
        self.text = facts
        if self.snapshots is not None:
            self.snapshots.begin(step)

    def start(self) -> epath.Path | None:
        """The checkpoint to go on from: the run's latest; before it has one, its `origin`."""
        return self.checkpointer.folder(None) if self.checkpointer.all_steps() else self.origin

    def meta(self) -> dict[str, Any]:
        """The metadata of the checkpoint to go on from; empty if there is none."""
        start = self.start()
        return {} if start is None else read_meta(start)

    def restore(self, trainer: Trainer) -> TrainState:
        """The state to go on from, each device reading its own shards, whatever mesh it was saved from."""
        start = self.start()
        assert start is not None
        shapes, shardings = jax.eval_shape(trainer.init), trainer.shardings()
        like = jax.tree.map(
            lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
            to_state_dict(_as_saved(trainer, shapes, start)),
            to_state_dict(shardings),
        )
        restored: Any = from_state_dict(shapes, read_arrays(start, like, whole=True))
        return restored._replace(params=jax.tree.map(lambda a, b: a.astype(b.dtype), restored.params, shapes.params))


def _as_saved(trainer: Trainer, shapes: TrainState, start: epath.Path) -> TrainState:
    """The `shapes` with vectors in bfloat16 where an older version kept them so beside its bfloat16 matrices."""
    if trainer.compute.options["param_dtype"] == jnp.float32:
        return shapes
    saved: dict[Any, Any] = flatten_dict(read_shapes(start).get("params", {}))

    def leaf(path: Any, wanted: jax.ShapeDtypeStruct, matrix: bool) -> jax.ShapeDtypeStruct:
        found = saved.get(tuple(key.key for key in path), wanted)
        return wanted if matrix else jax.ShapeDtypeStruct(wanted.shape, found.dtype)

    return shapes._replace(params=jax.tree_util.tree_map_with_path(leaf, shapes.params, trainer.update.mask))
