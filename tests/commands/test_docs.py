"""The pages' links lead somewhere. What docs/gpus.md says can be typed: its commands, XLA's flags, `make`."""

import importlib.util
import math
import mmap
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from ling_jax.cli import parse_train
from ling_jax.plan import gpu
from tests.tiny_run import REPO

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
GPUS = (REPO / "docs" / "gpus.md").read_text()
OUTER_MAKE = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "CUDA")  # the environment of a test under `make test`


def anchors(page: Path) -> set[str]:
    """The headings as links name them on GitHub."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> list[str]:
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if name.startswith("http"):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(f"{page.name}: {link}")
    return found


def test_links_between_pages_lead_somewhere():
    assert [link for page in PAGES for link in dead_links(page)] == []


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b`, c: d\n```\n# no heading\n```\n[a](#a-b-c-d) [b](page.md#no-heading) [c](gone.md)\n")
    assert dead_links(page) == ["page.md: page.md#no-heading", "page.md: gone.md"]


# docs/gpus.md.

SIZES = ("nodes", "gpus-per-node")


def train_commands() -> list[list[str]]:
    """The arguments of each `train.py` on the page."""
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", GPUS, re.MULTILINE | re.DOTALL))
    return [shlex.split(line) for line in re.findall(r" train\.py (.*)", blocks.replace("\\\n", " "))]


def test_the_commands_are_ones_that_there_are_and_use_all_gpus():
    gpus = []
    for argv in train_commands():
        _, command = parse_train(argv)
        gpus.append(math.prod(command.config.mesh.shape))
        if command.topology is not None:
            assert gpu.names_gpus(command.topology) and command.topology.endswith(f":{gpus[-1]}")
    nodes, each = (int(re.findall(rf"^#SBATCH --{size}=(\d+)", GPUS, re.MULTILINE)[0]) for size in SIZES)
    assert gpus == [1, 8, 8, nodes * each]


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="JAX's CUDA plugin is not installed")
def test_xla_has_the_flags():
    [plugin] = importlib.util.find_spec("jax_plugins.xla_cuda13").submodule_search_locations
    flags = set(re.findall(r"--(xla_\w+)", GPUS))
    with open(Path(plugin) / "xla_cuda_plugin.so", "rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
            assert {flag for flag in flags if code.find(b"\0%s\0" % flag.encode()) < 0} == set()
    assert len(flags) > 5


# What `make` installs.


def made(folder: Path, *args: str) -> list[str]:
    """The requirements that `make quickstart` would install."""
    env = {name: value for name, value in os.environ.items() if name not in OUTER_MAKE}
    command = ["make", "--dry-run", "quickstart", *args]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    return re.findall(r"make_venv\.sh \.venv (\S+)", done.stdout)


def test_an_environment_made_without_cuda_gets_the_plugin(tmp_path):
    for file in (REPO / "Makefile", *REPO.glob("requirements*.txt")):
        shutil.copy(file, tmp_path)
    (tmp_path / ".venv").mkdir()
    assert made(tmp_path) == ["requirements.txt"] == made(tmp_path, "CUDA=0")
    (tmp_path / ".venv" / "installed-requirements").touch()
    assert made(tmp_path) == [] and made(tmp_path, "CUDA=1") == ["requirements-cuda.txt"]
    (tmp_path / ".venv" / "installed-requirements-cuda").touch()
    assert made(tmp_path) == made(tmp_path, "CUDA=1") == []


def test_with_cuda_jax_has_the_same_bounds():
    def bounds(file: str, name: str) -> str:
        [found] = re.findall(rf"^{re.escape(name)}([<>=].*?)\s*(?:#.*)?$", (REPO / file).read_text(), re.MULTILINE)
        return found

    assert bounds("requirements-cuda.txt", "jax[cuda13]") == bounds("requirements.txt", "jax")
    assert "-r requirements.txt\n" in (REPO / "requirements-cuda.txt").read_text()
