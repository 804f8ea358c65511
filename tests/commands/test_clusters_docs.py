"""The commands of docs/clusters.md for GKE and Cloud TPU do what the page says: taken from the page and run, with two
processes in the place of the hosts, a bucket on loopback, tiny sizes, and a stand-in for gcloud's ssh and scp."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ling_jax.data.tokenizer import Tokenizer
from tests.support.buckets import complete_steps, names, new_bucket, put, upload
from tests.support.runs import free_port
from tests.tiny_run import REPO, SIZES, SPARSE, write_text

PAGE = (REPO / "docs" / "clusters.md").read_text()
HOSTS = 2
# The page's flags keep their names and get values that two processes of two CPU devices can hold.
SMALL = {"--data.global-batch-size": "8", "--train.microbatches": "2", "--mesh.fsdp": "2", "--mesh.expert": "2"}
MORE = SPARSE | {"model.num-nextn-predict-layers": 0, "checkpoint.every": 10, "train.eval-every": 0}
# As gcloud's for these commands: on each host in its home folder, one after the other, or on the one that is asked for.
GCLOUD = r"""
set -e
all=" $* "; worker=${all##*--worker=}; worker=${worker%% *}
case $worker in all) hosts=$(ls "$HOSTS");; *) hosts=$worker;; esac
for host in $hosts; do
  case "$*" in
    *" scp --recurse "*) cp -rd "$6" "$HOSTS/$host/${7#ling:}";;
    *" ssh ling "*) (cd "$HOSTS/$host" && JAX_PROCESS_ID=$host bash -c "${@: -1}");;
    *) exit 1;;
  esac
done
"""


def section(title: str) -> str:
    [found] = re.findall(rf"^## {title}.*?\n(.*?)(?=^## )", PAGE, re.MULTILINE | re.DOTALL)
    return found


def blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def shell_lines_of_the_jobset() -> str:
    """The script that the pods run: the text after the YAML's last `- |`."""
    [yaml] = blocks(section("GKE"))
    return textwrap.dedent(yaml.rpartition("- |\n")[2])


def tiny(commands: str, bucket: str, steps: int, home: Path) -> str:
    """The page's commands with a bucket of ours, and sizes for this machine after the configuration's name."""
    for flag, value in SMALL.items():
        commands, count = re.subn(rf"{re.escape(flag)} \d+", f"{flag} {value}", commands)
        assert count == 1, f"the page's command has no {flag}"
    given = re.findall(r"--([\w.-]+)", commands)
    sizes = SIZES | {name.replace("__", ".").replace("_", "-"): value for name, value in MORE.items()}
    sizes |= {"train.steps": steps, "run": "run", "data.cache-dir": home / "cache"}
    flags = " ".join(f"--{name} {value}" for name, value in sizes.items() if name not in given)
    commands, count = re.subn(r"\bling_mini_2_0\b", f"ling_tiny {flags}", commands)
    assert count == 1
    return commands.replace("gs://BUCKET", bucket)


@pytest.fixture
def bucket(request) -> Iterator[str]:
    with new_bucket("gs", request) as name:
        yield name


@pytest.fixture
def home(bucket, tmp_path, monkeypatch) -> Path:
    """A folder with ling_jax/, as the repository on a host; its programs come first. Text and tokenizer are in the
    bucket."""
    write_text(tmp_path / "text")
    upload(tmp_path / "text", f"{bucket}/text")
    texts = [file.read_text() for file in sorted((tmp_path / "text").iterdir())]
    Tokenizer.train(texts, SIZES["model.vocab-size"]).save(str(tmp_path / "tokenizer"))
    put(f"{bucket}/tokenizer.json", (tmp_path / "tokenizer" / "tokenizer.json").read_bytes())

    (tmp_path / "ling_jax").mkdir()
    for name in ("train.py", "ling_jax", "configs"):
        (tmp_path / "ling_jax" / name).symlink_to(REPO / name)
    (tmp_path / "ling_jax" / ".venv").symlink_to(sys.prefix)
    monkeypatch.setenv("PATH", os.pathsep.join([f"{sys.prefix}/bin", os.environ["PATH"]]))
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"localhost:{free_port()}")
    monkeypatch.setenv("JAX_NUM_PROCESSES", str(HOSTS))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    return tmp_path


def wait_for(reached: Callable[[], bool], told: Callable[[], str], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, told()
        time.sleep(0.05)


# GKE.


class Pods:
    """The JobSet's shell lines, once for each host; as a context manager, which ends them."""

    def __init__(self, home: Path, bucket: str, steps: int):
        command = ["bash", "-c", tiny(shell_lines_of_the_jobset(), bucket, steps, home)]
        self.logs = [home / f"pod{host}-{steps}.log" for host in range(HOSTS)]
        self.processes = []
        for host, file in enumerate(self.logs):
            env = os.environ | {"JAX_PROCESS_ID": str(host)}
            with file.open("w") as log:
                started = subprocess.Popen(
                    command,
                    cwd=home / "ling_jax",
                    env=env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.processes.append(started)

    def __enter__(self) -> "Pods":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def told(self) -> str:
        return "\n".join(file.read_text() for file in self.logs)

    def ended(self) -> bool:
        return any(process.poll() is not None for process in self.processes)

    def codes(self) -> list[int]:
        wait_for(lambda: all(process.poll() is not None for process in self.processes), self.told)
        return [process.returncode for process in self.processes]


@pytest.mark.nightly
def test_the_pods_of_a_jobset_stop_with_143_where_the_signal_came_and_resume(home, bucket):
    url = f"{bucket}/runs/run"
    with Pods(home, bucket, steps=100_000) as pods:
        wait_for(lambda: max(complete_steps(url), default=0) >= 10 or pods.ended(), pods.told)
        assert not pods.ended(), pods.told()
        pods.processes[1].send_signal(signal.SIGTERM)
        assert pods.codes() == [0, 143], pods.told()
    step = max(complete_steps(url))
    assert f"stopped by a signal to another process at step {step}" in pods.logs[0].read_text()
    with Pods(home, bucket, steps=step + 10) as again:  # the JobSet starts all anew
        assert again.codes() == [0, 0], again.told()
    assert f"resuming from step {step}" in again.logs[0].read_text()
    assert complete_steps(url)[-1] == step + 10 and "report.html" in names(url)


def test_a_pod_whose_process_fails_ends_with_its_code(home, bucket):
    with Pods(home, f"{bucket}-that-is-not-there", steps=10) as pods:
        assert pods.codes() == [2, 2], pods.told()
    assert "there is no such bucket" in pods.logs[0].read_text()


# Cloud TPU.


@pytest.mark.nightly
def test_the_commands_for_cloud_tpu_hosts_copy_start_show_and_stop(home, bucket, monkeypatch):
    _, copy_and_install, start, commands = blocks(section("Cloud TPU"))
    copy = copy_and_install.splitlines()[0]
    start_line, tail_line, kill_line = re.findall(r"^gcloud .*?(?<=')$", commands, re.MULTILINE | re.DOTALL)
    (home / "ling_jax" / "start.sh").write_text(start)
    (home / "bin").mkdir()
    (home / "bin" / "gcloud").write_text(f"#!/bin/bash\n{GCLOUD}")
    (home / "bin" / "gcloud").chmod(0o755)
    hosts = [home / "hosts" / str(host) for host in range(HOSTS)]
    for folder in hosts:
        folder.mkdir(parents=True)
    monkeypatch.setenv("PATH", os.pathsep.join([str(home / "bin"), os.environ["PATH"]]))
    monkeypatch.setenv("HOSTS", str(home / "hosts"))
    logs = [folder / "ling_jax" / "train.log" for folder in hosts]

    def told() -> str:
        return "\n".join(file.read_text() for file in logs if file.exists())

    subprocess.run(copy, shell=True, cwd=home / "ling_jax", check=True)
    with stopped_at_the_end(hosts):
        subprocess.run(tiny(start_line, bucket, 100_000, home), shell=True, check=True, timeout=60)
        wait_for(lambda: bool(complete_steps(f"{bucket}/runs/run")) or not all(map(running, hosts)), told)
        assert all(map(running, hosts)), told()
        with subprocess.Popen(tail_line, shell=True, stdout=subprocess.PIPE, text=True, process_group=0) as tail:
            assert tail.stdout is not None
            assert any("training from step 0" in tail.stdout.readline() for _ in range(50)), told()
            os.killpg(tail.pid, signal.SIGTERM)
        subprocess.run(kill_line, shell=True, check=True)
        wait_for(lambda: not any(map(running, hosts)), told, seconds=120)
    step = max(complete_steps(f"{bucket}/runs/run"))
    assert f"stopped by SIGTERM at step {step}; run the same command to resume" in logs[0].read_text()
    assert "training from step" not in logs[1].read_text()  # only the first has the steps


def pid_of(host: Path) -> int:
    return int((host / "ling_jax" / "train.pid").read_text())


def running(host: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        state = Path(f"/proc/{pid_of(host)}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    return False


@contextlib.contextmanager
def stopped_at_the_end(hosts: list[Path]) -> Iterator[None]:
    try:
        yield
    finally:
        for host in hosts:
            if running(host):
                os.kill(pid_of(host), signal.SIGKILL)
