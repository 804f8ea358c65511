"""Files of the Hugging Face hub in its library's cache, each compared with its hash before it is used.

`huggingface_hub` downloads, goes on after a broken connection, and keeps two processes from disturbing each other; it
checks sizes only. Here each new file is read for its hash: the SHA-256 of what the hub keeps as large files, git's own
of the others. An empty file in our cache folder remembers that, until the file changes.
"""

import contextlib
import hashlib
import inspect
import logging
import os
import pathlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ling_jax.files.cache import cache_folder
from ling_jax.files.progress import ByteProgress

log = logging.getLogger(__name__)

THREADS = 4  # files at a time
WAITS = (1.0, 5.0, 20.0)  # seconds before a file whose connection was lost is asked for again, as a whole
READ_BYTES = 4 << 20
CHUNK_BYTES = 1 << 18  # written at a time, and lost when a connection breaks; the library's own choice is 10 MB
LEFT_SECONDS = 3600.0  # after which an unfinished file that does not grow is nobody's
TRANSPORTS = ("httpx", "httpx2")  # loggers: the library's versions differ in it
SHA1, SHA256 = 40, 64  # hexadecimal digits


class File(NamedTuple):
    """A file as the hub describes it; None where it says nothing."""

    size: int | None
    hash: str | None


class Snapshot(NamedTuple):
    """One commit of a model; where the hub is not asked, `files` may be only those of the cache."""

    name: str  # as it was asked for
    repo: str
    commit: str
    files: dict[str, File]
    online: bool

    @property
    def folder(self) -> pathlib.Path:
        return home(self.repo) / "snapshots" / self.commit


def library(name: str) -> Any:
    """huggingface_hub; ValueError without it, or for an old one."""
    try:
        import huggingface_hub
        import huggingface_hub.constants  # the package loads its parts when they are first asked for
    except ImportError:
        raise ValueError(
            f"{name} is no local folder; to take it from the hub, install its library: pip install huggingface_hub"
        ) from None
    if "tqdm_class" not in inspect.signature(huggingface_hub.hf_hub_download).parameters:  # 1.3 has it
        raise ValueError(
            f"{name} is no local folder, and huggingface_hub {huggingface_hub.__version__} is too old to take it from "
            "the hub: pip install --upgrade huggingface_hub"
        )
    constants = huggingface_hub.constants
    constants.DOWNLOAD_CHUNK_SIZE = min(constants.DOWNLOAD_CHUNK_SIZE, CHUNK_BYTES)
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_without_queries)
    for transport in TRANSPORTS:
        logging.getLogger(transport).addFilter(_without_queries)
    return huggingface_hub


def _without_queries(record: logging.LogRecord) -> bool:
    """Cuts what follows the ? of an address from a library's message: it can be a signature that opens the file."""
    record.msg, record.args = re.sub(r"(?<=\S)\?[^\s'\"]+", "?...", record.getMessage()), ()
    return True


def cache() -> pathlib.Path:
    """The library's folder of models, which HF_HOME moves."""
    from huggingface_hub import constants

    return pathlib.Path(constants.HF_HUB_CACHE).expanduser().absolute()


def home(repo: str) -> pathlib.Path:
    """A model's folder in the cache."""
    return cache() / f"models--{repo.replace('/', '--')}"


def address() -> str:
    """The hub's, without a password that may stand in it."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _kinds(error: Exception) -> set[str]:
    """Names of an error's classes: those of the library's transport differ between its versions."""
    return {kind.__name__ for kind in type(error).__mro__}


def is_out_of_reach(error: Exception) -> bool:
    """Whether it was not the hub that refused."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return status >= 500 or bool(_kinds(error) & {"TransportError", "ConnectionError", "LocalEntryNotFoundError"})


def said(error: Exception, name: str) -> ValueError:
    """An error of the library in one sentence, without addresses of files: they can hold what nobody should read."""
    from huggingface_hub import errors

    if "LocalEntryNotFoundError" in _kinds(error) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what the library met before it looked into its cache
    hub, (repo, _, revision) = address(), name.partition("@")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return ValueError(
            f"{name} is gated: ask for access at {hub}/{repo}, then set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ValueError(f"{repo} has no revision {revision or 'main'}: give a branch, a tag or a commit")
    absent = status in (401, 403, 404) and not isinstance(error, errors.EntryNotFoundError)
    if absent or isinstance(error, errors.RepositoryNotFoundError):
        return ValueError(
            f"{name} is no local folder, and {hub} has no such model for this token: check its spelling, and for a "
            "private one set HF_TOKEN to a token that may read it"
        )
    more = "what is complete is kept: run the same command again to go on"
    if is_out_of_reach(error):
        cause = status or type(error).__name__
        return ValueError(f"{name} is no local folder, and {hub} cannot be reached ({cause}); {more}")
    text = error.strerror if isinstance(error, OSError) and error.strerror else status or type(error).__name__
    return ValueError(f"{name} could not be downloaded from {hub} ({text}); {more}")


def take(snapshot: Snapshot, names: Sequence[str]) -> None:
    """Downloads the files that are missing, and checks those that nobody has checked yet; ValueError as `said`."""
    missing = {name for name in names if not (snapshot.folder / name).exists()}
    if missing and not snapshot.online:
        raise ValueError(
            f"{snapshot.name}: {cache()} lacks {min(missing)}, and the hub is not asked (HF_HUB_OFFLINE, or no "
            "connection): run the same command once where it can be reached"
        )
    if missing:
        _remove_leftovers(snapshot)
        _check_space(snapshot, missing)
    todo = [name for name in names if name in missing or not _mark(snapshot, name).exists()]
    size = sum(snapshot.files[name].size or 0 for name in todo)
    large = any(name.endswith(".safetensors") for name in todo)
    if large:
        log.info("%s: %.2f GB to download or to check", snapshot.name, size / 1e9)
    stop = threading.Event()
    with ByteProgress(size) if large else contextlib.nullcontext() as bar, ThreadPoolExecutor(THREADS) as pool:
        advance = bar.advance if bar is not None else _unseen
        try:
            for done in as_completed([pool.submit(_take_one, snapshot, name, advance, stop) for name in todo]):
                done.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _remove_leftovers(snapshot: Snapshot) -> None:
    """Removes what killed downloads have left: the library begins a file anew under another name, and never looks back.
    One that is under way is written to all the time."""
    for file in (home(snapshot.repo) / "blobs").glob("*.incomplete"):
        with contextlib.suppress(OSError):  # another process was faster
            if time.time() - file.stat().st_mtime > LEFT_SECONDS:
                file.unlink()


def _unseen(size: int) -> None:
    """Shows nothing of small files, nor of what is checked right after its download."""


def _check_space(snapshot: Snapshot, missing: Iterable[str]) -> None:
    blobs = home(snapshot.repo) / "blobs"  # other commits may have brought some of them
    new = (file for name in missing if not (blobs / ((file := snapshot.files[name]).hash or "?")).exists())
    size = sum(file.size or 0 for file in new)
    parent = next(folder for folder in (cache(), *cache().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if size > free:
        raise ValueError(
            f"{snapshot.name} takes {size / 1e9:,.3f} GB more and {cache()} has {free / 1e9:,.3f} GB free: make room, "
            "or name another folder in HF_HOME"
        )


def _take_one(snapshot: Snapshot, name: str, advance: Callable[[int], None], stop: threading.Event) -> None:
    if (snapshot.folder / name).exists():
        return _check(snapshot, name, advance)
    download, bar = library(snapshot.name).hf_hub_download, _bar_class(advance, stop)
    for wait in (*WAITS, None):
        try:
            download(snapshot.repo, name, revision=snapshot.commit, tqdm_class=bar)
            break
        except Exception as error:
            if wait is None or "TransportError" not in _kinds(error):
                raise said(error, snapshot.name) from None
            log.warning("%s: the connection was lost (%s); again in %.0f s", name, type(error).__name__, wait)
            stop.wait(wait)
    _check(snapshot, name, _unseen)


def _bar_class(advance: Callable[[int], None], stop: threading.Event) -> Any:
    """A class that the library takes for a progress bar: it passes a file's bytes on, and can end the download."""

    class Bar:
        total = 0

        def __init__(self, *args: Any, **options: Any):
            pass

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def update(self, size: float | None = 1) -> None:
            if stop.is_set():
                raise InterruptedError("another file failed")
            if size:
                advance(int(size))

        def update_transfer(self, size: float) -> None:
            """Bytes on the wire are not those of the file."""

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **options: None

    return Bar


# Hashes.


def _expected(snapshot: Snapshot, name: str) -> str:
    """The hash that a file must have: the hub's, or, if it is not asked, the name that the library gave it."""
    path = snapshot.folder / name
    found = snapshot.files[name].hash or (os.path.basename(os.readlink(path)) if path.is_symlink() else "")
    if not re.fullmatch(rf"[0-9a-f]{{{SHA1}}}|[0-9a-f]{{{SHA256}}}", found):
        raise ValueError(f"{path} cannot be checked: no hash of it is known; run once where the hub can be reached")
    return found


def _mark(snapshot: Snapshot, name: str) -> pathlib.Path:
    """The empty file that says that a file was checked: its name follows from the file, its size, its time of change
    and its hash, so that a changed file has none."""
    path = (snapshot.folder / name).resolve()
    stat = path.stat()
    facts = f"{path}\n{stat.st_size}\n{stat.st_mtime_ns}\n{_expected(snapshot, name)}"
    return cache_folder() / "hub" / hashlib.sha256(facts.encode()).hexdigest()


def _check(snapshot: Snapshot, name: str, advance: Callable[[int], None]) -> None:
    """ValueError, and the file is gone, if it does not have the hub's hash."""
    path, want, mark = snapshot.folder / name, _expected(snapshot, name), _mark(snapshot, name)
    found = _digest(path, len(want), advance)
    if found == want:
        try:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            log.warning("%s cannot be written (%s): files are checked at every start", mark.parent, error.strerror)
        return
    try:
        for piece in _chain(path):
            os.unlink(piece)
        then = "it is removed: run the same command again to download it anew"
    except OSError as error:
        then = f"it cannot be removed ({error.strerror}): remove {path} and the file that it leads to"
    raise ValueError(f"{snapshot.name}: {name} is damaged: its hash is {found}, the hub's {want}; {then}")


def _chain(path: pathlib.Path) -> Iterator[str]:
    """A file and those that it leads to, links first."""
    at = os.fspath(path)
    while os.path.islink(at):
        following = os.path.join(os.path.dirname(at), os.readlink(at))
        yield at
        at = following
    yield at


def _digest(path: pathlib.Path, digits: int, advance: Callable[[int], None]) -> str:
    """A file's SHA-256, or git's SHA-1 of it, which begins with its size."""
    size = path.stat().st_size
    found = hashlib.sha256() if digits == SHA256 else hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            found.update(data)
            advance(len(data))
    return found.hexdigest()
