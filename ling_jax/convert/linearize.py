"""From Ling to the beginnings of a Ring-linear: most layers' softmax attention becomes linear attention (spec 8.3)."""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from etils import epath

from ling_jax.config import ModelConfig, layer_kinds
from ling_jax.convert.audit import Audit
from ling_jax.convert.fp8 import FP8
from ling_jax.convert.mapping import ArrayPath, TensorStack, layout
from ling_jax.convert.to_hf import write_hf
from ling_jax.convert.transfer import new_place
from ling_jax.convert.weights import Weights, narrow, open_weights
from ling_jax.files.arrays import Index

Heads = Literal["replicate", "random"]
NORM_GROUPS = 4  # of a linear layer's output norm, in the released models


def linearize(
    source: str, target: str, layer_group_size: int, heads: Heads = "replicate", group_norm_size: int | None = None
) -> Audit:
    """Writes a HF folder of a model whose layers, but for the last of each group, have linear attention.

    Queries, the output projection and the norms of queries and keys stay. Every query head gets a key and value head of
    its own: a copy of the one that it shared, or a random one. The gate is random and its norm 1. The MTP layer keeps
    its softmax attention. What comes out must be trained before it is of use.

    Args:
      source: anything `load_pretrained` takes, but not in FP8.
      layer_group_size: layers of a group, of which the last keeps softmax attention.
      group_norm_size: groups of a linear layer's output norm; None takes the released models' 4, or the most up to it
        that divide the heads.
    Raises:
      ValueError: for a source that is linear already or in FP8, and as `to_hf`.
    """
    place = new_place(target)
    weights = Linearized(open_weights(source), source, layer_group_size, heads, group_norm_size)
    how = f", linear in groups of {layer_group_size}, {heads} heads, {weights.config.group_norm_size} norms"
    return write_hf(weights, source, target, place, how=how)


class Linearized(Weights):
    """The weights of a model as those of its linear sibling, made as they are read."""

    def __init__(self, source: Weights, name: str, size: int, heads: Heads, norm_groups: int | None):
        before = source.config
        self.source, self.heads, self.folder = source, heads, source.folder
        self.config = _sibling(before, name, size, norm_groups)
        if FP8 in source.dtypes.values():
            raise ValueError(f"{name} has FP8 weights: write them out first (convert.py to-hf --format bf16)")
        self.stacks = layout(self.config)
        self._place = {
            str(tensor): (path, at)
            for path, stack in source.stacks.items()
            for at, tensor in np.ndenumerate(stack.names)
        }
        self.dtypes = {
            str(tensor): source.dtypes[_like(str(tensor))]
            for stack in self.stacks.values()
            for tensor in stack.names.flat
        }

    def companions(self) -> list[epath.Path]:
        return self.source.companions()

    def told_by(self) -> list[epath.Path]:
        return self.source.told_by()

    def chunk(self, path: ArrayPath) -> tuple[int, ...]:
        """A tensor at a time."""
        stack = self.stacks[path]
        return (*(1,) * stack.names.ndim, *stack.shape)

    def read(self, path: ArrayPath, index: Index) -> np.ndarray:
        stack, dtype = self.stacks[path], self.dtype(path)
        depth = stack.names.ndim
        names = np.array(stack.names[index[:depth]], object)
        parts = [narrow(self._tensor(str(name), stack)[index[depth:]], dtype) for name in names.flat]
        return np.stack(parts).reshape(*names.shape, *parts[0].shape)

    def _tensor(self, name: str, stack: TensorStack) -> np.ndarray:
        """One whole tensor."""
        module = name.removesuffix(".weight").rpartition(".")[2]
        if module == "g_norm":
            return np.ones(stack.shape, np.float32)
        if module == "g_proj":
            return self._random(name, stack.shape)
        own = self._of_source(name)
        if "query_key_value" in name and len(own) != stack.shape[0]:
            return self._with_all_heads(name, own)
        return own

    def _of_source(self, name: str) -> np.ndarray:
        path, at = self._place[name]
        shape = self.source.stacks[path].shape
        part = (*(slice(i, i + 1) for i in at), *(slice(0, size) for size in shape))
        return self.source.read(path, part).reshape(shape)

    def _with_all_heads(self, name: str, rows: np.ndarray) -> np.ndarray:
        """A fused projection, or its bias, with as many heads of keys and values as of queries."""
        c = self.source.config
        queries, groups = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        each = c.num_attention_heads // c.num_key_value_heads

        def expand(part: np.ndarray, side: str) -> np.ndarray:
            heads = np.repeat(part.reshape(c.num_key_value_heads, c.head_dim, *part.shape[1:]), each, axis=0)
            if self.heads == "random":
                heads = self._random(f"{name} {side}", heads.shape)
            return heads.reshape(-1, *part.shape[1:])

        keys, values = rows[queries : queries + groups], rows[queries + groups :]
        return np.concatenate([rows[:queries], expand(keys, "keys"), expand(values, "values")])

    def _random(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """float32 normal numbers, the same for a name at all times."""
        numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
        return np.float32(self.config.initializer_range) * numbers


def _like(name: str) -> str:
    """The tensor of the source whose dtype a tensor has."""
    return name.replace("g_proj", "dense").replace("g_norm", "dense")


def _sibling(config: ModelConfig, name: str, size: int, norm_groups: int | None) -> ModelConfig:
    """The configuration of the linear model; ValueError where there is none."""
    if any(kind.mixer == "linear" for kind in layer_kinds(config)):
        raise ValueError(f"{name} has linear attention already (layer_group_size = {config.layer_group_size})")
    if not 2 <= size <= config.num_hidden_layers:
        raise ValueError(
            f"layer_group_size = {size} must be from 2 to {name}'s {config.num_hidden_layers} layers: the last of each "
            "group keeps softmax attention"
        )
    groups = math.gcd(NORM_GROUPS, config.num_attention_heads) if norm_groups is None else norm_groups
    linear: Mapping[str, Any] = {"layer_group_size": size, "group_norm_size": groups, "hf_json": ""}
    return dataclasses.replace(config, **linear)
