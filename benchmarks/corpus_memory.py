"""Memory of a whole run by the size of its text: python -m benchmarks.corpus_memory [--megabytes 20 200 2000]

Writes generated text, then runs train.py on it in a process of its own: open, tokenize, 20 steps, report. Peak memory
is RssAnon in /proc, asked for 20 times a second; what is mapped from files is not in it. A table comes first; the last
line is one JSON object. `--megabytes 20 200 --kinds jsonl` takes a few minutes, the default an hour and 8 GB of disk.
"""

import dataclasses
import gzip
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from ling_jax.cli import run_main
from ling_jax.config.text import columns

ROOT = Path(__file__).parents[1]
FILE_BYTES = 50_000_000  # of text in each file
POOL_BYTES = 8_000_000  # of sentences that documents are cut from
LOWEST, HIGHEST = 200, 5000  # bytes of a document


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    megabytes: tuple[int, ...] = (20, 200, 2000)
    """Sizes of the text, unpacked."""
    kinds: tuple[Literal["jsonl", "gz"], ...] = ("jsonl", "gz")
    """Plain or packed files."""
    steps: int = 20
    """Of training."""
    root: Path = ROOT
    """The checkout whose train.py runs, to compare two."""
    folder: Path = Path(tempfile.gettempdir())
    """Where text, runs and tokens go meanwhile; a disk."""


def documents(size: int, seed: int = 0) -> Iterator[str]:
    """Different texts of made-up words, together of `size` bytes."""
    draw = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / (rank + 10) for rank in range(len(words))]
    pool = " ".join(draw.choices(words, weights, k=POOL_BYTES // 6)).replace(" e", ".\ne")
    number = 0
    while size > 0:
        length = draw.randint(LOWEST, HIGHEST)
        begin = draw.randrange(len(pool) - length)
        text = f"{number}: {pool[begin : begin + length]}"
        yield text
        number, size = number + 1, size - len(text)


def write_corpus(folder: Path, size: int, kind: str) -> None:
    """JSONL files of about FILE_BYTES of text each."""
    folder.mkdir(parents=True)
    texts, number = documents(size), 0
    for text in texts:
        path = folder / f"{number:04}.jsonl{'.gz' * (kind == 'gz')}"
        with gzip.open(path, "wt", compresslevel=1) if kind == "gz" else path.open("w") as file:
            written = 0
            while True:
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text)
                if written >= FILE_BYTES or (text := next(texts, "")) == "":
                    break
        number += 1


def measured(command: Sequence[str], root: Path) -> dict[str, float]:
    """Peak RssAnon in MB, CPU seconds and wall seconds of a process that must end well."""
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *command], cwd=root, env=env | {"PYTHONPATH": str(root)})
    while True:
        try:
            found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        except OSError:
            found = None
        peak = max(peak, int(found[1]) if found else 0)
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"{' '.join(command)} ended with exit code {process.returncode}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"rss_anon_mb": peak / 1e3, "cpu_s": cpu, "wall_s": time.perf_counter() - started}


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(Command, args=list(argv), prog="python -m benchmarks.corpus_memory", description=__doc__)
    results: list[dict[str, Any]] = []
    for kind in command.kinds:
        for megabytes in command.megabytes:
            with tempfile.TemporaryDirectory(dir=command.folder) as folder:
                text = Path(folder, "text")
                write_corpus(text, megabytes * 1_000_000, kind)
                flags = {
                    "run": "run", "runs-dir": f"{folder}/runs", "data.sources.0.path": text,
                    "data.cache-dir": f"{folder}/cache", "train.steps": command.steps, "train.eval-every": 0,
                }  # fmt: skip
                words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
                figures = measured(["train.py", "ling_tiny", *words], command.root)
                kept = sum(path.stat().st_size for path in Path(folder, "cache").iterdir()) / 1e6
                results.append({"kind": kind, "megabytes": megabytes, **figures, "cache_mb": kept})
    table = [["files", "text MB", "peak RssAnon MB", "CPU s", "wall s", "cache MB"]]
    table += [
        [r["kind"], str(r["megabytes"]), *(f"{r[key]:.0f}" for key in ("rss_anon_mb", "cpu_s", "wall_s", "cache_mb"))]
        for r in results
    ]
    print(columns(table, numbers=True))
    print(json.dumps(results))


if __name__ == "__main__":
    run_main(main)
