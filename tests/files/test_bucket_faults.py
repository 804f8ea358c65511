"""A bucket that refuses, dawdles and cuts connections changes no result; one out of reach ends a run with one sentence,
and nobody is lost; one process at a time writes to a run there."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ling_jax.files import paths
from ling_jax.files.one_writer import HOLDER
from tests.support.buckets import (
    complete_steps,
    download,
    every_day,
    names,
    put,
    server_of,
    upload,
    wait_for_step,
)  # fmt: skip
from tests.support.commands import call
from tests.support.fault_proxy import Faults, read_counts, set_faults
from tests.support.hf_folders import assert_same_folder, write_folder
from tests.support.marks import nightly
from tests.support.runs import assert_same_run, bucket_args
from tests.tiny_run import REPO, SPARSE, run, start, train_args

SOME = dict(refused=0.01, delayed=0.005, cut=0.01)  # shares of all requests
TINY = dict(**SPARSE, train__steps=40, checkpoint__every=8, train__eval_every=20)
REPEATED = re.compile(r"requests to buckets that were repeated: (\d+) \(")


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    call("train.py", *train_args(folder, "whole", **TINY))
    return folder


def repeated(log: str) -> int:
    """How many requests the last line about them counts."""
    found = REPEATED.findall(log)
    return int(found[-1]) if found else 0


def assert_disturbed(bucket: str, log: str) -> None:
    """There were faults of each kind, and the log tells at least of those that were answers."""
    counts = read_counts(server_of(bucket))
    print(dict(counts), "repeated:", repeated(log))
    assert counts["cut"] and counts["429"] + counts["503"], counts
    assert repeated(log) >= counts["429"] + counts["503"], log


def test_a_run_has_the_same_numbers_and_arrays_where_some_requests_fail(bucket, local, tmp_path):
    upload(local / "text", f"{bucket}/text")
    set_faults(server_of(bucket), Faults(**SOME, seed=1))
    _, log = run("train.py", *bucket_args(tmp_path, bucket, "run", **TINY))
    assert_disturbed(bucket, log)
    set_faults(server_of(bucket), Faults())
    assert_same_run(download(f"{bucket}/runs/run", tmp_path / "copy"), local / "runs" / "whole")
    assert complete_steps(f"{bucket}/runs/run") == [32, 40]


@pytest.mark.nightly
def test_a_conversion_there_and_back_gives_the_same_bytes_where_some_requests_fail(bucket, tmp_path):
    write_folder(tmp_path / "source", sharded=True)
    upload(tmp_path / "source", f"{bucket}/source")
    set_faults(server_of(bucket), Faults(refused=0.03, delayed=0.005, cut=0.03, seed=2))  # these are few requests
    logs = [
        run("convert.py", name, "--source", f"{bucket}/{source}", "--target", f"{bucket}/{target}")[1]
        for name, source, target in (("to-jax", "source", "ours"), ("to-hf", "ours", "back"))
    ]
    counts = read_counts(server_of(bucket))
    assert counts["cut"] and counts["429"] + counts["503"] <= sum(map(repeated, logs)), (counts, logs)
    set_faults(server_of(bucket), Faults())
    assert_same_folder(download(f"{bucket}/back", tmp_path / "back"), tmp_path / "source")
    assert not [name for name in names(bucket) if ".partial" in name]


@every_day("gs", "s3")
def test_objects_whose_deletion_loses_its_answer_are_deleted(bucket):
    for number in range(12):
        put(f"{bucket}/{number}", b"x")
    set_faults(server_of(bucket), Faults(cut=0.3, seed=1))  # mostly done, then repeated: nothing is found
    for number in range(12):
        paths.at(f"{bucket}/{number}").unlink()
    assert read_counts(server_of(bucket))["cut"] > 2
    set_faults(server_of(bucket), Faults())
    assert names(bucket) == []


def assert_one_sentence(log: str) -> None:
    *before, last = log.strip().splitlines()
    assert re.match(r"error: (gs|s3)://bucket-\S+: it cannot be reached, after \d+ attempts: ", last), log
    assert "the same command goes on once it can be" in last
    assert not [line for line in before if not re.match(r"\d\d:\d\d:\d\d |I\d{4} .*_TESTING$", line)], log


@pytest.mark.nightly
def test_out_of_reach_a_run_ends_within_a_minute_with_one_sentence_and_its_last_step_restores(bucket, local, tmp_path):
    upload(local / "text", f"{bucket}/text")
    url, forever = f"{bucket}/runs/run", TINY | {"train__steps": 100_000, "checkpoint__every": 50}
    process = start("train.py", *bucket_args(tmp_path, bucket, "run", **forever))
    wait_for_step(process, url, 50)
    set_faults(server_of(bucket), Faults(refused=1.0))
    begun = time.monotonic()
    _, log = process.communicate(timeout=120)
    seconds = time.monotonic() - begun
    assert process.returncode == 2 and "Traceback" not in log, log
    assert seconds < 60, log
    assert_one_sentence(log)

    begun = time.monotonic()  # nor does another start do more
    _, log = run("train.py", *bucket_args(tmp_path, bucket, "run", **forever), code=2)
    assert time.monotonic() - begun < 60, log
    assert_one_sentence(log)

    set_faults(server_of(bucket), Faults())
    last = max(complete_steps(url))
    _, log = run("train.py", *bucket_args(tmp_path, bucket, "run", **forever | {"train__steps": last + 10}))
    assert f"resuming from step {last}" in log
    call("train.py", *train_args(tmp_path, "whole", **forever | {"train__steps": last + 10}))
    assert_same_run(download(url, tmp_path / "copy"), tmp_path / "runs" / "whole")


@pytest.mark.nightly
def test_out_of_reach_a_conversion_ends_with_one_sentence_and_goes_on_later(bucket, tmp_path):
    write_folder(tmp_path / "source", sharded=True)
    upload(tmp_path / "source", f"{bucket}/source")
    command = ("convert.py", "to-jax", "--source", f"{bucket}/source", "--target", f"{bucket}/ours")
    set_faults(server_of(bucket), Faults(delayed=1.0, seconds=0.1))
    process = start(*command)
    while process.poll() is None and not [name for name in names(bucket) if name.startswith("ours/")]:
        time.sleep(0.01)
    set_faults(server_of(bucket), Faults(refused=1.0))
    begun = time.monotonic()
    _, log = process.communicate(timeout=120)
    assert process.returncode == 2 and time.monotonic() - begun < 60, log
    assert_one_sentence(log)
    set_faults(server_of(bucket), Faults())
    run(*command)
    call("convert.py", "to-hf", "--source", f"{bucket}/ours", "--target", f"{bucket}/back")
    assert_same_folder(download(f"{bucket}/back", tmp_path / "back"), tmp_path / "source")


# One writer.


@pytest.mark.nightly
def test_a_second_process_is_refused_and_after_a_sigkill_of_the_first_the_next_goes_on(bucket, local, tmp_path):
    upload(local / "text", f"{bucket}/text")
    url, forever = f"{bucket}/runs/run", TINY | {"train__steps": 100_000, "checkpoint__every": 50}
    first = start("train.py", *bucket_args(tmp_path, bucket, "run", **forever))
    wait_for_step(first, url, 50)
    _, log = run("train.py", *bucket_args(tmp_path, bucket, "run", **forever), code=2)
    assert f"error: {url} is in use: process {first.pid} on " in log.splitlines()[-1], log
    assert first.poll() is None
    first.kill()
    first.communicate()
    assert HOLDER in names(url)
    last = max(complete_steps(url))
    _, log = run("train.py", *bucket_args(tmp_path, bucket, "run", **forever | {"train__steps": last + 5}))
    assert f"resuming from step {last}" in log
    assert HOLDER not in names(url)


# Imports once and forks argv[2] processes, which all try to hold argv[1] at the same moment. Who holds it lets go when
# all have answered, or with "dies" is killed then.
STARTS = """
import json, os, sys
import gcsfs, s3fs
from ling_jax.files import buckets, one_writer, paths
one_writer.BEAT_SECONDS, one_writer.STALE_SECONDS, one_writer.SETTLE_SECONDS = 1.0, 8.0, 0.0
one_writer._boot = lambda: ""  # as if each were on a host of its own
buckets.prepare(sys.argv[1][:2])
(wait, begin), (told, tell), (stay, leave) = os.pipe(), os.pipe(), os.pipe()
for number in range(int(sys.argv[2])):
    if os.fork() == 0:
        os.close(begin)
        os.close(leave)
        os.read(wait, 1)  # until all are here
        try:
            with one_writer.OneWriter(paths.at(sys.argv[1])):
                os.write(tell, b"held\\n")
                os.read(stay, 1)
                if sys.argv[3:] == ["dies"]:
                    os.kill(os.getpid(), 9)
        except BaseException as error:
            os.write(tell, f"{error}\\n".encode())
        os._exit(0)
os.close(begin)
os.close(tell)
lines = os.fdopen(told)
print(json.dumps([lines.readline().strip() for number in range(int(sys.argv[2]))]), flush=True)
os.close(leave)
for number in range(int(sys.argv[2])):
    os.wait()
"""


def start_at_once(url: str, count: int, *how: str) -> list[str]:
    """The answers of `count` processes: "held", or why it was refused."""
    paths = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    env, command = os.environ | {"PYTHONPATH": paths}, [sys.executable, "-c", STARTS, url, str(count), *how]
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "faults", [nightly(Faults()), Faults(refused=0.1, cut=0.2, seed=3)], ids=["quiet", "disturbed"]
)
def test_of_twenty_starts_at_once_one_holds(bucket, faults):
    """By the service's preconditions alone: without the wait after which a process looks again."""
    set_faults(server_of(bucket), faults)
    answers = start_at_once(f"{bucket}/run", 20)
    assert answers.count("held") == 1, answers
    assert all("is in use" in answer for answer in answers if answer != "held"), answers
    set_faults(server_of(bucket), Faults())
    assert names(f"{bucket}/run") == []


@pytest.mark.nightly
def test_of_twenty_that_find_a_dead_ones_lease_one_takes_it_over(bucket):
    assert start_at_once(f"{bucket}/run", 1, "dies") == ["held"]
    assert names(f"{bucket}/run") == [HOLDER]
    answers = start_at_once(f"{bucket}/run", 20)
    assert answers.count("held") == 1, answers
