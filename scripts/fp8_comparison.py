"""Trains one model in float32, bfloat16, FP8 and with 8-bit AdamW: python -m scripts.fp8_comparison [--steps 2000].

Each run is an ordinary one of configs/fp8_comparison.py: what was stopped goes on where it was. A second seed in
bfloat16 shows how much a difference means. Ends with a table (its last line is JSON) and a figure.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from ling_jax.cli import run_main
from ling_jax.config.text import columns
from ling_jax.train.figures import loss_gap_figure
from ling_jax.train.metrics import read_metrics

ROOT = Path(__file__).parents[1]
REFERENCE, SEED = "bfloat16", "bfloat16-seed-1"
VARIANTS: dict[str, list[str]] = {
    REFERENCE: [],
    SEED: ["--train.seed", "1"],
    "float32": ["--train.dtype", "float32"],
    "fp8": ["--train.fp8"],
    "8-bit-adamw": ["--optimizer.eight-bit"],
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


def train(command: Command, name: str) -> None:
    words = [sys.executable, "train.py", "fp8_comparison", "--run", name, "--runs-dir", str(command.runs_dir.resolve())]
    words += ["--train.steps", str(command.steps), *VARIANTS[name], *command.settings]
    subprocess.run(words, cwd=ROOT, check=True)


def last(records: Sequence[Mapping[str, Any]], key: str) -> float:
    return next(record[key] for record in reversed(records) if key in record)


def compare(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """By run: validation loss at the end, its gap to bfloat16's, and the mean gap of the training losses of the last
    tenth of the steps."""
    tail = len(runs[REFERENCE]) // 10

    def trained(name: str) -> float:
        return sum(record["train/loss"] for record in runs[name][-tail:]) / tail

    reference = last(runs[REFERENCE], "eval/nats_per_token")
    return {
        name: {
            "nats_per_token": last(records, "eval/nats_per_token"),
            "gap": last(records, "eval/nats_per_token") / reference - 1,
            "training_gap": trained(name) / trained(REFERENCE) - 1,
        }
        for name, records in runs.items()
    }


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(Command, args=list(argv), prog="python -m scripts.fp8_comparison", description=__doc__)
    for name in VARIANTS:
        train(command, name)
    runs = {name: read_metrics(command.runs_dir / name) for name in VARIANTS}
    found = compare(runs)
    rows = [("run", "validation, nats a token", "from bfloat16", "training, from bfloat16")]
    rows += [
        (name, f"{v['nats_per_token']:.4f}", f"{v['gap']:+.3%}", f"{v['training_gap']:+.3%}")
        for name, v in found.items()
    ]
    print(columns(rows, numbers=True))
    loss_gap_figure(runs, REFERENCE, command.figure)
    print(json.dumps({"steps": command.steps, **found}))


if __name__ == "__main__":
    run_main(main)
