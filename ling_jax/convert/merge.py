"""Checkpoints of one run averaged into one, which stands for the end of a decay of the learning rate (spec 4.3).

Every array of the model is averaged with the same weights: float32 sums, the oldest checkpoint first, rounded once to
the array's dtype. Expert biases too, in float32: the balance update leaves their mean over experts at zero, and so does
an average. The optimizer's moments are not read, and the merged checkpoint has none.
"""

import itertools
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from ling_jax.checkpoint import finish_checkpoint, make_checkpoint, read_meta, saved_steps
from ling_jax.config import StageRun, architecture_diff, model_settings_diff
from ling_jax.convert.audit import Audit
from ling_jax.convert.fp8 import FP8
from ling_jax.convert.mapping import ArrayPath
from ling_jax.convert.merge_weights import Decay, Lineage, checkpoint_weights, given_weights, update_weights
from ling_jax.convert.ranking import ranking
from ling_jax.convert.tensorfile import NAMES
from ling_jax.convert.to_jax import array_of
from ling_jax.convert.tokenizer import trained_tokenizer
from ling_jax.convert.transfer import (
    ALONE,
    SCAN,
    THREADS,
    Conversion,
    Done,
    Piece,
    Shard,
    TensorRecord,
    carry,
    new_place,
    pieces,
    stamps,
    strides,
    tensors_in,
)
from ling_jax.convert.weights import (
    CHECKPOINTS,
    F32,
    HF,
    LINEAGE,
    OPENED,
    PIECE_BYTES,
    StoredWeights,
    narrow,
    some,
)
from ling_jax.files.arrays import Index, Layout, Part, chunk_of, write_chunks
from ling_jax.files.buckets import reaching
from ling_jax.files.paths import aside, at, check_bucket, move
from ling_jax.snapshots import SNAPSHOTS

log = logging.getLogger(__name__)

MERGED = "merged"  # of a run's folder
READ_BYTES = 8 << 20  # of float32 values, read at a time: memory of this size is used again, a larger one's is new


def merge(
    source: str,
    target: str,
    *,
    steps: Sequence[int] | None = None,
    last: int | None = None,
    decay: Decay | None = None,
    weights: str | Sequence[float] | None = None,
    top: int | None = None,
    rank_by: str | None = None,
    shard: Shard = ALONE,
) -> Audit | None:
    """Writes the average of a run's checkpoints as a checkpoint of ours, without moments.

    Args:
      source: a run's folder, or its checkpoints/.
      steps, last: which checkpoints, or how many of the latest; one of the two. The oldest is theta_0.
      decay: the curve that gives the weights, sampled by tokens; "linear" if neither is given.
      weights: a list instead, oldest first, whose sum is 1; or a file with it, as JSON.
      top: how many of these, or of all there are, are averaged, uniformly: the best by the metric `rank_by` (see
        `ranking`).
      shard: this process's part of the work, where several make one target. The last one to end completes it.
    Returns:
      The audit; None where other processes have still to copy their parts, or have completed the target.
    Raises:
      ValueError: before anything is written, for checkpoints that are not there, are fewer than two, differ in more
        than numbers, are in FP8, or lack the metric; for weights that do not fit; for a target that exists. Also for
        damaged files and a full disk: what was copied stays there, and the same command goes on.
    """
    folder = _folder(source)
    chosen = _chosen(folder, steps, last, top)
    if top is None and rank_by is not None:
        raise ValueError(f"--rank-by {rank_by} does nothing: give --top, how many of the best are averaged")
    if top is not None:
        if decay is not None or weights is not None:
            raise ValueError("--top averages uniformly, whatever lies between its steps: no --decay or --weights")
        chosen = _best(_run_of(folder), chosen, top, rank_by)
    with ThreadPoolExecutor(OPENED) as pool:
        found = list(pool.map(lambda step: StoredWeights(os.fspath(folder / str(step))), chosen))
    _check_alike(found)
    lineage = _lineage(found, decay, weights, rank_by)
    if shard != ALONE and _is_this(target, lineage):
        log.info("%s is complete", target)
        return None
    trained_tokenizer(found[-1], os.fspath(found[-1].folder))  # it goes along: it must be the right one
    place = new_place(target)
    log.info("averaging %s", lineage.render())
    return _write(Average(found, lineage.weights), lineage, source, target, place, shard)


def merge_snapshots(run_dir: epath.Path, stage: StageRun) -> None:
    """Writes the mean of a stage's last `checkpoint.merge_snapshots`, or of as many as it has, as a checkpoint,
    `run_dir`/merged: all weigh the same, as in `eval/merged_*`, whatever lies between them. One of an earlier end of
    the run is moved aside. ValueError as `merge`."""
    snapshots, target = run_dir / SNAPSHOTS, run_dir / MERGED
    steps = [step for step in saved_steps(snapshots) if step > stage.first_step]
    steps = steps[-stage.config.checkpoint.merge_snapshots :]
    if len(steps) < 2:
        log.warning("nothing to merge: %s has the steps %s of the last stage, and it takes two", snapshots, steps)
        return
    if target.exists():
        if Lineage.from_json(read_meta(target)[LINEAGE]).steps == tuple(steps):
            return
        move(target, aside(target))
    begun = time.perf_counter()
    merge(os.fspath(snapshots), os.fspath(target), steps=steps, weights=[1 / len(steps)] * len(steps))
    log.info("merged snapshots %s into %s, %.0f s", steps, target, time.perf_counter() - begun)


def _folder(source: str) -> epath.Path:
    """The folder of a run's steps."""
    check_bucket(path := at(source))
    for folder in (path, path / CHECKPOINTS):
        if saved_steps(folder):
            return folder
    raise ValueError(f"no saved steps in {path}: give a run's folder, or its {CHECKPOINTS}/, that has two or more")


def _run_of(folder: epath.Path) -> epath.Path:
    """The folder of the run that steps are of."""
    return folder.parent if folder.name in (CHECKPOINTS, SNAPSHOTS) else folder


def _chosen(folder: epath.Path, steps: Sequence[int] | None, last: int | None, top: int | None) -> list[int]:
    """The steps to be averaged, or of which the best are, ascending."""
    saved = saved_steps(folder)
    there = f"{folder} has {len(saved)} saved steps: {', '.join(map(str, saved))}"
    if top is not None and steps is None and last is None:
        return saved
    if (steps is None) == (last is None):
        raise ValueError("give either --steps or --last: which checkpoints are averaged; or --top")
    count = len(steps) if steps is not None else last or 0
    if count < 2:
        raise ValueError(f"a merge needs two checkpoints or more, {count} asked for; {there}")
    if steps is None:
        if count > len(saved):
            raise ValueError(f"--last {count}, but {there}; keep more by --checkpoint.keep-last, or merge fewer")
        return saved[-count:]
    if twice := sorted({step for step in steps if list(steps).count(step) > 1}):
        raise ValueError(f"--steps has {', '.join(map(str, twice))} twice")
    if missing := [step for step in steps if step not in saved]:
        raise ValueError(f"no step {', '.join(map(str, missing))}: {there}")
    return sorted(steps)


def _best(run: epath.Path, steps: Sequence[int], top: int, metric: str | None) -> list[int]:
    """The `top` best of the steps by a metric, ascending; the log shows all of them, with what did not choose."""
    if not 2 <= top <= len(steps):
        raise ValueError(f"--top {top} must be between 2 and the {len(steps)} checkpoints that it chooses from")
    found = ranking(run, steps, metric)
    best = found.best(top)
    log.info("the best %d of %d (*) by %s:\n%s", top, len(steps), found.metric, found.render(best))
    if not found.others:
        log.warning(
            "no held-out text of %s is left that did not choose: report the target on other text (evaluate --text)", run
        )
    return best


def _check_alike(found: Sequence[StoredWeights]) -> None:
    """ValueError for everything in which checkpoints differ from the oldest that an average could not mend."""
    first = found[0]
    if FP8 in {dtype for one in found for dtype in one.dtypes.values()}:
        raise ValueError(f"{first.folder} has FP8 weights: write them out first (convert.py to-hf --format bf16)")
    problems = []
    for one in found[1:]:
        lines = architecture_diff(first.config, one.config) + model_settings_diff(first.config, one.config)
        if one.trained_with != first.trained_with:
            lines.append(f"tokenizer: {first.trained_with} -> {one.trained_with}")
        for path, layout in first.arrays.layouts.items():
            other = one.arrays.layouts.get(path)
            if path in first.stacks and path in one.stacks and other is not None and other.dtype != layout.dtype:
                lines.append(f"{'/'.join(path)}: {layout.dtype.name} -> {other.dtype.name}")
        problems += [f"step {one.step}: {line}" for line in lines]
    if problems:
        raise ValueError(
            f"the checkpoints cannot be averaged, they differ from step {first.step}: {some(problems)}; choose steps "
            "of one stage by --steps"
        )


def _lineage(
    found: Sequence[StoredWeights], decay: Decay | None, given: str | Sequence[float] | None, chosen_by: str | None
) -> Lineage:
    if decay is not None and given is not None:
        raise ValueError("give either --decay or --weights: the weights are the curve's, or those of the file")
    tokens = [tokens_seen(one) for one in found]
    if chosen_by is not None:
        weights = np.full(len(found), 1 / len(found))
    elif isinstance(given, str):
        if not at(given).exists():
            raise ValueError(f"--weights {given}: there is no such file; it has a JSON list of weights, oldest first")
        weights = given_weights(at(given).read_text(), len(found))
    elif given is not None:
        weights = given_weights(json.dumps(list(given)), len(found))
    else:
        decay = decay or "linear"
        weights = checkpoint_weights(update_weights(decay, tokens))
    run, steps = _run_of(found[0].folder.parent), tuple(one.step or 0 for one in found)
    return Lineage(os.fspath(run), steps, tuple(tokens), tuple(weights.tolist()), decay, chosen_by)


def tokens_seen(weights: StoredWeights) -> int:
    """How many tokens a run had read at one of its checkpoints, padding counted, as its metadata say; of an older one,
    rows (or step * global_batch_size) times sequence_length."""
    data, said = weights.run.data, weights.meta.get("data", {})
    if "read" in said:
        return said["read"]["tokens"]
    return said.get("next_row", (weights.step or 0) * data.global_batch_size) * data.sequence_length


def _is_this(target: str, lineage: Lineage) -> bool:
    """Whether a target is there already, and is this merge."""
    try:
        return read_meta(at(target)).get(LINEAGE) == lineage.to_json()
    except ValueError:
        return False


class Average:
    """The average of checkpoints that are alike, made a chunk at a time.

    Attributes:
      like: one of the checkpoints, the newest.
    """

    def __init__(self, found: Sequence[StoredWeights], weights: Sequence[float]):
        self._found, self._weights, self.like = found, np.array(weights, F32), found[-1]

    def layout(self, path: ArrayPath) -> Layout:
        """How an array of the average is stored: its chunks divide those of the checkpoints, but are smaller."""
        stack = self.like.stacks[path]
        chunk = array_of(path, stack, F32, self._within(path)).chunk  # the sums are float32
        return Layout(stack.full_shape, self.like.dtype(path), chunk)

    def pieces(self, path: ArrayPath, layout: Layout) -> Iterator[Piece]:
        """An array cut into pieces, whose parts are the checkpoints' chunks, or chunks of the average."""
        stack = self.like.stacks[path]
        return pieces(path, stack, strides(stack, self._within(path), layout.dtype.itemsize))

    def stamps(self) -> list[Any]:
        """A value that changes when one of the checkpoints does."""
        return stamps(file for one in self._found for file in one.told_by())

    def streams(self, path: ArrayPath, part: Index, layout: Layout) -> list[Iterator[np.ndarray]]:
        """Each checkpoint's values of a part of an array, in C order, some at a time. Use nothing that is made of them
        for anything that lasts before the last ones are there: see `StoredArray.stream`."""
        size = _block(layout)

        def whole(one: StoredWeights) -> Iterator[np.ndarray]:
            values = one.read(path, part).reshape(-1, size)
            blocks = deque(values)
            del values  # the blocks alone keep it
            while blocks:
                yield blocks.popleft()

        if self._is_streamed(path):
            return [one.arrays.array(path).stream(part, size) for one in self._found]
        return [whole(one) for one in self._found]

    def sum(self, streams: Sequence[Iterator[np.ndarray]], layout: Layout) -> np.ndarray:
        """The next chunk of the average, in its dtype: a float32 sum of the next values of all, the oldest first."""
        total = np.zeros(math.prod(layout.chunk), F32)
        for stream, weight in zip(streams, self._weights, strict=True):
            for sums in total.reshape(-1, _block(layout)):
                _add(sums, weight, next(stream))
        return narrow(total, layout.dtype).reshape(layout.chunk)

    def record(self, path: ArrayPath, records: dict[str, TensorRecord], part: Index, values: np.ndarray) -> None:
        """Records the tensors of a part as an export would have them."""
        stack, dtype = self.like.stacks[path], NAMES[values.dtype]
        for name, rows in tensors_in(stack, part, values):
            told = f"mean of {len(self._found)} {dtype}"
            records.setdefault(name, TensorRecord(dtype, list(stack.shape), cast=told)).add(rows)

    def _within(self, path: ArrayPath) -> Sequence[int]:
        return self.like.chunk(path) if self._is_streamed(path) else array_of(path, self.like.stacks[path], F32).chunk

    def _is_streamed(self, path: ArrayPath) -> bool:
        """Whether the checkpoints' chunks are read once, a bit at a time: they are of whole rows, are cut alike (a run
        may have changed its mesh) and have checksums. Else a read of less than a chunk may take all of it."""
        stack, chunk = self.like.stacks[path], self.like.chunk(path)
        alike = all(one.chunk(path) == chunk and one.arrays.has_checksums for one in self._found)
        return alike and chunk[stack.names.ndim + 1 :] == stack.shape[1:]


def _block(layout: Layout) -> int:
    """How many values of a chunk are read at a time."""
    size = math.prod(layout.chunk)
    return chunk_of([size], F32.itemsize, READ_BYTES)[0]


def _add(sums: np.ndarray, weight: np.float32, values: np.ndarray) -> None:
    """Adds weighted values to float32 sums, which stay in a core's cache."""
    for first in range(0, sums.size, SCAN):
        block = slice(first, first + SCAN)
        sums[block] += weight * narrow(values[block], F32)


def _cut(part: Index, chunk: Sequence[int]) -> Iterator[Index]:
    """The chunks in a part of an array, in C order."""
    for start in itertools.product(*(range(s.start, s.stop, step) for s, step in zip(part, chunk, strict=True))):
        yield tuple(slice(first, first + step) for first, step in zip(start, chunk, strict=True))


def _write(
    average: Average, lineage: Lineage, source: str, target: str, place: epath.Path, shard: Shard
) -> Audit | None:
    like = average.like
    arrays = {path: average.layout(path) for path in like.stacks}
    todo = {piece.key: piece for path in like.stacks for piece in average.pieces(path, arrays[path])}
    sizes = {key: piece.nbytes(arrays[piece.path].dtype.itemsize) for key, piece in todo.items()}
    sizes = dict(sorted(sizes.items(), key=lambda item: -item[1]))  # no thread begins with the largest last
    with Conversion(place, [lineage.to_json(), PIECE_BYTES, average.stamps()], sizes, shard) as work:
        opened = make_checkpoint(work.folder, arrays) if work.left() else {}

        def put(path: ArrayPath, where: Index, values: np.ndarray, done: Done) -> int:
            average.record(path, done.records, where, values)
            chunk = Part(tuple(s.start for s in where), values)
            with reaching(work.folder):
                done.files.update(write_chunks(opened[path], arrays[path], chunk))
            return values.nbytes

        def copy(key: str, advance: Callable[[int], None]) -> Done:
            path, done = todo[key].path, Done({}, {})
            for part in todo[key].parts:
                streams = average.streams(path, part, arrays[path])
                for where in _cut(part, arrays[path].chunk):
                    advance(put(path, where, average.sum(streams, arrays[path]), done))  # not kept by a name of its own
            return done

        work.run(copy, THREADS)
        if not work.gather():
            return None
        make_checkpoint(work.folder, arrays)  # once more: a process may have been killed while it completed it
        carried = carry(like.companions(), work.folder / HF)
        form, wanted = f"average of {lineage.render()}", list(like.dtypes)
        audit = Audit(source, target, form, like.config, work.records, wanted, work.seconds(), carried, {})
        audit.check()
        files: dict[ArrayPath, dict[str, str]] = {path: {} for path in arrays}
        for key, piece in todo.items():
            files[piece.path] |= work.done[key].files
        meta = {"config": like.meta["config"], "tokenizer": like.trained_with or "", LINEAGE: lineage.to_json()}
        work.finish(audit.to_json(), lambda: finish_checkpoint(work.folder, arrays, files, meta))
    return audit
