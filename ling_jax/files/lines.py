"""Lines that are appended: to a file, or in a bucket, whose objects cannot grow, to a row of objects.

In a bucket the last object of the row is written anew now and then until it has PART bytes; then the next one begins:
metrics.jsonl, metrics-0001.jsonl, metrics-0002.jsonl, ... So a short record is one object, and of a long one no more
than PART bytes are ever uploaded again.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from ling_jax.files.buckets import is_bucket
from ling_jax.files.paths import write_whole

PART = 4 << 20  # bytes of an object after which the next one begins
UPLOAD_SECONDS = 60.0  # between two uploads of lines to a bucket


def _part(path: epath.Path, number: int) -> epath.Path:
    return path.parent / (f"{path.stem}-{number:04}{path.suffix}" if number else path.name)


def parts_of(path: epath.Path) -> list[epath.Path]:
    """The files that hold the lines, in order; none where nothing was ever appended."""
    if not is_bucket(path):
        return [path] if path.exists() else []
    name = re.compile(re.escape(path.stem) + r"(?:-(\d{4,}))?" + re.escape(path.suffix))
    try:
        found = [name.fullmatch(file.name) for file in path.parent.iterdir()]
    except FileNotFoundError:
        found = []
    numbers = sorted({int(one[1] or 0) for one in found if one})
    return [_part(path, number) for number in numbers]


def read_lines(path: epath.Path) -> Iterator[tuple[bytes, bool]]:
    """Each line without its end, and whether another one follows."""
    waiting: bytes | None = None
    for part in parts_of(path):
        with part.open("rb") as file:
            lines: Iterator[Any] = iter(file)
            for line in lines:
                if waiting is not None:
                    yield waiting, True
                waiting = line.rstrip(b"\n")
    if waiting is not None:
        yield waiting, False


def cut_lines(path: epath.Path, keep: Callable[[bytes], bool]) -> None:
    """Drops the lines at the end that are not to be kept; a kill in the middle leaves some, and damages none."""
    for part in reversed(parts_of(path)):
        lines = part.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and keep(line)]
        if len(kept) == len(lines):
            return
        if kept or not is_bucket(path):
            write_whole(part, b"".join(kept))
            return
        part.unlink()


class _LocalLines:
    """Each line reaches the operating system at once, so killing the process loses none."""

    def __init__(self, path: epath.Path):
        self._file = open(path, "ab")

    def append(self, line: bytes) -> None:
        self._file.write(line + b"\n")
        self._file.flush()

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _RemoteLines:
    def __init__(self, path: epath.Path):
        self._path = path
        parts = parts_of(path)
        self._number = max(len(parts) - 1, 0)
        self._part = bytearray(parts[-1].read_bytes() if parts else b"")
        self._new = False
        self._uploaded = time.monotonic()

    def append(self, line: bytes) -> None:
        if len(self._part) >= PART:
            self.flush()
            self._part, self._number = bytearray(), self._number + 1
        self._part += line + b"\n"
        self._new = True
        if time.monotonic() - self._uploaded >= UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._new:
            write_whole(_part(self._path, self._number), bytes(self._part))
            self._new, self._uploaded = False, time.monotonic()

    def close(self) -> None:
        self.flush()


def open_lines(path: epath.Path) -> _LocalLines | _RemoteLines:
    """To `append` lines (bytes without an end) and `flush` them: to the disk, or to the bucket, where they come once a
    minute by themselves."""
    return _RemoteLines(path) if is_bucket(path) else _LocalLines(path)
