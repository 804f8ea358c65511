"""The weights with which checkpoints of a run at a constant learning rate are averaged in place of a decay (spec 4.3).

Let theta_0 .. theta_k be the checkpoints, oldest first, and D_j = theta_j - theta_{j-1} what the optimizer did between
two of them. Had the rate been w_j of its peak while it did D_j, the weights would be, to first order,

    theta_0 + sum_{j=1..k} w_j D_j  =  sum_{j=0..k} c_j theta_j

so a decay curve, sampled as w, is an average of checkpoints with the weights c, and the other way round.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Decay = Literal["linear", "sqrt", "cosine"]
CURVES: dict[Decay, Callable[[np.ndarray], np.ndarray]] = {  # of the share of the decay that is done
    "linear": lambda share: 1 - share,
    "sqrt": lambda share: 1 - np.sqrt(share),
    "cosine": lambda share: 0.5 * (1 + np.cos(math.pi * share)),
}
TOLERANCE = 1e-6  # of the sum of given weights


def update_weights(decay: Decay, tokens: Sequence[int]) -> np.ndarray:
    """float64 [k]: w_j, the share of the peak rate that a decay curve has for each D_j.

    The decay would have ended one mean gap after the last checkpoint, so the share of it that is done at checkpoint j
    is (t_j - t_0) / (t_k - t_0) * k / (k + 1): with equal gaps, j / (k + 1).

    Args:
      tokens: t_0 .. t_k, how many the run had seen at each checkpoint; exact integers.
    Raises:
      ValueError: for fewer than two, or numbers that do not ascend.
    """
    count = len(tokens)
    if count < 2:
        raise ValueError(f"{count} checkpoint(s) given: a merge needs two or more")
    if any(later <= earlier for earlier, later in zip(tokens, tokens[1:], strict=False)):
        raise ValueError(
            f"the tokens seen at the checkpoints, {', '.join(map(str, tokens))}, do not ascend, so no decay curve says "
            "how to weight them: give their weights by --weights"
        )
    span = (tokens[-1] - tokens[0]) * count
    return CURVES[decay](np.array([(t - tokens[0]) * (count - 1) / span for t in tokens[1:]]))


def checkpoint_weights(updates: np.ndarray) -> np.ndarray:
    """float64 [k + 1]: c of w [k]. c_k = w_k, c_j = w_j - w_{j+1}, c_0 = 1 - w_1; their sum is 1."""
    padded = np.concatenate([[1.0], updates, [0.0]])
    return padded[:-1] - padded[1:]


def weights_of_updates(checkpoints: np.ndarray) -> np.ndarray:
    """float64 [k]: w of c [k + 1]. w_j is the sum of c_i over i >= j."""
    return np.cumsum(checkpoints[::-1], dtype=np.float64)[::-1][1:]


def given_weights(text: str, count: int) -> np.ndarray:
    """float64 [count]: c as a user's JSON list gives it, oldest first.

    Raises:
      ValueError: for anything but a list of `count` finite numbers whose sum is 1 up to TOLERANCE.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--weights is not valid JSON: {error}; give a list such as [0.5, 0.25, 0.25]") from error
    numbers = isinstance(values, list) and all(type(v) in (int, float) and math.isfinite(v) for v in values)
    if not numbers or len(values) != count:
        found = f"{len(values)} entries" if isinstance(values, list) else f"a JSON {type(values).__name__}"
        raise ValueError(f"--weights has {found}: give a list of {count} numbers, one for each step, oldest first")
    if abs(math.fsum(values) - 1) > TOLERANCE:
        raise ValueError(
            f"the sum of --weights is {math.fsum(values):.9g}: it must be 1 (to {TOLERANCE:g}), or the weights of the "
            "model would grow or shrink"
        )
    return np.array(values, np.float64)


@dataclass(frozen=True)
class Lineage:
    """The checkpoints that a merged one is an average of.

    Attributes:
      run: the folder of their run.
      steps, tokens, weights: of each, oldest first; the weights are c.
      decay: the curve that gave the weights; None where a user gave them.
      chosen_by: the metric by which these were the best, which are averaged uniformly then.
    """

    run: str
    steps: tuple[int, ...]
    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    decay: str | None
    chosen_by: str | None = None

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Lineage":
        lists = {name: tuple(value[name]) for name in ("steps", "tokens", "weights")}
        return cls(run=value["run"], decay=value["decay"], chosen_by=value.get("chosen_by"), **lists)

    def render(self) -> str:
        """One line: the run, the curve or what chose the steps, and each step with its weight."""
        how = self.decay or ("given weights" if self.chosen_by is None else f"the best by {self.chosen_by}")
        each = ", ".join(f"{step} ({weight:.4g})" for step, weight in zip(self.steps, self.weights, strict=True))
        return f"{self.run}, {how}: steps {each}"
