"""Whether equal commands give equal bits: python -m scripts.same_bits [--steps 200] [--kinds float32 eight_bit]

Trains the same run several times, unbroken and with SIGKILLs at random moments, and compares every logged number that
is not a clock's and every array of the last checkpoint. Prints a line for each kind of run; exit code 1 if any differ.
"""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from flax.traverse_util import flatten_dict

from ling_jax.checkpoint import read_arrays
from ling_jax.cli import run_main
from ling_jax.train.metrics import METRICS_FILE, read_metrics

ROOT = Path(__file__).parents[1]
KINDS = {
    "float32": [],
    "bfloat16": ["--train.dtype", "bfloat16"],
    "bf16_parameters": ["--train.dtype", "bfloat16", "--train.param-dtype", "bfloat16"],
    "eight_bit": ["--optimizer.eight-bit"],
}
CLOCK_KEYS = {"train/tokens_per_second", "train/mfu", "train/data_wait_s", "mem/peak_bytes"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    kinds: tuple[str, ...] = tuple(KINDS)
    """Of runs: float32, bfloat16, bf16_parameters, eight_bit (AdamW's moments)."""
    config: str = "ling_tiny"
    steps: int = 200
    whole: int = 3
    """Unbroken runs."""
    kills: int = 5
    """SIGKILLs of one more run."""
    seed: int = 0
    """Of the moments of the kills."""


def train(folder: Path, name: str, args: Sequence[str], kill_after: Sequence[int] = ()) -> None:
    """Runs `train.py` to its end, first killed after each of some steps."""
    command = [sys.executable, "train.py", *args, "--runs-dir", str(folder), "--run", name]
    for step in kill_after:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        metrics = folder / name / METRICS_FILE
        while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < step):
            time.sleep(0.002)
        process.kill()
        _, said = process.communicate()
        if process.returncode != -signal.SIGKILL:
            raise ValueError(f"{name} ended before its kill after step {step}:\n{said}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{name} ended with {done.returncode}:\n{done.stderr}")


def differences(a: Path, b: Path) -> list[str]:
    """The first step whose metrics differ in two runs, and the arrays that do in their last checkpoints."""
    found = []
    records = [
        [{key: value for key, value in record.items() if key not in CLOCK_KEYS} for record in read_metrics(run)]
        for run in (a, b)
    ]
    if len(records[0]) != len(records[1]):
        found.append(f"{len(records[0])} and {len(records[1])} steps")
    found += [f"step {x['step']}" for x, y in zip(*records, strict=False) if x != y][:1]
    arrays: list[dict[tuple[str, ...], Any]] = [flatten_dict(read_arrays(run)) for run in (a, b)]
    found += ["/".join(p) for p, x in arrays[0].items() if not np.array_equal(_bits(x), _bits(arrays[1][p]))]
    return found


def _bits(array: Any) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def compare(folder: Path, args: Sequence[str], steps: int, whole: int, kills: int, seed: int = 0) -> dict[str, list]:
    """`differences` of each run from the first."""
    args = [*args, "--train.steps", str(steps)]
    names = [f"whole{i}" for i in range(whole)] + ["killed"] * bool(kills)
    moments = sorted(random.Random(seed).sample(range(2, steps - 1), kills))
    for name in names:
        train(folder, name, args, moments if name == "killed" else ())
    return {name: differences(folder / names[0], folder / name) for name in names[1:]}


def main(argv: Sequence[str]) -> int:
    command = tyro.cli(Command, args=list(argv), prog="python -m scripts.same_bits", description=__doc__)
    print(f"Python {sys.version.split()[0]}, jax {jax.__version__}, {len(os.sched_getaffinity(0))} cores")
    differ = False
    for kind in command.kinds:
        every = max(command.steps // 20, 1)
        args = [command.config, *KINDS[kind], "--checkpoint.every", str(every), "--train.eval-every", "0"]
        with tempfile.TemporaryDirectory() as folder:
            begun = time.monotonic()
            found = compare(Path(folder), args, command.steps, command.whole, command.kills, command.seed)
        bad = {name: what[:4] for name, what in found.items() if what}
        differ |= bool(bad)
        runs = f"{command.whole} unbroken and one with {command.kills} SIGKILLs, {command.steps} steps"
        print(f"{kind}: {runs}: {bad or 'equal bits'} ({time.monotonic() - begun:.0f} s)", flush=True)
    return int(differ)


if __name__ == "__main__":
    run_main(main)
