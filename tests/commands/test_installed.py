"""The package as `pip install .` leaves it, called from an empty folder: its commands, its configurations."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ling_jax
from ling_jax.cli import named_config
from ling_jax.config import RunConfig
from tests.tiny_run import REPO, train_args

MINE = """
from dataclasses import replace

from ling_jax.config import RunConfig, ScheduleConfig
from ling_jax.configs import ling_tiny


def config() -> RunConfig:
    return replace(ling_tiny.config(), schedule=ScheduleConfig(peak_lr=0.0123))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what the wheel holds; the libraries it needs are those of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*pip, "wheel", *options, str(copy_of_sources(folder))], check=True, capture_output=True, text=True)
    [wheel] = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def copy_of_sources(folder: Path) -> Path:
    """The package's sources, so that building leaves nothing in the checkout."""
    sources = folder / "sources"
    for name in ("ling_jax", "configs"):
        shutil.copytree(REPO / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(REPO / name, sources)
    return sources


@pytest.fixture
def call(installed, tmp_path, monkeypatch):
    """Runs a command of the wheel in an empty folder; returns what it prints."""
    monkeypatch.setenv("PYTHONPATH", str(installed))

    def run(name: str, *args: str) -> str:
        command = [sys.executable, str(installed / "bin" / name), *map(str, args)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_every_command_says_what_it_takes(call):
    names = ("train", "post", "sample", "convert", "evaluate", "chat-evaluate", "prepare")
    for name in (f"ling-{name}" for name in names):
        assert f"usage: {name}" in call(name, "--help")


def test_released_models_and_files_of_ones_own_are_configurations(call, tmp_path):
    printed = json.loads(call("ling-train", "ling_1t", "--print-config"))
    assert printed == json.loads(named_config("ling_1t").to_json())
    (tmp_path / "mine.py").write_text(MINE)
    printed = json.loads(call("ling-train", "mine.py", "--print-config", "--train.steps", "7"))
    assert (printed["schedule"]["peak_lr"], printed["train"]["steps"]) == (0.0123, 7)


def test_a_run_is_trained_sampled_scored_and_exported(call, tmp_path):
    call("ling-train", *train_args(tmp_path, "run", train__steps=20))
    run = str(tmp_path / "runs" / "run")
    assert call("ling-sample", "--checkpoint", run, "--prompt", "def", "--max-new-tokens", "4").startswith("def")
    assert "bits per byte" in call("ling-evaluate", "--checkpoint", run, "--text", str(text_of(tmp_path)))
    call("ling-convert", "to-hf", "--source", run, "--target", str(tmp_path / "hf"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "bailing_moe"


def text_of(folder: Path) -> Path:
    return next(path for path in sorted((folder / "text").rglob("*")) if path.suffix == ".txt")


def test_the_version_is_the_wheels(installed):
    [info] = installed.glob("ling_jax-*.dist-info")
    assert f"Version: {ling_jax.__version__}\n" in (info / "METADATA").read_text()
    assert not os.path.exists(installed / "tests") and (installed / "ling_jax" / "kernels" / "native.cc").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no file .*gone.py; a configuration is a Python file with a function config"),
        ("x = 1", "must have a function config\\(\\) that returns a ling_jax.RunConfig"),
        ("def config():\n    return {}", "must have a function config\\(\\) that returns a ling_jax.RunConfig"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, message):
    file = tmp_path / "gone.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message):
        named_config(str(file))


def test_a_file_is_named_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE.replace("ling_jax.configs", "configs"))
    monkeypatch.chdir(tmp_path)
    found = named_config("./mine.py")
    assert isinstance(found, RunConfig) and found.schedule.peak_lr == 0.0123
