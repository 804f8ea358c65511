"""Tiles of arrays in a GPU's memory, for the kernels in `gpu_grouped`, `gpu_attention` and `gpu_fp8`.

They are written for Pallas's Triton backend, which runs on NVIDIA's compute capability 8.0 (A100) and later and is
deprecated since JAX 0.11. Only this file and the bodies of the kernels know of it: their arithmetic is in functions of
tiles, which a kernel for another backend can call too.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

log = logging.getLogger(__name__)

SMALLEST = 16  # elements along each side of a product's tiles: a matrix unit takes no fewer
DTYPES = (jnp.float32, jnp.bfloat16)
OLDEST, OLDEST_WITH_FP8 = 8.0, 8.9  # NVIDIA's compute capability
PLANNED = {"NVIDIA A100": 8.0}  # of GPUs that programs are compiled for without one, where it is older than FP8


class Span(NamedTuple):
    """A tile's part of one dim of an array: `size` elements from `first`.

    Attributes:
      end: nothing from here on is read or written: an array's length, where `first` is a multiple of `size`, or any
        place that the kernel computes.
    """

    first: Any
    size: int
    end: Any

    @property
    def is_whole(self) -> bool:
        """Whether no tile along this dim is cut short by `end`."""
        return isinstance(self.end, int) and self.end % self.size == 0

    @property
    def places(self) -> jax.Array:
        return self.first + jnp.arange(self.size, dtype=jnp.int32)


class Effort(NamedTuple):
    """The share of a processor that a kernel's programs take."""

    warps: int  # of 32 threads, that work on one tile
    stages: int  # turns of a loop whose loads are under way at once


@functools.cache
def _triton() -> Any:
    """The backend's module, or None with a warning: a later JAX may come without it."""
    try:
        return importlib.import_module("jax.experimental.pallas.triton")
    except ImportError as error:
        log.warning("experts and attention run in XLA's slower forms: this JAX has no Triton backend (%s)", error)
        return None


def _capability() -> float:
    """The compute capability of the GPUs of the program that is being traced; that of new ones if there are none."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.local_devices()[0]
    here = [d for d in jax.local_devices() if d.platform == "gpu" and d.device_kind == device.device_kind]
    if here:
        return float(here[0].compute_capability)
    return next((old for name, old in PLANNED.items() if device.device_kind.startswith(name)), OLDEST_WITH_FP8)


@functools.cache
def _new_enough(capability: float) -> bool:
    """Whether the backend knows the GPU; a warning if not."""
    if capability < OLDEST:
        log.warning(
            "experts and attention run in XLA's slower forms: this GPU's compute capability is %s, and their kernels "
            "need %s",
            *(capability, OLDEST),
        )
    return capability >= OLDEST


def _usable() -> bool:
    return _triton() is not None and _new_enough(_capability())


def takes(*arrays: jax.Array) -> bool:
    """Whether the kernels can be had, and have the dtype that all arrays share."""
    return arrays[0].dtype in DTYPES and len({a.dtype for a in arrays}) == 1 and _usable()


def take_fp8() -> bool:
    """Whether the kernels can be had, and the GPUs of the program being traced multiply E4M3."""
    return _usable() and _capability() >= OLDEST_WITH_FP8


def tile(size: int, most: int) -> int:
    """The side of tiles along a dim of `size`: a power of two up to `most`. One that divides `size` needs no mask, but
    must be 32 or more to be worth it."""
    divisor = min(size & -size, most)
    return divisor if divisor >= 32 else min(most, max(SMALLEST, 1 << (size - 1).bit_length()))


def tiles(size: int, side: int) -> int:
    """How many tiles cover a dim."""
    return -(-size // side)


def _at(index: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(pl.ds(i.first, i.size) if isinstance(i, Span) else i for i in index)


def _mask(index: Sequence[Any]) -> jax.Array | None:
    """Whether each element of a tile exists; None where all do, for any tile."""
    spans = [i for i in index if isinstance(i, Span)]
    shape = tuple(span.size for span in spans)
    mask = None
    for dim, span in enumerate(spans):
        if not span.is_whole:
            inside = jax.lax.broadcast_in_dim(span.places < span.end, shape, (dim,))
            mask = inside if mask is None else mask & inside
    return mask


def load(ref: Any, *index: Any, fill: int = 0) -> jax.Array:
    """The tile at an index of numbers and `Span`s; `fill` past their ends."""
    mask = _mask(index)
    return _triton().load(ref.at[_at(index)], mask=mask, other=None if mask is None else fill)


def store(ref: Any, value: jax.Array, *index: Any) -> None:
    """Writes the tile in the array's dtype, all but its elements past the spans' ends."""
    _triton().store(ref.at[_at(index)], value.astype(ref.dtype), mask=_mask(index))


def call(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    outs: Sequence[jax.ShapeDtypeStruct],
    *args: jax.Array,
    name: str,
    effort: Effort,
    interpret: bool,
) -> list[jax.Array]:
    """Runs `kernel` with references to whole arrays, once for each place in `grid`, the first dim's neighbours at
    once."""
    params = _triton().CompilerParams(num_warps=effort.warps, num_stages=effort.stages)
    run = pl.pallas_call(
        kernel, grid=grid, out_shape=list(outs), compiler_params=params, name=name, interpret=interpret
    )
    return run(*args)
