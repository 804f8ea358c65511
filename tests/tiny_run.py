"""A run small enough for a test: its text, its flags, and the commands as a user types them."""

import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[1]
WORDS = "the model reads a short line of plain words and learns which word comes after another one in order".split()
STEPS = 60
SIZES = {
    "model.vocab-size": 320, "model.hidden-size": 32, "model.intermediate-size": 48, "model.num-hidden-layers": 2,
    "model.num-attention-heads": 2, "model.num-key-value-heads": 1, "model.head-dim": 16, "model.num-experts": 8,
    "model.num-experts-per-tok": 2, "model.n-group": 2, "model.topk-group": 1, "model.moe-intermediate-size": 16,
    "model.max-position-embeddings": 128, "data.sequence-length": 32, "data.global-batch-size": 4,
    "schedule.peak-lr": 0.005, "schedule.warmup-steps": 5, "schedule.decay-fraction": 0,
    "train.steps": STEPS, "train.eval-every": 20, "checkpoint.every": 20, "train.sample-tokens": 0,
}  # fmt: skip
# One layer and no MTP layer, where the model is not the subject: most of a tiny run's time is the compiler's.
ONE_LAYER = dict(model__num_hidden_layers=1, model__num_nextn_predict_layers=0)
DENSE = dict(**ONE_LAYER, model__first_k_dense_replace=1)
SPARSE = dict(**ONE_LAYER, model__first_k_dense_replace=0)
# Sizes from which every C++ kernel of a step shares its work between two threads: below them one thread does all, and
# nothing that two threads could do wrong would show. The thresholds: attention's products (4 x 128 x 128 x 2 x 16), an
# expert layer's (1,024 rows x 3 x 64 x 72), AdamW's elements (16 x 64 x 72), in native.cc and its headers.
SHARED = dict(
    model__hidden_size=64, model__moe_intermediate_size=72, model__num_experts=16, data__sequence_length=128,
)  # fmt: skip
# What two runs of the same numbers may differ in.
CLOCK_KEYS = {"train/tokens_per_second", "train/mfu", "train/data_wait_s", "mem/peak_bytes"}


def write_text(folder: Path) -> None:
    """Twenty files of seeded nonsense, of which one is held out."""
    draw = random.Random(0)
    folder.mkdir(parents=True)
    for file in range(20):
        lines = [" ".join(draw.choice(WORDS) for _ in range(8)) for _ in range(60)]
        (folder / f"{file}.txt").write_text("\n".join(lines) + "\n")


def train_args(folder: Path, run: str, **changes: Any) -> list[str]:
    """Arguments of `train.py` for `folder`/runs/`run`; `changes` are settings as `train__steps=3`."""
    if not (folder / "text").exists():
        write_text(folder / "text")
    places = {"runs-dir": folder / "runs", "data.cache-dir": folder / "cache", "data.sources.0.path": folder / "text"}
    settings = places | SIZES | {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return [
        "ling_tiny",
        "--run",
        run,
        *(text for name, value in settings.items() for text in (f"--{name}", str(value))),
    ]


def start(*command: Any, stdin: int | None = None) -> subprocess.Popen[str]:
    """Starts `python *command` in the repository."""
    pipe = subprocess.PIPE
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(words, cwd=REPO, env=dict(os.environ), stdin=stdin, stdout=pipe, stderr=pipe, text=True)


def run(*command: Any, code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of `python *command` in the repository, which must end with `code` and no traceback."""
    process = start(*command)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}, not {code}:\n{out}\n{err}"
    assert "Traceback" not in err, err
    return out, err


def numbers(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records without what depends on the clock or the machine's memory."""
    return [{key: value for key, value in record.items() if key not in CLOCK_KEYS} for record in records]
