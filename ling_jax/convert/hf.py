"""Reading HF safetensors folders, and `load_pretrained` for them and for our checkpoints."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from ling_jax.checkpoint import find_checkpoint, read_arrays, read_meta
from ling_jax.config import ModelConfig, RunConfig
from ling_jax.convert.mapping import hf_names
from ling_jax.model.model import Ling, abstract_model, split_model

INDEX = "model.safetensors.index.json"
DTYPES = ("BF16", "F16", "F32")  # as safetensors spells them
SHOWN = 10  # names listed in an error


class HFFolder:
    """The tensors of a HF folder, by name, from one safetensors file or a sharded set with its index.

    Raises:
      ValueError: on opening, when a file is missing, damaged or outside the folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = _hf_config(folder)
        index = folder / INDEX
        if index.exists():
            weight_map = _read_weight_map(index)
            names = sorted(set(weight_map.values()))
        else:
            weight_map, names = {}, ["model.safetensors"]
        self.files = {name: self._open(name) for name in names}
        held = {tensor: name for name, file in self.files.items() for tensor in file.keys()}
        wrong = sorted(
            t for t in weight_map.keys() | held.keys() if index.exists() and weight_map.get(t) != held.get(t)
        )
        if wrong:
            raise ValueError(f"{index} disagrees with the files it names on {_some(wrong)}; download them again")
        self.file_of = held

    def _open(self, name: str) -> Any:
        path = self.folder / name
        if Path(name).name != name or name in ("", ".."):  # links are fine: HF's cache is made of them
            raise ValueError(f"{self.folder / INDEX} points outside its folder: {name!r}; refusing to read it")
        if not path.is_file():
            raise ValueError(f"{path} is missing: a HF folder holds model.safetensors, or {INDEX} and its files")
        try:
            return safe_open(path, "numpy")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or truncated ({error}); download it again") from error

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[self.file_of[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        return self.files[self.file_of[name]].get_slice(name).get_dtype()

    def read(self, name: str) -> np.ndarray:
        return self.files[self.file_of[name]].get_tensor(name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object; download it again")
    return value


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to file names; download it again")
    return weight_map


def _hf_config(folder: Path) -> ModelConfig:
    file = folder / "config.json"
    config = _read_json(file)
    if config.get("quantization_config") is not None:
        raise ValueError(f"{folder} holds quantised weights (quantization_config); use its bf16 release")
    try:
        return ModelConfig.from_hf(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _flatten(tree: dict, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        path = (*prefix, key)
        flat.update(_flatten(value, path) if isinstance(value, dict) else {path: value})
    return flat


def _check_tensors(source: HFFolder, wanted: dict[str, tuple[int, ...]]) -> None:
    """One error for everything wrong with a folder's tensors, before any weight is read."""
    dtypes = [f"{name} is {source.dtype(name)}" for name in source.file_of if source.dtype(name) not in DTYPES]
    missing = sorted(wanted.keys() - source.file_of.keys())
    extra = sorted(source.file_of.keys() - wanted.keys())
    shapes = [
        f"{name} is {source.shape(name)}, the config says {shape}"
        for name, shape in wanted.items()
        if name in source.file_of and source.shape(name) != shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensor(s) missing: {_some(missing)}")
    if extra:
        problems.append(f"{len(extra)} tensor(s) that the config has no place for: {_some(extra)}")
    if shapes:
        problems.append(f"{len(shapes)} wrong shape(s): {_some(shapes)}")
    if dtypes:
        problems.append(f"{len(dtypes)} dtype(s) other than {', '.join(DTYPES)}: {_some(dtypes)}")
    if problems:
        raise ValueError(f"{source.folder} does not match its config.json: " + "; ".join(problems))


def _read_stacked(source: HFFolder, names: np.ndarray, dtype: Any) -> jax.Array:
    """Reads the tensors of `names` (shape: the stacked dims) into one array, in their own dtype or `dtype`."""
    parts = [source.read(name) for name in names.reshape(-1)]
    out = np.stack(parts) if names.shape else parts[0]
    return jnp.asarray(out.reshape(*names.shape, *parts[0].shape).astype(dtype or out.dtype))


def _compute_dtype(dtype: Any) -> jnp.dtype:
    if dtype is not None:
        return jnp.dtype(dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def _load_hf(folder: Path, dtype: Any) -> Ling:
    source = HFFolder(folder)
    graph, params, bias = split_model(abstract_model(source.config, dtype=_compute_dtype(dtype)))
    places = {path: hf_names(source.config, path) for path in (_flatten(params) | _flatten(bias))}
    wanted = {
        name: leaf.shape[places[path].ndim :]
        for path, leaf in (_flatten(params) | _flatten(bias)).items()
        for name in places[path].reshape(-1)
    }
    _check_tensors(source, wanted)

    def read(tree: dict, dtype: Any, prefix: tuple[str, ...] = ()) -> dict:
        return {
            key: read(value, dtype, (*prefix, key))
            if isinstance(value, dict)
            else _read_stacked(source, places[(*prefix, key)], dtype)
            for key, value in tree.items()
        }

    return nnx.merge(graph, read(params, dtype), read(bias, jnp.float32))


def _saved_config(folder: Any) -> RunConfig:
    return RunConfig.from_json(json.dumps(read_meta(folder)["config"]))


def _load_checkpoint(path: str, dtype: Any) -> Ling:
    folder = find_checkpoint(path)
    config = _saved_config(folder)
    stored = jnp.dtype(config.train.param_dtype)
    model = abstract_model(config.model, dtype=_compute_dtype(dtype), param_dtype=stored)
    graph, params, bias = split_model(model)
    arrays = read_arrays(folder, {"params": params, "bias": bias})
    params = jax.tree.map(lambda a: jnp.asarray(a.astype(dtype or a.dtype)), arrays["params"])
    return nnx.merge(graph, params, jax.tree.map(jnp.asarray, arrays["bias"]))


def _is_hf(folder: Path) -> bool:
    return (folder / INDEX).exists() or any(folder.glob("*.safetensors"))


def model_config_of(path: str | Path) -> ModelConfig:
    """The architecture of a HF folder or checkpoint, without reading its weights."""
    return _hf_config(Path(path)) if _is_hf(Path(path)) else _saved_config(find_checkpoint(str(path))).model


def load_pretrained(path: str | Path, *, dtype: Any = None) -> Ling:
    """Loads a model from a HF folder (bf16 or float32 safetensors, one file or sharded) or our checkpoint.

    Args:
      path: a HF folder, a run folder, its `checkpoints/`, or one step of it.
      dtype: of weights and computation. None keeps the weights as stored and computes in float32 on CPU,
        bfloat16 elsewhere.
    Raises:
      ValueError: naming what is missing, extra, truncated or wrongly shaped, before weights are read.
    """
    return _load_hf(Path(path), dtype) if _is_hf(Path(path)) else _load_checkpoint(str(path), dtype)
