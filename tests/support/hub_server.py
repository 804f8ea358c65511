"""A hub on loopback: what `huggingface_hub` asks of the real one, and what can go wrong there."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

SIGNATURE = "let-me-in-4711"  # in the address of a large file: nobody may write it down
LARGE = (".safetensors", ".bin", "tokenizer.json")  # kept as large files: their hash is the SHA-256


class Seen(NamedTuple):
    method: str
    path: str
    range: str | None
    token: str | None


class Hub(ThreadingHTTPServer):
    """Models by name, commit and file.

    Attributes:
      commits: (model, branch or commit): the commit and its files.
      broken: how often a file's connection still ends in the middle.
      damaged: files whose last byte comes out changed.
      token: who does not bear it sees nothing, if it is set; `gated`: models that nobody has been let into.
      seen: every request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[tuple[str, str], tuple[str, dict[str, bytes]]] = {}
        self.broken: dict[str, int] = {}
        self.damaged: set[str] = set()
        self.gated: set[str] = set()
        self.token: str | None = None
        self.seen: list[Seen] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, model: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit on a branch; returns its name."""
        facts = sorted((name, hash_of("", data)) for name, data in files.items())
        commit = hashlib.sha1(repr(facts).encode()).hexdigest()
        for revision in (branch, commit):
            self.commits[model, revision] = commit, files
        return commit

    def fetched(self, method: str = "GET") -> list[str]:
        """Names of the files that were asked for, without the listings."""
        found = [seen.path for seen in self.seen if seen.method == method and "/api/" not in seen.path]
        return sorted({path.partition("?")[0].rpartition("/")[2] for path in found})

    @contextlib.contextmanager
    def running(self) -> Iterator["Hub"]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join()


def hash_of(name: str, data: bytes) -> str:
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def info_of(model: str, commit: str, files: dict[str, bytes]) -> dict[str, Any]:
    siblings = []
    for name, data in files.items():
        entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": hash_of("", data)}
        if name.endswith(LARGE):
            entry["lfs"] = {"sha256": hash_of(name, data), "size": len(data), "pointerSize": 134}
        siblings.append(entry)
    return {"id": model, "modelId": model, "sha": commit, "siblings": siblings}


def tree_of(files: dict[str, bytes]) -> list[dict[str, Any]]:
    tree = []
    for name, data in files.items():
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": hash_of("", data)}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": hash_of(name, data), "size": len(data), "pointerSize": 134}
        tree.append(entry)
    return tree


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        url = urlsplit(self.path)
        path, token = url.path.strip("/"), self.headers.get("authorization")
        self.server.seen.append(Seen(self.command, self.path, self.headers.get("range"), token))
        if path.startswith("cdn/"):
            assert token is None, "the token has left the hub"
            return self.send_large(path, parse_qs(url.query)["Signature"] == [SIGNATURE])
        words = [unquote(word) for word in path.split("/")]
        api = words[:2] == ["api", "models"]
        words = words[2:] if api else words
        model, revision = "/".join(words[:2]), words[3] if len(words) > 3 else "main"
        if model in self.server.gated:
            return self.refuse(403, "GatedRepo")
        if self.server.token is not None and token != f"Bearer {self.server.token}":
            return self.refuse(401, "RepoNotFound")
        if not any(name == model for name, _ in self.server.commits):
            return self.refuse(401 if token is None else 404, "RepoNotFound")
        if (model, revision) not in self.server.commits:
            return self.refuse(404, "RevisionNotFound")
        commit, files = self.server.commits[model, revision]
        if api:
            tree = len(words) > 2 and words[2] == "tree"
            return self.send_json(tree_of(files) if tree else info_of(model, commit, files))
        self.send_file(model, commit, files, "/".join(words[4:]))

    def refuse(self, status: int, code: str) -> None:
        self.send({"X-Error-Code": code, "X-Error-Message": code, "Content-Length": "0"}, b"", status)

    def send(self, headers: dict[str, str], body: bytes, status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def send_json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send({"Content-Type": "application/json", "Content-Length": str(len(body))}, body)

    def send_file(self, model: str, commit: str, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            return self.refuse(404, "EntryNotFound")
        data, headers = files[name], {"X-Repo-Commit": commit}
        etag = f'"{hash_of(name, data)}"'
        if not name.endswith(LARGE):
            return self.send(headers | {"ETag": etag, "Content-Length": str(len(data))}, self.bytes_of(name, data))
        # Another host than the hub's, as the real one's.
        place = f"http://localhost:{self.server.server_port}/cdn/{model}/{commit}/{name}?Signature={SIGNATURE}"
        linked = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(data)), "Location": place, "Content-Length": "0"}
        self.send(headers | linked, b"", 302)

    def bytes_of(self, name: str, data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1]) if name in self.server.damaged else data

    def send_large(self, path: str, signed: bool) -> None:
        assert signed
        _, *model, commit, name = path.split("/")
        data = self.bytes_of(name, self.server.commits["/".join(model), commit][1][name])
        asked = self.headers.get("range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        headers = {"Content-Length": str(len(data) - start), "ETag": '"of-the-cdn"', "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.server.broken.get(name, 0):
            self.server.broken[name] -= 1
            self.send(headers, data[start : start + (len(data) - start) // 2], 206 if asked else 200)
            self.close_connection = True
            return
        self.send(headers, data[start:], 206 if asked else 200)
