"""A run whose text, tokens and checkpoints are in a bucket is, bit for bit, the run of local folders."""

import json
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import convert
import sample
from ling_jax import evaluate, load_pretrained, score
from ling_jax.checkpoint import read_arrays
from ling_jax.files.one_writer import HOLDER
from ling_jax.train.metrics import read_metrics
from tests.support.buckets import (
    complete_steps,
    download,
    get,
    names,
    new_bucket,
    put,
    saving_step,
    stray_folders,
    upload,
    wait_for_step,
)
from tests.support.commands import call
from tests.support.hf_folders import assert_same_folder
from tests.support.marks import nightly
from tests.support.runs import assert_same_run, bucket_args, start_two
from tests.tiny_run import REPO, SPARSE, numbers, run, start, train_args

LONG = dict(**SPARSE, train__steps=150, checkpoint__every=30, train__eval_every=50)
PAIRS = [([3, 4, 5], [6, 7]), ([8], [9])]


class Places(NamedTuple):
    """Attributes:
    local: a folder with text/ and the run `whole` in runs/.
    bucket: with the same text, and the run `run` in runs/.
    logs: of the run in the bucket, which was stopped once.
    """

    local: Path
    bucket: str
    logs: list[str]


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    call("train.py", *train_args(folder, "whole", **LONG))
    return folder


@pytest.fixture(scope="module", params=["gs", nightly("s3")])
def places(request, local, tmp_path_factory) -> Iterator[Places]:
    with new_bucket(request.param, request) as bucket:
        upload(local / "text", f"{bucket}/text")
        other = tmp_path_factory.mktemp("other")  # has no text of its own
        (other / "text").mkdir()
        command = ("train.py", *bucket_args(other, bucket, "run", **LONG))
        process = start(*command)
        wait_for_step(process, f"{bucket}/runs/run", 30)
        process.send_signal(signal.SIGTERM)
        logs = [process.communicate(timeout=120)[1]]
        assert process.returncode == 0, logs
        logs.append(run(*command)[1])
        yield Places(local, bucket, logs)


def test_a_run_stopped_and_resumed_has_the_numbers_and_arrays_of_a_local_one(places, tmp_path):
    stopped = re.search(r"stopped by SIGTERM at step (\d+); run the same command to resume", places.logs[0])
    assert stopped and int(stopped[1]) < 150, places.logs[0]
    assert f"resuming from step {stopped[1]}" in places.logs[1]
    copy = download(f"{places.bucket}/runs/run", tmp_path / "copy")
    assert_same_run(copy, places.local / "runs" / "whole")
    assert (copy / "report.html").exists() and list((copy / "tensorboard").iterdir())
    assert not (copy / HOLDER).exists()
    assert (copy / "tokenizer" / "tokenizer.json").read_bytes() == (
        places.local / "runs" / "whole" / "tokenizer" / "tokenizer.json"
    ).read_bytes()
    assert names(f"{places.bucket}/text") == sorted(file.name for file in (places.local / "text").iterdir())


def test_the_record_is_read_where_it_is(places):
    found = read_metrics(f"{places.bucket}/runs/run")
    assert numbers(found) == numbers(read_metrics(places.local / "runs" / "whole"))


def answers_of(run_path: str, text: str, capsys) -> list[str]:
    options = ["--prompt", "the model reads", "--max-new-tokens", "8", "--temperature", "0"]
    sample.main(["--checkpoint", run_path, *options])
    evaluate.main(["--checkpoint", run_path, "--text", text])
    convert.main(["inspect", "--source", run_path, "--checksums"])
    told = capsys.readouterr().out
    return [line for line in told.splitlines() if not line.startswith("folder")]


def test_sampling_evaluating_inspecting_and_scoring_give_what_they_give_of_a_local_run(places, tmp_path, capsys):
    text = (places.local / "text" / "0.txt").read_bytes()
    (tmp_path / "0.txt").write_bytes(text)
    put(f"{places.bucket}/scored/0.txt", text)
    here = str(places.local / "runs" / "whole")
    there = f"{places.bucket}/runs/run"
    assert answers_of(there, f"{places.bucket}/scored/0.txt", capsys) == answers_of(
        here, str(tmp_path / "0.txt"), capsys
    )
    assert score(load_pretrained(there), PAIRS) == score(load_pretrained(here), PAIRS)


def test_a_file_of_prompts_is_read_in_a_bucket(places, capsys):
    prompts = json.dumps({"prompt": "the model", "id": 7}).encode() + b"\n"
    put(f"{places.bucket}/prompts.jsonl", prompts)
    options = ["--prompt-file", f"{places.bucket}/prompts.jsonl", "--max-new-tokens", "4", "--temperature", "0"]
    sample.main(["--checkpoint", f"{places.bucket}/runs/run", *options])
    answer = json.loads(capsys.readouterr().out)
    assert answer["id"] == 7 and answer["tokens"] == 4


def test_weights_go_to_a_hf_folder_and_back_in_the_bucket_and_runs_start_from_both(places, tmp_path, capsys):
    whole, bucket = places.local / "runs" / "whole", places.bucket
    hf, ours = f"{bucket}/exports/hf", f"{bucket}/exports/ours"
    convert.main(["to-hf", "--source", f"{bucket}/runs/run", "--target", hf])
    convert.main(["to-jax", "--source", hf, "--target", ours])
    convert.main(["to-hf", "--source", ours, "--target", f"{bucket}/exports/back"])
    convert.main(["to-hf", "--source", str(whole), "--target", str(tmp_path / "hf")])
    capsys.readouterr()
    assert not [name for name in names(bucket) if ".partial" in name]
    for name in ("hf", "back"):
        assert_same_folder(download(f"{bucket}/exports/{name}", tmp_path / f"{name} of the bucket"), tmp_path / "hf")
    short = dict(**SPARSE, train__steps=3, train__eval_every=0)
    runs = {}
    for name, origin in {"run": f"{bucket}/runs/run", "hf": hf, "local": tmp_path / "hf"}.items():
        _, log = call("train.py", *bucket_args(tmp_path, bucket, f"from-{name}", **short), "--init-from", origin)
        runs[name] = numbers(read_metrics(f"{bucket}/runs/from-{name}"))
    assert runs["run"] == runs["hf"] == runs["local"] and len(runs["run"]) == 3


def test_a_tokenizer_is_read_in_a_bucket(places, tmp_path):
    upload(places.local / "runs" / "whole" / "tokenizer", f"{places.bucket}/tokenizer")
    short = dict(**SPARSE, train__steps=2, train__eval_every=0)
    tokenizer = f"{places.bucket}/tokenizer/tokenizer.json"
    call("train.py", *bucket_args(tmp_path, places.bucket, "tokenizer", **short, data__tokenizer=tokenizer))
    ours = get(f"{places.bucket}/runs/tokenizer/tokenizer/tokenizer.json")
    assert json.loads(ours)["model"]["vocab"] == json.loads(get(tokenizer))["model"]["vocab"]


MESH_OF_TWO = dict(mesh__fsdp=2, mesh__expert=2)
PAIR = dict(**SPARSE, **MESH_OF_TWO, train__steps=40, checkpoint__every=10, train__eval_every=20)


def train_together(monkeypatch, args: list[str]) -> None:
    processes = start_two(monkeypatch, args)
    logs = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], logs
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")


@pytest.fixture(scope="module")
def local_pair(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        train_together(patch, train_args(folder, "pair", **PAIR))
    return folder


@pytest.mark.nightly
def test_two_processes_train_and_resume_in_a_bucket_as_in_local_folders(bucket, local_pair, tmp_path, monkeypatch):
    upload(local_pair / "text", f"{bucket}/text")
    for steps in (20, 40):
        train_together(monkeypatch, bucket_args(tmp_path, bucket, "pair", **PAIR | {"train__steps": steps}))
    copy = download(f"{bucket}/runs/pair", tmp_path / "copy")
    assert complete_steps(f"{bucket}/runs/pair") == [30, 40]
    assert_same_run(copy, local_pair / "runs" / "pair")


@pytest.mark.nightly
def test_after_two_sigkills_a_run_ends_with_the_numbers_of_one_that_was_left_alone(bucket, local, tmp_path):
    """`scripts/bucket_kills.py` does the same more often, and kills conversions too."""
    upload(local / "text", f"{bucket}/text")
    draw, url = random.Random(0), f"{bucket}/runs/killed"
    command = ("train.py", *bucket_args(tmp_path, bucket, "killed", **LONG))
    for moment in ("step", "save"):
        before = max(complete_steps(url), default=0)
        process = start(*command)
        wait_for_step(process, url, before + 20)
        while moment == "save" and process.poll() is None and saving_step(url) is None:
            pass
        time.sleep(draw.uniform(0, 0.2 if moment == "step" else 0.02))
        process.kill()
        _, log = process.communicate()
        assert process.returncode == -signal.SIGKILL, log
        steps = complete_steps(url)
        assert max(steps) >= before + 20, "the kill lost a step"
        copy = download(url, tmp_path / moment)
        for step in steps:  # each is whole
            assert int(read_arrays(str(copy / "checkpoints" / str(step)))["step"]) == step
    _, log = call(*command)
    assert f"resuming from step {max(steps)}" in log
    assert_same_run(download(url, tmp_path / "copy"), local / "runs" / "whole")
    assert saving_step(url) is None and complete_steps(url) == [120, 150]


def test_no_folder_is_called_as_a_scheme(places, tmp_path_factory):
    """Looks at what was written until now; conftest.py looks again when the session ends."""
    assert stray_folders(REPO, tmp_path_factory.getbasetemp()) == []
