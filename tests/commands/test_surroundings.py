"""A command among users and machines: switches of JAX, no home, closed terminals and pipes, changed files."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import sample
import train
from ling_jax import evaluate, generate, load_pretrained, token_logprobs
from ling_jax.convert.to_hf import to_hf
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.train.metrics import read_metrics
from tests.support.commands import call
from tests.support.marks import nightly
from tests.tiny_run import DENSE, REPO, SPARSE, numbers, run, start, train_args

SHORT = dict(**SPARSE, train__steps=3, train__eval_every=0)
FOREVER = dict(**DENSE, train__steps=100_000, train__eval_every=0, checkpoint__every=100_000)
SWITCHES = ("JAX_ENABLE_X64=1", "JAX_NUMPY_RANK_PROMOTION=raise", "JAX_NUMPY_DTYPE_PROMOTION=strict")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a text corpus and the run `whole`, of three steps."""
    folder = tmp_path_factory.mktemp("surroundings")
    call("train.py", *train_args(folder, "whole", **SHORT))
    return folder


@pytest.fixture
def copied(folder) -> Path:
    target = folder / "runs" / "copied"
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(folder / "runs" / "whole", target)


# JAX's own switches.


@pytest.mark.nightly
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_run_and_its_text_do_not_depend_on_switches_of_jax(folder, monkeypatch, switch):
    prompt = ("--prompt", "the model", "--max-new-tokens", 6, "--seed", 3)
    text, _ = run("sample.py", "--checkpoint", folder / "runs" / "whole", *prompt)
    monkeypatch.setenv(*switch.split("="))
    name = f"run-{switch}"
    run("train.py", *train_args(folder, name, **SHORT))
    assert numbers(read_metrics(folder / "runs" / name)) == numbers(read_metrics(folder / "runs" / "whole"))
    assert run("sample.py", "--checkpoint", folder / "runs" / name, *prompt)[0] == text


@pytest.mark.parametrize(
    "switch", [jax.enable_x64(True), jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")]
)
def test_calls_from_python_work_under_switches_of_jax(switch):
    def answers() -> list:
        model, tokens = load_pretrained(REPO / "tests" / "golden" / "tiny-ling"), np.array([[1, 2, 3, 4]])
        return [model(tokens).logits_BTV, token_logprobs(model, tokens), generate(model, [[1, 2, 3]], 6)]

    plain = answers()
    with switch:
        jax.tree.map(np.testing.assert_array_equal, answers(), plain)


@pytest.mark.parametrize(("platform", "command"), [("cuda", "train"), nightly("bogus", "sample")])
def test_a_platform_that_is_not_here_is_one_sentence(folder, monkeypatch, platform, command):
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    whole = folder / "runs" / "whole"
    commands = {
        "train": ["train.py", *train_args(folder, "other", **SHORT)],
        "sample": ["sample.py", "--checkpoint", whole, "--prompt", "a"],
    }
    _, log = run(*commands[command], code=2)
    assert log.splitlines()[-1].startswith(f"error: JAX_PLATFORMS = '{platform}', but JAX finds no such device here")


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="JAX's CUDA plugin is not installed")
def test_a_compiler_for_gpus_complains_of_nothing_where_there_is_no_gpu(folder, monkeypatch):
    """`run` fails for a traceback, which JAX's plugin would give about the libraries that only a GPU needs."""
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    _, log = run("sample.py", "--checkpoint", folder / "runs" / "whole", "--prompt", "a", "--max-new-tokens", 2)
    assert "cuDNN" not in log and "CUDA" not in log


# Folders that cannot be written.


@pytest.mark.nightly
def test_without_a_home_tokens_are_kept_in_the_runs_own_folder(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("HOME", "/proc")
    args = train_args(folder, "run", runs_dir=tmp_path, data__cache_dir="~/.cache/ling_jax", **SHORT)
    _, log = run("train.py", *args)
    assert "compiled programs are not kept; XDG_CACHE_HOME" in log
    assert re.search(rf"cannot be written: tokens are kept in {tmp_path}/run/cache; --data.cache-dir names", log)
    assert "C++ kernels are built at every start" in log
    assert any((tmp_path / "run" / "cache").glob("*.tokens.npy"))
    assert numbers(read_metrics(tmp_path / "run")) == numbers(read_metrics(folder / "runs" / "whole"))


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("gs:/bucket/cache", "gs:/bucket/cache: a path in a bucket is gs://BUCKET/FOLDER"),
        ("az://bucket/cache", "az://bucket/cache: only local paths, gs://BUCKET/... and s3://BUCKET/... are known"),
    ],
)
def test_a_cache_of_tokens_that_is_no_place_is_refused(folder, place, said):
    with pytest.raises(ValueError, match=said):
        train.main(train_args(folder, "no place", **SHORT, data__cache_dir=place))
    assert not any((root / place.partition("/")[0]).exists() for root in (REPO, Path()))


def test_a_damaged_cache_of_tokens_is_made_anew(tmp_path):
    call("train.py", *train_args(tmp_path, "a", **SHORT))
    [tokens] = (tmp_path / "cache").glob("*.tokens.npy")
    os.truncate(tokens, 200)
    _, log = call("train.py", *train_args(tmp_path, "b", **SHORT))
    assert f"{tokens} is damaged" in log and "tokenizing" in log
    assert numbers(read_metrics(tmp_path / "runs" / "a")) == numbers(read_metrics(tmp_path / "runs" / "b"))


# Terminals and pipes that close.

TERMINAL = """
import os, pty, sys, time
from pathlib import Path
metrics, command = Path(sys.argv[1]), sys.argv[2:]
child, terminal = pty.fork()
if child == 0:
    os.execv(sys.executable, [sys.executable, *command])
os.set_blocking(terminal, False)
while not metrics.exists() or metrics.read_bytes().count(b"\\n") < 5:
    try:
        os.read(terminal, 1 << 16)
    except BlockingIOError:
        time.sleep(0.01)
os.close(terminal)  # as if its window were closed
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_run_whose_terminal_closes_saves_its_step(tmp_path):
    """In the terminal there is a progress bar, and every write to it fails from then on."""
    folder = tmp_path / "runs" / "run"
    args = train_args(tmp_path, "run", **FOREVER)
    out, _ = run("-c", TERMINAL, folder / "metrics.jsonl", "train.py", *args)
    assert out.strip() == "0"
    [step] = os.listdir(folder / "checkpoints")
    assert int(step) >= 5 and read_metrics(folder)[-1]["step"] == int(step)


def wait_for_lines(process: subprocess.Popen[str], metrics: Path, count: int) -> None:
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < count):
        time.sleep(0.01)


NOHUP = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.mark.parametrize("ignored", [False, nightly(True)])
def test_sighup_saves_unless_it_was_ignored_at_the_start(tmp_path, ignored):
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    process = start(*["-c", NOHUP] * ignored, "train.py", *train_args(tmp_path, "run", **FOREVER))
    wait_for_lines(process, metrics, 3)
    process.send_signal(signal.SIGHUP)
    if ignored:
        wait_for_lines(process, metrics, metrics.read_bytes().count(b"\n") + 50)
        assert process.poll() is None, "it ended"
        process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert f"stopped by {'SIGTERM' if ignored else 'SIGHUP'} at step" in log


@pytest.mark.parametrize("read", [1, nightly(0)])
def test_a_pipe_that_closes_is_a_quiet_end(folder, read):
    samples = ("--prompt", "the model", "--samples", 40, "--max-new-tokens", 4)
    process = start("sample.py", "--checkpoint", folder / "runs" / "whole", *samples)
    assert process.stdout is not None and process.stderr is not None
    for _ in range(read):
        process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE


# What changed between two starts; in this process, whose log is `caplog`'s.


def goes_on(folder: Path, steps: int, **changes) -> None:
    assert train.main(train_args(folder, "copied", **SHORT | {"train__steps": steps} | changes)) == 0


@pytest.fixture
def log(caplog) -> Callable[[], str]:
    caplog.set_level("INFO")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def test_another_tokenizer_than_the_checkpoints_is_refused_by_all_who_would_use_it(folder, copied, tmp_path):
    file = copied / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    names = [name for name, id_ in vocab.items() if id_ > 280]
    vocab.update(zip(names, reversed([vocab[name] for name in names]), strict=True))
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"tokenizer in .* is not .* \(fingerprint \w{16}, in the checkpoint \w{16}\)"):
        goes_on(folder, 5)
    for command in (
        lambda: sample.main(["--checkpoint", str(copied), "--prompt", "a"]),
        lambda: evaluate.evaluate(str(copied), "a", 32, 1),
        lambda: to_hf(str(copied), str(tmp_path / "hf")),
    ):
        with pytest.raises(ValueError, match=f"{file} is not the tokenizer that .* was trained with"):
            command()


def test_how_a_librarys_version_spells_a_tokenizer_is_no_change(copied):
    file = copied / "tokenizer" / "tokenizer.json"
    before, tokenizer = Tokenizer.load(str(file)), json.loads(file.read_text())
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [" ".join(m) if isinstance(m, list) else m.split(" ") for m in merges]
    file.write_text(json.dumps(tokenizer, indent=None))
    assert Tokenizer.load(str(file)).fingerprint == before.fingerprint
    tokenizer["model"]["merges"][-2:] = reversed(tokenizer["model"]["merges"][-2:])
    file.write_text(json.dumps(tokenizer))
    assert Tokenizer.load(str(file)).fingerprint != before.fingerprint


def test_a_lost_tokenizer_is_made_anew_only_if_it_is_the_same(folder, copied):
    shutil.rmtree(copied / "tokenizer")
    other = folder / "other tokenizer"
    Tokenizer.train(["quite other words stand here\n" * 300], 280).save(str(other))
    with pytest.raises(ValueError, match="is not the one that this run's checkpoint was trained with"):
        goes_on(folder, 5, data__tokenizer=other)
    assert not (copied / "tokenizer" / "tokenizer.json").exists()
    goes_on(folder, 4)


def test_a_cut_config_is_named_and_a_lost_one_is_taken_from_the_checkpoint(folder, copied, log):
    file = copied / "config.json"
    os.truncate(file, 300)
    with pytest.raises(ValueError, match=rf"^{file} is not valid JSON: .*; every step in {copied}/checkpoints has the"):
        goes_on(folder, 5)
    file.unlink()
    goes_on(folder, 5)
    assert "resuming from step 3" in log() and json.loads(file.read_text())["train"]["steps"] == 5


def test_settings_that_differ_are_named_old_and_new(folder, copied, log):
    goes_on(folder, 4, schedule__peak_lr=1e-4)
    [line] = [line for line in log().splitlines() if "differ" in line]
    assert line == (
        "settings that differ from those of step 3 (old -> new): schedule.peak_lr: 0.005 -> 0.0001; train.steps: 3 -> 4"
    )


def test_a_run_past_its_steps_says_so_and_changes_nothing(folder, copied, log):
    lines = (copied / "metrics.jsonl").read_bytes()
    goes_on(folder, 2)
    assert "already at step 3, past --train.steps 2" in log()
    assert (copied / "metrics.jsonl").read_bytes() == lines and os.listdir(copied / "checkpoints") == ["3"]
