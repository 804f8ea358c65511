"""Reading HF safetensors folders, and `load_pretrained` for them and for our checkpoints."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open

from ling_jax.checkpoint import find_checkpoint, read_arrays, read_meta
from ling_jax.config import ONE_DEVICE, MeshConfig, ModelConfig, RunConfig
from ling_jax.convert.mapping import hf_names
from ling_jax.model.model import Ling, abstract_model, param_specs, split_model
from ling_jax.parallel.mesh import make_mesh

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

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.files[self.file_of[name]].get_slice(name)[index]


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


def _read_part(source: HFFolder, names: np.ndarray, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """`index` of the array that the tensors of `names` (shape: the stacked dims) make, in their own dtype or `dtype`;
    only what it covers is read."""
    picked = np.array(names[index[: names.ndim]], object)
    parts = [source.read(name, index[names.ndim :]) for name in picked.reshape(-1)]
    out = np.stack(parts).reshape(*picked.shape, *parts[0].shape) if names.ndim else parts[0]
    return out.astype(dtype or out.dtype)


def _read_array(
    source: HFFolder, names: np.ndarray, shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding | None
) -> jax.Array:
    if sharding is None:
        return jnp.asarray(_read_part(source, names, (slice(None),) * len(shape), dtype))
    parts: dict[str, np.ndarray] = {}  # devices that hold the same part share one reading

    def part(index: Any) -> np.ndarray:
        if str(index) not in parts:
            parts[str(index)] = _read_part(source, names, index, dtype)
        return parts[str(index)]

    return jax.make_array_from_callback(shape, sharding, part)


def _compute_dtype(dtype: Any) -> jnp.dtype:
    if dtype is not None:
        return jnp.dtype(dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def _abstract(config: ModelConfig, mesh: MeshConfig | None, **dtypes: Any) -> Ling:
    (mesh or ONE_DEVICE).check(config)
    return abstract_model(config, mesh=mesh or ONE_DEVICE, **dtypes)


def _shardings(model: Ling, mesh: MeshConfig | None) -> tuple[dict, dict]:
    """Where each parameter and each bias is to live; None for each without a mesh."""
    _, params, bias = split_model(model)
    if mesh is None:
        return jax.tree.map(lambda _: None, params), jax.tree.map(lambda _: None, bias)
    devices = make_mesh(mesh)
    whole = NamedSharding(devices, PartitionSpec())
    return jax.tree.map(partial(NamedSharding, devices), param_specs(model)), jax.tree.map(lambda _: whole, bias)


def _load_hf(folder: Path, dtype: Any, mesh: MeshConfig | None) -> Ling:
    source = HFFolder(folder)
    model = _abstract(source.config, mesh, dtype=_compute_dtype(dtype))
    graph, params, bias = split_model(model)
    leaves: dict[tuple[str, ...], Any] = flatten_dict(params) | flatten_dict(bias)
    param_shardings, bias_shardings = map(flatten_dict, _shardings(model, mesh))
    shardings: dict[tuple[str, ...], Any] = param_shardings | bias_shardings
    places = {path: hf_names(source.config, path) for path in leaves}
    wanted = {name: leaf.shape[places[path].ndim :] for path, leaf in leaves.items() for name in places[path].flat}
    _check_tensors(source, wanted)
    arrays = {
        path: _read_array(
            source, places[path], leaf.shape, jnp.float32 if path in bias_shardings else dtype, shardings[path]
        )
        for path, leaf in leaves.items()
    }
    read = [unflatten_dict({path: arrays[path] for path in flatten_dict(tree)}) for tree in (params, bias)]
    return nnx.merge(graph, *read)


def _saved_config(folder: Any) -> RunConfig:
    return RunConfig.from_json(json.dumps(read_meta(folder)["config"]))


def _load_checkpoint(path: str, dtype: Any, mesh: MeshConfig | None) -> Ling:
    folder = find_checkpoint(path)
    config = _saved_config(folder)
    stored = jnp.dtype(config.train.param_dtype)
    model = _abstract(config.model, mesh, dtype=_compute_dtype(dtype), param_dtype=stored)
    graph, params, bias = split_model(model)
    like = [
        jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)
        for tree, shardings in zip((params, bias), _shardings(model, mesh), strict=True)
    ]
    arrays = read_arrays(folder, dict(zip(("params", "bias"), like, strict=True)))
    params = jax.tree.map(lambda a: jnp.asarray(a.astype(dtype or a.dtype)), arrays["params"])
    return nnx.merge(graph, params, jax.tree.map(jnp.asarray, arrays["bias"]))


def _is_hf(folder: Path) -> bool:
    return (folder / INDEX).exists() or any(folder.glob("*.safetensors"))


def model_config_of(path: str | Path) -> ModelConfig:
    """The architecture of a HF folder or checkpoint, without reading its weights."""
    return _hf_config(Path(path)) if _is_hf(Path(path)) else _saved_config(find_checkpoint(str(path))).model


def load_pretrained(path: str | Path, *, dtype: Any = None, mesh: MeshConfig | None = None) -> Ling:
    """Loads a model from a HF folder (bf16 or float32 safetensors, one file or sharded) or our checkpoint.

    Args:
      path: a HF folder, a run folder, its `checkpoints/`, or one step of it.
      dtype: of weights and computation. None keeps the weights as stored and computes in float32 on CPU,
        bfloat16 elsewhere.
      mesh: splits the weights over all devices by `parallel.rules`; every process reads only its devices' parts.
        None puts them whole on one device.
    Raises:
      ValueError: naming what is missing, extra, truncated or wrongly shaped, or a dim that the mesh does not divide,
        before weights are read.
    """
    return _load_hf(Path(path), dtype, mesh) if _is_hf(Path(path)) else _load_checkpoint(str(path), dtype, mesh)
