"""From our checkpoint, or a HF folder in another format, to a HF folder, a piece at a time."""

import contextlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from ling_jax.checkpoint import META, META_FILE
from ling_jax.config import ModelConfig, count_params
from ling_jax.convert.adapter import Adapter, told_of
from ling_jax.convert.audit import Audit
from ling_jax.convert.fp8 import FP8, quantise
from ling_jax.convert.mapping import SCALE, Path, Stack, scales_of
from ling_jax.convert.tensorfile import NAMES, TensorFileWriter
from ling_jax.convert.tokenizer import GENERATION, tokenizer_of
from ling_jax.convert.transfer import Piece, Record, Work, carry, new_place, pieces, stamps, tensors_in
from ling_jax.convert.weights import BF16, F32, INDEX, TOKENIZER, HFFolder, StoredWeights, Weights, narrow, open_weights
from ling_jax.data.tokenizer import Tokenizer
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
        TARGET.partial, and the same command goes on there.
    """
    limit, weights, place = _bytes_of(max_shard_size), open_weights(source, mtp), new_place(target)
    tokenizer = None
    if any(folder.name == TOKENIZER and (folder / "tokenizer.json").exists() for folder in weights.companions()):
        tokenizer = tokenizer_of(source)  # a run's goes along: it must be the right one
    assert adapter is None or form == "keep"
    change = None if adapter is None else Adapter(adapter, weights, source)
    tensors = _tensors(weights, form)
    shards = _shards(tensors, limit)
    todo = [
        piece
        for path, stack in weights.stacks.items()
        for piece in pieces(path, stack, weights.chunk(path), weights.dtype(path).itemsize, weights.block[0])
    ]
    stamped = _stamped(weights) + ([] if change is None else change.files)
    fingerprint = [str(weights.folder), form if mtp else f"{form}, no MTP", limit, stamps(stamped)]
    itemsizes = {path: weights.dtype(path).itemsize for path in weights.stacks}
    work = Work(place, fingerprint, todo, itemsizes, lambda folder: None)
    with work, contextlib.ExitStack() as stack:
        writers = {}
        for file, names in shards.items():
            entries = {name: (NAMES[tensors[name].dtype], tensors[name].shape) for name in names}
            writer = TensorFileWriter(work.folder / file, entries, METADATA)
            writers[file] = stack.enter_context(contextlib.closing(writer))
        writer_of = {name: writers[file] for file in shards for name in shards[file]}
        work.run(_Export(weights, tensors, writer_of, change).copy)
        carried = carry(weights.companions(), work.folder)
        _write_json_files(work.folder, weights, tensors, shards, form)
        if tokenizer is not None:
            _complete(work.folder, weights.config, tokenizer)
        (work.folder / "README.md").write_text(_card(weights, place.name, form))
        wanted, seconds = list(tensors), work.seconds()
        audit = Audit(source, target, form, weights.config, work.records, wanted, seconds, carried, weights.beyond)
        audit.check()
        work.finish(audit.to_json())
    return audit


class _Tensor:
    """What one tensor of the export will be."""

    def __init__(self, dtype: np.dtype, shape: tuple[int, ...]):
        self.dtype, self.shape = dtype, shape
        self.nbytes = math.prod(shape) * dtype.itemsize


class _Export:
    """Copies pieces into the files of an export."""

    def __init__(
        self,
        weights: Weights,
        tensors: Mapping[str, _Tensor],
        writers: Mapping[str, TensorFileWriter],
        adapter: Adapter | None,
    ):
        self._weights, self._tensors, self._writers, self._adapter = weights, tensors, writers, adapter

    def copy(self, piece: Piece) -> dict[str, Record]:
        weights, stack = self._weights, self._weights.stacks[piece.path]
        records: dict[str, Record] = {}
        for part in piece.parts:
            raw = weights.read(piece.path, part)
            decoded = weights.decode(piece.path, part, raw) if self._changes(stack, part) else raw
            row = part[stack.names.ndim].start
            pairs = zip(tensors_in(stack, part, raw), tensors_in(stack, part, decoded), strict=True)
            for (name, codes), (_, numbers) in pairs:
                self._copy_rows(records, stack, name, row, codes, numbers)
        for writer in {self._writers[name] for name in records}:
            writer.flush()
        return records

    def _changes(self, stack: Stack, part: Any) -> bool:
        """Whether any tensor of a part gets another dtype."""
        own, tensors = self._weights.dtypes, self._tensors
        names = np.array(stack.names[part[: stack.names.ndim]], object).flat
        return any(name in own and name in tensors and tensors[name].dtype != own[name] for name in names)

    def _copy_rows(self, records, stack: Stack, name: str, row: int, codes: np.ndarray, numbers: np.ndarray) -> None:
        own, new = self._weights.dtypes.get(name), self._tensors.get(name)
        if own is None or new is None:  # scales that one side has no FP8 tensor for
            return
        if self._adapter is not None and name in self._adapter:
            self._put(records, name, row, self._adapter.merged(name, row, narrow(codes, own)), told_of(own))
            return
        if own == new.dtype:
            self._put(records, name, row, narrow(codes, own), None)
            return
        told = f"{NAMES[own]} -> {NAMES[new.dtype]}"
        if new.dtype == FP8:
            block = self._weights.block
            quantised = quantise(narrow(numbers, F32), stack.rule, block)
            self._put(records, name, row, quantised.codes, told)
            self._put(records, name + SCALE, row // block[0], quantised.scales, None)
        else:
            self._put(records, name, row, narrow(numbers, new.dtype), told)

    def _put(self, records: dict[str, Record], name: str, row: int, rows: np.ndarray, told: str | None) -> None:
        new = self._tensors[name]
        records.setdefault(name, Record(NAMES[new.dtype], list(new.shape), cast=told)).add(rows)
        self._writers[name].write(name, row * (rows.nbytes // rows.shape[0]), rows)


def _tensors(weights: Weights, form: Format) -> dict[str, _Tensor]:
    """Every tensor of an export, in the order in which it is to lie: layer by layer."""
    places: dict[tuple[float, int, int, int], tuple[str, _Tensor]] = {}

    def add(path: Path, stack: Stack, order: int) -> None:
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


def _dtype(weights: Weights, path: Path, stack: Stack, name: str, form: Format) -> np.dtype | None:
    """Of a tensor in an export; None if it has none."""
    own = weights.dtypes.get(name)
    if form == "keep":
        return own
    if path[0] == "scales":
        return (own or F32) if form == "fp8" else None
    if form == "fp8" and (stack.rule is not None or own == FP8):
        return FP8
    return F32 if path[0] == "bias" or form == "fp32" else BF16


def _shards(tensors: Mapping[str, _Tensor], limit: int) -> dict[str, list[str]]:
    """The files of an export and the tensors in each, none of them over `limit` bytes if that can be."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}


def _bytes_of(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", text.upper())
    if not found or float(found[1]) <= 0:
        raise ValueError(f"--max-shard-size {text}: give a number and one of {', '.join(UNITS)}, such as 5GB")
    return int(float(found[1]) * UNITS[found[2]])


def _stamped(weights: Weights) -> list[Any]:
    if isinstance(weights, HFFolder):
        return [*weights.files(), weights.folder / "config.json"]
    return [weights.folder / META / META_FILE]


def _write_json_files(
    folder: Any, weights: Weights, tensors: Mapping[str, _Tensor], shards: Mapping[str, list[str]], form: Format
) -> None:
    config = weights.config.to_hf()
    quantised = any(tensor.dtype == FP8 for tensor in tensors.values())
    if not quantised:
        config.pop("quantization_config", None)
    elif form == "fp8" and "quantization_config" not in config:
        settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        config["quantization_config"] = settings | {"weight_block_size": list(weights.block)}
    common = {"bf16": "bfloat16", "fp8": "bfloat16", "fp32": "float32"}.get(form) or _common_dtype(weights, tensors)
    if form != "keep" or isinstance(weights, StoredWeights) and not weights.kept:
        config["dtype" if "dtype" in config else "torch_dtype"] = common
    _write_json(folder / "config.json", config)
    if len(shards) > 1:
        total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        weight_map = {name: file for file, names in shards.items() for name in names}
        _write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})
    generation = folder / GENERATION
    if not generation.exists():
        ids = {"eos_token_id": weights.config.eos_token_id, "pad_token_id": weights.config.pad_token_id}
        _write_json(generation, {name: value for name, value in ids.items() if value is not None})


def _complete(folder: Any, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """What other programs want to know of a run's own tokenizer, and runs of earlier versions did not say; in a
    `config.json` that came with the weights nothing is added."""
    generation = dict(before := read_json(folder / GENERATION))
    if any(generation.get(name) for name in ("temperature", "top_p", "top_k")):
        generation.setdefault("do_sample", True)  # without it transformers ignores them, and refuses to save them
    if tokenizer.bos_id is not None:
        generation.setdefault("bos_token_id", tokenizer.bos_id)
        if not config.hf_json:
            _write_json(folder / "config.json", {**read_json(folder / "config.json"), "bos_token_id": tokenizer.bos_id})
    if generation != before:
        _write_json(folder / GENERATION, generation)


def _common_dtype(weights: Weights, tensors: Mapping[str, _Tensor]) -> str:
    """What most numbers are, in HF's words."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.nbytes
    most = max(sizes, key=lambda name: sizes[name])
    return "bfloat16" if most == FP8.name else most


def _write_json(path: Any, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


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
