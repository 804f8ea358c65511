"""Several processes as one run: who they are, waiting until all are there, and ending together.

A process of several is two: a parent that watches the others, and a worker that it starts, the same command once more,
in which JAX runs. When a peer dies, JAX's own runtime aborts the survivors without naming it; a parent has no JAX
in it, so it can always stop its worker, name the process that is missing, and leave.

The parents talk in lines of JSON. Process 0 listens at the cluster's coordinator address:

  {"id", "count", "host"}    from each of the others, once
  {"port"}                   to all, when all are there: where JAX's coordination service will be; the next one if free
  {"ended"}                  from each, its worker's exit code
  {"stop"}                   to all: why the run ends
  {"done"}                   to all: every worker has ended well
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.clusters import ClusterEnv  # JAX has no public way to ask for a cluster without joining it,
from jax._src.distributed import global_state  # nor to wait without a collective
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

WORKER = "LING_JAX_WORKER"  # the environment of a worker: a `Cluster` and its lifeline, as JSON
EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
T = TypeVar("T")
START_SECONDS = "LING_JAX_START_SECONDS"  # how long processes wait for each other at the start
RETRY_SECONDS = 0.5
BARRIER_SECONDS = 24 * 3600  # a process may tokenize for hours while the others wait; a dead one ends all at once
GRACE_SECONDS = 10.0  # for a worker to end by itself, with its own message, once another has failed
NEWS_SECONDS = 1.0  # after a worker failed: for word that another failed first, and this one because of it
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 2}  # a host without power is noticed in 20 s


class Cluster(NamedTuple):
    """This process's place among several."""

    address: str  # host:port of process 0
    count: int
    id: int
    local_device_ids: list[int] | None  # None: all that the host has

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


def find_cluster() -> Cluster | None:
    """The cluster that the environment describes: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or
    one that JAX knows (SLURM, Open MPI, GKE, Cloud TPU); None for a single process.

    Raises:
      ValueError: for an incomplete or impossible setting of the three variables.
    """
    given = {name: os.environ[name] for name in EXPLICIT if os.environ.get(name)}
    if not given:
        detect = ClusterEnv.auto_detect_unset_distributed_params
        address, count, id_, local = detect(None, None, None, None, None, start_seconds())
        if address is None or count is None or id_ is None or count == 1:
            return None
        return Cluster(address, count, id_, _device_ids(local))
    if len(given) < len(EXPLICIT):
        raise ValueError(f"{', '.join(given)} is set: set all of {', '.join(EXPLICIT)}, or none")
    address, count, id_ = given.values()
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{EXPLICIT[0]} = {address!r} must be HOST:PORT of process 0")
    if not count.isdigit() or not id_.isdigit() or not int(id_) < int(count):
        raise ValueError(f"{EXPLICIT[2]} = {id_} must be a number below {EXPLICIT[1]} = {count}")
    return Cluster(address, int(count), int(id_), None) if int(count) > 1 else None


def _device_ids(found: Any) -> list[int] | None:
    """Which of a host's devices are this process's; None: all that it sees. JAX finds the process's number on its host,
    for one process per GPU; that is wrong where there is one process per host, or each sees its own GPU only."""
    if given := os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        return [int(i) for i in given.split(",")]
    alone = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if found is None or alone or (visible and len(visible.split(",")) <= max(found)):
        return None
    return [int(i) for i in found]


def worker_id() -> int | None:
    """This process's id among several at work; None elsewhere, in their parents too."""
    return json.loads(os.environ[WORKER])["id"] if WORKER in os.environ else None


def run_together(work: Callable[[], int]) -> int:
    """The exit code of `work()`; in one of several processes, of `work()` under `jax.distributed` in a worker.

    Raises:
      ConnectionError: naming the process that is missing, after this one's worker has ended.
    """
    if worker_id() is not None:
        _join(json.loads(os.environ[WORKER]))
        return work()
    cluster = find_cluster()
    if cluster is None:
        return work()
    return asyncio.run(_lead(cluster) if cluster.id == 0 else _follow(cluster))


def lead_first(name: str, f: Callable[[], T]) -> T:
    """f(), first on process 0, which may write what the others then read."""
    if jax.process_index() != 0:
        barrier(name)
    result = f()
    if jax.process_index() == 0:
        barrier(name)
    return result


_barriers: Counter[str] = Counter()  # passed so far, by name: JAX wants another id for each


def barrier(name: str) -> None:
    """Returns once every process is here, however late; no device takes part (gloo gives up after 30 seconds)."""
    if jax.process_count() > 1:
        _barriers[name] += 1
        client = global_state.client
        assert client is not None
        client.wait_at_barrier(f"ling_jax: {name} {_barriers[name]}", BARRIER_SECONDS * 1000)


class CompiledTogether:
    """A jitted `f`, called by all processes with arguments of one shape. The first call compiles it, then waits for the
    others' compilers: an exchange within `f` would give up on them after 30 seconds."""

    def __init__(self, name: str, f: jax.stages.Wrapped):
        self._name, self._f = name, f
        self._compiled: jax.stages.Compiled | None = None

    def __call__(self, *args: Any) -> Any:
        if self._compiled is None:
            self._compiled = self._f.lower(*args).compile()
            barrier(f"{self._name} is compiled")
        return self._compiled(*args)


def check_same(what: str, fingerprint: int) -> None:
    """ValueError naming the processes whose `fingerprint` (below 2^31) of `what` is not process 0's."""
    if jax.process_count() == 1:
        return
    found = multihost_utils.process_allgather(np.array([fingerprint], np.int32)).reshape(-1)
    if others := [str(i) for i in np.flatnonzero(found != found[0])]:
        raise ValueError(
            f"{what} of process {', '.join(others)} differs from that of process 0: give all hosts the same files and "
            "the same versions of the packages"
        )


class AnyProcess:
    """Whether any process has said yes: `votes(flag)`, called by all once per step, answers for the call before, so
    that the device is not waited for and all get the same answer at the same step. Alone, it answers at once."""

    def __init__(self, mesh: jax.sharding.Mesh):
        self._pending: jax.Array | None = None
        self._flags = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        greatest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._max = CompiledTogether("the vote", greatest)

    def __call__(self, flag: bool) -> bool:
        if jax.process_count() == 1:
            return flag
        shape = (self._flags.mesh.size,)
        here = jax.make_array_from_callback(shape, self._flags, lambda _: np.array([flag], np.int32))
        before, self._pending = self._pending, self._max(here)
        return before is not None and bool(before)


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals on which a run saves and ends: a scheduler's, Ctrl-C, and a terminal that has closed."""
    return (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def leave_terminal() -> None:
    """Sends what is printed from now on nowhere, if it went to a terminal: one that has closed gives errors."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):  # a closed terminal no longer says that it is one
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# The worker.


def _join(description: dict[str, Any]) -> None:
    """Becomes one process of JAX's runtime; ends at once when the parent does."""
    threading.Thread(target=_end_with_parent, args=(description["lifeline"],), daemon=True).start()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        description["address"],
        description["count"],
        description["id"],
        description["local_device_ids"],
        cluster_detection_method="deactivate",
        initialization_timeout=start_seconds(),
    )


def _end_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)  # returns when the other end closes
    os._exit(1)


# The parent.


class _Link(NamedTuple):
    """A connection to another parent."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    host: str

    async def receive(self) -> dict[str, Any] | None:
        """The next message; None when the other is gone or talks nonsense."""
        try:
            message = json.loads(await self.reader.readline())
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    async def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):
            self.writer.write(json.dumps(message).encode() + b"\n")
            await self.writer.drain()


def _link(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> _Link:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return _Link(reader, writer, host)


def start_seconds() -> int:
    """How long processes wait for each other at the start: $LING_JAX_START_SECONDS, or 300."""
    text = os.environ.get(START_SECONDS, "300")
    if not text.isdigit() or not int(text):
        raise ValueError(f"{START_SECONDS} = {text!r} must be a positive whole number of seconds")
    return int(text)


def _free_port(wanted: int) -> int:
    """`wanted`, which a firewall can be told of; another one where it is taken."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError), socket.create_server(("", port)) as server:
            return server.getsockname()[1]
    raise ValueError(f"this host has no free port, and {wanted} is taken")


class _Worker:
    """This process's command once more, with JAX in it; signals to the parent are passed on."""

    def __init__(self, process: asyncio.subprocess.Process, lifeline: int):
        self._process, self._lifeline = process, lifeline

    @classmethod
    async def start(cls, cluster: Cluster, port: int) -> "_Worker":
        theirs, ours = os.pipe()
        host = f"[{cluster.host}]" if ":" in cluster.host else cluster.host
        description = cluster._replace(address=f"{host}:{port}")._asdict() | {"lifeline": theirs}
        environment = os.environ | {WORKER: json.dumps(description)}
        command = [sys.executable, *sys.orig_argv[1:]]
        process = await asyncio.create_subprocess_exec(*command, env=environment, pass_fds=[theirs])
        os.close(theirs)
        for number in stop_signals():
            if signal.getsignal(number) != signal.SIG_IGN:
                asyncio.get_running_loop().add_signal_handler(number, cls._pass_on, process, number)
        return cls(process, ours)

    @staticmethod
    def _pass_on(process: asyncio.subprocess.Process, number: int) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    async def ended(self) -> int:
        return await self._process.wait()

    async def stop(self, grace: float) -> None:
        """Returns once it has ended: by itself within `grace` seconds, or killed."""
        try:
            await asyncio.wait_for(self._process.wait(), grace)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


def _how(code: int | None) -> str:
    if code is None:
        return "is gone: its connection closed"
    if code < 0:
        return f"ended: its worker was stopped by {signal.Signals(-code).name}"
    return f"ended with exit code {code}; its own log says why"


async def _meet(cluster: Cluster, links: dict[int, _Link]) -> asyncio.Server:
    """Process 0: fills `links` with the others, by id."""
    everyone = asyncio.Event()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _link(reader, writer, "")
        hello = await link.receive() or {}
        id_ = int(hello.get("id", 0))
        before = links.get(id_)
        if hello.get("count") != cluster.count or id_ not in range(1, cluster.count):
            await link.send(
                stop=f"process 0 waits for {cluster.count} processes, this one is {id_} of {hello.get('count')}"
            )
            writer.close()
        elif before is not None and not before.reader.at_eof():
            await link.send(stop=f"there are two processes {id_}: the other is on {before.host}")
            writer.close()
        else:
            links[id_] = link._replace(host=str(hello.get("host")))
            if len(links) == cluster.count - 1:
                everyone.set()

    try:
        server = await asyncio.start_server(greet, port=cluster.port)
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen on port {cluster.port} of {cluster.address}: {error.strerror}; is another run "
            f"using it? Choose another port in {EXPLICIT[0]}"
        ) from None
    try:
        await asyncio.wait_for(everyone.wait(), start_seconds())
    except TimeoutError:
        missing = [str(i) for i in range(1, cluster.count) if i not in links]
        there = ", ".join(f"{i} ({link.host})" for i, link in sorted(links.items())) or "none"
        text = (
            f"after {start_seconds()} s these of {cluster.count} processes had not come: {', '.join(missing)} (there "
            f"besides process 0 on {socket.gethostname()}: {there}); look at their logs, or raise {START_SECONDS}"
        )
        for link in links.values():
            await link.send(stop=text)
        raise ConnectionError(text) from None
    return server


async def _lead(cluster: Cluster) -> int:
    """Process 0: waits for the others, starts its worker, watches all."""
    links: dict[int, _Link] = {}
    server = await _meet(cluster, links)
    port = _free_port(cluster.port + 1)
    for link in links.values():
        await link.send(port=port)
    worker = await _Worker.start(cluster, port)
    pending: dict[asyncio.Task, int] = {asyncio.create_task(link.receive()): i for i, link in links.items()}
    pending[asyncio.create_task(worker.ended())] = 0
    while pending:
        failed: list[tuple[int, int | None]] = []
        done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            id_, result = pending.pop(task), task.result()
            code = result if id_ == 0 else None if result is None else result.get("ended")
            if code != 0:
                failed.append((id_, code))
        if [id_ for id_, _ in failed] == [0]:  # perhaps because another one did
            for task in (await asyncio.wait(pending, timeout=NEWS_SECONDS))[0] if pending else ():
                result = task.result()
                failed.insert(0, (pending.pop(task), None if result is None else result.get("ended")))
        failed = [(id_, code) for id_, code in failed if code != 0]
        if failed:
            return await _give_up(failed[0], links, worker)
    for link in links.values():
        await link.send(done=True)
    server.close()
    return 0


async def _give_up(first: tuple[int, int | None], links: dict[int, _Link], worker: _Worker) -> int:
    """Tells all which process failed, and ends."""
    id_, code = first
    host = links[id_].host if id_ else socket.gethostname()
    text = f"process {id_} ({host}) {_how(code)}; checkpoints are intact, run the same command to resume"
    for link in links.values():
        await link.send(stop=text, grace=0.0 if code is None else GRACE_SECONDS)
    if id_ == 0:
        return code if code and code > 0 else 1
    await worker.stop(0.0 if code is None else GRACE_SECONDS)
    raise ConnectionError(text)


async def _reach(cluster: Cluster) -> _Link:
    """Another process: connects to process 0, which may start later."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + start_seconds()
    while True:
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(cluster.host, cluster.port), 5.0)
            return _link(reader, writer, cluster.host)
        except OSError as error:
            if loop.time() > deadline:
                raise ConnectionError(
                    f"process 0 is missing: after {start_seconds()} s process {cluster.id} could not reach it at "
                    f"{cluster.address} ({error or 'no answer'}); look at its log, or raise {START_SECONDS}"
                ) from None
            await asyncio.sleep(RETRY_SECONDS)


async def _follow(cluster: Cluster) -> int:
    """Another process: reports to process 0, starts its worker on its word, watches it."""
    link = await _reach(cluster)
    await link.send(id=cluster.id, count=cluster.count, host=socket.gethostname())
    lost = f"process 0 ({cluster.address}) {_how(None)}; checkpoints are intact, run the same command to resume"
    message = await link.receive() or {"stop": lost}
    if "stop" in message:
        raise ConnectionError(message["stop"])
    worker = await _Worker.start(cluster, message["port"])
    news, own = asyncio.create_task(link.receive()), asyncio.create_task(worker.ended())
    await asyncio.wait([news, own], return_when=asyncio.FIRST_COMPLETED)
    if not news.done() and own.result() != 0:  # perhaps because another one did
        await asyncio.wait([news], timeout=NEWS_SECONDS)
    if not news.done():
        await link.send(ended=own.result())
        if own.result():
            await asyncio.wait([news], timeout=NEWS_SECONDS)
            return own.result() if own.result() > 0 else 1
    message = await news or {"stop": lost, "grace": 0.0}
    await worker.stop(message.get("grace", GRACE_SECONDS))
    if "stop" in message:
        raise ConnectionError(message["stop"])
    return 0
