"""FP8 block checkpoints in numpy, bit by bit as the official tool makes them (spec 3.2). XLA's division differs."""

from typing import NamedTuple

import ml_dtypes
import numpy as np

from ling_jax.convert.mapping import Rule

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BLOCK = (128, 128)
LARGEST = np.float32(448)  # of e4m3
FLOOR = np.float32(1e-4)  # a block's greatest magnitude counts as no less


class Quantised(NamedTuple):
    """`codes` times the scale of their block is the tensor."""

    codes: np.ndarray  # float8_e4m3fn [out, in]
    scales: np.ndarray  # float32 [ceil(out / 128), ceil(in / 128)]


def quantise(w: np.ndarray, rule: Rule, block: tuple[int, int] = BLOCK) -> Quantised:
    """Quantises a float32 tensor [out, in] by its rule; the blocks at the right and lower edges may be smaller.

    scale = max(amax of the block, 1e-4) / 448, for "power_of_two" the power of two above it; codes = w * (1 / scale).
    NaN and infinities give NaN codes, of their whole block.
    """
    assert w.dtype == np.float32 and w.ndim == 2 and rule is not None
    edges = [np.arange(0, size, step) for size, step in zip(w.shape, block, strict=True)]
    amax = np.maximum.reduceat(np.maximum.reduceat(np.abs(w), edges[1], axis=1), edges[0], axis=0)
    scales = np.maximum(amax, FLOOR) / LARGEST
    if rule == "power_of_two":
        # log2 rounded to float32 first, as there: a scale just above a power of two keeps it.
        exponents = np.ceil(np.log2(scales.astype(np.float64)).astype(np.float32))
        scales = np.exp2(exponents).astype(np.float32)
    with np.errstate(invalid="ignore"):
        codes = (w * expand(np.float32(1) / scales, w.shape, block)).astype(FP8)
    return Quantised(codes, scales)


def expand(
    scales: np.ndarray, shape: tuple[int, ...], block: tuple[int, int] = BLOCK, start: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """Each element's scale, for a part of a tensor: [..., *shape[-2:]] from [..., blocks, blocks].

    Args:
      start: where in its first block the part begins, rows and columns.
    """
    rows, columns = (
        (np.arange(size) + first) // step for size, first, step in zip(shape[-2:], start, block, strict=True)
    )
    return scales[..., rows, :][..., columns]


def dequantise(
    codes: np.ndarray, scales: np.ndarray, block: tuple[int, int] = BLOCK, start: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """float32: codes times their scales; arguments as in `expand`, with any leading dims."""
    return codes.astype(np.float32) * expand(scales, codes.shape, block, start)
