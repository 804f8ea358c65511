"""From a HF folder to our checkpoint, a piece at a time."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from etils import epath

from ling_jax.checkpoint import arrays_to_write, finish_checkpoint, make_checkpoint
from ling_jax.config import DataConfig, RunConfig
from ling_jax.convert.audit import Audit
from ling_jax.convert.mapping import Path, Stack
from ling_jax.convert.tensorfile import NAMES
from ling_jax.convert.transfer import PIECE_BYTES, Piece, Record, Work, carry, new_place, pieces, stamps, tensors_in
from ling_jax.convert.weights import BF16, F32, HF, HFFolder, Index, Weights, narrow, open_weights
from ling_jax.files.arrays import Layout, chunk_of

DTYPES = {"bfloat16": BF16, "float32": F32}


def to_jax(source: str, target: str, dtype: Literal["keep", "bfloat16", "float32"] = "keep") -> Audit:
    """Writes the weights of a HF folder as a checkpoint of ours, from which a run can start.

    Args:
      dtype: "keep" stores every tensor as it is, FP8 codes and scales too, so that `to_hf` gives every byte back; the
        others multiply FP8 out. The expert bias keeps its own.
    Raises:
      ValueError: for a source that is not exactly what its config.json says, before anything is written; for a target
        that exists; for a full disk. What was copied stays in TARGET.partial, and the same command goes on there.
    """
    weights, place = open_weights(source), new_place(target)
    if not isinstance(weights, HFFolder):
        raise ValueError(f"{source} is a checkpoint of ling_jax already: to-jax reads a HF folder")
    kept = dtype == "keep"
    arrays = {
        path: _array(stack, weights.dtype(path) if kept or path[0] == "bias" else DTYPES[dtype])
        for path, stack in weights.stacks.items()
        if kept or path[0] != "scales"
    }
    todo = [
        piece
        for path, new in arrays.items()
        for piece in pieces(path, weights.stacks[path], new.chunk, new.dtype.itemsize, weights.block[0])
    ]
    files = [*weights.files(), weights.folder / "config.json"]
    fingerprint = [str(weights.folder.resolve()), dtype, stamps(files)]
    itemsizes = {path: new.dtype.itemsize for path, new in arrays.items()}

    def prepare(folder: pathlib.Path) -> None:
        make_checkpoint(epath.Path(folder), arrays, _meta(weights, arrays, kept))

    with Work(place, fingerprint, todo, itemsizes, prepare) as work:
        targets = arrays_to_write(epath.Path(work.folder), arrays)

        def copy(piece: Piece) -> dict[str, Record]:
            records: dict[str, Record] = {}
            for part in piece.parts:
                raw, wanted = weights.read(piece.path, part), arrays[piece.path].dtype
                _record(records, weights, piece.path, part, raw, wanted)
                out = raw if kept else weights.decode(piece.path, part, raw, wanted)
                targets[piece.path][part].write(out, can_reference_source_data_indefinitely=True).result()
            return records

        work.run(copy)
        carried = carry([weights.folder], work.folder / HF)
        wanted, seconds = list(weights.dtypes), work.seconds()
        audit = Audit(source, target, dtype, weights.config, work.records, wanted, seconds, carried, weights.beyond)
        audit.check()
        finish_checkpoint(epath.Path(work.folder), arrays)
        work.finish(audit.to_json())
    return audit


def _array(stack: Stack, dtype: np.dtype) -> Layout:
    return Layout(stack.full_shape, dtype, chunk_of(stack.full_shape, dtype.itemsize, PIECE_BYTES))


def _meta(weights: HFFolder, arrays: Mapping[Path, Layout], kept: bool) -> dict[str, Any]:
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
    records: dict[str, Record], weights: Weights, path: Path, part: Index, raw: np.ndarray, wanted: np.dtype
) -> None:
    """Records the tensors of a part as they are in the file; with codes that are multiplied out, their scales too."""
    for name, rows in tensors_in(weights.stacks[path], part, raw):
        own = weights.dtypes.get(name)
        if own is not None:
            kept = own == wanted or raw.dtype == wanted
            record = Record(NAMES[own], list(weights.stacks[path].shape), cast=None if kept else _cast(own, wanted))
            records.setdefault(name, record).add(narrow(rows, own))
    scales_path = weights.scales_path(path)
    if scales_path is not None and raw.dtype != wanted:
        blocks = weights.blocks(part)
        scales = weights.read(scales_path, blocks)
        _record(records, weights, scales_path, blocks, scales, scales.dtype)


def _cast(old: np.dtype, new: np.dtype) -> str:
    return f"{NAMES[old]} -> {NAMES[new]}"
