"""What is kept on this machine from one start to the next."""

import os
import platform
from pathlib import Path


def cache_folder() -> Path:
    """~/.cache/ling_jax, or where XDG_CACHE_HOME says."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "ling_jax"


def cpu_flags() -> str:
    """What the processor offers, as far as the system says: a cache may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
