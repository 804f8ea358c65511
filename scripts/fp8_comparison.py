"""Trains one model in float32, bfloat16, FP8 and with 8-bit AdamW: python -m scripts.fp8_comparison [--steps 2000].

Each run is an ordinary one of configs/fp8_comparison.py: what was stopped goes on where it was. Every variant is
compared with bfloat16 of the same seeds. The noise floor is what another seed changes: the mean difference between two
of bfloat16's. FP8 costs no more than it may if its mean gap in validation loss is at most 0.25% or, if greater, the
floor. Ends with a table (its last line is JSON) and a figure.
"""

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import tyro

from ling_jax.cli import run_main
from ling_jax.config.text import columns
from ling_jax.train.figures import loss_gap_figure
from ling_jax.train.metrics import read_metrics

ROOT = Path(__file__).parents[1]
REFERENCE = "bfloat16"


class Variant(NamedTuple):
    flags: tuple[str, ...]
    seeds: int


VARIANTS = {
    REFERENCE: Variant((), 5),
    "fp8": Variant(("--train.fp8",), 5),
    "8-bit-adamw": Variant(("--optimizer.eight-bit",), 3),
    "float32": Variant(("--train.dtype", "float32"), 1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    steps: int = 2000
    """Of each run."""
    runs_dir: Path = Path("runs/fp8_comparison")
    """Where the runs live."""
    figure: Path = Path("docs/fp8_comparison.png")
    """The PNG to draw."""
    settings: tuple[str, ...] = ()
    """More flags of train.py, for every run."""


def run_name(variant: str, seed: int) -> str:
    return f"{variant}-seed-{seed}"


def train(command: Command, variant: str, seed: int) -> None:
    words = [sys.executable, "train.py", "fp8_comparison", "--run", run_name(variant, seed)]
    words += ["--runs-dir", str(command.runs_dir.resolve()), "--train.steps", str(command.steps)]
    words += ["--train.seed", str(seed), *VARIANTS[variant].flags, *command.settings]
    subprocess.run(words, cwd=ROOT, check=True)


def losses(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Validation loss at the end, and means of the training loss: last tenth of the steps, and all of them."""
    trained = [record["train/loss"] for record in records if "train/loss" in record]
    validation = next(r["eval/nats_per_token"] for r in reversed(records) if "eval/nats_per_token" in r)
    return {
        "validation": validation,
        "training, last tenth": fmean(trained[-(len(trained) // 10) :]),
        "training": fmean(trained),
    }


def compare(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Relative gaps by run, to bfloat16 of the same seed (its other seeds: to its first); each variant's mean over its
    seeds, and that mean's standard error; and the noise floor."""
    found = {name: losses(records) for name, records in runs.items()}
    gaps = {}
    for variant, (_, seeds) in VARIANTS.items():
        for seed in range(seeds):
            base = found[run_name(REFERENCE, 0 if variant == REFERENCE else seed)]
            own = found[run_name(variant, seed)]
            gaps[run_name(variant, seed)] = {key: own[key] / base[key] - 1 for key in base}
        if variant != REFERENCE and seeds > 1:
            own = [gaps[run_name(variant, seed)] for seed in range(seeds)]
            gaps[f"{variant}, mean"] = {key: fmean(one[key] for one in own) for key in own[0]}
            errors = {key: stdev(one[key] for one in own) / len(own) ** 0.5 for key in own[0]}
            gaps[f"{variant}, standard error"] = errors
    base = [found[run_name(REFERENCE, seed)] for seed in range(VARIANTS[REFERENCE].seeds)]
    pairs = list(itertools.combinations(base, 2))
    gaps["two seeds"] = {key: fmean(abs(a[key] / b[key] - 1) for a, b in pairs) for key in base[0]}
    return gaps


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(Command, args=list(argv), prog="python -m scripts.fp8_comparison", description=__doc__)
    names = [(variant, seed) for variant, (_, seeds) in VARIANTS.items() for seed in range(seeds)]
    for variant, seed in names:
        train(command, variant, seed)
    runs = {run_name(*one): read_metrics(command.runs_dir / run_name(*one)) for one in names}
    gaps = compare(runs)
    keys = list(gaps[run_name(REFERENCE, 0)])
    rows = [("from bfloat16", *keys)]
    rows += [(name, *(f"{values[key]:+.3%}" for key in keys)) for name, values in gaps.items()]
    print(columns(rows, numbers=True))
    drawn = (run_name(REFERENCE, 0), run_name(REFERENCE, 1), "fp8-seed-0", "8-bit-adamw-seed-0", "float32-seed-0")
    loss_gap_figure({name: runs[name] for name in drawn}, run_name(REFERENCE, 0), command.figure)
    print(
        json.dumps({"steps": command.steps, "losses": {name: losses(one) for name, one in runs.items()}, "gaps": gaps})
    )


if __name__ == "__main__":
    run_main(main)
