"""From a HF folder to our checkpoint, a piece at a time."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ling_jax.checkpoint import finish_checkpoint, make_checkpoint
from ling_jax.config import DataConfig, RunConfig
from ling_jax.convert.audit import Audit
from ling_jax.convert.mapping import ArrayPath, TensorStack
from ling_jax.convert.tensorfile import NAMES
from ling_jax.convert.transfer import (
    THREADS,
    Conversion,
    Done,
    TensorRecord,
    carry,
    new_place,
    pieces,
    stamps,
    strides,
    tensors_in,
)
from ling_jax.convert.weights import BF16, F32, HF, PIECE_BYTES, HFFolder, Weights, narrow, open_weights
from ling_jax.files.arrays import Index, Layout, Part, chunk_of, write_chunks
from ling_jax.files.buckets import reaching

DTYPES = {"bfloat16": BF16, "float32": F32}
SMALL_BYTES = 8 << 20  # of a chunk with several layers in it, which an export reads one after the other


def to_jax(source: str, target: str, dtype: Literal["keep", "bfloat16", "float32"] = "keep") -> Audit:
    """Writes the weights of a HF folder as a checkpoint of ours, from which a run can start.

    Args:
      dtype: "keep" stores every tensor as it is, FP8 codes and scales too, so that `to_hf` gives every byte back; the
        others multiply FP8 out. The expert bias keeps its own.
    Raises:
      ValueError: for a source that is not exactly what its config.json says, before anything is written; for a target
        that exists; for a full disk. What was copied stays there, and the same command goes on.
    """
    weights, place = open_weights(source), new_place(target)
    if not isinstance(weights, HFFolder):
        raise ValueError(f"{source} is a checkpoint of ling_jax already: to-jax reads a HF folder")
    kept = dtype == "keep"
    arrays = {
        path: array_of(path, stack, weights.dtype(path) if kept or path[0] == "bias" else DTYPES[dtype])
        for path, stack in weights.stacks.items()
        if kept or path[0] != "scales"
    }
    found = [
        piece
        for path, new in arrays.items()
        for piece in pieces(path, weights.stacks[path], strides(weights.stacks[path], new.chunk, new.dtype.itemsize))
    ]
    found.sort(key=lambda piece: -len(piece.parts))  # or one thread would copy the head while the others have ended
    todo = {piece.key: piece for piece in found}
    source_stamps = stamps(weights.told_by())
    sizes = {key: piece.nbytes(arrays[piece.path].dtype.itemsize) for key, piece in todo.items()}
    with Conversion(place, [str(weights.folder.resolve()), dtype, PIECE_BYTES, source_stamps], sizes) as work:
        targets = make_checkpoint(work.folder, arrays)

        def copy(key: str, advance: Callable[[int], None]) -> Done:
            path, new, done = todo[key].path, arrays[todo[key].path], Done({}, {})
            for part in todo[key].parts:  # whole chunks
                raw = weights.read(path, part)
                _record(done.records, weights, path, part, raw, new.dtype)
                out = raw if kept else weights.decode(path, part, raw, new.dtype)
                with reaching(work.folder):
                    done.files.update(write_chunks(targets[path], new, Part(tuple(s.start for s in part), out)))
                advance(out.nbytes)
            return done

        work.run(copy, THREADS)
        carried = carry([weights.folder], work.folder / HF)
        wanted, seconds = list(weights.dtypes), work.seconds()
        audit = Audit(source, target, dtype, weights.config, work.records, wanted, seconds, carried, weights.beyond)
        audit.check()
        files: dict[ArrayPath, dict[str, str]] = {path: {} for path in arrays}
        for key, done in work.done.items():
            files[todo[key].path] |= done.files
        meta = _meta(weights, arrays, kept)
        work.finish(audit.to_json(), lambda: finish_checkpoint(work.folder, arrays, files, meta))
    return audit


def array_of(path: ArrayPath, stack: TensorStack, dtype: np.dtype, within: Sequence[int] | None = None) -> Layout:
    """Chunks of PIECE_BYTES, none of which has parts of several layers unless it is small; they divide larger ones of
    the shape `within`, if there are any."""
    layer = math.prod(stack.full_shape[1:]) * dtype.itemsize if path[1] == "layers" else PIECE_BYTES
    limit = min(max(layer, SMALL_BYTES), PIECE_BYTES)
    return Layout(stack.full_shape, dtype, chunk_of(within or stack.full_shape, dtype.itemsize, limit))


def _meta(weights: HFFolder, arrays: Mapping[ArrayPath, Layout], kept: bool) -> dict[str, Any]:
    """The checkpoint's metadata: the configuration, and what an export needs to give back every byte."""
    others: dict[str, str | None] = {}
    for path, new in arrays.items() if kept else ():
        for name in map(str, weights.stacks[path].names.flat):
            own = weights.dtypes.get(name)  # None: the scales of a tensor that is not FP8
            if own != new.dtype:
                others[name] = None if own is None else NAMES[own]
    length = min(DataConfig().sequence_length, weights.config.max_positions)
    config = RunConfig(model=weights.config, data=DataConfig(sequence_length=length))  # of a run that there never was
    return {"config": dataclasses.asdict(config), HF: {"kept": kept, "block": list(weights.block), "dtypes": others}}


def _record(
    records: dict[str, TensorRecord], weights: Weights, path: ArrayPath, part: Index, raw: np.ndarray, wanted: np.dtype
) -> None:
    """Records the tensors of a part as they are in the file; with codes that are multiplied out, their scales too."""
    for name, rows in tensors_in(weights.stacks[path], part, raw):
        own = weights.dtypes.get(name)
        if own is not None:
            kept = own == wanted or raw.dtype == wanted
            record = TensorRecord(
                NAMES[own], list(weights.stacks[path].shape), cast=None if kept else _cast(own, wanted)
            )
            records.setdefault(name, record).add(narrow(rows, own))
    scales_path = weights.scales_path(path)
    if scales_path is not None and raw.dtype != wanted:
        rows = part[-2]
        first, last = (-(-row // weights.block[0]) for row in (rows.start, rows.stop))  # blocks that begin in the part
        if first < last:
            blocks = (*part[:-2], slice(first, last), weights.blocks(part)[-1])
            scales = weights.read(scales_path, blocks)
            _record(records, weights, scales_path, blocks, scales, scales.dtype)


def _cast(old: np.dtype, new: np.dtype) -> str:
    return f"{NAMES[old]} -> {NAMES[new]}"
