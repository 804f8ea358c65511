"""Whatever ends a run (SIGKILL, a full disk, lost numbers), its last checkpoint is whole and the run can go on."""

import json
import os
import random
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from ling_jax.checkpoint import read_arrays
from ling_jax.train.metrics import read_metrics
from scripts.same_bits import KINDS, compare
from tests.support.commands import call
from tests.support.marks import nightly
from tests.support.runs import is_saving, kill_at, latest_step, lines_of, mount_prefix
from tests.tiny_run import REPO, SHARED, SPARSE, STEPS, numbers, run, start, train_args

# Most moments are in or near a save or a validation. At sizes that one thread does alone, kills could not show that two
# threads give other bits.
OFTEN = dict(**SPARSE, **SHARED, train__eval_every=3, checkpoint__every=4)


@pytest.mark.parametrize("kills", [nightly(2), nightly(10)])
def test_after_some_sigkills_a_run_ends_with_the_numbers_of_one_that_was_left_alone(tmp_path, kills):
    """Until so many have come, and one of them inside a save."""
    draw = random.Random(0)
    killed, whole = tmp_path / "runs" / "killed", tmp_path / "runs" / "whole"
    run("train.py", *train_args(tmp_path, "whole", **OFTEN))
    step, ends = 0, []
    for moment in ("save", "line", "start", "save", "line", "start", "save", "line", "save", "line"):
        process = start("train.py", *train_args(tmp_path, "killed", **OFTEN))
        longest = {"start": 3.0, "line": 0.1, "save": 0.05}[moment]
        kill_at(process, killed, moment, step + draw.randint(6, 11), draw.uniform(0, longest))
        before, step = step, latest_step(killed)
        assert step >= before, f"the kill lost step {before}"
        ends.append(f"{moment} {lines_of(killed)}/{step}{' saving' * is_saving(killed)}")
        if len(ends) >= kills and any("saving" in end for end in ends):
            break
    print("killed at (moment, lines / checkpoint):", ", ".join(ends))
    assert 0 < step < STEPS and any("saving" in end for end in ends)
    _, log = run("train.py", *train_args(tmp_path, "killed", **OFTEN))
    assert f"resuming from step {step}" in log
    assert numbers(read_metrics(killed)) == numbers(read_metrics(whole))
    assert sum("eval/bits_per_byte" in record for record in read_metrics(killed)) == STEPS // 3
    assert latest_step(killed) == latest_step(whole) == STEPS
    jax.tree.map(np.testing.assert_array_equal, read_arrays(killed), read_arrays(whole))


@pytest.mark.parametrize(
    ("kind", "whole"),
    [("bfloat16", 1), *(nightly(k, 2) for k in ("float32", "bfloat16"))],
)
def test_equal_commands_give_equal_bits_killed_or_not(tmp_path, kind, whole):
    """As `python -m scripts.same_bits`, shorter, and smaller but for what two threads share. Most moments are in a
    save."""
    args = train_args(tmp_path, "", **SPARSE, **SHARED, train__eval_every=0, checkpoint__every=2)
    del args[1:3]  # the run's name
    found = compare(tmp_path / "runs", [*args, *KINDS[kind]], steps=30, whole=whole, kills=1)
    assert found == {name: [] for name in ("whole1", "killed")[2 - whole :]}


# Runs on a small disk at argv[1], with argv[2] bytes and argv[3] files left: trains until it is full, looks, makes
# room, and trains on.
FULL_DISK = """
import json, os, subprocess, sys
from pathlib import Path
from ling_jax.checkpoint import read_arrays

disk, room, files, command = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
free = os.statvfs(disk)
fillers = [disk / f"filler{i}" for i in range(max(1, free.f_ffree - files))]
for filler in fillers:
    filler.touch()
with fillers[0].open("wb") as file:
    os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - room)

done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
folder = disk / "run" / "checkpoints"
names = sorted(os.listdir(folder))
steps = [int(read_arrays(folder / name)["step"]) for name in names if name.isdigit()]  # leftovers have other names
for filler in fillers:
    filler.unlink()
again = subprocess.run([sys.executable, *command], capture_output=True, text=True)
last = sorted(os.listdir(folder))
print(json.dumps([names, steps, done.returncode, done.stderr, again.returncode, again.stderr, last]))
"""


@pytest.mark.nightly
@pytest.mark.parametrize(("room", "files"), [(3 << 20, 9000), (64 << 20, 600)], ids=["bytes", "files"])
def test_a_full_disk_ends_a_run_with_one_error_and_its_last_checkpoint_intact(tmp_path, room, files):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["train.py", *train_args(tmp_path, "run", runs_dir=disk, train__eval_every=0)]
    script = [sys.executable, "-c", FULL_DISK, str(disk), str(room), str(files), *command]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    prefix = mount_prefix(disk, "size=80m,nr_inodes=10000")
    out = subprocess.run([*prefix, *script], cwd=REPO, env=env, capture_output=True, text=True, timeout=200)
    assert out.returncode == 0, out.stdout + out.stderr
    names, steps, code, log, code_again, log_again, last = json.loads(out.stdout)
    assert names == ["20"] and steps == [20], names
    told = [line for line in log.splitlines() if not re.match(r"\d\d:\d\d:\d\d (text:|training from|step)", line)]
    assert code == 2 and len(told) == 1, "\n".join(told)[:3000]
    assert re.match(rf"error: .*{disk}/run.*(room|space)", told[0]), told
    assert code_again == 0 and str(STEPS) in last, log_again


def test_a_run_that_diverges_ends_with_one_error_and_keeps_its_last_good_checkpoints(tmp_path):
    often = dict(**SPARSE, checkpoint__every=1, train__eval_every=0)
    call("train.py", *train_args(tmp_path, "run", **often, train__steps=4))
    good = tmp_path / "runs" / "run" / "checkpoints" / "4"
    before = read_arrays(good)
    _, log = call("train.py", *train_args(tmp_path, "run", **often, schedule__peak_lr=1e30), code=1)
    assert "step 6 skipped: its loss or gradient is not finite (1 in a row)" in log
    assert re.search(r"5 steps in a row, up to step 10, .*train\.max_skipped_steps = 5\).*schedule\.peak_lr", log)
    # The update of step 5 broke the weights, which its own loss could not show; no later state is worth saving.
    assert sorted(os.listdir(good.parent)) == ["4", "5"]
    jax.tree.map(np.testing.assert_array_equal, read_arrays(good), before)
    assert latest_step(tmp_path / "runs" / "run") == 5
