"""A corpus kept on disk is whole or not there: kills, full disks, damage, and several processes at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ling_jax.data import store
from ling_jax.data.store import Columns, keep
from tests.support.runs import mount_prefix
from tests.tiny_run import REPO

# Opens the corpus argv[1] with the cache argv[2], from argv[3]'s source name on; a text takes argv[4] seconds.
OPEN = """
import hashlib, logging, sys, time
from pathlib import Path
from ling_jax.config import DataConfig, DataSource
from ling_jax.data import packing, survey
from ling_jax.data.packing import build_stream
from ling_jax.data.sources import read_corpus
from ling_jax.data.tokenizer import SPECIAL_TOKENS, Tokenizer

logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s", force=True)
corpus, cache, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
packing.CHUNK_CHARACTERS = 1
survey.ROWS = 2
encode = Tokenizer.encode_batch
Tokenizer.encode_batch = lambda *args: time.sleep(seconds) or encode(*args)
read = survey.read_file
survey.read_file = lambda *args: time.sleep(seconds) or read(*args)
train = read_corpus(DataConfig(sources=(DataSource(path=corpus),)), cache).train["text"]
stream = build_stream(train, Tokenizer.train([], 256 + len(SPECIAL_TOKENS)), "text", 0, cache)
ids, cuts = stream.read(0, len(stream.tokens_S))
print(len(cuts), hashlib.sha256(ids.tobytes() + cuts.tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "text"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"text number {i}\n" * (i + 1))
    return folder


def start(corpus: Path, cache: Path, seconds: float = 0.0, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*prefix, sys.executable, "-c", OPEN, str(corpus), str(cache), str(seconds)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)}, stdout=pipe, stderr=pipe, text=True
    )


def result(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    return out, log


@pytest.fixture(scope="module")
def right(corpus, tmp_path_factory) -> str:
    return result(start(corpus, tmp_path_factory.mktemp("cache")))[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("column", ["share", "tokens"])
def test_after_a_kill_in_the_middle_of_reading_or_tokenizing_the_corpus_is_whole(corpus, right, tmp_path, column):
    killed = start(corpus, tmp_path, 0.1)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = list(tmp_path.glob(f"*.{column}.*.tmp"))
        if found and found[0].exists():
            break
        time.sleep(0.005)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(f"*.{column}.*.tmp")) and not list(tmp_path.glob(f"*.{column}.npy"))
    out, log = result(start(corpus, tmp_path))
    assert out == right and "tokenizing" in log
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*writer*"))


def test_several_processes_tokenize_once(corpus, right, tmp_path):
    started = [start(corpus, tmp_path, 0.02) for _ in range(3)]
    outs, logs = zip(*map(result, started), strict=True)
    assert set(outs) == {right}
    said = "".join(logs)
    for what in (
        "reading, into",
        "choosing what to hold out, into",
        "tokenizing 19 documents, into",
        "shuffling, into",
    ):
        assert said.count(what) == 1, said
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*writer*"))


def test_a_full_disk_is_one_sentence_and_leaves_nothing(corpus, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""
import os, sys
filler = open("{disk}/filler", "wb")
room = os.statvfs("{disk}")
os.posix_fallocate(filler.fileno(), 0, room.f_bavail * room.f_frsize - int(sys.argv[4]))
try:
    exec({OPEN!r})
except ValueError as error:
    print("ERROR", error, os.listdir("{disk}"))
"""
    prefix = mount_prefix(disk, "size=1m")
    for room in (0, 16384):
        command = [*prefix, sys.executable, "-c", script, str(corpus), str(disk), "0", str(room)]
        env = {**os.environ, "PYTHONPATH": str(REPO)}
        done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        said = done.stdout.splitlines()[-1]
        assert said.startswith("ERROR text: ") and f"{disk} does not take it (No space left" in said, said
        assert "--data.cache-dir" in said and ".tmp" not in said and "writer" not in said, said


def build(columns: Columns) -> dict[str, int]:
    for i in range(5):
        columns.append("a", np.arange(10 * i, 10 * i + 10, dtype=np.uint16))
        columns.append("b", np.array([i], np.int64))
    columns.append("empty", np.empty(0, np.uint8))
    return {"made": 1}


@pytest.fixture
def entry(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(store, "BLOCK", 32)
    keep(tmp_path, "key", "testing", build)
    return tmp_path


def test_an_entry_has_what_was_put_in_and_is_made_once(entry):
    kept = keep(entry, "key", "testing", lambda columns: pytest.fail("made twice"))
    assert kept["a"].tolist() == list(range(50)) and kept["b"].tolist() == [0, 1, 2, 3, 4] and len(kept["empty"]) == 0
    assert kept.facts == {"made": 1} and isinstance(kept["a"], np.memmap)
    assert names(entry) == ["key.a.npy", "key.b.npy", "key.empty.npy", "key.json"]
    assert np.load(entry / "key.a.npy").tolist() == list(range(50))
    assert keep(entry, "other", "testing", build).checksum == kept.checksum


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["key.a.npy", "key.b.npy", "key.json"])
def test_what_is_damaged_is_made_anew(entry, harm, name, caplog):
    harm(entry / name)
    kept = keep(entry, "key", "testing", build)
    assert kept["a"].tolist() == list(range(50)) and len(kept["b"]) == 5
    if (harm, name) != (Path.unlink, "key.json"):
        assert str(entry / name) in caplog.text and "made anew" in caplog.text


def test_a_failure_leaves_nothing_and_names_itself(tmp_path):
    def fails(columns):
        build(columns)
        raise ValueError("a bad line")

    with pytest.raises(ValueError, match="a bad line"):
        keep(tmp_path, "key", "testing", fails)
    with pytest.raises(OSError, match="/nowhere"):
        keep(tmp_path, "key", "testing", lambda columns: open("/nowhere/file") and {})
    assert names(tmp_path) == []


def test_an_index_of_another_version_of_json_is_no_entry(entry, caplog):
    index = json.loads((entry / "key.json").read_text())
    index["facts"]["made"] = 2
    (entry / "key.json").write_text(json.dumps(index))
    assert keep(entry, "key", "testing", build).facts == {"made": 1}
    assert "key.json is damaged" in caplog.text
