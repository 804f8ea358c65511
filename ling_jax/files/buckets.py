"""How buckets are reached: packages, where their services are, retries, and what went wrong in one sentence.

gs:// and s3:// are reached in two ways, which retry alike: TensorStore reads and writes what is large (arrays, ranges
of objects), gcsfs and s3fs what is small, and they upload what is written as a stream. A request is tried again on 408,
429, 5xx and a broken connection, ATTEMPTS times with longer and longer waits. Once that was in vain, others are tried
once for a while, so that a program whose bucket is out of reach ends soon.

  STORAGE_EMULATOR_HOST, TENSORSTORE_GCS_HTTP_URL       a service that speaks Google's protocol; either means both
  AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL                 one that speaks Amazon's
  AWS_REGION, AWS_DEFAULT_REGION                        us-east-1 by default where there is an endpoint
"""

import asyncio
import contextlib
import functools
import importlib.util
import io
import logging
import os
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import unquote

import tensorstore as ts

log = logging.getLogger(__name__)

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # by scheme
# Loggers: what fails is told once, here.
TRANSPORTS = ("fsspec", "gcsfs", "s3fs", "aiobotocore", "botocore", "google", "urllib3")
ATTEMPTS = 7
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0  # seconds between attempts: 23.5 together, and up to half of that at random
TOGETHER = 60.0  # seconds after attempts in vain in which others are not repeated
LOG_SECONDS = 10.0  # between two lines about retries
PASSING = {408, 429, 500, 502, 503, 504}  # answers after which a request is tried again
REFUSED = {301, 307, 401, 403}
BROKEN = ("aiohttp", "botocore", "requests", "urllib3", "google.auth")  # packages whose errors of connections pass


def is_bucket(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def scheme_of(path: str | os.PathLike[str]) -> str:
    """ "gs" or "s3"; "" for a local path."""
    return os.fspath(path).partition("://")[0] if "://" in os.fspath(path) else ""


def bucket_of(path: str | os.PathLike[str]) -> str:
    """ "gs://BUCKET" of a path in one."""
    scheme, _, rest = os.fspath(path).partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


@functools.cache
def prepare(scheme: str) -> None:
    """Makes `epath` and `fsspec` reach buckets as this module says; ValueError without the package."""
    package = PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{scheme}:// needs the package {package}, which is not installed: pip install {package}")
    for name in TRANSPORTS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    import fsspec

    if scheme == "gs":
        _settle_emulator()
        fsspec.register_implementation("gcs", _google(), clobber=True)
        fsspec.register_implementation("gs", _google(), clobber=True)
    else:
        fsspec.register_implementation("s3", _amazon(), clobber=True)


def file_system(path: str | os.PathLike[str]) -> Any:
    """fsspec's file system for a path in a bucket, the one that `epath` uses."""
    import fsspec

    scheme = scheme_of(path)
    prepare(scheme)
    return fsspec.filesystem("gcs", finalize_on_close=True) if scheme == "gs" else fsspec.filesystem("s3")


# Where a service is.


def _settle_emulator() -> None:
    host, url = os.environ.get("STORAGE_EMULATOR_HOST"), os.environ.get("TENSORSTORE_GCS_HTTP_URL")
    if not (host or url):
        return
    address = str(host or url)
    address = address if "://" in address else f"http://{address}"
    os.environ.setdefault("STORAGE_EMULATOR_HOST", address)
    os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", address)
    os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # TensorStore asks for credentials all the same


def store_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """TensorStore's key-value store of a folder in a bucket, to be opened in `context`."""
    prepare(scheme_of(path))
    scheme, _, rest = os.fspath(path).partition("://")
    bucket, _, folder = rest.partition("/")
    store: dict[str, Any] = {
        "driver": "gcs" if scheme == "gs" else "s3",
        "bucket": bucket,
        "path": folder.rstrip("/") + "/" * bool(folder),
    }
    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        store |= {"endpoint": endpoint} if endpoint else {}
        store |= {"aws_region": region or "us-east-1"} if region or endpoint else {}
        if "AWS_ACCESS_KEY_ID" in os.environ:
            store["aws_credentials"] = {"type": "environment"}
    return store


@functools.cache
def context(attempts: int = ATTEMPTS) -> ts.Context:
    """TensorStore's, for buckets and local files; made when it is used: it would not survive a fork."""
    wait = {"max_retries": attempts - 1, "initial_delay": f"{FIRST_WAIT}s", "max_delay": f"{LONGEST_WAIT}s"}
    return ts.Context({"file_io_concurrency": {"limit": 128}, "gcs_request_retries": wait, "s3_request_retries": wait})


def open_store(path: str | os.PathLike[str], attempts: int = ATTEMPTS) -> ts.KvStore:
    """The objects of a folder, by their names in it."""
    return ts.KvStore.open(store_of(path), context=context(attempts)).result()


# Retries.


class _Retries:
    """Counts the requests that had to be repeated, for the log, and knows whether trying again is worth while."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._logged = self._in_vain = -float("inf")

    def attempts(self) -> int:
        return 1 if time.monotonic() - self._in_vain < TOGETHER else ATTEMPTS

    def gave_up(self) -> None:
        self._in_vain = time.monotonic()

    def add(self, why: str) -> None:
        with self._lock:
            self._counts[why] = self._counts.get(why, 0) + 1
            if time.monotonic() - self._logged < LOG_SECONDS:
                return
            self._logged = time.monotonic()
        log.warning("%s", self.told())

    def told(self) -> str:
        """One line with all counts; "" if nothing was repeated."""
        counts = dict(self._counts)
        for driver in ("gcs", "s3"):
            for metric in ts.experimental_collect_matching_metrics(f"/tensorstore/kvstore/{driver}/retries"):
                if found := sum(int(value.get("value", 0)) for value in metric["values"]):
                    counts["of arrays and ranges"] = counts.get("of arrays and ranges", 0) + found
        told = ", ".join(f"{count} {why}" for why, count in sorted(counts.items()))
        return f"requests to buckets that were repeated: {sum(counts.values())} ({told})" if counts else ""


retries = _Retries()


def log_retries() -> None:
    """Tells at a program's end how many requests were repeated, if any were."""
    if told := retries.told():
        log.info("%s", told)


async def _retried(path: str, call: Callable[[], Awaitable[Any]]) -> Any:
    """Returns what `call` gives; raises `failure` where it is refused or out of reach, the library's own error for
    other answers."""
    attempts = retries.attempts()
    for attempt in range(1, attempts + 1):
        try:
            return await call()
        except Exception as error:
            why = _passing(error)
            if why is None and not _is_refusal(error):
                raise
            if why is None or attempt == attempts:
                raise failure(path, error) from error
            retries.add(why)
            await asyncio.sleep(min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT) * random.uniform(1, 1.5))


def _is_refusal(error: BaseException) -> bool:
    """Whether no request of this kind would be answered: credentials, permissions, another region."""
    named = any("Credential" in type(one).__name__ for one in (error, error.__cause__))
    statuses = {_status(one) for one in (error, error.__cause__) if one is not None}
    return bool(named or isinstance(error, PermissionError) or "Forbidden" in str(error) or statuses & REFUSED)


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of a transport."""
    response = getattr(error, "response", None)
    found: Any = getattr(error, "code", None) or getattr(error, "status", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode", found)
    return int(found) if str(found).isdigit() else None


def _passing(error: BaseException) -> str | None:
    """Why a request may be tried again; None if it may not."""
    for one in (error, error.__cause__):
        if one is None:
            continue
        status = _status(one)
        if status is not None:
            return f"after {status}" if status in PASSING else None
        if "ProxyError" in type(one).__name__:  # how gcsfs calls 502
            return "after 502"
        broken = type(one).__module__.startswith(BROKEN) and "Credential" not in type(one).__name__
        if broken or isinstance(one, TimeoutError | ConnectionError):
            return "after a broken connection"
    return None


class _Written(io.BytesIO):
    """A file that is written as one object, by one request: repeated, it does what it did."""

    def __init__(self, path: str):
        super().__init__()
        self._path = path

    def close(self) -> None:
        if not self.closed:
            folder, _, name = self._path.rpartition("/")
            try:
                open_store(folder, retries.attempts()).write(name, self.getvalue()).result()
            except ValueError as error:  # TensorStore's
                raise failure(self._path, error) from error
            finally:
                super().close()


def _small(path: str, mode: str) -> io.BytesIO:
    """An object in memory, as `epath` opens it to read or to write all of it; FileNotFoundError if it is not there."""
    if mode == "wb":
        return _Written(path)
    folder, _, name = path.rpartition("/")
    try:
        found = open_store(folder, retries.attempts()).read(name).result()
    except ValueError as error:  # TensorStore's
        raise failure(path, error) from error
    if found.state != "value":
        raise FileNotFoundError(path)
    return io.BytesIO(found.value)


@functools.cache
def _google() -> type:
    from fsspec.asyn import sync_wrapper
    from gcsfs.core import GCSFileSystem

    once = getattr(GCSFileSystem._request, "__wrapped__", GCSFileSystem._request)  # without the library's own retries

    class Google(GCSFileSystem):
        """Without the cache of listings: other hosts write too."""

        def __init__(self, *args: Any, **settings: Any):
            super().__init__(*args, **{"use_listings_cache": False, "requests_timeout": 60.0} | settings)

        async def _request(self, *args: Any, **settings: Any) -> Any:
            where = re.search(r"/b/([^/?]+)(?:/o/([^/?]+))?", self._format_path(args[1], args[2:]))
            path = f"gs://{where[1]}/{unquote(where[2] or '')}" if where else "gs://"
            return await _retried(path, lambda: once(self, *args, **settings))

        async def _rm(self, path: Any, *args: Any, **settings: Any) -> Any:
            """Deletes, like Amazon's, also what is not there: a request repeated by us, or by aiohttp unseen, finds
            nothing where the one before it has deleted."""
            try:
                return await super()._rm(path, *args, **settings)
            except FileNotFoundError:
                return [path]

        rm = sync_wrapper(_rm)  # the library's own would call the library's own

        def open(self, path: str, mode: str = "rb", block_size: int | None = None, **settings: Any) -> Any:
            if mode in ("rb", "wb") and block_size is None:
                return _small(f"gs://{path.removeprefix('gs://')}", mode)
            return super().open(path, mode, block_size, **settings)

    return Google


@functools.cache
def _amazon() -> type:
    from fsspec.asyn import sync_wrapper
    from s3fs import S3FileSystem

    class Amazon(S3FileSystem):
        """Without the cache of listings: other hosts write too."""

        retries = 1

        def __init__(self, *args: Any, **settings: Any):
            own = {"retries": {"mode": "standard", "total_max_attempts": 1}}
            settings = {"use_listings_cache": False, "config_kwargs": own} | settings
            super().__init__(*args, **settings)

        async def _call_s3(self, *args: Any, **settings: Any) -> Any:
            path = f"s3://{settings.get('Bucket', '')}/{settings.get('Key') or settings.get('Prefix') or ''}"
            return await _retried(path, lambda: super(Amazon, self)._call_s3(*args, **settings))

        call_s3 = sync_wrapper(_call_s3)  # what files that are uploaded call: it would be the library's own else

        async def _cat_file(self, path: str, *args: Any, **settings: Any) -> Any:  # which reads in its own way
            return await _retried(path, lambda: super(Amazon, self)._cat_file(path, *args, **settings))

        def open(self, path: str, mode: str = "rb", block_size: int | None = None, **settings: Any) -> Any:
            if mode in ("rb", "wb") and block_size is None:
                return _small(f"s3://{path.removeprefix('s3://')}", mode)
            return super().open(path, mode, block_size, **settings)

    return Amazon


# What went wrong.

SENTENCES = (  # (words of an error, what they mean)
    (r"NoSuchBucket|bucket does not exist|no such bucket", "there is no such bucket: look at its name"),
    (
        r"NoCredentials|Unable to locate credentials|UNAUTHENTICATED|\b401\b|Anonymous caller|DefaultCredentialsError",
        "no valid credentials: log in ({login}), or set {variable}",
    ),
    (
        r"PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocation|must be addressed using|region .* is wrong",
        "it is in another region: set AWS_REGION to the bucket's",
    ),
    (
        r"AccessDenied|Forbidden|PERMISSION_DENIED|PermissionError|\b403\b|InvalidAccessKeyId|SignatureDoesNotMatch",
        "no permission: give this account the right to {right} there",
    ),
)
LOGINS = {"gs": "gcloud auth application-default login", "s3": "aws configure"}
VARIABLES = {"gs": "GOOGLE_APPLICATION_CREDENTIALS", "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"}
RIGHTS = {"gs": "read, list, create and delete objects", "s3": "GetObject, ListBucket, PutObject and DeleteObject"}


class Unreachable(ValueError):
    """A request that was refused, or not answered: it says nothing of what is in the bucket."""


def failure(path: str | os.PathLike[str], error: BaseException) -> Unreachable:
    """The one sentence for an error of TensorStore, gcsfs or s3fs at a path in a bucket."""
    path = os.fspath(path) if is_bucket(path) else f"s3://{os.fspath(path)}"  # as s3fs calls it
    return Unreachable(f"{path.rstrip('/')}: {_meaning(error, scheme_of(path))}")


def _meaning(error: BaseException, scheme: str) -> str:
    told = " ".join(f"{type(one).__name__} {one}" for one in (error, error.__cause__) if one is not None)
    for pattern, sentence in SENTENCES:
        if re.search(pattern, told, re.IGNORECASE):
            return sentence.format(login=LOGINS[scheme], variable=VARIABLES[scheme], right=RIGHTS[scheme])
    retries.gave_up()
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    what = re.sub(r" \[http_response_body=.*", "", first)
    return f"it cannot be reached, after {ATTEMPTS} attempts: {what}; the same command goes on once it can be"


WAY = ("UNAVAILABLE", "DEADLINE", "ABORTED", "UNAUTHENTICATED", "PERMISSION", "INTERNAL", "UNKNOWN", "CANCELLED")


@contextlib.contextmanager
def reaching(path: str | os.PathLike[str]) -> Iterator[None]:
    """Where TensorStore works at a path: its errors about the way to a bucket become `failure`."""
    try:
        yield
    except ValueError as error:
        if scheme_of(path) in PACKAGES and is_out_of_reach(error):
            raise failure(path, error) from error
        raise


def is_out_of_reach(error: BaseException) -> bool:
    """Whether TensorStore's error is about the way to a bucket, and says nothing about what lies there."""
    return str(error).startswith(WAY)
