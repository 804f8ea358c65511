"""Code that runs with kernels built in other ways, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.tiny_run import REPO


def start(code: str, folder: Path, **environment: str) -> subprocess.Popen:
    env = os.environ | {"XDG_CACHE_HOME": str(folder), "PYTHONPATH": str(REPO)} | environment
    setup = "import logging\nlogging.basicConfig(level='INFO')\nfrom ling_jax.kernels import native\n"
    command = [sys.executable, "-c", setup + code]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    """Returns what it logged."""
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said
