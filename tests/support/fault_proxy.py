"""A proxy before a bucket's server on loopback: it counts requests, disturbs some of them, and keeps Google's
preconditions, which the server on loopback does not.

As a program: `python tests/support/fault_proxy.py URL` prints its own address and ends when its standard input does;
other processes reach its faults and counts by `set_faults` and `read_counts`.
"""

import contextlib
import http.client
import json
import random
import socket
import sys
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

CONTROL = "/_proxy"  # where faults are set and counts are read
ASKED = "/_proxy/asked"  # where all requests are read
PIECE = 1 << 20  # bytes that are forwarded at a time
HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "expect", "host", "date", "server"}
GIVES_NO_BODY = (204, 304, 308)


class Asked(NamedTuple):
    """A request as it came: `range`, of the bytes it asks for, or ""; `sent` and `got`, bytes of both bodies."""

    method: str
    path: str
    range: str
    sent: int
    got: int


@dataclass
class Session:
    """An upload of several parts: what it writes, under which precondition, and what its last part was answered."""

    object: str
    wanted: str | None
    part: str = ""
    answer: tuple[int, dict[str, str], bytes] | None = None


@dataclass(frozen=True)
class Faults:
    """Shares of requests, from 0 to 1.

    Attributes:
      refused: answered 429 or 503, and not forwarded.
      delayed: answered `seconds` later.
      cut: whose connection ends in the middle: of the answer's body, of the request's body (which is then not
        forwarded), or before the answer, when the server has done what was asked.
      seed: of the draws.
    """

    refused: float = 0.0
    delayed: float = 0.0
    cut: float = 0.0
    seconds: float = 2.0
    seed: int = 0


class FaultProxy(ThreadingHTTPServer):
    """Attributes:
    faults: what to do from now on.
    counts: requests by method ("GET", ...) and what was done to them: "429", "503", "delayed", "cut", and "412" where
      a precondition failed; "most at once" is how many were under way together.
    asked: all requests that were forwarded, in the order of their ends.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.upstream = upstream
        self.counts: Counter[str] = Counter()
        self.asked: list[Asked] = []
        self._under_way = 0
        self.sessions: dict[str, Session] = {}  # by `_upload_in` their addresses
        self._objects: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()
        self.faults = Faults()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def faults(self) -> Faults:
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        with self._lock:
            self._faults, self._draw = faults, random.Random(faults.seed)

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        with self._lock:
            self._under_way += 1
            self.counts["most at once"] = max(self.counts["most at once"], self._under_way)
        yield
        with self._lock:
            self._under_way -= 1

    def draw(self) -> str:
        """Draws what happens to the next request: "429", "503", "delayed", "cut" or ""."""
        with self._lock:
            faults, value = self._faults, self._draw.random()
            for what, share in (("refused", faults.refused), ("delayed", faults.delayed), ("cut", faults.cut)):
                if value < share:
                    return self._draw.choice(("429", "503")) if what == "refused" else what
                value -= share
        return ""

    def chance(self) -> float:
        with self._lock:
            return self._draw.random()

    def lock_of(self, name: str) -> threading.Lock:
        with self._lock:
            return self._objects[name]

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that went away

    @contextlib.contextmanager
    def running(self) -> Iterator["FaultProxy"]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()


def set_faults(address: str, faults: Faults) -> None:
    """Sets the faults of the proxy at an address, which counts anew."""
    body = json.dumps(asdict(faults)).encode()
    urllib.request.urlopen(urllib.request.Request(f"{address}{CONTROL}", body, method="PUT"), timeout=30).close()


def read_counts(address: str) -> Counter[str]:
    with urllib.request.urlopen(f"{address}{CONTROL}", timeout=30) as answer:
        return Counter(json.load(answer))


def read_asked(address: str) -> list[Asked]:
    with urllib.request.urlopen(f"{address}{ASKED}", timeout=30) as answer:
        return [Asked(*one) for one in json.load(answer)]


class _Cut(Exception):
    """The connection ends here."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    _connection: http.client.HTTPConnection | None = None

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith(CONTROL):
            self._control()
            return
        with self.server.under_way():
            self._disturbed()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def _disturbed(self) -> None:
        """Forwards the request, unless it is one of those that something happens to."""
        self.server.count(self.command)
        fault = self.server.draw()
        if fault:
            self.server.count(fault)
        try:
            if fault == "cut" and (self.command == "HEAD" or int(self.headers.get("content-length", 0)) > 1):
                self._cut_request()
            body = self._body()
            if fault == "delayed":
                time.sleep(self.server.faults.seconds)
            if fault.isdigit():
                self._answer(int(fault), {"Retry-After": "0"}, b"try again later")
                return
            if again := self._answered_before():
                self._answer(*again)
                return
            with self._precondition(body) as holds:
                if holds:
                    self._forward(body, cut=fault == "cut")
                else:
                    self.server.count("412")
                    error = {"error": {"code": 412, "message": "At least one of the pre-conditions did not hold."}}
                    self._answer(412, {"Content-Type": "application/json"}, json.dumps(error).encode())
        except (_Cut, OSError, http.client.HTTPException):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        if self._connection:
            self._connection.close()
        super().finish()

    def _control(self) -> None:
        if self.command == "PUT":
            self.server.faults = Faults(**json.loads(self._body()))
            self.server.counts.clear()
            self.server.asked.clear()
        told = self.server.asked if self.path == ASKED else self.server.counts
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(told).encode())

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        pieces = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def _cut_request(self) -> None:
        """Half of the times; the others are cut when they are done."""
        if self.server.chance() < 0.5:
            self.rfile.read(int(self.headers.get("content-length", 0)) // 2)
            raise _Cut

    def _forward(self, body: bytes, cut: bool) -> None:
        answer = self._ask(self.command, self.path, body, dict(self.headers.items()))
        session = answer.getheader("location", "").replace(self.server.upstream, self.server.address)
        asked = self._asked(body)
        if asked and _upload_in(session):
            self.server.sessions[_upload_in(session)] = Session(*asked)
        if self.command == "POST" and urlsplit(self.path).query.startswith("uploadId=") and answer.status == 200:
            self.server.sessions[_upload_in(self.path)] = Session(
                self.path, None
            )  # Amazon's, which this request has completed
        if upload := self.server.sessions.get(_upload_in(self.path)):
            told = answer.read()
            kept = {name: value for name, value in answer.getheaders() if name.lower() in ("content-type", "range")}
            upload.part, upload.answer = self._part(), (answer.status, kept, told)
            if cut:
                raise _Cut
            self._answer(*upload.answer)
            return
        if cut and (self.command not in ("GET", "HEAD") or answer.length in (None, 0)):
            answer.read()
            raise _Cut
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in HOP - {"date", "server"}:
                self.send_header(name, session if name.lower() == "location" else value)
        empty = self.command == "HEAD" or answer.status in GIVES_NO_BODY
        chunked = not empty and answer.getheader("content-length") is None
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif empty and answer.getheader("content-length") is None:
            self.send_header("Content-Length", "0")
        self.end_headers()
        left, got = answer.length // 2 if cut and answer.length else None, 0
        while piece := answer.read(PIECE if left is None else min(PIECE, left)):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            left, got = None if left is None else left - len(piece), got + len(piece)
        if cut:
            raise _Cut
        if chunked:
            self.wfile.write(b"0\r\n\r\n")
        self.server.asked.append(Asked(self.command, self.path, self.headers.get("range", ""), len(body), got))

    def _ask(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None):
        """The server's answer, by a connection of this thread's own."""
        sent = {name: value for name, value in (headers or {}).items() if name.lower() not in HOP}
        if body or method in ("POST", "PUT", "PATCH"):
            sent = {name: value for name, value in sent.items() if name.lower() != "content-length"}
            sent["Content-Length"] = str(len(body))
        for fresh in (False, True):
            if self._connection is None:
                self._connection = http.client.HTTPConnection(urlsplit(self.server.upstream).netloc, timeout=120)
                fresh = True
            try:
                self._connection.request(method, path, body or None, sent)
                answer = self._connection.getresponse()
            except (OSError, http.client.HTTPException):
                self._connection.close()
                self._connection = None
                if fresh:
                    raise
                continue
            if answer.will_close:
                self._connection = None
            return answer
        raise AssertionError

    # Google's preconditions.

    def _asked(self, body: bytes) -> tuple[str, str | None] | None:
        """(address of the object that this request writes or deletes, generation that it asks for); None for others."""
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        wanted = query.get("ifGenerationMatch")
        if self.command == "POST" and url.path.startswith("/upload/storage/v1/b/"):
            name = query.get("name") or _name_in(body)
            return f"{url.path.removeprefix('/upload')}/{quote(name, safe='')}", wanted
        if self.command == "PUT" and (session := self.server.sessions.get(_upload_in(self.path))):
            return session.object, session.wanted
        if self.command == "DELETE" and url.path.startswith("/storage/v1/b/"):
            return _plain(url.path), wanted
        target = url.path.replace("/copyTo/b/", "/rewriteTo/b/").partition("/rewriteTo/b/")[2]
        if self.command == "POST" and target:
            return _plain(f"/storage/v1/b/{target}"), wanted
        amazon = not url.path.startswith(("/storage/", "/upload/"))  # keeps its own, but not of two at the same time
        return (url.path, None) if amazon and self.command in ("PUT", "POST", "DELETE") else None

    def _answered_before(self) -> tuple[int, dict[str, str], bytes] | None:
        """The answer that this part of an upload got when it came first, if it may have been lost.

        The services take no byte twice, and answer alike; those on loopback would append it once more, or know a
        finished upload no longer.
        """
        session = self.server.sessions.get(_upload_in(self.path))
        return session.answer if session and session.part == self._part() else None

    def _part(self) -> str:
        return f"{self.command} {self.headers.get('content-range', '')}"

    @contextlib.contextmanager
    def _precondition(self, body: bytes) -> Iterator[bool]:
        """Whether it holds; no other request through this proxy changes the object meanwhile."""
        asked = self._asked(body)
        if asked is None:
            yield True
            return
        name, wanted = asked
        with self.server.lock_of(name):
            yield wanted is None or self._generation(name) == wanted

    def _generation(self, name: str) -> str:
        answer = self._ask("GET", name)
        found = answer.read()
        return str(json.loads(found)["generation"]) if answer.status == 200 else "0"


def _upload_in(address: str) -> str:
    """The name that a service gave an upload of several parts; "" in other addresses. Clients quote the rest anew."""
    query = parse_qs(urlsplit(address).query)
    return (query.get("upload_id") or query.get("uploadId") or [""])[0]


def _plain(path: str) -> str:
    """The one address of an object, however its name is quoted."""
    folder, _, name = path.partition("/o/")
    return f"{folder}/o/{quote(unquote(name), safe='')}"


def _name_in(body: bytes) -> str:
    """The object's name in the body of a multipart or resumable upload: its first JSON object."""
    return json.JSONDecoder().raw_decode(body[body.index(b"{") :].decode(errors="replace"))[0]["name"]


if __name__ == "__main__":
    with FaultProxy(sys.argv[1]).running() as proxy:
        print(proxy.address, flush=True)
        sys.stdin.read()
