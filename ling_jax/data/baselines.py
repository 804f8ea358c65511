"""Baselines that a model must beat: bits per byte of general compressors and of a byte-trigram model.

Legend: S bytes of training text, N bytes of held-out text.
"""

import gzip
import lzma
from collections.abc import Iterable

import numpy as np

BLOCK = 1 << 22  # bytes that are counted at a time: each takes 17 in memory meanwhile


def baselines(train_texts: Iterable[str], heldout_texts: Iterable[str]) -> dict[str, float]:
    """Bits per byte of the held-out texts as one stream: gzip -9, xz -9, and a byte trigram.

    The compressors see the held-out bytes only; the trigram is fitted on the training texts, joined in memory.

    Raises:
      ValueError: if either side is empty.
    """
    train = "".join(train_texts).encode()
    heldout = "".join(heldout_texts).encode()
    if not train or not heldout:
        raise ValueError(f"baselines need text: got {len(train)} training and {len(heldout)} held-out bytes")
    return {
        "gzip -9": 8 * len(gzip.compress(heldout, 9, mtime=0)) / len(heldout),
        "xz -9": 8 * len(lzma.compress(heldout, preset=9)) / len(heldout),
        "byte trigram": _trigram_bits(np.frombuffer(train, np.uint8), np.frombuffer(heldout, np.uint8)),
    }


def _trigram_bits(train_S: np.ndarray, heldout_N: np.ndarray) -> float:
    """Mean bits of a held-out byte given the two before it (fewer at the start).

    Witten-Bell interpolation: an order's counts are mixed with the next lower order's estimate, which weighs as
    much as the context has distinct successors; below order 0 all 256 bytes are equally likely.
    """
    probability_N = np.full(len(heldout_N), 1 / 256)
    for order in range(min(3, len(train_S), len(heldout_N))):
        counts = _counts(train_S, order + 1).reshape(-1, 256)
        gram = _ngrams(heldout_N, order + 1)
        context, byte = gram // 256, gram % 256
        kinds, total = (counts > 0).sum(1)[context], counts.sum(1)[context]
        lower = probability_N[order:]
        mixed = (counts[context, byte] + kinds * lower) / np.maximum(total + kinds, 1)
        probability_N[order:] = np.where(total > 0, mixed, lower)  # an unseen context knows nothing
    return float(-np.log2(probability_N).mean())


def _counts(data: np.ndarray, n: int) -> np.ndarray:
    """How often each run of n bytes occurs: int64 [256^n]."""
    counts = np.zeros(256**n, np.int64)
    for start in range(0, len(data) - n + 1, BLOCK):
        counts += np.bincount(_ngrams(data[start : start + BLOCK + n - 1], n), minlength=256**n)
    return counts


def _ngrams(data: np.ndarray, n: int) -> np.ndarray:
    """Every run of n bytes as one integer, big-endian."""
    codes = np.zeros(len(data) - n + 1, np.int64)
    for i in range(n):
        codes = codes * 256 + data[i : len(data) - n + 1 + i]
    return codes
