"""A folder has one writer at a time, whatever ends it, with the kernel's locks and with leases in their place."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from ling_jax.checkpoint import read_arrays
from ling_jax.files import one_writer
from ling_jax.files.one_writer import HOLDER, OneWriter
from ling_jax.train.metrics import read_metrics
from tests.support.commands import call
from tests.support.marks import nightly
from tests.tiny_run import REPO, SPARSE, numbers, train_args

# Holds argv[1] until a line comes; with "lease", as where there are no locks, in seconds that a test has.
HOLD = """
import sys
from etils import epath
from ling_jax.files import one_writer
one_writer.BEAT_SECONDS, one_writer.STALE_SECONDS, one_writer.SETTLE_SECONDS = 0.2, 2.0, 0.3
if sys.argv[2] == "lease":
    one_writer.LOCAL.clear()
if sys.argv[2] == "elsewhere":  # a lease, and as if from another host: nobody can ask whether its process lives
    one_writer.LOCAL.clear()
    one_writer._boot = lambda: ""
try:
    with one_writer.OneWriter(epath.Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
except ValueError as error:
    print(error, flush=True)
    raise SystemExit(2)
"""


def hold(folder: Path, kind: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLD, str(folder), kind]
    return subprocess.Popen(
        command, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)}, stdin=pipe, stdout=pipe, text=True
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def let_go(process: subprocess.Popen[str]) -> int:
    process.communicate("\n", timeout=30)
    return process.returncode


@pytest.mark.parametrize("kind", ["lock", "lease", nightly("elsewhere")])
def test_a_second_writer_is_refused_and_told_who_the_first_is_until_it_has_ended(tmp_path, kind):
    first = hold(tmp_path / "run", kind)
    assert said(first) == "held\n"
    second = hold(tmp_path / "run", kind)
    assert f"{tmp_path / 'run'} is in use: process {first.pid} on " in said(second) and let_go(second) == 2
    assert let_go(first) == 0
    assert os.listdir(tmp_path / "run") == []  # nothing is left of it
    third = hold(tmp_path / "run", kind)
    assert said(third) == "held\n" and let_go(third) == 0


@pytest.mark.parametrize("kind", ["lock", "lease", nightly("elsewhere")])
def test_a_killed_writer_blocks_nobody(tmp_path, kind):
    first = hold(tmp_path / "run", kind)
    assert said(first) == "held\n"
    first.kill()
    first.wait()
    assert HOLDER in os.listdir(tmp_path / "run")
    begun = time.monotonic()
    second = hold(tmp_path / "run", kind)
    assert said(second) == "held\n" and let_go(second) == 0
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("kind", ["lease", nightly("lock"), nightly("elsewhere")])
def test_of_many_at_once_one_holds(tmp_path, kind):
    processes = [hold(tmp_path / "run", kind) for _ in range(4)]
    answers = [said(process) for process in processes]
    assert answers.count("held\n") == 1, answers
    assert sorted(let_go(process) for process in processes) == [0, 2, 2, 2]


def test_a_writer_that_was_taken_for_dead_ends_before_it_writes_more(tmp_path):
    """A laptop's lid, a paused virtual machine: its lease went to another one meanwhile."""
    first = hold(tmp_path / "run", "elsewhere")
    assert said(first) == "held\n"
    first.send_signal(signal.SIGSTOP)
    second = hold(tmp_path / "run", "elsewhere")
    assert said(second) == "held\n"
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=10) == 1
    assert let_go(second) == 0


def test_a_folder_that_is_moved_while_it_is_held_is_let_go_at_its_new_place(tmp_path):
    for locks in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(one_writer, "_locks", lambda path, locks=locks: locks)
            patch.setattr(one_writer, "SETTLE_SECONDS", 0.0)
            with OneWriter(epath.Path(tmp_path / "run")) as writer:
                writer.move(epath.Path(tmp_path / "aside"))
            assert os.listdir(tmp_path / "aside") == [] and not (tmp_path / "run").exists()
            (tmp_path / "aside").rmdir()


def test_a_second_one_may_wait(tmp_path):
    first = hold(tmp_path, "lock")
    assert said(first) == "held\n"
    threading.Timer(1.0, lambda: let_go(first)).start()
    begun = time.monotonic()
    with OneWriter(epath.Path(tmp_path), wait=True):
        assert time.monotonic() - begun > 0.5


def test_network_file_systems_are_not_trusted_with_locks(tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "a / ext4 rw 0 0\nb /home nfs4 rw 0 0\nc /home/local\\040disk xfs rw 0 0\nd /lustre lustre rw 0 0\n"
    )
    real = open
    monkeypatch.setattr("builtins.open", lambda path, *a: real(mounts if path == "/proc/mounts" else path, *a))
    answers = {
        path: one_writer._locks(path) for path in ("/work", "/home/a", "/home/local disk/a", "/lustre/x", "/homes")
    }
    assert list(answers.values()) == [True, False, True, False, True], answers


# Runs: processes that import once and fork, each then a `train.py` of its own.

PAIRS = """
import contextlib, io, json, os, random, signal, sys, time
import train
from ling_jax import runner
from ling_jax.cli import run_main

runner._sample = runner._report = lambda *args, **more: None  # half of the time, and no part of this
folder, args = sys.argv[1], json.loads(sys.argv[2])

def start(name, delay=0.0):
    child = os.fork()
    if child:
        return child
    with open(f"{folder}/{name}.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    time.sleep(delay)
    sys.argv = ["train.py", *args, "--run", name.partition("-")[0]]
    try:
        run_main(train.main)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code)

def steps(name):
    with contextlib.suppress(OSError):
        return open(f"{folder}/runs/{name}/metrics.jsonl", "rb").read().count(b"\\n")
    return 0

draw, codes = random.Random(0), {}
for pair in range(int(sys.argv[3])):
    name = f"run{pair}"
    children = [start(f"{name}-{i}", delay) for i, delay in enumerate((0.0, draw.uniform(0, 3)))]
    ended = {}
    while len(ended) < 2:
        child, status = os.wait()
        ended[child] = os.waitstatus_to_exitcode(status)
        if pair % 5 == 1 and len(ended) == 1:  # the second was refused: the holder is killed, and a third goes on
            while steps(name) < 60:
                time.sleep(0.01)
            [holder] = set(children) - set(ended)
            os.kill(holder, signal.SIGKILL)
    codes[name] = [ended[child] for child in children]
    if pair % 5 == 1:
        codes[name].append(os.waitstatus_to_exitcode(os.waitpid(start(f"{name}-2"), 0)[1]))
print(json.dumps(codes))
"""


@pytest.mark.parametrize("pairs", [2, nightly(20)])
def test_of_each_pair_one_trains_as_if_it_were_alone(tmp_path, pairs):
    often = dict(**SPARSE, train__eval_every=0, train__steps=120, checkpoint__every=40)
    args = train_args(tmp_path, "whole", **often)
    call("train.py", *args)
    whole = tmp_path / "runs" / "whole"
    rest = [word for word in args if word not in ("--run", "whole")]
    command = [sys.executable, "-c", PAIRS, str(tmp_path), json.dumps(rest), str(pairs)]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    logs = {file.stem: file.read_text() for file in tmp_path.glob("run*.log")}
    assert len(codes) == pairs and sum(2 in ends for ends in codes.values()) > pairs // 2, codes
    for name, ends in codes.items():
        trained = [logs[f"{name}-{i}"] for i, end in enumerate(ends) if end != 2]
        refused = [logs[f"{name}-{i}"] for i, end in enumerate(ends) if end == 2]
        if refused:  # else the first had ended when the second began
            assert sorted(ends) == ([-9, 0, 2] if len(ends) == 3 else [0, 2]), (ends, trained, refused)
        if len(ends) == 2:  # the third goes on from whatever was saved before the kill
            assert sum("training from step 0" in log for log in trained) == 1
        assert all("is in use: process" in log and len(log.splitlines()) == 1 for log in refused), refused
        assert numbers(read_metrics(tmp_path / "runs" / name)) == numbers(read_metrics(whole)), name
        assert sorted(os.listdir(tmp_path / "runs" / name / "checkpoints")) == ["120", "80"]
        jax.tree.map(np.testing.assert_array_equal, read_arrays(tmp_path / "runs" / name), read_arrays(whole))


def test_a_run_that_is_alive_is_neither_moved_aside_nor_touched(tmp_path):
    args = train_args(tmp_path, "run", **SPARSE, train__steps=3, train__eval_every=0)
    call("train.py", *args)
    folder = tmp_path / "runs" / "run"
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    with OneWriter(epath.Path(folder)):
        for flags in ((), ("--fresh", "--move-aside"), ("--from-step", 3)):
            _, log = call("train.py", *args, *flags, code=2)
            assert f"error: {folder} is in use: process {os.getpid()} on " in log, log
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
