"""Conversion, restore and save in a bucket on loopback against a bare loop of the same requests.

Run it as python -m benchmarks.buckets [--scheme s3] [--megabytes 2048]; JSON on the last line. It needs the packages of
requirements-test.txt.

Each part runs once through a proxy, which notes its requests and how many were under way at once. The bare loop then
sends those of them that carry data (ranges read, objects written: the same sizes in the same order) from as many
threads with Python's own HTTP client, straight to the server as the part itself is timed. Parts and bare loops run in
turns. The rule: the median of the bare loop's seconds is at least 60% of the median of the part's own.
"""

import dataclasses
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlencode, urlsplit

import jax
import numpy as np
import tyro

from ling_jax.checkpoint import Checkpointer
from ling_jax.cli import run_main
from ling_jax.config import CheckpointConfig
from ling_jax.config.text import columns
from ling_jax.convert.to_jax import to_jax
from ling_jax.files.paths import at
from scripts.bucket_memory import make_source, model_of
from tests.support.buckets import SIGNED, amazon_server, environment, google_server, make_bucket
from tests.support.fault_proxy import Asked, FaultProxy

RULE = 0.6
ARRAYS = 16  # of the checkpoint that is saved and restored
PARTS = ("conversion", "save", "restore")
ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    scheme: Literal["gs", "s3"] = "gs"
    megabytes: int = 2048
    """Of the weights that are converted, and of the checkpoint."""
    rounds: int = 5
    only: tuple[str, str] | None = None
    """A part and a bucket: runs it once, to be looked at; used by the benchmark itself."""


def part(name: str, bucket: str, megabytes: int, target: str) -> Callable[[], Any]:
    """The part that is measured; the source of a conversion and the checkpoint to restore are there."""
    folder, config = f"{bucket}/checkpoints", CheckpointConfig(keep_last=1000)
    size = megabytes * 10**6 // 4 // ARRAYS // 1024
    shapes = {"params": {f"a{i}": jax.ShapeDtypeStruct((size, 1024), np.float32) for i in range(ARRAYS)}}
    if name == "conversion":
        return lambda: to_jax(f"{bucket}/source", f"{bucket}/{target}")
    if name == "restore":
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), shapes)
        saved = Checkpointer(folder, config)
        return lambda: jax.block_until_ready(saved.restore(None, like))
    draw = np.random.default_rng(0)
    state = jax.tree.map(lambda a: draw.standard_normal(a.shape, np.float32), shapes)
    saver = Checkpointer(folder if target == "first" else f"{bucket}/{target}", config)

    def save() -> None:
        saver.save(1, state, {})
        saver.wait()

    return save


def bare_loop(asked: Sequence[Asked], threads: int, scheme: str, server: str, bucket: str) -> Callable[[], None]:
    """Sends the requests that carry data; what was written goes to objects of other names."""
    address, name = urlsplit(server).netloc, bucket.partition("://")[2]
    data = bytes(max((one.sent for one in asked), default=0))
    headers = SIGNED if scheme == "s3" else {}

    def request_of(number: int, one: Asked) -> tuple[str, str, bytes, dict[str, str]]:
        if one.method == "GET":
            return "GET", one.path, b"", headers | ({"Range": one.range} if one.range else {})
        kind = headers | {"Content-Type": "application/octet-stream"}
        if scheme == "s3":
            return "PUT", f"/{name}/bare/{number}", data[: one.sent], kind
        query = urlencode({"uploadType": "media", "name": f"bare/{number}"})
        return "POST", f"/upload/storage/v1/b/{quote(name)}/o?{query}", data[: one.sent], kind

    requests = iter([request_of(number, one) for number, one in enumerate(asked)])

    def send() -> None:
        connection = http.client.HTTPConnection(address)
        for method, path, body, more in requests:  # shared by the threads
            connection.request(method, path, body or None, more)
            answer = connection.getresponse()
            answer.read()
            if answer.status >= 300:
                raise ValueError(f"{method} {path} is answered {answer.status}")
        connection.close()

    def loop() -> None:
        with ThreadPoolExecutor(threads) as pool:
            for one in [pool.submit(send) for _ in range(threads)]:
                one.result()

    return loop


def carries_data(one: Asked, scheme: str) -> bool:
    if one.method == "GET":
        listing = "list-type=" in one.path if scheme == "s3" else "alt=media" not in one.path
        return not listing and one.got > 0
    return one.method in ("PUT", "POST") and one.sent > 0 and "uploads" not in one.path


def still_there(asked: Sequence[Asked], scheme: str, server: str) -> list[Asked]:
    """Without reads of what is gone when the part has ended: journals, leases, parts of checksums."""
    connection = http.client.HTTPConnection(urlsplit(server).netloc)

    @cache
    def found(path: str) -> bool:
        connection.request("GET", path, headers={"Range": "bytes=0-0", **(SIGNED if scheme == "s3" else {})})
        answer = connection.getresponse()
        answer.read()
        return answer.status < 300

    return [one for one in asked if one.method != "GET" or found(one.path)]


def look(name: str, command: Command, bucket: str, server: str) -> tuple[list[Asked], int]:
    """(requests, most under way at once) of a part that a process of its own runs through a proxy."""
    with FaultProxy(server).running() as proxy:
        env = os.environ | environment(command.scheme, proxy.address)
        words = ["--megabytes", str(command.megabytes), "--scheme", command.scheme, "--only", name, bucket]
        done = subprocess.run([sys.executable, "-m", "benchmarks.buckets", *words], cwd=ROOT, env=env)
        if done.returncode:
            raise ValueError(f"{name} ended with {done.returncode}")
        return list(proxy.asked), proxy.counts["most at once"]


def seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def measure(name: str, command: Command, bucket: str, server: str) -> dict[str, Any]:
    asked, threads = look(name, command, bucket, server)
    data = [one for one in still_there(asked, command.scheme, server) if carries_data(one, command.scheme)]
    ours, bare = [], []
    for number in range(command.rounds):
        work = part(name, bucket, command.megabytes, f"{name}-{number}")
        loop = bare_loop(data, threads, command.scheme, server, bucket)
        for times, one in ((ours, work), (bare, loop)) if number % 2 else ((bare, loop), (ours, work)):
            times.append(seconds(one))
        for folder in (f"{name}-{number}", "bare"):  # a server on loopback keeps all in memory
            at(f"{bucket}/{folder}").rmtree(missing_ok=True)
    return {
        "requests": Counter(one.method for one in asked),
        "with_data": len(data),
        "bytes": sum(one.got if one.method == "GET" else one.sent for one in data),
        "at_once": threads,
        "seconds": ours,
        "bare_seconds": bare,
        "of_bare": statistics.median(bare) / statistics.median(ours),
    }


def measure_alone(command: Command, name: str) -> dict[str, Any]:
    """`measure` on a server of its own: what it has once held slows it down."""
    os.environ["GOGC"] = "25"  # Google's stand-in, a Go program, then takes a quarter more than its objects, not twice
    with tempfile.TemporaryDirectory() as folder:
        running = google_server(Path(folder)) if command.scheme == "gs" else amazon_server()
        with running as server:
            os.environ |= environment(command.scheme, server)
            bucket = make_bucket(command.scheme)
            if name == "conversion":
                make_source(at(f"{bucket}/source"), model_of(command.megabytes * 1e6))
            if name == "restore":
                part("save", bucket, command.megabytes, "first")()
            return measure(name, command, bucket, server)


def told(times: Sequence[float]) -> str:
    return f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"


def main(argv: Sequence[str]) -> int:
    command = tyro.cli(Command, args=list(argv), prog="python -m benchmarks.buckets", description=__doc__)
    if command.only is not None:
        name, bucket = command.only
        part(name, bucket, command.megabytes, "first")()
        return 0
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:  # clients keep their server
        found = dict(zip(PARTS, fresh.map(partial(measure_alone, command), PARTS), strict=True))
    rows = [("", "requests", "with data", "MB", "at once", "seconds", "bare loop", "share", "")]
    for name, one in found.items():
        counts = ", ".join(f"{count} {method}" for method, count in one["requests"].most_common())
        share = "" if one["of_bare"] >= RULE else "TOO SLOW"
        numbers = (str(one["with_data"]), f"{one['bytes'] / 1e6:,.0f}", str(one["at_once"]))
        rows.append(
            (name, counts, *numbers, told(one["seconds"]), told(one["bare_seconds"]), f"{one['of_bare']:.0%}", share)
        )
    print(columns(rows))
    print(json.dumps({"benchmark": "buckets", "scheme": command.scheme, "parts": found}))
    return int(any(one["of_bare"] < RULE for one in found.values()))


if __name__ == "__main__":
    run_main(main)
