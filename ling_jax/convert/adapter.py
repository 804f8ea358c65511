"""A LoRA adapter of PEFT, read from its folder and added to the weights that it was trained beside.

PEFT's `adapter_config.json` says how strongly, `adapter_model.safetensors` has a pair of thin matrices for each module:
`base_model.model.MODULE.lora_A.weight` [r, in] and `.lora_B.weight` [out, r]. The merged weight is W + scale * B @ A,
with scale = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`. What has another meaning is refused by the name
of its field: a setting that is not known here may change what the numbers stand for.
"""

import logging
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from ling_jax.convert.fp8 import FP8
from ling_jax.convert.tensorfile import DTYPES, NAMES, TensorFile
from ling_jax.convert.weights import F32, Weights, narrow, some
from ling_jax.files import hub
from ling_jax.files.paths import at, check_bucket
from ling_jax.files.whole import read_json

log = logging.getLogger(__name__)

PREFIX = "base_model.model."  # before HF's name of a module
PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.default)?(?P<weight>\.weight)?")
# Settings that are read here, and those that say how an adapter was trained, not what it computes.
READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias"}
READ |= {"base_model_name_or_path"}
OF_TRAINING = {
    "auto_mapping", "corda_config", "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_dropout", "megatron_core", "modules_to_save", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
# Ways to begin that leave the base weights as they are; the others (pissa, olora, loftq, ...) go with changed ones.
BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")
DEFAULTS = {"r": 8, "lora_alpha": 8}  # PEFT's


class Adapter:
    """The adapter in a folder, checked against the weights that it goes with.

    Args:
      path: a folder with adapter_config.json and adapter_model.safetensors, or a hub id of one.
      weights: of the model.
      source: what the user calls that model.
    Raises:
      ValueError: for an adapter of another kind, naming the field; for tensors that are missing, left over, or of
        another shape than the model's, all in one error; for a module whose weight is FP8.
    """

    def __init__(self, path: str, weights: Weights, source: str):
        self.folder = at(hub.folder_of(path, hub.ADAPTER) or path)
        check_bucket(self.folder)
        self._config: dict[str, Any] = DEFAULTS | read_json(self.folder / hub.ADAPTER_CONFIG)
        _check_settings(self.folder, self._config)
        _compare_base(self._config.get("base_model_name_or_path"), source, path)
        self.file = _open(self.folder)
        self._whole: dict[str, str] = {}  # tensors that take the place of the model's: HF's name, the file's
        self._pairs = self._sort_names()
        shapes = {str(name): stack.shape for stack in weights.stacks.values() for name in stack.names.flat}
        problems = self._problems(shapes)
        problems += [
            f"{name} is FP8 in {source}: merge into bf16 (convert.py to-hf --format bf16), then quantise"
            for name in sorted(self._pairs.keys() | self._whole.keys())
            if weights.dtypes.get(name) == FP8
        ]
        if problems:
            raise ValueError(f"{self.folder} cannot be merged into {source}: {some(problems)}")

    @property
    def files(self) -> list[epath.Path]:
        return [self.file.path, self.folder / hub.ADAPTER_CONFIG]

    def __contains__(self, name: str) -> bool:
        return name in self._pairs or name in self._whole

    def merged(self, name: str, start: int, rows: np.ndarray) -> np.ndarray:
        """Rows of a tensor from row `start` on, merged in float32, in the dtype of `rows`."""
        own = rows.dtype
        if name in self._whole:
            rows = self.file.read(self._whole[name], (slice(start, start + len(rows)),))
        numbers = narrow(rows, F32)
        if name in self._pairs:
            numbers = numbers + self._added(name, start, len(rows))
        return narrow(numbers, own)

    def _sort_names(self) -> dict[str, dict[str, str]]:
        """{HF's name: {"A": the file's name, ...}} of pairs, sides of embeddings being "a" and "b"; the rest goes to
        `_whole`."""
        pairs: dict[str, dict[str, str]] = {}
        for full in self.file.tensors:
            name = full.removeprefix(PREFIX)
            found = PAIR.fullmatch(name)
            if found and bool(found["embedding"]) != bool(found["weight"]):
                side = found["side"].lower() if found["embedding"] else found["side"]
                pairs.setdefault(found["module"] + ".weight", {})[side] = full
            else:
                self._whole[re.sub(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)", "", name)] = full
        return pairs

    def _problems(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Lists what is wrong with the adapter's tensors, for a model whose tensors have these `shapes`."""
        tensors, floats = self.file.tensors, DTYPES.keys() - {NAMES[FP8]}
        problems = [f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in floats]
        if not tensors:
            problems.append("it has no tensors")
        if len(tensors) != len(self._whole) + sum(map(len, self._pairs.values())):
            problems.append("two tensors stand for one")
        for name, full in self._whole.items():
            if name not in shapes:
                problems.append(f"{full} has no place in the model")
            elif tensors[full].shape != shapes[name]:
                problems.append(f"{full} is {tensors[full].shape}, {name} is {shapes[name]}")
        for name, sides in self._pairs.items():
            if name not in shapes or len(shapes[name]) != 2:
                problems.append(f"{min(sides.values())} has no place in the model")
            elif set(sides) not in ({"A", "B"}, {"a", "b"}):
                problems.append(f"of {name} there is only {', '.join(sides.values())}")
            else:
                problems += self._wrong_shapes(name, sides, shapes[name])
        return problems

    def _wrong_shapes(self, name: str, sides: Mapping[str, str], shape: tuple[int, ...]) -> list[str]:
        rank, (rows, columns) = self._rank(name), shape
        wanted = {"A": (rank, columns), "B": (rows, rank), "a": (rank, rows), "b": (columns, rank)}
        found = {side: self.file.tensors[full].shape for side, full in sides.items()}
        return [
            f"{sides[side]} is {found[side]}, not {wanted[side]}: {name} is {shape}, its rank {rank}"
            for side in sides
            if found[side] != wanted[side]
        ]

    def _added(self, name: str, start: int, count: int) -> np.ndarray:
        """float32 [count, in]: rows of what a pair adds to a tensor [out, in]."""
        sides, rank, rows = self._pairs[name], self._rank(name), slice(start, start + count)
        if "A" in sides:
            starts = [self.file.start(sides["B"], (rows,)), self.file.start(sides["A"])]
            left, right = (narrow(read(), F32) for read in starts)
        else:  # an embedding's is (B @ A).T
            starts = [self.file.start(sides[side]) for side in "ab"]
            left, right = (narrow(read(), F32).T for read in starts)
            left = left[rows]
        scale = self._of_module("alpha_pattern", "lora_alpha", name)
        scale /= math.sqrt(rank) if self._config.get("use_rslora") else rank
        return np.float32(scale) * (left @ right)

    def _of_module(self, pattern: str, default: str, name: str) -> float:
        """A setting of one module: that of the first pattern which is its name or the end of it, else everybody's."""
        for key, value in (self._config.get(pattern) or {}).items():
            if re.fullmatch(rf"(.*\.)?({key})", name.removesuffix(".weight")):
                return value
        return self._config[default]

    def _rank(self, name: str) -> int:
        return int(self._of_module("rank_pattern", "r", name))


def _check_settings(folder: epath.Path, config: Mapping[str, Any]) -> None:
    """ValueError for what is not plain LoRA, whose meaning is the sum above."""
    file = folder / hub.ADAPTER_CONFIG
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type = {config.get('peft_type')!r}: only LORA adapters can be merged")
    plain = {"bias": (None, "none"), "init_lora_weights": BEGINNINGS}
    for name, value in config.items():
        if value not in plain[name] if name in plain else bool(value) and name not in READ | OF_TRAINING:
            raise ValueError(
                f"{file}: {name} = {value!r}: only plain LoRA is merged here; merge this one in PyTorch with PEFT's "
                "merge_and_unload, and save that model"
            )
    for name, pattern, least in (("r", "rank_pattern", 1), ("lora_alpha", "alpha_pattern", -math.inf)):
        own = config.get(pattern) or {}
        values = [config[name], *(own.values() if isinstance(own, dict) else [None])]
        if not all(isinstance(v, int | float) and not isinstance(v, bool) and v >= least for v in values):
            raise ValueError(f"{file}: {name} = {config[name]!r}, {pattern} = {own!r}: numbers, ranks of 1 or more")
        if wrong := [key for key in own if not _is_pattern(key)]:
            raise ValueError(f"{file}: {pattern}: {wrong[0]!r} is no regular expression")


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _compare_base(base: Any, source: str, adapter: str) -> None:
    """Warns where the adapter was trained beside a model of another name."""
    names = [pathlib.PurePath(str(path).partition("@")[0]).name.lower() for path in (base, source)]
    if base and names[0] != names[1]:
        log.warning("%s was trained on %s, and is merged into %s", adapter, base, source)


def _open(folder: epath.Path) -> TensorFile:
    if not (folder / hub.ADAPTER_WEIGHTS).is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in hub.PICKLES)
        hint = f", but a pickle, {pickles[0]}: save it with safe_serialization=True" if pickles else ""
        raise ValueError(f"{folder} has no {hub.ADAPTER_WEIGHTS}{hint}")
    return TensorFile(folder / hub.ADAPTER_WEIGHTS)


def told_of(dtype: np.dtype) -> str:
    """The line of an audit about a merged tensor."""
    return f"{NAMES[dtype]} + adapter"
