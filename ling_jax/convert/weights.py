"""A model's weights in a folder, HF's or ours, on a disk or in a bucket, read piece by piece under one interface.

Both are seen as our stacked arrays (`mapping.layout`): a HF folder's tensors are stacked as they are read. Where the
tensors of one array have several dtypes, it has the narrowest one that holds them all exactly; each tensor's own is
kept beside, so that an export gives back every byte. FP8 arrays hold codes, and "scales" has their scales.
"""

import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from ling_jax.checkpoint import META, META_FILE, find_checkpoint, open_arrays, read_meta
from ling_jax.config import ModelConfig, RunConfig
from ling_jax.convert.beyond import left_out, one_reading
from ling_jax.convert.fp8 import BLOCK, FP8, dequantise
from ling_jax.convert.mapping import SCALE, ArrayPath, TensorStack, layout, scales_of
from ling_jax.convert.tensorfile import DTYPES, NAMES, TensorFile
from ling_jax.files import hub
from ling_jax.files.arrays import Index
from ling_jax.files.buckets import is_bucket
from ling_jax.files.hub import INDEX, PICKLES
from ling_jax.files.paths import at, check_bucket, entries
from ling_jax.files.whole import read_json
from ling_jax.snapshots import SNAPSHOTS

log = logging.getLogger(__name__)

CHECKPOINTS, TOKENIZER = "checkpoints", "tokenizer"  # of a run's folder
HF = "hf"  # of a checkpoint's metadata: what only a HF folder knows; of its folder: files that came with the weights
LINEAGE = "merge"  # of a merged checkpoint's metadata: what it is an average of
WEIGHTS = ("params", "bias", "scales")  # of a checkpoint's arrays: the model's
SHOWN = 10  # names listed in an error
OPENED = 16  # files opened at a time
PIECE_BYTES = 64 << 20  # of what is read, and of a chunk that is written, at a time, where that can be
QUANTISATION = ("quant_method", "format", "fmt", "bits", "group_size", "mode")  # what tells one kind from another
BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


class Weights(ABC):
    """Where the weights of one model are, and how to read any part of them.

    Attributes:
      stacks: our arrays, FP8 scales included, in the order of HF's files.
      dtypes: of each HF tensor that the folder has or an export of it would have.
      block: sides of an FP8 block, if any array is quantised.
      beyond: tensors of the folder that are no part of the model, each with the reason why it is left out.
      kept: whether every tensor is as it came in a HF folder.
      trained_with: the fingerprint of the tokenizer that the weights were trained with, where it is known.
    """

    folder: epath.Path
    config: ModelConfig
    stacks: dict[ArrayPath, TensorStack]
    dtypes: dict[str, np.dtype]
    block: tuple[int, int] = BLOCK
    beyond: Mapping[str, str] = {}
    kept: bool = False
    trained_with: str | None = None

    def dtype(self, path: ArrayPath) -> np.dtype:
        """The dtype of one of our arrays: the narrowest that holds its tensors exactly."""
        return self._dtypes[path]

    @functools.cached_property
    def _dtypes(self) -> dict[ArrayPath, np.dtype]:
        return {
            path: common({self.dtypes.get(n, F32) for n in stack.names.flat}) for path, stack in self.stacks.items()
        }

    @abstractmethod
    def told_by(self) -> list[epath.Path]:
        """The files whose change tells that these are other weights."""

    @abstractmethod
    def companions(self) -> list[epath.Path]:
        """Folders with the files that go with a model, a tokenizer for one; where two have a file, the later counts."""

    @abstractmethod
    def read(self, path: ArrayPath, index: Index) -> np.ndarray:
        """A part of our array, in `dtype(path)`."""

    @abstractmethod
    def chunk(self, path: ArrayPath) -> tuple[int, ...]:
        """The shape in whose multiples an array is best read."""

    def scales_path(self, path: ArrayPath) -> ArrayPath | None:
        """Where the scales of an array are; None for one that has none."""
        scales = ("scales", *path[1:])
        return scales if path[0] == "params" and scales in self.stacks else None

    def blocks(self, index: Index) -> Index:
        """The part of the scales that a part of a quantised array needs."""
        rows = (slice(s.start // b, -(-s.stop // b)) for s, b in zip(index[-2:], self.block, strict=True))
        return (*index[:-2], *rows)

    def scales(self, path: ArrayPath, index: Index) -> np.ndarray | None:
        """float32 [tensors, blocks, blocks]: the scales that a part of an array needs; None for an array without."""
        scales_path = self.scales_path(path)
        if scales_path is None:
            return None
        scales = self.read(scales_path, self.blocks(index))
        return scales.reshape(-1, *scales.shape[-2:])

    def multiplied(self, codes: np.ndarray, scales: np.ndarray, index: Index) -> np.ndarray:
        """float32: one tensor's part of what was read at `index`, times its scales."""
        start = (index[-2].start % self.block[0], index[-1].start % self.block[1])
        return dequantise(codes, scales, self.block, start)

    def decode(self, path: ArrayPath, index: Index, read: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
        """The numbers that a part which was `read` stands for, FP8 multiplied out, in `dtype` (None: the array's own,
        or float32 for FP8)."""
        scales = self.scales(path, index)
        if scales is None:
            return read if dtype is None else narrow(read, np.dtype(dtype))
        out = np.empty(read.shape, F32 if dtype is None else np.dtype(dtype))
        tensors = (values.reshape(-1, *read.shape[-2:]) for values in (out, read))
        for new, codes, own in zip(*tensors, scales, strict=True):  # float32 of one tensor at a time
            new[...] = narrow(self.multiplied(codes, own, index), out.dtype)
        return out

    def values(self, path: ArrayPath, index: Index, dtype: Any = None) -> np.ndarray:
        """The same of a part that is read now."""
        return self.decode(path, index, self.read(path, index), dtype)


def common(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds all values of `dtypes` exactly."""
    found = set(dtypes)
    if len(found) == 1:
        return found.pop()
    return BF16 if found <= {FP8, BF16} else F32


def narrow(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`values` in `dtype`: bit by bit where they came from it, else rounded to the nearest."""
    if values.dtype == dtype:
        return values
    if (values.dtype, dtype) == (F32, BF16):
        bits = values.view(np.uint32)
        if not np.any(bits & 0xFFFF):  # a cast would change the bits of a NaN
            return (bits >> 16).astype(np.uint16).view(BF16)
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def whole(shape: Iterable[int]) -> Index:
    return tuple(slice(0, size) for size in shape)


# A HF folder.


class HFFolder(Weights):
    """A HF folder: one safetensors file or a sharded set with its index, in any of DTYPES, FP8 blocks too.

    Raises:
      ValueError: on opening, when a file is missing, damaged or outside the folder, or the tensors are not those of
        config.json; see `beyond.one_reading` for the few that may be there besides.
    """

    kept = True

    def __init__(self, folder: epath.Path, mtp: bool = True):
        self.folder = folder
        json_config = read_json(folder / "config.json")
        self.config = _with_mtp(_hf_config(folder, json_config), mtp)
        quantised = _is_quantised(folder, json_config)
        if quantised:
            self.block = _block(folder, json_config["quantization_config"])
        self._files = _open_files(folder)
        self._file_of = {name: file for file in self._files for name in file.tensors}
        self.stacks = {}
        for path, stack in layout(self.config).items():
            self.stacks[path] = stack
            if quantised and len(stack.shape) == 2 and any(self._spelled(n) == NAMES[FP8] for n in stack.names.flat):
                scales_path, scales = scales_of(path, stack, self.block)
                self.stacks[scales_path] = scales
        known = {str(name) for stack in self.stacks.values() for name in stack.names.flat}
        self.beyond = one_reading(self.config, self._file_of.keys() - known, self._file_of)
        self._check_tensors(quantised)
        if self.beyond and mtp:
            _warn_once(f"{folder}: {left_out(self.beyond)}")
        used = {name: file for name, file in self._file_of.items() if name not in self.beyond}
        self.dtypes = {name: DTYPES[file.tensors[name].dtype] for name, file in used.items()}

    def _spelled(self, name: str) -> str | None:
        return self._file_of[name].tensors[name].dtype if name in self._file_of else None

    def told_by(self) -> list[epath.Path]:
        return [*self.files(), self.folder / "config.json"]

    def companions(self) -> list[epath.Path]:
        return [self.folder]

    def files(self) -> list[epath.Path]:
        return [file.path for file in self._files]

    def chunk(self, path: ArrayPath) -> tuple[int, ...]:
        """Tensors that follow one another, or whole FP8 blocks of a tensor's rows: PIECE_BYTES, and at least one."""
        stack = self.stacks[path]
        size = math.prod(stack.shape) * self.dtype(path).itemsize
        together = min(max(PIECE_BYTES // size, 1), *stack.names.shape[-1:]) if stack.names.ndim else 1
        rows = PIECE_BYTES * stack.shape[0] // size // self.block[0] * self.block[0]
        rows = min(max(rows, self.block[0]), stack.shape[0])
        return (*(1,) * (stack.names.ndim - 1), *(together,) * (stack.names.ndim > 0), rows, *stack.shape[1:])

    def read(self, path: ArrayPath, index: Index) -> np.ndarray:
        stack, dtype = self.stacks[path], self.dtype(path)
        depth = stack.names.ndim
        names = np.array(stack.names[index[:depth]], object)
        inner = index[depth:]
        files = [self._file_of.get(name) for name in names.flat]
        reads = [file and file.start(name, inner) for file, name in zip(files, names.flat, strict=True)]
        out = np.empty((names.size, *(s.stop - s.start for s in inner)), dtype)
        for row, read in enumerate(reads):
            out[row] = read() if read is not None else 1  # a scale of no FP8 tensor
        return out.reshape(*names.shape, *out.shape[1:])

    def _check_tensors(self, quantised: bool) -> None:
        """One error for everything wrong with the folder's tensors, before any weight is read."""
        wanted = {str(name): stack.shape for stack in self.stacks.values() for name in stack.names.flat}
        unscaled = {n for n in wanted if n.endswith(SCALE) and self._spelled(n[: -len(SCALE)]) != NAMES[FP8]}
        wanted = {name: shape for name, shape in wanted.items() if name not in unscaled}
        have = {name: file.tensors[name] for name, file in self._file_of.items() if name not in self.beyond}
        missing = [name for name in wanted if name not in have]
        extra = sorted(have.keys() - wanted.keys())
        shapes = [
            f"{name} is {have[name].shape}, the config says {shape}"
            for name, shape in wanted.items()
            if name in have and have[name].shape != shape
        ]
        allowed = [name for name in DTYPES if quantised or name != NAMES[FP8]]
        dtypes = [f"{name} is {tensor.dtype}" for name, tensor in have.items() if tensor.dtype not in allowed]
        problems = []
        if missing:
            problems.append(f"{len(missing)} tensor(s) missing: {some(missing)}{self._hint(missing)}")
        if extra:
            problems.append(f"{len(extra)} tensor(s) that the config has no place for: {some(extra)}")
        if shapes:
            problems.append(f"{len(shapes)} wrong shape(s): {some(shapes)}")
        if dtypes:
            problems.append(f"{len(dtypes)} dtype(s) other than {', '.join(allowed)}: {some(dtypes)}")
        if problems:
            raise ValueError(f"{self.folder} does not match its config.json: " + "; ".join(problems))

    def _hint(self, missing: list[str]) -> str:
        mtp = f"model.layers.{self.config.num_hidden_layers}."
        if self.config.num_nextn_predict_layers and all(name.startswith(mtp) for name in missing):
            return (
                " (the MTP layer: if this release has none, set num_nextn_predict_layers to 0 in config.json, or do "
                "without it: convert.py to-hf --no-mtp, train.py --init-mtp drop or new)"
            )
        return ""


def _open_files(folder: epath.Path) -> list[TensorFile]:
    """The safetensors files of a folder, which hold what its index says and nothing twice."""
    index = folder / INDEX
    weight_map = _read_weight_map(index) if index.exists() else None
    names = ["model.safetensors"] if weight_map is None else sorted(set(weight_map.values()))
    for name in names:
        if pathlib.Path(name).name != name or name in ("", ".."):  # links are fine: HF's cache is made of them
            raise ValueError(f"{index} points outside its folder: {name!r}; refusing to read it")
    sizes = {one.name: one.size for one in entries(folder)} if is_bucket(folder) else {}  # one request for all
    for name in names:
        if name not in sizes and (is_bucket(folder) or not (folder / name).is_file()):
            raise _missing(folder, name)
    with ThreadPoolExecutor(OPENED) as pool:
        files = list(pool.map(lambda name: TensorFile(folder / name, sizes.get(name)), names))
    held: dict[str, str] = {}
    twice = [name for file in files for name in file.tensors if held.setdefault(name, file.path.name) != file.path.name]
    if twice:
        raise ValueError(f"{folder} has {len(twice)} tensor(s) in two files: {some(sorted(twice))}; download it again")
    told = held if weight_map is None else weight_map
    if wrong := sorted(name for name in told.keys() | held.keys() if told.get(name) != held.get(name)):
        raise ValueError(f"{index} disagrees with the files it names on {some(wrong)}; download them again")
    return files


def _missing(folder: epath.Path, name: str) -> ValueError:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        return ValueError(
            f"{folder} has its weights in pickles only ({some(pickles)}), which can run any code when read: take "
            "the release's safetensors files, or write them in PyTorch with model.save_pretrained(DIR), where you "
            "trust the pickles"
        )
    return ValueError(f"{folder / name} is missing: a HF folder holds model.safetensors, or {INDEX} and its files")


def _read_weight_map(index: epath.Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to file names; download it again")
    return weight_map


def _hf_config(folder: epath.Path, config: Mapping[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.from_hf(config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def _is_quantised(folder: epath.Path, config: Mapping[str, Any]) -> bool:
    settings = config.get("quantization_config", config.get("quantization"))  # the latter is MLX's
    if settings is None:
        return False
    wanted = {"quant_method": "fp8", "fmt": "e4m3"}
    found = {key: settings.get(key, value) for key, value in wanted.items()} if isinstance(settings, dict) else {}
    if found != wanted or "quant_method" not in settings:
        told = {key: settings[key] for key in QUANTISATION if key in settings} if isinstance(settings, dict) else {}
        raise ValueError(
            f"{folder / 'config.json'}: quantization_config = {told or settings!r}: of quantised weights only FP8 "
            "blocks (quant_method fp8, fmt e4m3) are read; use the bf16 release, or let the program that quantised "
            "them write them in bf16"
        )
    return True


def _block(folder: epath.Path, settings: Mapping[str, Any]) -> tuple[int, int]:
    block = settings.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(side) is int and side > 0 for side in block):
        raise ValueError(
            f"{folder / 'config.json'}: quantization_config.weight_block_size = {block!r} must be two positive "
            f"numbers, such as {list(BLOCK)}; FP8 by tensor or by channel is not read: use the bf16 release"
        )
    return block[0], block[1]


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


# A checkpoint of ours.


class StoredWeights(Weights):
    """One step of a run, or what `convert.py to-jax` made. ValueError if it lacks arrays of its configuration."""

    def __init__(self, path: str, mtp: bool = True):
        self.folder = find_checkpoint(path)
        self.meta = meta = read_meta(self.folder)
        self.run = RunConfig.from_json(json.dumps(meta["config"]))
        self.step = int(self.folder.name) if self.folder.name.isdigit() else None
        self.config = _with_mtp(self.run.model, mtp)
        self.trained_with = meta.get("tokenizer") or None
        hf = meta.get(HF, {})
        self.kept = hf.get("kept", False)
        self.block = tuple(hf.get("block", BLOCK))
        self.arrays = open_arrays(self.folder, lambda path: path[0] in WEIGHTS)
        saved = self.arrays.layouts
        self.stacks = {}
        for path_, stack in layout(self.config).items():
            self.stacks[path_] = stack
            scales_path, scales = scales_of(path_, stack, self.block) if len(stack.shape) == 2 else (None, None)
            if scales_path in saved and scales is not None:
                self.stacks[scales_path] = scales
        self._check_arrays(saved)
        self._stored = {p: np.dtype(saved[p].dtype) for p in self.stacks}
        own = hf.get("dtypes", {})
        self.dtypes = {}
        for path_, stack in self.stacks.items():
            for name in map(str, stack.names.flat):
                spelled = own.get(name, NAMES[self._stored[path_]])
                if spelled is not None:
                    self.dtypes[name] = DTYPES[spelled]

    def dtype(self, path: ArrayPath) -> np.dtype:
        return self._stored[path]

    def told_by(self) -> list[epath.Path]:
        return [self.folder / META / META_FILE]

    def companions(self) -> list[epath.Path]:
        """The files that came with a converted checkpoint; for a run, its own and those of the weights it began
        from."""
        run = self.folder.parent.parent
        of_run = [run / HF, run / TOKENIZER] if self.folder.parent.name in (CHECKPOINTS, SNAPSHOTS) else []
        return [self.folder / HF, *of_run]

    def chunk(self, path: ArrayPath) -> tuple[int, ...]:
        return self.arrays.layouts[path].chunk

    def read(self, path: ArrayPath, index: Index) -> np.ndarray:
        return self.arrays.array(path).read(index)

    def _check_arrays(self, saved: Mapping[ArrayPath, Any]) -> None:
        problems = []
        for path, stack in self.stacks.items():
            if path not in saved:
                problems.append(f"{'/'.join(path)} is missing")
            elif saved[path].shape != stack.full_shape:
                problems.append(f"{'/'.join(path)} is {saved[path].shape}, not {stack.full_shape}")
            elif np.dtype(saved[path].dtype) not in NAMES:
                problems.append(f"{'/'.join(path)} is {saved[path].dtype}")
        if problems:
            raise ValueError(f"checkpoint {self.folder} does not match its configuration: {some(problems)}")


def _refuse_adapter(folder: epath.Path) -> None:
    parts = [name for name in (hub.ADAPTER_CONFIG, hub.ADAPTER_WEIGHTS) if (folder / name).exists()]
    if not parts or (folder / INDEX).exists() or (folder / hub.WHOLE).exists():
        return
    told = read_json(folder / hub.ADAPTER_CONFIG) if hub.ADAPTER_CONFIG in parts else {}
    base, kind = told.get("base_model_name_or_path") or "BASE", told.get("peft_type") or "LORA"
    raise ValueError(
        f"{folder} is a {'LoRA' if kind == 'LORA' else kind} adapter of {base}, not a model: merge it first with "
        f"python convert.py merge-adapter --source {base} --adapter {folder} --target DIR"
    )


def _is_hf(folder: epath.Path) -> bool:
    if not folder.is_dir() or (folder / META).exists():
        return False
    _refuse_adapter(folder)
    return (folder / INDEX).exists() or any(file.suffix in (".safetensors", *PICKLES) for file in folder.iterdir())


def open_weights(path: str | os.PathLike[str], mtp: bool = True) -> Weights:
    """The weights of a HF folder, hub id, run folder, its `checkpoints/`, or one step of it; ValueError as they say.
    Without `mtp` they are those of a model that has no MTP layer, whether the folder has one or not."""
    folder = at(hub.folder_of(path, hub.WEIGHTS) or path)
    check_bucket(folder)
    return HFFolder(folder, mtp) if _is_hf(folder) else StoredWeights(os.fspath(path), mtp)


def _with_mtp(config: ModelConfig, mtp: bool) -> ModelConfig:
    return config if mtp else dataclasses.replace(config, num_nextn_predict_layers=0)


@functools.cache
def _warn_once(text: str) -> None:
    """A folder may be opened several times by one command."""
    log.warning("%s", text)


def model_config_of(path: str | os.PathLike[str]) -> ModelConfig:
    """The architecture of a HF folder, hub id or checkpoint, without looking at its weights."""
    here = hub.folder_of(path, hub.CONFIG)
    folder = at(here or path)
    if _is_hf(folder) or here:
        return _hf_config(folder, read_json(folder / "config.json"))
    return RunConfig.from_json(json.dumps(read_meta(find_checkpoint(str(path)))["config"])).model


def checkpoint_of(path: str | os.PathLike[str]) -> epath.Path | None:
    """The folder of the checkpoint that a path stands for; None for a HF folder or hub id."""
    is_hf = hub.folder_of(path, hub.CONFIG) or _is_hf(at(path))
    return None if is_hf else find_checkpoint(str(path))
