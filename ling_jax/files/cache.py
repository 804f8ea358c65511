"""The cache: files that this machine keeps from one start to the next."""

import os
import platform
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """~/.cache/ling_jax, or where XDG_CACHE_HOME says; it may be one that cannot be made."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path(os.path.expanduser("~/.cache"))) / "ling_jax"


def can_write(folder: Path) -> bool:
    """Makes a folder; whether files can be written to it. Services and containers often have no home."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def cpu_flags() -> str:
    """The processor's instruction sets, as far as the system says: a cache may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
