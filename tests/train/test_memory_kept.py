"""Freed memory stays with a process that trains on CPU; its numbers are as ever."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ling_jax.train import hardware
from tests.tiny_run import REPO

# System time of taking and freeing 64 MB a hundred times, every page of it touched.
PROGRAM = """
import ctypes, resource, sys
from ling_jax.train.hardware import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
library, size = ctypes.CDLL(None), 64 << 20
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    block = library.malloc(ctypes.c_size_t(size))
    ctypes.memset(block, 1, size)
    library.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""


def faults(kind: str, tunables: str | None = None) -> int:
    """Page faults of the program."""
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    env |= {} if tunables is None else {"GLIBC_TUNABLES": tunables}
    done = subprocess.run([sys.executable, "-c", PROGRAM, kind], cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_pages_are_not_taken_anew_at_every_step():
    given_back, kept = faults("given back"), faults("kept")
    assert kept * 20 < given_back, f"{kept} page faults, {given_back} without"
    assert faults("kept", "glibc.malloc.mmap_threshold=65536") * 2 > given_back, "a user's own settings are left alone"


def test_only_where_the_device_is_a_cpu(monkeypatch):
    asked = []
    library = SimpleNamespace(mallopt=lambda *option: asked.append(option))
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: library)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(hardware.jax, "devices", lambda: [SimpleNamespace(platform="tpu")])
    hardware.keep_freed_memory()
    assert asked == []
    monkeypatch.setattr(hardware.jax, "devices", lambda: [SimpleNamespace(platform="cpu")])
    hardware.keep_freed_memory()
    assert len(asked) == len(hardware.MALLOC)
