"""The device mesh, and how each dim of a parameter is split over it: one table, from a dim's name to mesh axes."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ling_jax.config.checks import check, check_at_least
from ling_jax.config.layers import kinds_of
from ling_jax.config.model import ModelConfig
from ling_jax.config.parameters import MIXERS, parameters

FP8_BLOCK = 128  # rows and columns of a weight that share a scale (spec 3.2)
MESH_AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")
HELPERS = ("context", "expert")  # axes that help to store a dim only where they divide it


class Dim(NamedTuple):
    """How a dim of parameters is split.

    Attributes:
      axes: mesh axes, major first; () where it stays whole.
      settings: the model's settings that its size may be.
      stored: split only to be stored, whole to compute.
      heads: its size is so many heads, which stay whole.
    """

    axes: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    stored: bool = False
    heads: bool = False

    def units(self, model: ModelConfig, size: int) -> int:
        """How many pieces a dim of `size` can be cut into."""
        return size // model.head_dim if self.heads else size

    def setting(self, model: ModelConfig, size: int) -> str:
        """The setting that decides a dim of `size`."""
        units = self.units(model, size)
        return next((f"model.{name}" for name in self.settings if getattr(model, name) == units), "a dim of the model")


# Vectors (norms, biases) are never split.
DIMS: dict[str, Dim] = {
    "vocab": Dim(("tensor",), ("vocab_size",)),
    "hidden": Dim(("expert", "fsdp", "context"), ("hidden_size",), stored=True),
    "expert": Dim(("expert",), ("num_experts",)),
    "expert_hidden": Dim(("fsdp", "context"), ("hidden_size",), stored=True),
    "expert_ffn": Dim(("tensor",), ("moe_intermediate_size",)),
    "ffn": Dim(("tensor",), ("intermediate_size", "shared_intermediate_size")),
    # Query heads, as the output projection's inputs.
    "heads": Dim(("tensor",), ("num_attention_heads",), heads=True),
    # The fused rows are query, key and value heads: no contiguous part is one rank's. So the inputs are split, and
    # `parallel.rules.tensor_rows` swaps them for heads.
    "qkv_heads": Dim(),
    "qkv_inputs": Dim(("expert", "fsdp", "context", "tensor"), ("hidden_size",), stored=True),
    "expert_row": Dim(),
    "head_dim": Dim(),
    "mtp_input": Dim(),
}

Split = tuple[tuple[str, ...], ...]  # mesh axes of each dim of a parameter


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The device mesh, six axes that are always there, and how work is exchanged over it (docs/meshes.md).

    Rows of the batch go over data, fsdp and expert; tokens of a row over context; see `DIMS` for weights.
    """

    stage: int = 1
    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    dispatcher: Literal["auto", "ragged_all_to_all", "all_gather"] = "auto"  # of tokens to their experts
    buffer_factor: float = 2.0  # rows an expert rank takes at once, over the mean; from `expert` on, the worst case
    overflow: Literal["rounds", "drop"] = "rounds"  # rows beyond the buffer: further rounds, or left out and counted
    context_method: Literal["ring", "all_gather"] = "ring"  # how keys and values reach the queries of other shards
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # gradients are summed over devices in it

    def __post_init__(self):
        check_at_least(self, 1, *MESH_AXES)
        check(self.buffer_factor > 0, f"mesh.buffer_factor = {self.buffer_factor} must be positive")
        check(
            self.stage == 1,
            f"mesh.stage = {self.stage}: pipeline stages are not implemented yet; use fsdp and expert instead",
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name in MESH_AXES)

    @property
    def batch_shards(self) -> int:
        return self.data * self.fsdp * self.expert

    def check(self, model: ModelConfig) -> None:
        """ValueError, with both numbers and a remedy, where the model cannot be cut this way."""
        for entry in parameters(model).values():
            for name, size in zip(entry.dims, entry.shape, strict=True):
                self._check_dim(model, DIMS[name], size)
        for name in dict.fromkeys(kind.mixer for kind in kinds_of(model)):
            mixer = MIXERS[name]
            mixer.check(model, self.tensor, self.context)
            check(
                self.context == 1 or mixer.context,
                f"mesh.context = {self.context}: layers whose mixer is {name!r} need whole rows; set it to 1 and split "
                "the work over mesh.fsdp, mesh.expert or mesh.tensor instead",
            )

    def _check_dim(self, model: ModelConfig, dim: "Dim", size: int) -> None:
        axes = [axis for axis in dim.axes if getattr(self, axis) > 1 and not (dim.stored and axis in HELPERS)]
        shards, units = math.prod(getattr(self, axis) for axis in axes), dim.units(model, size)
        text = " * ".join(f"mesh.{axis}" for axis in axes)
        check(
            units % shards == 0,
            f"{dim.setting(model, size)} = {units} must be a multiple of {text} = {shards}; choose "
            + ("one of its divisors" if len(axes) == 1 else "smaller ones, whose product divides it"),
        )

    def check_fp8(self, model: ModelConfig) -> None:
        """ValueError where the mesh cuts a weight inside an FP8 block that products are split at."""
        if self.tensor == 1:
            return
        in_blocks = [entry for entry in parameters(model).values() if entry.rule]
        cut = dict.fromkeys(pair for entry in in_blocks for pair in zip(entry.dims, entry.shape, strict=True))
        sizes = {
            dim.setting(model, size) + " * head_dim" * dim.heads: size
            for known, dim in DIMS.items()
            for name, size in cut
            if name == known and "tensor" in dim.axes and not dim.stored
        }
        for kind in kinds_of(model):
            sizes |= MIXERS[kind.mixer].fused(model, self.tensor)
        for name, size in sizes.items():
            check(
                size % (FP8_BLOCK * self.tensor) == 0,
                f"mesh.tensor = {self.tensor} cuts {name} = {size} inside FP8 blocks of {FP8_BLOCK}; lower it",
            )

    def check_rows(self, rows: int, parts: int, length: int) -> None:
        """ValueError where `rows` per step in `parts` microbatches, of `length` tokens, cannot be cut this way."""
        check(
            rows // parts % self.batch_shards == 0,
            f"data.global_batch_size / train.microbatches = {rows // parts} must be a multiple of mesh.data * "
            f"mesh.fsdp * mesh.expert = {self.batch_shards}: raise the batch, or lower the microbatches or an axis",
        )
        pieces = 2 * self.context if self.context > 1 else 1
        check(
            length % pieces == 0,
            f"data.sequence_length = {length} must be a multiple of 2 * mesh.context = {pieces} (each shard holds an "
            "early and a late piece of the row): change either",
        )


ONE_DEVICE = MeshConfig()


def split_of(shape: tuple[int, ...], names: tuple[str, ...], mesh: MeshConfig, stored: bool = True) -> Split:
    """The mesh axes of more than one device that each dim is split over.

    Args:
      shape, names: of a parameter's dims, those of a stack of layers left out.
      stored: as it is stored; else dims that would be whole again to compute stay whole.
    Raises:
      ValueError: naming the dim and both numbers, where the axes do not divide it.
    """

    def shards(axes: tuple[str, ...]) -> int:
        return math.prod(getattr(mesh, axis) for axis in axes)

    split = []
    for name, size in zip(names, shape, strict=True):
        dim = DIMS[name]
        axes = tuple(axis for axis in dim.axes if getattr(mesh, axis) > 1)
        if len(names) == 1 or (dim.stored and not stored):
            axes = ()
        for helper in HELPERS:
            if dim.stored and size % shards(axes):
                axes = tuple(axis for axis in axes if axis != helper)
        if size % shards(axes):
            text = " * ".join(f"mesh.{axis} {getattr(mesh, axis)}" for axis in axes)
            raise ValueError(f"dim {name!r} of {size} must be a multiple of {text} = {shards(axes)}; lower these axes")
        split.append(axes)
    used = [axis for axes in split for axis in axes]
    assert len(used) == len(set(used)), f"{names}: two dims on one mesh axis, {split}"
    return tuple(split)
