"""The servers on loopback do what the tests of buckets take for granted."""

import http.client
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ling_jax.files import buckets
from tests.support.buckets import delete, download, get, missing, names, put, server_of, stray_folders, upload
from tests.support.fault_proxy import FaultProxy, Faults, read_counts, set_faults
from tests.tiny_run import REPO

TESTS = REPO / "tests"
ODD = "a folder/ä+%&=?#.bin"


def test_what_is_put_is_got_and_listed(bucket, tmp_path):
    assert names(bucket) == []
    for name in (ODD, "a/b", "a/c/d", "ab"):
        put(f"{bucket}/{name}", name.encode())
    put(f"{bucket}/a/b", b"second")
    assert get(f"{bucket}/{ODD}") == ODD.encode() and get(f"{bucket}/a/b") == b"second"
    assert names(f"{bucket}/a") == ["b", "c/d"] and len(names(bucket)) == 4
    delete(f"{bucket}/a/b")
    with pytest.raises(FileNotFoundError):
        get(f"{bucket}/a/b")
    upload(download(bucket, tmp_path), f"{bucket}/copy")
    assert names(f"{bucket}/copy") == ["a folder/ä+%&=?#.bin", "a/c/d", "ab"]


def test_a_long_listing_is_whole(bucket):
    for number in range(1005):
        put(f"{bucket}/{number:04}", b"")
    assert names(bucket) == [f"{number:04}" for number in range(1005)]


STARTS = """
import pathlib, sys, time
from tests.support.buckets import amazon_server, google_server
with {server} as url:
    print(url, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("scheme", "server"), [("gs", "google_server(pathlib.Path('/nowhere'))"), ("s3", "amazon_server()")]
)
def test_a_server_ends_with_the_process_that_started_it(scheme, server):
    if why := missing(scheme):
        pytest.skip(why)
    command = [sys.executable, "-c", STARTS.format(server=server)]
    starter = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE)
    assert starter.stdout is not None
    port = starter.stdout.readline().decode().strip().rpartition(":")[2]
    assert _listening(port)
    starter.kill()
    starter.wait()
    end = time.monotonic() + 10
    while _listening(port) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _listening(port)


def _listening(port: str) -> bool:
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1].endswith(f":{int(port):04X}") and line.split()[3] == "0A" for line in lines)


# The proxy.


def files_of(bucket: str) -> Any:
    import fsspec

    return fsspec.filesystem("gcs" if bucket.startswith("gs") else "s3", use_listings_cache=False)


def test_uploads_of_every_kind_come_through_whole(bucket):
    files, data = files_of(bucket), os.urandom(13 << 20)
    files.pipe_file(f"{bucket}/one", data[:1000])
    with files.open(f"{bucket}/stream", "wb", block_size=5 << 20) as file:  # resumable, or of several parts
        file.write(data)
    files.copy(f"{bucket}/stream", f"{bucket}/copy")
    assert get(f"{bucket}/one") == data[:1000] and get(f"{bucket}/stream") == data and get(f"{bucket}/copy") == data
    assert files.cat_file(f"{bucket}/stream", start=5_000_000, end=5_000_100) == data[5_000_000:5_000_100]
    files.rm([f"{bucket}/one", f"{bucket}/copy"])
    assert names(bucket) == ["stream"]


def test_faults_are_made_counted_and_ended(bucket):
    put(f"{bucket}/a", bytes(1 << 20))
    server = server_of(bucket)
    set_faults(server, Faults(refused=1.0))
    for _ in range(20):
        with pytest.raises(urllib.error.HTTPError) as told:
            get(f"{bucket}/a")
        assert told.value.code in (429, 503)
    counts = read_counts(server)
    assert counts["GET"] == 20 == counts["429"] + counts["503"] and min(counts["429"], counts["503"]) > 2

    set_faults(server, Faults(delayed=1.0, seconds=0.3))
    begun = time.monotonic()
    assert len(get(f"{bucket}/a")) == 1 << 20 and time.monotonic() - begun > 0.3

    set_faults(server, Faults(cut=1.0))
    with pytest.raises((OSError, http.client.HTTPException)):
        get(f"{bucket}/a")
    for number in range(16):
        with pytest.raises((OSError, http.client.HTTPException)):
            put(f"{bucket}/cut/{number}", bytes(1 << 20))
    assert read_counts(server)["cut"] == 17
    set_faults(server, Faults())
    done = len(names(f"{bucket}/cut"))
    assert 0 < done < 16  # some reached the server, whose answer got lost
    assert all(len(get(f"{bucket}/cut/{name}")) == 1 << 20 for name in names(f"{bucket}/cut"))


@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_a_part_of_an_upload_that_comes_twice_is_taken_once(bucket):
    """As where the answer to the first got lost."""
    server, data = server_of(bucket), os.urandom(3 << 18)

    def send(method: str, url: str, body: bytes, **headers: str) -> tuple[int, Any]:
        request = urllib.request.Request(url, body, {name.replace("_", "-"): v for name, v in headers.items()})
        request.method = method
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.headers

    name = bucket.removeprefix("gs://")
    _, headers = send("POST", f"{server}/upload/storage/v1/b/{name}/o?uploadType=resumable&name=b%2Fa", b"{}")
    session, half = headers["Location"].replace("b/a", "b%2Fa"), len(data) // 3 * 2
    first = dict(Content_Range=f"bytes 0-{half - 1}/*")
    last = dict(Content_Range=f"bytes {half}-{len(data) - 1}/{len(data)}")
    assert [send("PUT", session, data[:half], **first)[0] for _ in range(2)] == [308, 308]
    assert [send("PUT", session, data[half:], **last)[0] for _ in range(2)] == [200, 200]
    assert session.startswith(server) and get(f"{bucket}/b/a") == data


def test_the_same_seed_gives_the_same_faults():
    def draws(seed: int) -> list[str]:
        proxy = FaultProxy("http://127.0.0.1:9")
        proxy.server_close()
        proxy.faults = Faults(0.2, 0.2, 0.2, seed=seed)
        return [proxy.draw() for _ in range(1000)]

    assert draws(1) == draws(1) != draws(2)
    counts = Counter(draws(1))
    assert 350 < counts[""] < 450 and all(70 < counts[what] < 130 for what in ("429", "503")), counts


@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_of_many_that_create_an_object_one_does(bucket):
    def create(number: int) -> int:
        query = f"uploadType=media&name=lease&ifGenerationMatch={match}"
        url = f"{server_of(bucket)}/upload/storage/v1/b/{bucket.removeprefix('gs://')}/o?{query}"
        try:
            return int(json.load(urllib.request.urlopen(url, str(number).encode()))["generation"])
        except urllib.error.HTTPError as error:
            assert error.code == 412
            return 0

    match = 0
    with ThreadPoolExecutor(16) as pool:
        for _ in range(5):  # each takes over from the one before
            made = list(filter(None, pool.map(create, range(16))))
            assert len(made) == 1
            match = made[0]
    files = files_of(bucket)
    with pytest.raises(FileExistsError):
        files.pipe_file(f"{bucket}/lease", b"", mode="create")
    address = f"{server_of(bucket)}/storage/v1/b/{bucket.removeprefix('gs://')}/o/lease?ifGenerationMatch="
    with pytest.raises(urllib.error.HTTPError, match="412"):
        urllib.request.urlopen(urllib.request.Request(address + "7", method="DELETE"))
    urllib.request.urlopen(urllib.request.Request(address + str(match), method="DELETE"))
    assert names(bucket) == []


def test_conditional_writes_of_tensorstore_hold_or_not(bucket):
    store = buckets.open_store(bucket)
    missing = store.read("a").result().stamp.generation
    first = store.write("a", b"1", if_equal=missing).result().generation
    assert store.write("a", b"2", if_equal=missing).result().generation == b""
    second = store.write("a", b"3", if_equal=first).result().generation
    assert second not in (b"", first) and get(f"{bucket}/a") == b"3"
    assert store.write("a", b"4", if_equal=first).result().generation == b"" and get(f"{bucket}/a") == b"3"


# Where a bucket's address was taken for a local path.


def test_folders_called_as_a_scheme_are_found(tmp_path):
    (tmp_path / "a" / "gs:" / "bucket").mkdir(parents=True)
    (tmp_path / "b" / "s3:").mkdir(parents=True)
    (tmp_path / "c" / "gs").mkdir(parents=True)
    try:
        assert stray_folders(tmp_path) == [str(tmp_path / "a" / "gs:"), str(tmp_path / "b" / "s3:")]
    finally:
        shutil.rmtree(tmp_path)


def test_a_session_that_leaves_one_fails(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_it(tmp_path):\n    (tmp_path / 'gs:').mkdir()\n")
    (tmp_path / "pytest.ini").touch()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "--basetemp", "temporary", "test_it.py"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    try:
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 1 and "1 passed" in done.stdout, done.stdout + done.stderr
        assert "taken for a local path: " in done.stdout and "/gs:" in done.stdout
    finally:
        shutil.rmtree(tmp_path)
