"""Trains ling_tiny with parameters in float32 and in bfloat16: python -m scripts.bf16_parameters [--steps 1000].

And with bfloat16 parameters rounded to the nearest, which no setting does: what stochastic rounding is for. The peak
rate is the Ling 2.0 report's, at which an update is a small part of a weight's last place; at ling_tiny's own, ten
times that, nothing separates them. Every variant of a seed sees the same batches. Each run is an ordinary one: what was
stopped goes on where it was. Flags that are not listed here are train.py's, for every run. Prints a table, whose last
line is JSON.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import tyro
from flax.traverse_util import flatten_dict

from ling_jax.checkpoint import read_arrays
from ling_jax.cli import parse_train, run_main
from ling_jax.config.text import columns
from ling_jax.runner import run_training
from ling_jax.train import rounding
from ling_jax.train.metrics import read_metrics

IN_BF16 = ("--train.param-dtype", "bfloat16")
NEAREST = "bfloat16, to the nearest"
VARIANTS = {"float32": (), "bfloat16": IN_BF16, NEAREST: IN_BF16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    steps: int = 1000
    """Of each run."""
    seeds: int = 3
    """Of each variant."""
    runs_dir: Path = Path("runs/bf16_parameters")
    """Where the runs live."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    validation: float  # loss at the end, nats per token
    norms: str  # dtype of the norms' weights
    still: float  # share of them that is still exactly 1


@contextlib.contextmanager
def rounded_to_nearest() -> Iterator[None]:
    """Inside, bfloat16 parameters are rounded as every other cast rounds."""
    with mock.patch.object(rounding, "to_bfloat16", lambda x, bits: x.astype(jnp.bfloat16)):
        yield


def train(command: Command, settings: Sequence[str], variant: str, seed: int) -> Outcome:
    run = f"{variant.replace(', ', '-').replace(' ', '-')}-seed-{seed}"
    words = ["ling_tiny", "--run", run, "--runs-dir", str(command.runs_dir), "--train.steps", str(command.steps)]
    words += ["--schedule.peak-lr", "3.36e-4", "--train.seed", str(seed), *VARIANTS[variant], *settings]
    with rounded_to_nearest() if variant == NEAREST else contextlib.nullcontext():
        code = run_training(*parse_train(words))
    records = read_metrics(command.runs_dir / run)
    if code or records[-1]["step"] < command.steps:
        raise ValueError(f"{run} stopped at step {records[-1]['step']}: the same command goes on there")
    params: dict[Any, Any] = flatten_dict(read_arrays(str(command.runs_dir / run))["params"])
    norms = [value for path, value in params.items() if "norm" in path[-2]]
    weights = np.concatenate([np.asarray(value, np.float32).reshape(-1) for value in norms])
    dtypes = ", ".join(sorted({str(value.dtype) for value in norms}))
    return Outcome(records[-1]["eval/nats_per_token"], dtypes, float((weights == 1).mean()))


def main(argv: Sequence[str]) -> None:
    prog = "python -m scripts.bf16_parameters"
    command, settings = tyro.cli(Command, args=list(argv), prog=prog, description=__doc__, return_unknown_args=True)
    found = {v: [train(command, settings, v, seed) for seed in range(command.seeds)] for v in VARIANTS}
    means = {variant: fmean(one.validation for one in outcomes) for variant, outcomes in found.items()}
    rows = [("parameters", *(f"seed {i}" for i in range(command.seeds)), "mean", "from float32", "norms", "still 1")]
    for variant, outcomes in found.items():
        losses = [f"{one.validation:.4f}" for one in outcomes]
        gap = means[variant] / means["float32"] - 1
        last = outcomes[-1]
        rows.append((variant, *losses, f"{means[variant]:.4f}", f"{gap:+.2%}", last.norms, f"{last.still:.1%}"))
    print(columns(rows, numbers=True))
    figures = {variant: [dataclasses.asdict(one) for one in outcomes] for variant, outcomes in found.items()}
    print(json.dumps({"steps": command.steps, "outcomes": figures}))


if __name__ == "__main__":
    run_main(main)
