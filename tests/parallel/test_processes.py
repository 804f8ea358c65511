"""Several processes on this machine train as one, and end together; a checkpoint goes on on any mesh."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from jax._src.clusters import cloud_tpu_cluster

from ling_jax.parallel.processes import EXPLICIT, START_SECONDS, Cluster, _device_ids, find_cluster
from ling_jax.train.metrics import read_metrics
from tests.support.commands import call
from tests.support.runs import free_port, latest_step, lines_of, start_process, start_two, wait_until
from tests.tiny_run import DENSE, SPARSE, train_args, write_text

FOREVER = 100_000
OFTEN = dict(checkpoint__every=5, train__eval_every=0)


def losses(run_dir: Path, first: int, last: int) -> np.ndarray:
    return np.array([record["train/loss"] for record in read_metrics(run_dir) if first <= record["step"] <= last])


def assert_goes_on_alike(a: Path, b: Path, step: int, steps: int) -> None:
    """After `step`, the first loss to 1e-6 and the others to 1e-4, relative."""
    ours, theirs = losses(a, step + 1, step + steps), losses(b, step + 1, step + steps)
    assert len(ours) == len(theirs) == steps
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


MESH_OF_TWO = dict(mesh__fsdp=2, mesh__expert=2)


def test_two_processes_train_stop_and_resume_as_one_does(tmp_path, monkeypatch):
    pair, one = (tmp_path / "runs" / name for name in ("pair", "one"))
    args = train_args(tmp_path, "pair", **OFTEN, **SPARSE, **MESH_OF_TWO, train__steps=FOREVER)
    processes = start_two(monkeypatch, args)
    wait_until(lambda: lines_of(pair) >= 12, processes)
    processes[1].send_signal(signal.SIGTERM)
    logs = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], logs
    step = latest_step(pair)
    assert f"stopped by a signal to another process at step {step}" in logs[0]
    assert "process 1: SIGTERM: finishing this step" in logs[1]
    assert lines_of(pair) == step

    goes_on = dict(**OFTEN, **SPARSE, train__steps=step + 8)
    processes = start_two(monkeypatch, train_args(tmp_path, "pair", **goes_on, **MESH_OF_TWO))
    logs = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], logs
    assert f"resuming from step {step}" in logs[0] and (pair / "report.html").exists()
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
    call("train.py", *train_args(tmp_path, "one", **goes_on))
    assert_goes_on_alike(pair, one, 0, step + 8)  # in one process, not interrupted


def worker_of(process: subprocess.Popen[str]) -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def still_running(folder: Path) -> list[str]:
    """Commands of processes that name `folder`."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        found += [command] * (str(folder) in command)
    return found


@pytest.mark.nightly
@pytest.mark.parametrize(("victim", "what"), [(0, "process"), (1, "process"), (1, "worker")])
def test_when_one_is_killed_the_other_ends_and_names_it(tmp_path, monkeypatch, victim, what):
    run_dir = tmp_path / "runs" / "pair"
    args = train_args(tmp_path, "pair", **OFTEN, **DENSE, mesh__fsdp=4, train__steps=FOREVER)
    processes = start_two(monkeypatch, args)
    wait_until(lambda: lines_of(run_dir) >= 12, processes)
    before = latest_step(run_dir)
    killed, other = processes[victim], processes[1 - victim]
    os.kill(killed.pid if what == "process" else worker_of(killed), signal.SIGKILL)
    _, log = other.communicate(timeout=30)
    last = log.strip().splitlines()[-1]
    assert other.returncode not in (0, None), log
    assert f"process {victim} " in last and "resume" in last, log
    killed.communicate(timeout=30)
    assert killed.returncode not in (0, None)
    wait_until(lambda: not still_running(tmp_path), [], 10)
    assert latest_step(run_dir) >= before > 0  # every checkpoint is read in full


@pytest.mark.parametrize(
    ("id_", "told"),
    [(0, r"these of 3 processes had not come: 1, 2 \("), (1, "process 0 is missing.*could not reach it at localhost:")],
)
def test_a_process_that_does_not_come_is_named_after_the_time_out(tmp_path, monkeypatch, id_, told):
    monkeypatch.setenv(START_SECONDS, "2")
    process = start_process(monkeypatch, free_port(), id_, train_args(tmp_path, "run"), count=3)
    _, log = process.communicate(timeout=30)
    assert process.returncode == 2
    lines = log.strip().splitlines()
    assert len(lines) == 1, log
    assert re.search(told, lines[0]), log
    assert not (tmp_path / "runs").exists()


def test_processes_of_other_settings_end_with_one_error(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    port = free_port()
    args = [train_args(tmp_path, "run", **MESH_OF_TWO, train__seed=seed) for seed in (0, 1)]
    processes = [start_process(monkeypatch, port, id_, args[id_]) for id_ in (0, 1)]
    logs = [process.communicate(timeout=120)[1] for process in processes]
    assert all(process.returncode == 2 for process in processes), logs
    assert "the settings of process 1 differ from those of process 0" in logs[1]
    assert "process 1 " in logs[0].strip().splitlines()[-1]


@pytest.mark.nightly
def test_processes_of_other_text_end_with_one_error(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    port, processes = free_port(), []
    for id_ in (0, 1):
        write_text(tmp_path / str(id_) / "text")
        (tmp_path / str(id_) / "text" / "3.txt").write_text(f"text of {id_}\n")
        monkeypatch.setenv("HOME", str(tmp_path / str(id_)))
        args = train_args(tmp_path, "run", **MESH_OF_TWO, data__sources__0__path="~/text", data__cache_dir="~/cache")
        processes.append(start_process(monkeypatch, port, id_, args))
    logs = [process.communicate(timeout=120)[1] for process in processes]
    assert all(process.returncode == 2 for process in processes), logs
    assert all("the text of process 1 differs from that of process 0" in log for log in logs), logs


def test_the_cluster_is_found_in_the_environment(monkeypatch):
    for name in [*EXPLICIT, *(name for name in os.environ if name.startswith("SLURM"))]:
        monkeypatch.delenv(name, raising=False)
    assert find_cluster() is None
    monkeypatch.setenv(EXPLICIT[0], "host:99")
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS is set: set all of"):
        find_cluster()
    monkeypatch.setenv(EXPLICIT[1], "4")
    monkeypatch.setenv(EXPLICIT[2], "4")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID = 4 must be a number below JAX_NUM_PROCESSES = 4"):
        find_cluster()
    monkeypatch.setenv(EXPLICIT[2], "3")
    assert find_cluster() == Cluster("host:99", 4, 3, None)
    monkeypatch.setenv(EXPLICIT[0], "host")
    with pytest.raises(ValueError, match="must be HOST:PORT"):
        find_cluster()


def test_gke_tpu_hosts_are_found_in_the_environment(monkeypatch):
    for name in EXPLICIT:
        monkeypatch.delenv(name, raising=False)
    settings = {"TPU_WORKER_HOSTNAMES": "localhost,b,c,d", "TPU_WORKER_ID": "3"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value", lambda name: None)  # one slice
    found = find_cluster()
    assert found is not None and (found.host, found.count, found.id) == ("localhost", 4, 3)


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, [1]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, None),
        ({"CUDA_VISIBLE_DEVICES": "1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [1]),
        ({"JAX_LOCAL_DEVICE_IDS": "2,3"}, [2, 3]),
    ],
)
def test_a_process_takes_its_own_gpus_of_those_it_sees(monkeypatch, settings, ids):
    for name in ("SLURM_STEP_TASKS_PER_NODE", "CUDA_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert _device_ids([1]) == ids


def test_slurm_starts_several_processes_with_a_device_each(monkeypatch):
    for name in EXPLICIT:
        monkeypatch.delenv(name, raising=False)
    settings = {"SLURM_JOB_ID": "4242", "SLURM_STEP_NODELIST": "node[7-8]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    for name, value in {**settings, "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    found = find_cluster()
    assert found is not None and (found.host, found.count, found.id, found.local_device_ids) == ("node7", 2, 1, [0])
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert find_cluster() is None


@pytest.mark.nightly
def test_a_checkpoint_of_eight_devices_goes_on_on_one_and_on_four(tmp_path):
    def train(name: str, devices: int, **mesh: int) -> Path:
        saves = dict(checkpoint__every=4, checkpoint__keep_last=3)
        args = train_args(tmp_path, name, **SPARSE, **mesh, **saves, train__steps=12, train__eval_every=0)
        _, log = call("train.py", *args)
        assert ("resuming from step 4" in log) == (devices < 8), log
        return tmp_path / "runs" / name

    whole = train("eight", 8, mesh__fsdp=2, mesh__expert=2, mesh__tensor=2)
    for devices, mesh in {1: {}, 4: dict(mesh__fsdp=2, mesh__context=2)}.items():
        other = shutil.copytree(whole, tmp_path / "runs" / str(devices))
        for later in ("8", "12"):
            shutil.rmtree(other / "checkpoints" / later)
        assert_goes_on_alike(train(str(devices), devices, **mesh), whole, 4, 8)
