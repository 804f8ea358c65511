"""The one place that knows paths: a local one, gs://BUCKET/... or s3://BUCKET/...

Whatever takes a path from a user asks `at`, or `local` where it cannot be in a bucket.
"""

import contextlib
import io
import os
import pathlib
import re
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import tensorstore as ts
from etils import epath

from ling_jax.files import buckets
from ling_jax.files.buckets import is_bucket

BLOCK = 8 << 20  # bytes of a request for a part of an object
AHEAD = 4  # requests for the next parts of a stream, under way at a time

Path = str | os.PathLike[str]


def at(path: Path) -> epath.Path:
    """A user's path, with ~ expanded; no request is made.

    Raises:
      ValueError: for a scheme that is not known, a bucket without a name, or one whose package is not installed.
    """
    text = os.fspath(path)
    if found := re.match(r"(gs|s3):/*", text):
        if found[0] != f"{found[1]}://" or not re.match(r"[^/]+(/|$)", text[found.end() :]):
            raise ValueError(f"{text}: a path in a bucket is {found[1]}://BUCKET/FOLDER, given as a string")
        buckets.prepare(found[1])
        return epath.Path(text.rstrip("/"))
    if "://" in text:
        raise ValueError(f"{text}: only local paths, gs://BUCKET/... and s3://BUCKET/... are known")
    return epath.Path(text).expanduser()


def local(path: Path, what: str) -> pathlib.Path:
    """A user's path to what must be on this machine; ValueError for one in a bucket."""
    if is_bucket(at(path)):
        raise ValueError(f"{what} {os.fspath(path)} must be a local path: it cannot be in a bucket")
    return pathlib.Path(at(path))


def check_bucket(path: Path) -> None:
    """One request, before any work: ValueError if a path's bucket is not there, or not for this account."""
    if not is_bucket(path):
        return
    try:
        buckets.file_system(path).info(buckets.bucket_of(path))
    except FileNotFoundError:
        raise ValueError(f"{buckets.bucket_of(path)}: there is no such bucket: look at its name") from None


def write_whole(path: epath.Path, data: bytes | str) -> None:
    """Writes a file that others see whole or not at all; its folder is there."""
    data = data.encode() if isinstance(data, str) else data
    if is_bucket(path):  # an object appears whole
        path.write_bytes(data)
        return
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    temporary.write_bytes(data)
    temporary.replace(path)


@contextlib.contextmanager
def made_locally(folder: epath.Path) -> Iterator[str]:
    """A folder for a library that knows no buckets; what it writes there comes to `folder` in the end."""
    if not is_bucket(folder):
        yield os.fspath(folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield scratch
        for file in sorted(pathlib.Path(scratch).rglob("*")):
            if file.is_file():
                write_whole(folder / file.relative_to(scratch).as_posix(), file.read_bytes())


def aside(path: epath.Path) -> epath.Path:
    """A name beside `path` that nothing has."""
    return path.parent / f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}.{time.time_ns() % 10**6:06d}"


def move(path: epath.Path, to: epath.Path) -> None:
    """Renames a file or a folder. In a bucket every object is copied by the service, then deleted."""
    if not is_bucket(path):
        path.rename(to)
        return
    files = buckets.file_system(path)
    source, target = (os.fspath(one).partition("://")[2] for one in (path, to))
    found = files.find(source) or [source]
    inner = [name for name in found if "/" in name[len(source) + 1 :]]
    outer = [name for name in found if name not in set(inner)]
    # What tells that a folder is whole lies in the folder itself: it comes last, and goes first.
    for some in filter(None, (inner, outer)):
        files.copy(some, [target + name[len(source) :] for name in some])
    for some in filter(None, (outer, inner)):
        files.rm(some)


@dataclass(frozen=True)
class Entry:
    """A file below a folder.

    Attributes:
      name: its path below the folder, with "/".
      stamp: what changes when the file does; equal on all hosts.
      time: of its last change, in seconds since 1970.
    """

    name: str
    size: int
    stamp: str
    time: float


def entries(folder: epath.Path) -> list[Entry]:
    """All files below a folder in a bucket, in the order of their names; one request for a thousand or more."""
    try:
        found: dict[str, dict[str, Any]] = buckets.file_system(folder).find(os.fspath(folder), detail=True)
    except FileNotFoundError:
        return []
    start = len(os.fspath(folder).partition("://")[2].rstrip("/")) + 1
    told = [_entry(name[start:], about) for name, about in found.items() if about.get("type") != "directory"]
    return sorted((one for one in told if one.name and not one.name.endswith("/")), key=lambda one: one.name)


def entry(file: epath.Path) -> Entry:
    """A file in a bucket; FileNotFoundError if it is not there."""
    return _entry(file.name, buckets.file_system(file).info(os.fspath(file)))


def _entry(name: str, about: dict[str, Any]) -> Entry:
    mark = about.get("generation") or about.get("ETag") or about.get("etag") or ""
    changed = about.get("mtime") or about.get("LastModified") or about.get("last_modified")
    when = changed.timestamp() if changed is not None and hasattr(changed, "timestamp") else 0.0
    return Entry(name, int(about["size"]), f"{about['size']} {mark}", when)


# Reading parts of objects.


class Ranges:
    """One object of a bucket, read by ranges; for any number of threads.

    Raises:
      ValueError: one sentence, where it cannot be read, is gone, or changed since the first range.
    """

    def __init__(self, path: epath.Path):
        self.path = path
        self._store = buckets.open_store(path.parent)
        self._generation: bytes | None = None

    def start(self, begin: int, end: int) -> Callable[[], bytes]:
        """Begins to read bytes begin .. end - 1; the call gives them."""
        reading = self._store.read(self.path.name, byte_range=slice(begin, end))
        return lambda: self._finish(reading, end - begin)

    def read(self, begin: int, end: int) -> bytes:
        return self.start(begin, end)()

    def _finish(self, reading: "ts.Future[ts.KvStore.ReadResult]", size: int) -> bytes:
        try:
            found = reading.result()
        except Exception as error:  # TensorStore's own kinds
            if "OUT_OF_RANGE" in str(error):
                raise self._changed() from error
            raise buckets.failure(self.path, error) from error
        if found.state != "value":
            raise ValueError(f"{self.path} is missing")
        generation = self._generation = self._generation or found.stamp.generation
        if found.stamp.generation != generation or len(found.value) != size:
            raise self._changed()
        return found.value

    def _changed(self) -> ValueError:
        return ValueError(f"{self.path} changed while it was read: leave it alone, and run the same command again")


class ObjectFile(io.RawIOBase):
    """An object of a bucket as a file that can be sought; subclasses say how its bytes are read.

    Args:
      size: of the object, in bytes.
    """

    def __init__(self, path: epath.Path, size: int):
        self._ranges, self._size, self._at = Ranges(path), size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at


class _Stream(ObjectFile):
    """An object as a file: while it is read on and on, AHEAD blocks are under way."""

    def __init__(self, path: epath.Path, size: int):
        super().__init__(path, size)
        self._ahead = 1  # grows while the reading goes straight on
        self._waiting: deque[tuple[int, Callable[[], bytes]]] = deque()  # (where it begins, block)
        self._block, self._begin = b"", 0

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._size:
            return 0
        if not self._begin <= self._at < self._begin + len(self._block):
            self._next_block()
        data = memoryview(self._block)[self._at - self._begin :][: len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _next_block(self) -> None:
        if self._at == self._begin + len(self._block):
            self._ahead = min(self._ahead + 1, AHEAD)
        else:
            self._waiting.clear()
            self._ahead = 1
        at = self._waiting[-1][0] + BLOCK if self._waiting else self._at
        while len(self._waiting) < self._ahead and at < self._size:
            self._waiting.append((at, self._ranges.start(at, min(at + BLOCK, self._size))))
            at += BLOCK
        self._begin, block = self._waiting.popleft()
        self._block = block()


def open_to_read(file: epath.Path, size: int | None = None) -> io.BufferedReader:
    """A file's bytes, which may be sought; of one in a bucket some AHEAD blocks are in memory.

    Args:
      size: of one in a bucket, where it is known: it is not asked for then.
    """
    if not is_bucket(file):
        return open(file, "rb")
    return io.BufferedReader(_Stream(file, entry(file).size if size is None else size), 1 << 20)
