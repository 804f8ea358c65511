"""From rewards to what the device sums: advantages within a group of answers, and a weight for each token.

Everything here is numpy in float64; the device gets float32.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ling_jax.config import Normalise, Spread

Baseline = Literal["group", "leave_one_out", "none"]


def advantages(rewards: Sequence[float], baseline: Baseline = "group", spread: Spread = "sample") -> np.ndarray:
    """float64 [answers]: how much better each answer of a group is than the others.

    Args:
      baseline: what is taken from each reward: the group's mean, the mean of the others, nothing.
      spread: what that is divided by: the group's standard deviation with n - 1 or with n, nothing. The report writes
        `std` without saying which; TRL and verl take n - 1.
    Returns:
      Zeros for a group whose rewards are all equal: it has no signal.
    """
    values = np.asarray(rewards, np.float64)
    if len(values) < 2 or np.ptp(values) == 0:
        return np.zeros(len(values))
    others = (values.sum() - values) / (len(values) - 1)
    centred = {"group": values - values.mean(), "leave_one_out": values - others, "none": values}[baseline]
    return centred if spread == "none" else centred / values.std(ddof=spread == "sample")


def token_weights(lengths: Sequence[Sequence[int]], normalise: Normalise, constant: float = 0.0) -> list[list[float]]:
    """The weight of each token of each answer of each group, with which a sum over tokens is the objective's mean.

    Args:
      lengths: tokens of each answer, by group.
      normalise: "group": all tokens of a group together count as one, as much as those of another group (LPO);
        "response": each answer of a group counts as much as another (GRPO); "batch": each token of the batch counts
        as much as another (DAPO); "constant": a token counts as much as another, whatever the lengths (Dr. GRPO).
      constant: of the last, tokens that an answer counts as, such as the most that it may have.
    """
    groups = len(lengths)
    total = sum(map(sum, lengths))

    def weight(group: Sequence[int], length: int) -> float:
        if normalise == "group":
            return 1 / (groups * max(sum(group), 1))
        if normalise == "response":
            return 1 / (groups * len(group) * max(length, 1))
        if normalise == "batch":
            return 1 / max(total, 1)
        return 1 / (groups * len(group) * constant)

    return [[weight(group, length) for length in group] for group in lengths]
