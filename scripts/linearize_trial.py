"""How much a model loses when most of its attention becomes linear: python -m scripts.linearize_trial --source RUN

Makes the source linear, trains the new parts for some steps and then everything; beside it the source goes on for as
many steps, and the linear model begins from random weights. What is there of a run is not run again. Prints a table of
validation losses and draws the three runs; some 15 minutes on two free cores.
"""

import logging
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import tyro

from ling_jax.config.text import columns
from ling_jax.train.figures import validation_figure
from ling_jax.train.metrics import read_metrics

EVAL = "eval/nats_per_token"
NEW = ("layers.linear_*.attention.query_key_value", "layers.linear_*.attention.*_layernorm")


def train(run: str, folder: Path, flags: str) -> list[dict[str, Any]]:
    """Trains, or goes on with, a run of `ling_tiny` in `folder`; its records."""
    command = f"train.py ling_tiny --run {run} --runs-dir {folder} --data.seed 1 --checkpoint.every 100 {flags}"
    logging.info("python %s", command)
    subprocess.run([sys.executable, *shlex.split(command)], check=True)
    return read_metrics(folder / run)


def losses(records: list[dict[str, Any]]) -> dict[int, float]:
    """The validation loss by step."""
    return {record["step"]: record[EVAL] for record in records if EVAL in record}


def main(
    source: Path,
    folder: Path = Path("runs/linearize"),
    layer_group_size: int = 4,
    warmup_steps: int = 100,
    steps: int = 200,
    peak_lr: float = 1e-3,
    figure: Path | None = None,
) -> None:
    """Runs the three, tells and draws them.

    Args:
      source: a finished run of ling_tiny.
      folder: of the runs that are made.
      warmup_steps: of the linear layers' queries, keys, values and their norms alone.
      steps: of everything, after them.
      peak_lr: of the runs that begin with trained weights; the one that does not has ling_tiny's.
      figure: where to draw it.
    """
    linear = folder / "linear_weights"
    if not linear.exists():
        command = ["convert.py", "linearize", "--source", str(source), "--target", str(linear)]
        subprocess.run([sys.executable, *command, "--layer-group-size", str(layer_group_size)], check=True)
    hybrid = f"--model.layer-group-size {layer_group_size} --model.group-norm-size 2"
    total, rest = warmup_steps + steps, "--schedule.decay linear --schedule.decay-fraction 0.6 --train.eval-every 50"
    trained = f"--schedule.peak-lr {peak_lr} --schedule.warmup-steps 10 {rest} --train.steps {total}"
    only = f"--train.only {shlex.join(NEW)} --train.steps {warmup_steps} --schedule.decay-fraction 0"
    train("linear", folder, f"{hybrid} --init-from {linear} {trained} {only}")
    runs = {
        "made linear": train("linear", folder, f"{hybrid} --init-from {linear} {trained}"),
        "source, trained on": train("source", folder, f"--init-from {source} {trained}"),
        "linear, from random weights": train("random", folder, f"{hybrid} {rest} --train.steps {total}"),
    }
    before = list(losses(read_metrics(source)).values())[-1]
    rows = [("run", "step", "validation loss", "over the source's")]
    rows.append(("source, as it was", "0", f"{before:.4f}", f"{0:+.4f}"))
    for name, records in runs.items():
        found = losses(records)
        rows += [
            (name, str(step), f"{found[step]:.4f}", f"{found[step] - before:+.4f}")
            for step in sorted({warmup_steps, total} & found.keys())
        ]
    print(columns(rows))
    if figure is not None:
        validation_figure(runs, before, figure)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tyro.cli(main)
