"""Text in a bucket is the text of a local folder; what is kept of it there is made once, and read by ranges."""

import gzip
import io
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from ling_jax.config import DataConfig, DataSource
from ling_jax.data import prepare, reading, remote, store, survey
from ling_jax.data.packing import Stream, build_stream
from ling_jax.data.pipeline import Data, open_data, train_batches
from ling_jax.data.sources import Corpus, read_corpus, source_names
from ling_jax.data.store import Columns, cache_dir, keep
from ling_jax.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from ling_jax.files import buckets, paths
from tests.support.buckets import delete, every_day, get, names, put, upload
from tests.tiny_run import REPO, write_text

MB = 1 << 20
VOCAB = 256 + len(SPECIAL_TOKENS)  # bytes only


@pytest.fixture(autouse=True)
def own_room(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "room"))


def config_of(*places, **changes) -> DataConfig:
    return DataConfig(sources=tuple(DataSource(path=str(place)) for place in places), **changes)


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text, "source": f"author {text[:3]}"}) + "\n" for text in texts).encode()


def parquet(texts: list[str], group: int = 4) -> bytes:
    table = pyarrow.table(
        {
            "id": [*range(len(texts))],
            "text": texts,
            "junk": [os.urandom(2 * len(text)) for text in texts],
            "source": [f"author of {text[:9]}" for text in texts],
            "licence": ["MIT"] * len(texts),
        }
    )
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out, row_group_size=group, compression="zstd")
    return out.getvalue()


def some(name: str, count: int = 20) -> list[str]:
    return [f"{name} {i}: " + " ".join(f"{name}{j}" for j in range(i * 7)) + "\n" for i in range(count)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Every format, long and short files, and some that are not read."""
    files = {
        "a.jsonl": lines(*some("a")),
        "B.txt": "".join(some("b")).encode(),
        "b/deep/c.jsonl.gz": gzip.compress(lines(*some("c"))),
        "b/d.json.zst": pyarrow.compress(lines(*some("d")), "zstd", asbytes=True),
        "b.txt": "".join(some("e", 3)).encode(),
        "b0.json": json.dumps([{"text": text} for text in some("f")]).encode(),
        "é ü #1?x=%20.txt": "".join(some("g", 5)).encode(),
        "long.jsonl": lines(*some("h", 90)),
        "p.parquet": parquet(some("p", 30)),
        "z.TXT.GZ": gzip.compress("".join(some("z", 60)).encode()),
        "._a.jsonl": b"{}",
        ".hidden/x.txt": b"x",
        "README.txt": b"about",
        "LICENSE.txt": b"about",
        "dataset_info.json": b"{}",
        "y.csv": b"1,2",
        "q.parquet.gz": b"",
    }
    for name, data in files.items():
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / name).write_bytes(data)
    return tmp_path / "text"


@pytest.fixture(params=[False, True], ids=["whole", "in blocks"])
def text(request, folder, bucket, monkeypatch) -> str:
    """The folder's copy in a bucket; with small limits it takes many requests to read."""
    upload(folder, f"{bucket}/text")
    put(f"{bucket}/text/b/", b"")  # how consoles make a folder
    put(f"{bucket}/text-other/a.txt", b"the beginning of the name is the same")
    if request.param:
        monkeypatch.setattr(paths, "BLOCK", 500)
        monkeypatch.setattr(remote, "SMALL", 700)
        monkeypatch.setattr(remote, "SMALL_AHEAD", 2000)
    return f"{bucket}/text"


def contents(corpus: Corpus) -> dict:
    """All documents of a corpus, both sides, and what checkpoints have of them."""
    train = {name: list(documents) for name, documents in corpus.train.items()}
    return {"train": train, "heldout": corpus.heldout, "facts": corpus.facts()}


def test_every_format_is_read_as_in_a_local_folder(folder, text, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(survey, "REMEMBERED", 0)
    local = contents(read_corpus(config_of(folder), tmp_path / "a"))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        found = contents(read_corpus(config_of(text), tmp_path / "b"))
    assert found == local and len(found["train"]["text"]) >= 200
    [said] = [r.getMessage() for r in caplog.records if "not read" in r.getMessage()]
    assert "._a.jsonl" in said and "and 2 more" in said
    listed, here = (reading.list_files(str(path), ()) for path in (text, folder))
    assert (listed.names, listed.left_out) == (here.names, here.left_out)
    assert listed == reading.list_files(text + "/", ()) and len(set(listed.stamps)) > 5


def test_tokens_and_their_order_are_those_of_a_local_folder(folder, text, tmp_path):
    tokenizer = Tokenizer.train(some("t"), VOCAB + 1)
    both = []
    for place, cache in ((folder, tmp_path / "a"), (text, tmp_path / "b")):
        train = read_corpus(config_of(place), cache).train["text"]
        both.append(build_stream(train, tokenizer, "text", 0, cache))
    local, found = both
    assert found.checksum == local.checksum
    for a, b in zip(local.read(0, 10**9), found.read(0, 10**9), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_was_read_before_is_not_read_again_until_an_object_changes(text, tmp_path, monkeypatch):
    first = read_corpus(config_of(text), tmp_path)
    reads = []
    real = survey.read_file
    monkeypatch.setattr(survey, "read_file", lambda *args: reads.append(args[1]) or real(*args))
    assert read_corpus(config_of(text), tmp_path).facts() == first.facts() and not reads
    put(f"{text}/a.jsonl", lines(*some("A")))  # of the same size
    assert read_corpus(config_of(text), tmp_path).facts() != first.facts() and "a.jsonl" in reads


def test_a_source_is_called_as_its_file_folder_or_bucket_is(bucket):
    name = bucket.partition("://")[2]
    places = [bucket, f"{bucket}/a/text/", f"{bucket}/b.jsonl.gz", f"{bucket}/c/d.txt"]
    assert source_names(config_of(*places)) == [name, "text", "b", "d"]
    twice = [f"{bucket}/a/text", f"{bucket}/b/text"]
    assert source_names(config_of(*twice)) == twice


@every_day("gs", "s3")
def test_files_in_the_root_of_a_bucket_are_read(bucket, tmp_path):
    put(f"{bucket}/a.jsonl", lines(*some("a")))
    put(f"{bucket}/README.txt", "".join(some("r")).encode())
    (tmp_path / "a.jsonl").write_bytes(lines(*some("a")))
    whole = contents(read_corpus(config_of(bucket), tmp_path / "cache"))
    assert {d.origin.split(":")[0] for docs in whole["train"].values() for d in docs} == {"a.jsonl"}
    one = contents(read_corpus(config_of(f"{bucket}/a.jsonl"), tmp_path / "cache"))
    assert one == contents(read_corpus(config_of(tmp_path / "a.jsonl"), tmp_path / "cache"))
    named = read_corpus(config_of(f"{bucket}/README.txt"), tmp_path / "cache")  # by its own path it is read
    assert [d.origin for d in named.train["README"]] == ["README.txt"]


@every_day("gs", "s3")
def test_what_cannot_be_read_is_one_sentence(bucket, tmp_path):
    put(f"{bucket}/csv/a.csv", b"1")
    put(f"{bucket}/bad/a.jsonl", b"{")
    put(f"{bucket}/cut/a.jsonl.gz", gzip.compress(lines(*some("a")))[:-9])
    put(f"{bucket}/no/a.parquet", b"PAR1 and more, but no footer")
    put(f"{bucket}/empty/a.txt", b"")
    for place, said in {
        f"{bucket}/none": f"data source '{bucket}/none' does not exist; give a file or folder",
        f"{bucket}-no/text": f"{bucket}-no: there is no such bucket: look at its name",
        f"{bucket}/csv": r"holds no documents \(a.csv\); give",
        f"{bucket}/csv/a.csv": "ends in '.csv'; give",
        f"{bucket}/bad": f"{bucket}/bad/a.jsonl:1: not JSON",
        f"{bucket}/cut": f"corpus file {bucket}/cut/a.jsonl.gz is damaged or cut short",
        f"{bucket}/no": f"corpus file {bucket}/no/a.parquet is not a parquet file, or is damaged",
        f"{bucket}/empty": f"corpus file {bucket}/empty/a.txt is empty",
        "gs:/bucket/text": "a path in a bucket is gs://BUCKET/FOLDER",
    }.items():
        with pytest.raises(ValueError, match=said) as error:
            read_corpus(config_of(place), tmp_path)
        assert "\n" not in str(error.value)


def test_names_that_no_path_can_have_are_left_out(bucket):
    scheme = bucket.partition(":")[0]
    put(f"{bucket}/text/a.txt", b"a")
    put(f"{bucket}/text/b//c.txt", b"twice")
    put(f"{bucket}/text/./d.txt", b"dot")
    listed = reading.list_files(f"{bucket}/text", ())
    assert listed.names[0] == "a.txt" and (scheme == "gs" or listed.left_out == ["./d.txt", "b//c.txt"])


@pytest.mark.parametrize("change", ["other", "longer", "shorter", "gone", "more"])
def test_text_that_changes_while_it_is_read_for_the_first_time_is_an_error(bucket, tmp_path, monkeypatch, change):
    for i in range(6):
        put(f"{bucket}/text/{i}.txt", f"{i} and more\n".encode() * 9)
    new = {"other": b"5 or more.\n\n" * 9, "longer": b"5 and more\n" * 20, "shorter": b"5\n"}
    monkeypatch.setattr(remote, "FILES_AHEAD", 0)
    real = survey.read_file

    def read_file(*args):
        if args[1] == "2.txt":
            delete(f"{bucket}/text/5.txt") if change == "gone" else None
            put(
                f"{bucket}/text/{'6' if change == 'more' else '5'}.txt", new.get(change, b"6")
            ) if change != "gone" else 0
        return real(*args)

    monkeypatch.setattr(survey, "read_file", read_file)
    with pytest.raises(ValueError, match="changed while it was read|5.txt is missing"):
        read_corpus(config_of(f"{bucket}/text"), tmp_path)
    monkeypatch.setattr(survey, "read_file", real)
    corpus = read_corpus(config_of(f"{bucket}/text"), tmp_path)
    assert len(corpus.train["text"]) + len(corpus.heldout["text"]) == {"gone": 5, "more": 7}.get(change, 6)


# What is ahead.


class Requests:
    """The ranges that are asked for, and how many bytes of them are on their way at most."""

    def __init__(self, monkeypatch):
        self.ranges: list[tuple[int, int]] = []
        self.events: list[str] = []
        self.ahead = self.most = 0
        real = paths.Ranges.start

        def start(ranges: paths.Ranges, begin: int, end: int) -> Callable[[], bytes]:
            self.ranges.append((begin, end))
            self.events.append("start")
            self.ahead += end - begin
            self.most = max(self.most, self.ahead)
            reading = real(ranges, begin, end)

            def finish() -> bytes:
                self.events.append("wait")
                self.ahead -= end - begin
                return reading()

            return finish

        monkeypatch.setattr(paths.Ranges, "start", start)

    @property
    def bytes(self) -> int:
        return sum(end - begin for begin, end in self.ranges)


def test_less_than_256_mb_are_ahead():
    stream = (paths.AHEAD + 1) * paths.BLOCK
    spans = (remote.HELD + remote.SPAN_AHEAD + 1) * paths.BLOCK
    assert max(stream, spans + paths.BLOCK) + remote.SMALL_AHEAD + remote.SMALL <= 256 * MB


def test_the_next_small_files_are_on_their_way_and_not_too_many_of_them(bucket, monkeypatch):
    sizes = [0, 10, 30, 20, 25, 40, 500, 30, 30, 5, 0, 50, 50] + [1] * 60
    files = [bytes([i]) * size for i, size in enumerate(sizes)]
    for i, data in enumerate(files):
        put(f"{bucket}/{i}", data)
    monkeypatch.setattr(remote, "SMALL", 50)
    monkeypatch.setattr(remote, "SMALL_AHEAD", 100)
    monkeypatch.setattr(paths, "BLOCK", 50)
    requests = Requests(monkeypatch)
    found = remote.openers(paths.at(bucket), [str(i) for i in range(len(files))], sizes)
    first = next(found)
    assert len(requests.ranges) == 4 and requests.ahead == 85
    read = [first().read()]
    for opener in found:
        assert requests.ahead <= 100 + 50
        with opener() as file:
            read.append(file.read())
    assert read == files and requests.bytes == sum(sizes)
    assert 75 < requests.most <= 100 + 50 + 4 * 50


def test_of_a_parquet_file_only_the_columns_that_are_wanted_are_read(bucket, tmp_path, monkeypatch):
    data = parquet([f"{i} " + os.urandom(100).hex() for i in range(600)], group=50)
    put(f"{bucket}/a.parquet", data)
    (tmp_path / "a.parquet").write_bytes(data)
    monkeypatch.setattr(paths, "BLOCK", 4000)
    monkeypatch.setattr(reading, "BLOCK", 1000)
    source = DataSource(path="x")
    local = list(reading.read_file(paths.at(tmp_path / "a.parquet"), "a.parquet", "a", source))
    requests = Requests(monkeypatch)
    found = list(reading.read_file(paths.at(f"{bucket}/a.parquet"), "a.parquet", "a", source))
    assert found == local and len(found) == 600
    assert requests.bytes < 0.6 * len(data)  # two thirds of it are junk, but there is a footer
    assert requests.most <= (remote.HELD + remote.SPAN_AHEAD + 1) * 4000


def test_spans_are_a_file(bucket, monkeypatch):
    monkeypatch.setattr(paths, "BLOCK", 7)
    data = bytes(range(200))
    put(f"{bucket}/data", data)
    requests = Requests(monkeypatch)
    with io.BufferedReader(remote.Spans(paths.at(f"{bucket}/data"), 200, [(50, 90), (10, 30), (30, 40)]), 1) as file:
        for at, count in [(10, 30), (50, 40), (12, 3), (0, 5), (35, 20), (195, 50), (88, 4)]:
            file.seek(at)
            assert file.read(count) == data[at : at + count]
        assert file.seek(-3, os.SEEK_END) == 197 and file.read() == data[-3:]
    inside = [part for part in requests.ranges if part[1] - part[0] == 7 and (10 <= part[0] < 40 or 50 <= part[0] < 90)]
    assert len(inside) <= 14


# Prepared shards.


def build(columns: Columns) -> dict[str, int]:
    for i in range(5):
        columns.append("a", np.arange(10 * i, 10 * i + 10, dtype=np.uint16))
        columns.append("b", np.array([i], np.int64))
    columns.append("empty", np.empty(0, np.uint8))
    return {"made": 1}


def never(columns: Columns) -> dict[str, int]:
    pytest.fail("made twice")


@pytest.fixture
def entry(bucket, monkeypatch) -> str:
    monkeypatch.setattr(store, "BLOCK", 32)
    monkeypatch.setattr(paths, "BLOCK", 24)
    keep(f"{bucket}/cache", "key", "testing", build)
    return f"{bucket}/cache"


def test_an_entry_in_a_bucket_is_made_once_and_opened_without_reading_it(entry, tmp_path, monkeypatch):
    assert names(entry) == ["key.a.npy", "key.b.npy", "key.empty.npy", "key.json"]
    assert np.load(io.BytesIO(get(f"{entry}/key.a.npy"))).tolist() == list(range(50))
    assert not list((tmp_path / "room").rglob("*.tmp"))
    requests = Requests(monkeypatch)
    kept = keep(entry, "key", "testing", never)
    assert kept.facts == {"made": 1} and not requests.ranges
    assert kept["a"].tolist() == list(range(50)) and kept["a"].dtype == np.uint16
    assert kept["b"].tolist() == [0, 1, 2, 3, 4] and kept["empty"].tolist() == []
    assert kept.checksum == keep(tmp_path, "key", "testing", build).checksum


def test_a_column_in_a_bucket_is_read_by_slices(entry, monkeypatch):
    column = keep(entry, "key", "testing", never).columns["a"]
    assert isinstance(column, remote.Column) and (len(column), column.dtype) == (50, np.uint16)
    requests = Requests(monkeypatch)
    for part in (slice(3, 7), slice(0, 0), slice(45, 99), slice(None), slice(-3, None), slice(9, 2)):
        assert column[part].tolist() == list(range(50))[part]
    assert requests.bytes == 2 * (4 + 5 + 50 + 3)


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("name", ["key.a.npy", "key.b.npy", "key.json"])
@pytest.mark.parametrize("harm", [flip, lambda data: data[:-1], lambda data: b"", None])
def test_an_object_that_changed_is_noticed_and_made_anew(entry, harm, name, caplog):
    if harm is None:
        delete(f"{entry}/{name}")
    else:
        put(f"{entry}/{name}", harm(get(f"{entry}/{name}")))
    kept = keep(entry, "key", "testing", build)
    assert kept["a"].tolist() == list(range(50)) and len(kept["b"]) == 5
    if (harm, name) != (None, "key.json"):
        assert f"{entry}/{name}" in caplog.text and "made anew" in caplog.text


def test_a_copied_entry_is_compared_and_not_made_again(entry, bucket, tmp_path):
    keep(tmp_path / "local", "other", "testing", build)
    for name in names(entry):
        put(f"{bucket}/copy/{name}", get(f"{entry}/{name}"))
    upload(tmp_path / "local", f"{bucket}/copy")
    for key in ("key", "other"):
        assert keep(f"{bucket}/copy", key, "testing", never)["a"].tolist() == list(range(50))
        put(f"{bucket}/copy/{key}.a.npy", flip(get(f"{bucket}/copy/{key}.a.npy")))
        with pytest.raises(pytest.fail.Exception, match="made twice"):
            keep(f"{bucket}/copy", key, "testing", never)


def test_a_column_that_changes_while_it_is_in_use_is_an_error(entry):
    kept = keep(entry, "key", "testing", never)
    column = kept.columns["a"]
    assert column[0:2].tolist() == [0, 1]
    put(f"{entry}/key.a.npy", flip(get(f"{entry}/key.a.npy")))
    with pytest.raises(ValueError, match=f"{entry}/key.a.npy changed while it was read"):
        column[2:4]


def test_a_bucket_out_of_reach_is_no_damage(entry, monkeypatch):
    def refuse(*args, **kwargs):
        raise buckets.failure(f"{entry}/key.json", ConnectionError("no way there"))

    monkeypatch.setattr(type(paths.at(entry)), "read_text", refuse)
    with pytest.raises(ValueError, match="it cannot be reached, after 7 attempts: no way there"):
        keep(entry, "key", "testing", never)
    assert "key.json" in names(entry)


UPLOAD = """
import os, shutil, signal, sys
from ling_jax.data import store
from ling_jax.data.store import keep
from tests.data.test_data_buckets import build
uploads = 0

def copy(source, target, size):
    global uploads
    uploads += 1
    target.write(bytes(20 << 20) if uploads == int(sys.argv[2]) else source.read())
    if uploads == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

shutil.copyfileobj = copy
keep(sys.argv[1], "key", "testing", build)
"""


@pytest.mark.parametrize("at", [1, 3])
def test_after_a_kill_in_the_middle_of_an_upload_the_entry_is_made_whole(bucket, tmp_path, at):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), *sys.path])}
    command = [sys.executable, "-c", UPLOAD, f"{bucket}/cache", str(at)]
    assert subprocess.run(command, cwd=REPO, env=env, timeout=120).returncode == -signal.SIGKILL
    left = names(f"{bucket}/cache")
    assert [name for name in left if name.endswith(".npy")] == ["key.a.npy", "key.b.npy"][: at - 1]
    assert "key.json" not in left and list((tmp_path / "room").rglob("*.tmp"))
    assert keep(f"{bucket}/cache", "key", "testing", build)["a"].tolist() == list(range(50))
    assert names(f"{bucket}/cache") == ["key.a.npy", "key.b.npy", "key.empty.npy", "key.json"]
    assert not list((tmp_path / "room").rglob("*.tmp"))


def test_an_upload_that_fails_leaves_no_object(bucket, monkeypatch):
    def copy(source, target, size):
        target.write(bytes(20 << 20))
        raise RuntimeError("in the middle")

    monkeypatch.setattr(store.shutil, "copyfileobj", copy)
    with pytest.raises(RuntimeError, match="in the middle"):
        keep(f"{bucket}/cache", "key", "testing", build)
    assert names(f"{bucket}/cache") == []


def test_a_large_column_is_uploaded_in_parts(bucket, monkeypatch):
    values = np.random.default_rng(0).integers(0, 2**16, 11 << 20, np.uint16)  # 22 MB
    kept = keep(f"{bucket}/cache", "key", "testing", lambda columns: columns.append("a", values) or {})
    np.testing.assert_array_equal(kept["a"], values)
    np.testing.assert_array_equal(kept.columns["a"][(10 << 20) - 5 : (10 << 20) + 5], values[(10 << 20) - 5 :][:10])


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("{bucket}-no/cache", "{bucket}-no: there is no such bucket: look at its name"),
        ("gs:/bucket/cache", "gs:/bucket/cache: a path in a bucket is gs://BUCKET/FOLDER"),
        ("az://bucket/cache", "only local paths, gs://BUCKET/... and s3://BUCKET/... are known"),
    ],
)
def test_a_cache_that_cannot_be_is_one_sentence(bucket, place, said):
    with pytest.raises(ValueError, match=said.format(bucket=bucket)):
        cache_dir(place.format(bucket=bucket))


# A run's data.


@pytest.fixture
def prose(tmp_path) -> Path:
    write_text(tmp_path / "prose")
    return tmp_path / "prose"


def opened(place, cache, tokenizer_dir) -> tuple[Data, DataConfig]:
    config = config_of(place, cache_dir=str(cache), sequence_length=64, global_batch_size=6)
    return open_data(config, 300, str(tokenizer_dir)), config


OTHER = """
import hashlib, itertools, logging, sys
from tests.data.test_data_buckets import opened
from ling_jax.data.pipeline import train_batches
logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
data, config = opened(*sys.argv[1:4])
digest = hashlib.sha256()
for batch in itertools.islice(train_batches(data.rows, config, 3), 20):
    for name in sorted(batch.arrays):
        digest.update(batch.arrays[name].tobytes())
print(data.fingerprint(), digest.hexdigest())
"""


def test_shards_prepared_by_one_process_are_read_by_another_that_has_no_cache(prose, bucket, tmp_path):
    """Batches, facts and fingerprint are those of local folders; nothing is read or tokenized again."""
    upload(prose, f"{bucket}/prose")
    data, config = opened(f"{bucket}/prose", f"{bucket}/cache", tmp_path / "tokenizer")
    local, _ = opened(prose, tmp_path / "cache", tmp_path / "local" / "tokenizer")
    assert isinstance(data.rows["prose"].stream.tokens_S, remote.Column)
    assert data.fingerprint() == local.fingerprint() and data.facts == local.facts
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), *sys.path])}
    env["XDG_CACHE_HOME"] = str(tmp_path / "empty")
    outs = []
    for place, cache in ((f"{bucket}/prose", f"{bucket}/cache"), (prose, tmp_path / "cache")):
        command = [sys.executable, "-c", OTHER, str(place), str(cache), str(tmp_path / "tokenizer")]
        done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "into " not in done.stderr and "tokenizing" not in done.stderr
        outs.append(done.stdout)
    assert outs[0] == outs[1]
    assert not list(Path(tmp_path).glob("empty/**/*.npy"))


def test_all_rows_of_a_batch_are_on_their_way_before_the_first_is_waited_for(prose, bucket, tmp_path, monkeypatch):
    data, config = opened(prose, f"{bucket}/cache", tmp_path / "tokenizer")
    rows = data.rows["prose"]
    assert isinstance(rows.stream, Stream)
    local, _ = opened(prose, tmp_path / "cache", tmp_path / "tokenizer")
    wanted = list(itertools.islice(train_batches(local.rows, config, 0), 8))
    requests = Requests(monkeypatch)
    one = rows.start(len(rows) // 2)
    count = len(requests.ranges)
    assert count >= 1 and "wait" not in requests.events
    assert set(one()) == set(wanted[0].arrays)
    monkeypatch.setattr("ling_jax.data.pipeline.READ_THREADS", 1)
    requests.events.clear()
    found = list(itertools.islice(train_batches(data.rows, config, 0), 8))
    for a, b in zip(found, wanted, strict=True):
        assert a.state == b.state
        for name in b.arrays:
            np.testing.assert_array_equal(a.arrays[name], b.arrays[name])
    assert "".join(event[0] for event in requests.events).startswith("s" * config.global_batch_size)


def test_a_vocabulary_of_the_bytes_alone_has_two_bytes_a_token_in_the_bucket(prose, bucket, tmp_path):
    train = read_corpus(config_of(prose), tmp_path).train["prose"]
    tokenizer = Tokenizer.train([], VOCAB)
    stream = build_stream(train, tokenizer, "prose", 0, f"{bucket}/cache")
    [tokens] = [name for name in names(f"{bucket}/cache") if name.endswith(".tokens.npy")]
    assert len(get(f"{bucket}/cache/{tokens}")) - 2 * len(stream.tokens_S) <= 128
    local = build_stream(train, tokenizer, "prose", 0, tmp_path)
    for begin in (0, 17, len(stream.tokens_S) // 2, len(stream.tokens_S) - 5):
        for a, b in zip(stream.read(begin, begin + 300), local.read(begin, begin + 300), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.nightly
def test_text_prepared_from_a_bucket_into_a_bucket_gives_the_rows_of_the_text(prose, bucket, tmp_path, monkeypatch):
    upload(prose, f"{bucket}/prose")
    data, config = opened(prose, tmp_path / "cache", tmp_path / "run")
    monkeypatch.setattr(prepare, "PORTION", 1000)

    def here(job, portions):
        return (prepare.make_shard(job, number, portion) for number, portion in enumerate(portions))

    source, folder = DataSource(path=f"{bucket}/prose"), f"{bucket}/made/prose.prepared"
    made = prepare.prepare("prose", source, paths.at(folder), data.tokenizer, here)
    assert len(made.facts["shards"]) > 1
    found, _ = opened(folder, f"{bucket}/cache", tmp_path / "other")
    assert {name: [d.text for d in documents] for name, documents in found.heldout.items()} == {
        name: [d.text for d in documents] for name, documents in data.heldout.items()
    }
    batches = [train_batches(one.rows, config, 0) for one in (data, found)]
    for one, other in itertools.islice(zip(*batches, strict=False), 5):
        for name in one.arrays:
            np.testing.assert_array_equal(one.arrays[name], other.arrays[name])
    assert prepare.prepare("prose", source, paths.at(folder), data.tokenizer, here).checksum == made.checksum
    delete(f"{folder}/shard-000001.tokens.npy")
    with pytest.raises(ValueError, match=r"shard-000001\.tokens\.npy is missing.*run the `prepare` command"):
        opened(folder, f"{bucket}/cache", tmp_path / "other")
