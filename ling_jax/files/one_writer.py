"""One writer to a folder at a time: a lock where the file system has one, a lease with a heartbeat where it has none.

A lock is the kernel's, on the file `writer.json` in the folder: it ends with the process, however that ends. Network
file systems lock per host, if at all, and buckets not at all. There the file is a lease: its holder writes it anew
every few seconds, and whoever finds it unchanged for long enough takes it over. Both say who holds the folder. Readers
of a folder need neither.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from typing import Any, Protocol

import tensorstore as ts
from etils import epath

from ling_jax.files.buckets import failure, is_bucket, open_store, retries
from ling_jax.files.paths import move

log = logging.getLogger(__name__)

HOLDER = "writer.json"
BEAT_SECONDS = 5.0  # between two signs of life of a lease's holder
STALE_SECONDS = 30.0  # without one, after which the holder is dead
LEASE_ATTEMPTS = 6  # 15 s and more: less than another process waits for a sign of life
SETTLE_SECONDS = 1.0  # until two processes that write a lease at once see whose write was the last
POLL_SECONDS = 0.5
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
LOCAL = {  # file systems
    "apfs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "fuseblk", "jfs", "ntfs3", "overlay", "ramfs", "reiserfs",
    "tmpfs", "vfat", "xfs", "zfs",
}  # fmt: skip


class _Hold(Protocol):
    """A folder is this process's until `release`; `to`: where it has been moved meanwhile."""

    def release(self, to: epath.Path) -> None: ...


class OneWriter:
    """Holds a folder (made if missing) for this process alone, as a context manager.

    Args:
      folder: local or gs://, s3://.
      name: of the file that tells who holds it; what other names stand for may have other writers.
      wait: for another holder to end, instead of refusing.
    Raises:
      ValueError: on entering, if another process holds the folder: which one, since when, and what to do.
    """

    def __init__(self, folder: epath.Path, name: str = HOLDER, wait: bool = False):
        self._folder, self._name, self._wait = folder, name, wait
        self._hold: _Hold | None = None

    def __enter__(self) -> "OneWriter":
        said = False
        while isinstance(found := _take(self._folder, self._name), dict):
            who = _who(found)
            if not self._wait:
                raise ValueError(
                    f"{self._folder} is in use: {who} writes there. Wait until it has ended, or end it; then run the "
                    "same command again"
                )
            if not said:
                log.info("%s is in use: waiting for %s", self._folder / self._name, who)
                said = True
            time.sleep(POLL_SECONDS)
        self._hold = found
        return self

    def __exit__(self, *exception: object) -> None:
        if self._hold is not None:
            self._hold.release(self._folder)
            self._hold = None

    def move(self, to: epath.Path) -> None:
        """Renames the folder and lets go of it."""
        assert self._hold is not None
        if isinstance(self._hold, _Lease):
            self._hold.release(self._folder)
            move(self._folder, to)
        else:
            self._folder.rename(to)
            self._hold.release(to)
        self._hold = None


def _me() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "id": uuid.uuid4().hex}


def _who(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')})"


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:  # being written just now
        return {}
    return value if isinstance(value, dict) else {}


def _take(folder: epath.Path, name: str) -> "_Hold | dict[str, Any]":
    """The hold, or who has it."""
    if is_bucket(folder):
        return _take_lease(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    if not _locks(os.path.realpath(folder)):
        return _take_lease(folder, name)
    try:
        return _take_lock(folder, name)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.info("%s has no locks (%s): a lease takes their place", folder, error)
        return _take_lease(folder, name)


def _locks(path: str) -> bool:
    """Whether locks in a folder hold against every process that may write there: its file system is this host's own."""
    try:
        with open("/proc/mounts") as file:
            mounts = [line.split()[1:3] for line in file]
    except OSError:
        return True  # no Linux: nothing is known of its mounts
    found = ("", "")
    for at, kind in mounts:
        at = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), at)
        inside = path == at or path.startswith(at.rstrip("/") + "/")
        if inside and len(at) >= len(found[0]):
            found = (at, kind)
    return found[1] in LOCAL


class _Lock(_Hold):
    def __init__(self, file: int, name: str):
        self._file, self._name = file, name

    def release(self, to: epath.Path) -> None:
        (to / self._name).unlink(missing_ok=True)  # while it is held: who waits for this file sees that it is gone
        os.close(self._file)


def _take_lock(folder: epath.Path, name: str) -> "_Lock | dict[str, Any]":
    path = os.fspath(folder / name)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                with contextlib.suppress(OSError):  # a full disk: only the others' message needs it
                    os.ftruncate(file, 0)
                    os.pwrite(file, json.dumps(_me()).encode(), 0)
                return _Lock(file, name)
        except BlockingIOError:
            holder = _parsed(os.pread(file, 1 << 16, 0))
            os.close(file)
            return holder
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the one who held it has removed the file, or moved the folder: once more


def _is_at(file: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


class _Lease(_Hold):
    """A lease that a thread renews; losing it, to a process that took this one for dead, ends this process."""

    def __init__(self, folder: epath.Path, name: str, value: dict[str, Any], generation: bytes):
        self._folder, self._name, self._value, self._generation = folder, name, value, generation
        self._store = _store_of(folder)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self._value["beat"] = self._value.get("beat", 0) + 1
            try:
                lost = _is_of_another(self._store, self._name, self._value)
                generation = None if lost else _put(self._store, self._name, self._value, self._generation)
            except Exception as error:  # a bucket out of reach: for the others too
                log.warning("cannot renew %s: %s", self._name, str(error).splitlines()[0])
                continue
            if generation is None:
                log.critical("another process has taken the run's folder over: this one ends, and writes nothing more")
                os._exit(1)
            self._generation = generation

    def release(self, to: epath.Path) -> None:
        self._ended.set()
        attempts = retries.attempts()
        self._thread.join(None if attempts > 1 else 1.0)  # a bucket out of reach: it may try for long
        store = _store_of(self._folder, min(attempts, LEASE_ATTEMPTS))
        try:
            if not _is_of_another(store, self._name, self._value):
                store.write(self._name, None, if_equal=self._generation).result()
        except ValueError as error:  # then it grows stale by itself
            log.warning("cannot let go of %s: %s", self._name, str(error).splitlines()[0])


def _put(store: ts.KvStore, name: str, value: dict[str, Any], expected: bytes) -> bytes | None:
    """Writes a lease where it still is what was `expected`; its new generation, None if it is not."""
    generation = store.write(name, json.dumps(value).encode(), if_equal=expected).result().generation
    if not generation:  # or the request was repeated, and the first one had come through
        now = store.read(name).result()
        return now.stamp.generation if _parsed(now.value) == value else None
    return generation


def _is_of_another(store: ts.KvStore, name: str, mine: dict[str, Any]) -> bool:
    """Whether a lease is not there any more, or another's: not every service knows conditions on a write."""
    found = store.read(name).result()
    return found.state != "value" or _parsed(found.value).get("id", mine["id"]) != mine["id"]


def _take_lease(folder: epath.Path, name: str) -> "_Lease | dict[str, Any]":
    store = _store_of(folder)
    try:
        return _take_from(store, folder, name)
    except ValueError as error:  # TensorStore's
        raise failure(folder / name, error) if is_bucket(folder) else error from error


def _store_of(folder: epath.Path, attempts: int = LEASE_ATTEMPTS) -> ts.KvStore:
    if is_bucket(folder):
        return open_store(folder, attempts)
    local = {"driver": "file", "path": f"{folder}/", "file_io_locking": {"mode": "none"}}
    return ts.KvStore.open(local).result()


def _take_from(store: ts.KvStore, folder: epath.Path, name: str) -> "_Lease | dict[str, Any]":
    found = store.read(name).result()
    holder = _parsed(found.value) if found.state == "value" else {}
    if found.state == "value" and not _is_dead_here(holder):
        log.info("%s is held by %s: looking for %.0f s whether it lives", folder, _who(holder), STALE_SECONDS)
        deadline = time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            now = store.read(name).result()
            if now.stamp.generation != found.stamp.generation:
                if now.state == "value":
                    return _parsed(now.value)
                found = now
                break
    mine = _me() | {"boot": _boot()}
    generation = _put(store, name, mine, found.stamp.generation)
    if generation is not None:
        time.sleep(SETTLE_SECONDS)  # a file system compares and writes in two steps, an emulator does not compare
        now = store.read(name).result()
        generation = now.stamp.generation if _parsed(now.value).get("id") == mine["id"] else None
    if generation is None:
        return _parsed(store.read(name).result().value)
    return _Lease(folder, name, mine, generation)


def _boot() -> str:
    """Names the running kernel and this container's process numbers; "" where that cannot be told."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _is_dead_here(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this host, and is no more."""
    if not holder.get("boot") or holder["boot"] != _boot():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
