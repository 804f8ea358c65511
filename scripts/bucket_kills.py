"""Kills training and conversions in a bucket: python -m scripts.bucket_kills [--scheme s3] [--seed 1]

SIGKILL at twenty random moments, some of them inside a save or a conversion, against a server on loopback (the packages
of requirements-test.txt). After each: every checkpoint that claims to be complete is read whole, none is lost, and no
half conversion is taken for one. In the end the run has the numbers and arrays of one that was left alone, the
conversions its bytes, and the bucket the same objects. Prints a line for each kill; exit code 1 if any of it fails.
"""

import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from ling_jax.checkpoint import find_checkpoint, read_arrays
from ling_jax.cli import run_main
from ling_jax.config.text import columns
from ling_jax.convert.transfer import AUDIT_FILE
from ling_jax.convert.weights import open_weights
from ling_jax.files.paths import at
from scripts.same_bits import ROOT, differences
from tests.support.buckets import (
    amazon_server,
    complete_steps,
    download,
    environment,
    get,
    google_server,
    make_bucket,
    names,
    saving_step,
    upload,
)  # fmt: skip
from tests.support.fault_proxy import FaultProxy, Faults
from tests.tiny_run import SPARSE, train_args

MOMENTS = ("start", "step", "save", "step", "save", "to-jax", "step", "save", "to-hf", "save")
DELAYS = {"start": 4.0, "step": 0.5, "save": 0.1, "to-jax": 0.2, "to-hf": 0.2}  # seconds after it, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    scheme: Literal["gs", "s3"] = "gs"
    kills: int = 20
    seed: int = 0
    """Of the moments."""


class Kills:
    """A run and two conversions in a bucket, at which processes die."""

    def __init__(self, bucket: str, folder: Path, seed: int):
        self.bucket, self.folder = bucket, folder
        self.run, self.draw = f"{bucket}/runs/killed", random.Random(seed)
        self.rows: list[tuple[str, ...]] = [("kill", "moment", "inside", "objects", "complete steps", "wrong")]
        self.failures: list[str] = []

    def train(self, name: str, steps: int) -> list[str]:
        places = {"runs_dir": f"{self.bucket}/runs", "data__sources__0__path": f"{self.bucket}/text"}
        more = dict(train__steps=steps, checkpoint__every=20, train__eval_every=0, model__num_nextn_predict_layers=0)
        return ["train.py", *train_args(self.folder, name, **places, **more, **SPARSE)]

    def convert(self, kind: str, killed: bool = True) -> list[str]:
        """A conversion of the weights in source/, which was exported from a run; to-hf reads what to-jax wrote."""
        place = "" if killed else "whole/"
        source = {"to-jax": "source", "to-hf": "whole/to-jax"}[kind]
        return ["convert.py", kind, "--source", f"{self.bucket}/{source}", "--target", f"{self.bucket}/{place}{kind}"]

    def do(self, command: list[str], code: int = 0) -> None:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        if done.returncode != code:
            raise ValueError(f"{' '.join(command[:2])} ended with {done.returncode}:\n{done.stderr}")

    def kill(self, number: int, moment: str, steps: int) -> None:
        """Starts what the moment is one of, waits for it, kills, and looks at what is there."""
        conversion = moment in ("to-jax", "to-hf")
        if conversion and self.converted(moment):  # the last kill came too late
            at(f"{self.bucket}/{moment}").rmtree()
        before = max(complete_steps(self.run), default=0)
        there = set(names(f"{self.bucket}/{moment}"))
        command = self.convert(moment) if conversion else self.train("killed", steps)
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not self._reached(moment, before, there):
            time.sleep(0.01)
        time.sleep(self.draw.uniform(0, DELAYS[moment]))
        process.kill()
        _, told = process.communicate()
        if process.returncode >= 0:
            raise ValueError(f"{' '.join(command[:2])} ended with {process.returncode} before kill {number}:\n{told}")
        inside = "conversion" if conversion and not self.converted(moment) else ""
        if not conversion and saving_step(self.run) is not None:
            inside = "save"
        wrong = self._wrong(before, moment if conversion else "")
        complete = " ".join(map(str, complete_steps(self.run)))
        self.rows.append((str(number), moment, inside, str(len(names(self.bucket))), complete, "; ".join(wrong)))
        self.failures += wrong

    def _reached(self, moment: str, before: int, there: set[str]) -> bool:
        if moment == "start":
            return True
        if moment == "step":
            return max(complete_steps(self.run), default=0) > before
        if moment == "save":
            return (saving_step(self.run) or 0) > before
        return bool(set(names(f"{self.bucket}/{moment}")) - there)

    def converted(self, kind: str) -> bool:
        """Whether a conversion is whole, though its process may have been killed."""
        last = {"to-jax": "commit_success.txt", "to-hf": "config.json"}[kind]
        return last in names(f"{self.bucket}/{kind}")

    def _wrong(self, before: int, conversion: str) -> list[str]:
        """Lists what a kill has broken."""
        wrong, steps = [], complete_steps(self.run)
        if max(steps, default=0) < before:
            wrong.append(f"step {before} is lost")
        with tempfile.TemporaryDirectory() as scratch:
            copy = download(self.run, Path(scratch))
            for step in steps:
                try:
                    found = int(read_arrays(str(copy / "checkpoints" / str(step)))["step"])
                    wrong += [f"step {step} holds {found}"] * (found != step)
                except ValueError as error:
                    wrong.append(str(error))
        if steps and find_checkpoint(self.run).name != str(steps[-1]):
            wrong.append(f"{find_checkpoint(self.run)} is taken for the last step")
        if conversion and not self.converted(conversion):
            try:
                open_weights(f"{self.bucket}/{conversion}")
                wrong.append(f"a half {conversion} is taken for whole")
            except ValueError:
                pass
        return wrong

    def compare(self) -> list[str]:
        """How what was killed differs from what was left alone."""
        copies = [download(f"{self.bucket}/runs/{name}", self.folder / name) for name in ("whole", "killed")]
        found = differences(*copies)
        for whole, killed in (("runs/whole", "runs/killed"), ("whole/to-jax", "to-jax"), ("whole/to-hf", "to-hf")):
            ours, theirs = (
                {name for name in names(f"{self.bucket}/{place}") if not name.startswith("tensorboard/")}
                for place in (whole, killed)
            )
            found += [f"{killed}/{name} is left over" for name in sorted(theirs - ours)]
            found += [f"{killed}/{name} is missing" for name in sorted(ours - theirs)]
        found += [f"{name} is left over" for name in names(self.bucket) if ".partial" in name]
        for name in names(f"{self.bucket}/whole"):
            whole, killed = (get(f"{self.bucket}/{place}{name}") for place in ("whole/", ""))
            if name.endswith(AUDIT_FILE):  # it tells its target, and how long it took
                whole, killed = (json.loads(text)["tensors"] for text in (whole, killed))
            found += [f"{name} differs"] * (whole != killed)
        return found


def main(argv: Sequence[str]) -> int:
    command = tyro.cli(Command, args=list(argv), prog="python -m scripts.bucket_kills", description=__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = google_server(folder / "objects") if command.scheme == "gs" else amazon_server()
        with server as url, FaultProxy(url).running() as proxy:
            os.environ |= environment(command.scheme, proxy.address)
            return kill_all(command, folder, proxy)


def kill_all(command: Command, folder: Path, proxy: FaultProxy) -> int:
    kills = Kills(make_bucket(command.scheme), folder, command.seed)
    kills.train("text", 0)  # writes the text
    upload(folder / "text", f"{kills.bucket}/text")
    kills.do(kills.train("source", 5))
    source = f"{kills.bucket}/runs/source"
    kills.do(["convert.py", "to-hf", "--source", source, "--target", f"{kills.bucket}/source"])
    for kind in ("to-jax", "to-hf"):
        kills.do(kills.convert(kind, killed=False))

    proxy.faults = Faults(delayed=1.0, seconds=0.01)  # so saves and conversions last long enough to be hit
    steps = 200 * command.kills
    moments = [MOMENTS[i % len(MOMENTS)] for i in range(command.kills)]
    for number, moment in enumerate(moments, start=1):
        kills.kill(number, moment, steps)
    proxy.faults = Faults()

    last = max(complete_steps(kills.run)) + 20
    for name in ("killed", "whole"):
        kills.do(kills.train(name, last))
    for kind in ("to-jax", "to-hf"):
        # One that was whole when its process was killed is refused; the refusal removes what was left beside it.
        kills.do(kills.convert(kind), 2 * kills.converted(kind))
    print(columns(kills.rows))
    found = kills.failures + kills.compare()
    inside = [row[2] for row in kills.rows[1:]]
    print(
        f"{len(inside)} kills, {inside.count('save')} inside a save, {inside.count('conversion')} inside a conversion"
    )
    if command.kills >= len(MOMENTS) and (inside.count("save") < 5 or inside.count("conversion") < 2):
        found.append("too few kills were inside a save or a conversion: another --seed")
    print("\n".join(found) or "nothing is lost, left over or taken for whole; numbers, arrays and bytes are equal")
    return int(bool(found))


if __name__ == "__main__":
    run_main(main)
