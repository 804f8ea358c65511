"""Questions that tests ask of a run folder, and runs of several processes."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ling_jax.checkpoint import read_arrays, read_meta
from ling_jax.parallel.processes import EXPLICIT
from ling_jax.train.metrics import read_metrics
from tests.tiny_run import numbers, start, train_args


class NoCheckpoint:
    """The saver of a new run."""

    def start(self) -> None:
        return None


def mount_prefix(folder: Path, options: str) -> tuple[str, ...]:
    """A command prefix that runs the rest with a small tmpfs at `folder`, in a user namespace or as root."""
    script = f'mount -t tmpfs -o {options} tmpfs "{folder}" && exec "$@"'
    for flags in ("-Urm", "-m"):
        prefix = ("unshare", flags, "sh", "-c", script, "sh")
        if shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
            return prefix
    pytest.skip(
        "FULL DISK NOT TESTED: this needs a small tmpfs, and neither `unshare -Urm` (a user namespace) nor "
        "`unshare -m` (root) may mount one here; run on a Linux host or in a container with --privileged"
    )


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The folders that bear a step's number, ascending: each claims to be complete."""
    folders = (path for path in (run_dir / "checkpoints").glob("*") if path.name.isdigit())
    return sorted(folders, key=lambda path: int(path.name))


def latest_step(run_dir: Path) -> int:
    """After reading every checkpoint in full: one that is damaged fails the test."""
    for path in checkpoints_of(run_dir):
        arrays = read_arrays(path)
        assert int(arrays["step"]) == int(path.name) == read_meta(path)["data"]["next_step"]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(arrays["params"])), path
    return max((int(path.name) for path in checkpoints_of(run_dir)), default=0)


def lines_of(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def is_saving(run_dir: Path) -> bool:
    folder = run_dir / "checkpoints"
    return folder.exists() and any("tmp" in name for name in os.listdir(folder))


def kill_at(process: subprocess.Popen[str], run_dir: Path, moment: str, line: int, delay: float) -> None:
    """SIGKILL, `delay` seconds after the start, after line `line` of the metrics, or after a later save began."""
    begun = time.monotonic()
    reached = {
        "start": lambda: time.monotonic() > begun + 1.0,  # imports, data, restoring, compiling
        "line": lambda: lines_of(run_dir) >= line,  # the next step, a validation, a save
        "save": lambda: lines_of(run_dir) >= line and is_saving(run_dir),
    }[moment]
    while process.poll() is None and not reached():
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    _, log = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"it ended before its kill:\n{log}"


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start_process(monkeypatch, port: int, id_: int, args: list[str], count: int = 2) -> subprocess.Popen[str]:
    values = (f"localhost:{port}", str(count), str(id_))
    for name, value in zip(EXPLICIT, values, strict=True):
        monkeypatch.setenv(name, value)
    process = start("train.py", *args)
    for name in EXPLICIT:
        monkeypatch.delenv(name)
    return process


def start_two(monkeypatch, args: list[str]) -> list[subprocess.Popen[str]]:
    """Two processes of two devices each."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    port = free_port()
    return [start_process(monkeypatch, port, id_, args) for id_ in (0, 1)]


def wait_until(reached: Callable[[], bool], processes: list[subprocess.Popen[str]], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not reached() and time.monotonic() < end and all(process.poll() is None for process in processes):
        time.sleep(0.02)
    if not reached():
        for process in processes:
            process.kill()
        raise AssertionError("\n".join("".join(process.communicate()) for process in processes))


def bucket_args(local: Path, bucket: str, name: str, **changes: Any) -> list[str]:
    """As `train_args`, with text and runs in the bucket."""
    return train_args(
        local, name, **{"runs_dir": f"{bucket}/runs", "data__sources__0__path": f"{bucket}/text", **changes}
    )


def assert_same_run(copy: Path, whole: Path) -> None:
    """Logged numbers and arrays of two local folders."""
    assert numbers(read_metrics(copy)) == numbers(read_metrics(whole))
    jax.tree.map(np.testing.assert_array_equal, read_arrays(str(copy)), read_arrays(str(whole)))
