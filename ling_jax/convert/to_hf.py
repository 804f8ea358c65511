"""From our checkpoint, or a HF folder in another format, to a HF folder: each file from its front to its end."""

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from etils import epath

from ling_jax.config import ModelConfig, count_params, layer_kinds
from ling_jax.convert.adapter import Adapter, told_of
from ling_jax.convert.audit import Audit
from ling_jax.convert.fp8 import FP8, quantise
from ling_jax.convert.mapping import SCALE, ArrayPath, TensorStack, scales_of
from ling_jax.convert.tensorfile import NAMES, write_tensors
from ling_jax.convert.tokenizer import GENERATION, trained_tokenizer
from ling_jax.convert.transfer import (
    CONFIG,
    Conversion,
    Done,
    TensorRecord,
    carry,
    in_order,
    new_place,
    size_of,
    stamps,
    strides,
    tensors_in,
)
from ling_jax.convert.weights import (
    BF16,
    F32,
    INDEX,
    Weights,
    narrow,
    open_weights,
)
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.files.arrays import Index
from ling_jax.files.paths import write_whole
from ling_jax.files.whole import read_json

Format = Literal["keep", "bf16", "fp32", "fp8"]
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
METADATA = {"format": "pt"}  # what transformers wants to read in a file's header
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---

# {name}

Weights of a {architecture} model, written by [ling_jax] (`convert.py to-hf --format {form}`){origin}.
Parameters: {total:,}, of which {active:,} are active per token. Checksums of all tensors: `conversion_audit.json`.

This card is a stub: say what the model was trained on, how it was evaluated, under which licence it may be used.
"""


def to_hf(
    source: str,
    target: str,
    form: Format = "keep",
    max_shard_size: str = "5GB",
    mtp: bool = True,
    adapter: str | None = None,
) -> Audit:
    """Writes weights as a HF folder that other programs can load.

    Args:
      source: anything `load_pretrained` takes.
      form: "keep" gives every tensor as it came, byte for byte; "fp8" quantises what is not FP8 already by the official
        rule (spec 3.2) and makes the rest bf16. The expert bias is float32 in all but "keep".
      max_shard_size: of one file, such as 5GB or 500MB; a single tensor may exceed it.
      mtp: whether the MTP layer goes along, where there is one.
      adapter: a LoRA adapter's folder or hub id, to be merged; `form` is "keep" then.
    Raises:
      ValueError: for a source that lacks anything, a target that exists, a full disk. What was copied stays in
        TARGET.partial, or in a bucket in TARGET, and the same command goes on after the last file that is whole.
    """
    limit, weights, place = _bytes_of(max_shard_size), open_weights(source, mtp), new_place(target)
    assert adapter is None or form == "keep"
    merged = None if adapter is None else Adapter(adapter, weights, source)
    return write_hf(weights, source, target, place, form, limit, merged, "" if mtp else ", no MTP")


def write_hf(
    weights: Weights,
    source: str,
    target: str,
    place: epath.Path,
    form: Format = "keep",
    limit: int = 5 * UNITS["GB"],
    adapter: Adapter | None = None,
    how: str = "",
) -> Audit:
    """Writes weights that are open as a HF folder, as `to_hf` says.

    Args:
      source: what the user calls the place they come from, whose tokenizer goes along.
      target, place: the folder as the user calls it, and as `new_place` gave it.
      limit: bytes of a file.
      how: what else decides the bytes: an interrupted export with another one is not taken up.
    """
    tokenizer = trained_tokenizer(weights, source)  # it goes along: it must be the right one
    tensors = tensors_of(weights, form)
    shards = shards_of(tensors, limit)
    stamped = stamps(weights.told_by() + ([] if adapter is None else adapter.files))
    fingerprint = [os.fspath(weights.folder), f"{form}{how}", limit, stamped]
    sizes = {file: sum(tensors[name].nbytes for name in names) for file, names in shards.items()}
    with Conversion(place, fingerprint, sizes) as work:
        export = Export(weights, tensors, adapter)

        def copy(file: str, advance: Callable[[int], None]) -> Done:
            records: dict[str, TensorRecord] = {}
            entries = {name: (NAMES[tensors[name].dtype], tensors[name].shape) for name in shards[file]}
            write_tensors(work.folder / file, entries, METADATA, export.parts_of(shards[file], records, advance))
            return Done(records)

        work.run(copy, 1)
        carried = carry(weights.companions(), work.folder)
        config = _config(weights, tensors, form)
        _write_json_files(work.folder, weights.config, tensors, shards)
        if tokenizer is not None:
            config |= _complete(work.folder, weights.config, tokenizer)
        write_whole(work.folder / "README.md", _card(weights, place.name, form))
        wanted, seconds = list(tensors), work.seconds()
        audit = Audit(source, target, form, weights.config, work.records, wanted, seconds, carried, weights.beyond)
        audit.check()
        work.finish(audit.to_json(), lambda: _write_json(work.folder / CONFIG, config))  # without it nobody takes it
    return audit


class _Tensor:
    """One tensor of the export, before it is written."""

    def __init__(self, dtype: np.dtype, shape: tuple[int, ...]):
        self.dtype, self.shape = dtype, shape
        self.nbytes = math.prod(shape) * dtype.itemsize


class _Rows(NamedTuple):
    """Rows of a tensor of the export, with its record where they are all of it; `told`: how they were cast."""

    name: str
    values: np.ndarray
    told: str | None
    record: TensorRecord | None


class Export:
    """Makes the tensors of an export, a part of our arrays at a time."""

    def __init__(self, weights: Weights, tensors: Mapping[str, _Tensor], adapter: Adapter | None):
        self._weights, self._tensors, self._adapter = weights, tensors, adapter
        self._place = {
            str(name): (path, at)
            for path, stack in weights.stacks.items()
            if path[0] != "scales"
            for at, name in np.ndenumerate(stack.names)
        }

    def parts_of(
        self, names: Iterable[str], records: dict[str, TensorRecord], advance: Callable[[int], None]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """(name, rows) of a file's tensors, in order. A tensor's record is in `records` when its rows are all used."""
        jobs = self.jobs(name for name in names if name in self._place)
        made = (rows for found in in_order(self._make, jobs) for rows in found)
        ahead: dict[str, list[_Rows]] = {}  # scales, of which rows come with those of their tensor, and lie behind it
        for name in names:
            left = self._tensors[name].shape[0]
            while left:
                while not ahead.get(name):
                    rows = next(made)
                    ahead.setdefault(rows.name, []).append(rows)
                rows = ahead[name].pop(0)
                yield name, rows.values
                self._keep(records, rows)
                advance(rows.values.nbytes)
                left -= len(rows.values)

    def _keep(self, records: dict[str, TensorRecord], rows: _Rows) -> None:
        if rows.record is not None:
            records[rows.name] = rows.record
        else:
            records.setdefault(rows.name, self._record(rows.name, rows.told)).add(rows.values)

    def _record(self, name: str, told: str | None) -> TensorRecord:
        return TensorRecord(NAMES[self._tensors[name].dtype], list(self._tensors[name].shape), cast=told)

    def jobs(self, names: Iterable[str]) -> Iterator[tuple[tuple[ArrayPath, Index], int]]:
        """The parts of our arrays that hold these tensors, in order, as large as the files they are read from allow;
        each with its bytes, as it is read or as it is exported, whichever is more."""
        for (path, _), group in itertools.groupby(
            names, lambda name: (self._place[name][0], self._place[name][1][:-1])
        ):
            stack, own, here = self._weights.stacks[path], self._weights.dtype(path), list(group)
            *together, rows = strides(stack, self._weights.chunk(path), own.itemsize, self._weights.block[0])
            step = together[-1] if together and rows == stack.shape[0] else 1
            cuts = [slice(row, min(row + rows, stack.shape[0])) for row in range(0, stack.shape[0], rows)]
            width = max(own.itemsize, *(self._tensors[name].dtype.itemsize for name in here))
            for run in _runs([self._place[name][1] for name in here], step):
                for cut in cuts:
                    part = (*run, cut, *(slice(0, size) for size in stack.shape[1:]))
                    yield (path, part), size_of(part) * width

    def _make(self, job: tuple[ArrayPath, Index]) -> list[_Rows]:
        """Turns a part of an array into rows of its tensors, and of their scales where they have any."""
        path, part = job
        weights, stack = self._weights, self._weights.stacks[path]
        raw = weights.read(path, part)
        scales = weights.scales(path, part)
        row = part[stack.names.ndim].start
        return [
            rows
            for i, (name, codes) in enumerate(tensors_in(stack, part, raw))
            for rows in self._rows(stack, name, row, part, codes, None if scales is None else scales[i])
        ]

    def _rows(
        self, stack: TensorStack, name: str, row: int, part: Index, codes: np.ndarray, scales: np.ndarray | None
    ) -> Iterator[_Rows]:
        own, new = self._weights.dtypes[name], self._tensors[name].dtype
        if self._adapter is not None and name in self._adapter:
            yield self._finished(name, self._adapter.merged(name, row, narrow(codes, own)), told_of(own))
        elif own == new:
            yield self._finished(name, narrow(codes, own), None)
            if scales is not None and name + SCALE in self._tensors:
                yield self._finished(name + SCALE, scales, None)
        else:
            numbers = codes if scales is None else self._weights.multiplied(codes, scales, part)
            told = f"{NAMES[own]} -> {NAMES[new]}"
            if new != FP8:
                yield self._finished(name, narrow(numbers, new), told)
                return
            quantised = quantise(narrow(numbers, F32), stack.rule, self._weights.block)
            yield self._finished(name, quantised.codes, told)
            yield self._finished(name + SCALE, quantised.scales, None)

    def _finished(self, name: str, values: np.ndarray, told: str | None) -> _Rows:
        record = None
        if values.shape == self._tensors[name].shape:
            record = self._record(name, told)
            record.add(values)
        return _Rows(name, values, told, record)


def _runs(places: list[tuple[int, ...]], step: int) -> Iterator[Index]:
    """The parts of an array's first dims with these places, which follow one another in the last of them: `step` at a
    time, counted from its beginning."""
    if places == [()]:
        yield ()
        return
    *outer, first = places[0]
    end = places[-1][-1] + 1
    for start in range(first // step * step, end, step):
        yield (*(slice(i, i + 1) for i in outer), slice(max(start, first), min(start + step, end)))


def tensors_of(weights: Weights, form: Format) -> dict[str, _Tensor]:
    """Every tensor of an export, in the order in which it is to lie: layer by layer."""
    places: dict[tuple[float, int, int, int], tuple[str, _Tensor]] = {}

    def add(path: ArrayPath, stack: TensorStack, order: int) -> None:
        for i, name in enumerate(map(str, stack.names.flat)):
            dtype = _dtype(weights, path, stack, name, form)
            if dtype is not None:
                found = re.match(r"model\.layers\.(\d+)\.", name)
                layer = int(found[1]) if found else (-1.0 if "embeddings" in name else math.inf)
                places[layer, order, i, path[0] == "scales"] = (name, _Tensor(dtype, stack.shape))

    for order, (path, stack) in enumerate(weights.stacks.items()):
        if path[0] != "scales":
            add(path, stack, order)
        if stack.rule is not None:
            add(*scales_of(path, stack, weights.block), order)
    return dict(places[key] for key in sorted(places))


def _dtype(weights: Weights, path: ArrayPath, stack: TensorStack, name: str, form: Format) -> np.dtype | None:
    """The dtype of a tensor in an export; None if the export leaves it out."""
    own = weights.dtypes.get(name)
    if form == "keep":
        return own
    if path[0] == "scales":
        return (own or F32) if form == "fp8" else None
    if form == "fp8" and (stack.rule is not None or own == FP8):
        return FP8
    return F32 if path[0] == "bias" or form == "fp32" else BF16


def shards_of(tensors: Mapping[str, _Tensor], limit: int) -> dict[str, list[str]]:
    """The files of an export and the tensors in each, none of them over `limit` bytes if that can be."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        scales = name.endswith(SCALE)  # they stay with their tensor
        if shards[-1] and not scales and size + tensor.nbytes + _scales_bytes(tensors, name) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}


def _scales_bytes(tensors: Mapping[str, _Tensor], name: str) -> int:
    return tensors[name + SCALE].nbytes if name + SCALE in tensors else 0


def _bytes_of(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", text.upper())
    if not found or float(found[1]) <= 0:
        raise ValueError(f"--max-shard-size {text}: give a number and one of {', '.join(UNITS)}, such as 5GB")
    return int(float(found[1]) * UNITS[found[2]])


def _config(weights: Weights, tensors: Mapping[str, _Tensor], form: Format) -> dict[str, Any]:
    """The export's config.json."""
    config = weights.config.to_hf()
    quantised = any(tensor.dtype == FP8 for tensor in tensors.values())
    if not quantised:
        config.pop("quantization_config", None)
    elif form == "fp8" and "quantization_config" not in config:
        settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        config["quantization_config"] = settings | {"weight_block_size": list(weights.block)}
    common = {"bf16": "bfloat16", "fp8": "bfloat16", "fp32": "float32"}.get(form) or _common_dtype(weights, tensors)
    if form != "keep" or not weights.kept:
        config["dtype" if "dtype" in config else "torch_dtype"] = common
    return config


def _write_json_files(
    folder: epath.Path, config: ModelConfig, tensors: Mapping[str, _Tensor], shards: Mapping[str, list[str]]
) -> None:
    if len(shards) > 1:
        total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        weight_map = {name: file for file, names in shards.items() for name in names}
        _write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})
    generation = folder / GENERATION
    if not generation.exists():
        ids = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
        _write_json(generation, {name: value for name, value in ids.items() if value is not None})


def _complete(folder: epath.Path, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Adds to the generation settings what other programs want to know of a run's own tokenizer, and runs of earlier
    versions did not say. Returns what config.json lacks: nothing, if it came with the weights."""
    generation = dict(before := read_json(folder / GENERATION))
    if any(generation.get(name) for name in ("temperature", "top_p", "top_k")):
        generation.setdefault("do_sample", True)  # without it transformers ignores them, and refuses to save them
    if tokenizer.bos_id is not None:
        generation.setdefault("bos_token_id", tokenizer.bos_id)
    if generation != before:
        _write_json(folder / GENERATION, generation)
    return {"bos_token_id": tokenizer.bos_id} if tokenizer.bos_id is not None and not config.hf_json else {}


def _common_dtype(weights: Weights, tensors: Mapping[str, _Tensor]) -> str:
    """The dtype that most numbers have, in HF's spelling."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.nbytes
    most = max(sizes, key=lambda name: sizes[name])
    return "bfloat16" if most == FP8.name else most


def _write_json(path: epath.Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n")


def _card(weights: Weights, name: str, form: Format) -> str:
    counts = count_params(weights.config)
    step = getattr(weights, "step", None)
    kind = weights.config.to_hf().get("architectures", ["Ling"])[0]
    return CARD.format(
        tags="ling, mixture-of-experts",
        name=name,
        architecture=kind,
        form=form,
        origin=f" from step {step} of a run" if step is not None else "",
        total=counts.total,
        active=counts.active,
    )


def slopes_told(config: ModelConfig) -> list[str]:
    """Lines for whoever exports a linear model: which programs let its states decay as it was trained with."""
    if not any(kind.mixer == "linear" for kind in layer_kinds(config)):
        return []
    readers = {"sglang": "SGLang, vLLM", "hf": "the code beside the released weights (transformers)", "mlx": "mlx-lm"}
    others = "; ".join(f"{told} reads as {name!r}" for name, told in readers.items() if name != config.slope_convention)
    return [
        f"Decay of linear attention: this model's is {config.slope_convention!r}, that of "
        f"{readers[config.slope_convention]}. No field of config.json that other programs know says so: {others}, "
        "where its answers differ (docs/to_pytorch.md).",
        "",
    ]
