"""The C++ kernels under gcc's address and undefined-behaviour sanitizers: nothing outside an array, no overflow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.marks import nightly
from tests.tiny_run import REPO

# As kernels/native.py calls a compiler, with the sanitizers and at -O1, where they are found at the line they are in.
COMPILER = """#!/usr/bin/env bash
exec {compiler} "${{@/-O3/-O1}}" -g -fsanitize=address,undefined -fno-sanitize-recover=undefined
"""


def library(name: str) -> str:
    """The path of one of gcc's own libraries."""
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def sanitized(tmp_path, monkeypatch):
    """A compiler and an environment in which every kernel is built with sanitizers."""
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER.format(compiler="g++"))
    compiler.chmod(0o755)
    libraries = [library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    if any("/" not in path for path in libraries):
        pytest.skip("gcc's sanitizers are not installed")
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0:halt_on_error=1")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return {"LD_PRELOAD": ":".join(libraries)}


def run(code: list[str], preload: dict[str, str]) -> subprocess.CompletedProcess[str]:
    env = os.environ | preload
    return subprocess.run([sys.executable, *code], cwd=REPO, env=env, capture_output=True, text=True, timeout=1800)


# Some tests of the kernels: experts', attention's over a cache, lightning attention's.
SOME = "read_in_their_stack or random_shapes or pieces_of_prompts or row_may_be_cut"


@pytest.mark.parametrize("part", [SOME, nightly("")])
def test_kernels_and_their_gradients_stay_inside_their_arrays(sanitized, part):
    files = [f"tests/kernels/test_{name}.py" for name in ("native_experts", "native_cached", "lightning")]
    only = ["-k", part] if part else []
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *only], sanitized)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]
    assert "runtime error" not in done.stderr and "AddressSanitizer" not in done.stderr
    [library] = Path(os.environ["XDG_CACHE_HOME"]).rglob("native-*.so")  # it was this one that ran
    assert b"__asan_report_load" in library.read_bytes() and b"__ubsan_handle" in library.read_bytes()
