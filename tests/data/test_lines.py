"""Lines that are appended to files, and to rows of objects in buckets."""

import pytest

from ling_jax.files import lines
from ling_jax.files.lines import cut_lines, open_lines, parts_of, read_lines
from ling_jax.files.paths import at
from tests.support.buckets import get, names, put


@pytest.fixture
def places(tmp_path, bucket):
    """A folder of this machine and a bucket."""
    return [at(tmp_path), at(bucket)]


def _write(path, numbers):
    writer = open_lines(path)
    for number in numbers:
        writer.append(b"%d" % number)
    writer.close()


def _read(path):
    found = list(read_lines(path))
    assert [followed for _, followed in found] == [True] * (len(found) - 1) + [False] * bool(found)
    return [int(line) for line, _ in found]


def test_lines_are_read_as_they_were_appended(places, monkeypatch):
    monkeypatch.setattr(lines, "PART", 30)
    for place in places:
        path = place / "record.jsonl"
        assert _read(path) == [] and parts_of(path) == []
        _write(path, range(30))
        _write(path, range(30, 50))
        assert _read(path) == list(range(50))


def test_lines_at_the_end_are_dropped(places, monkeypatch):
    monkeypatch.setattr(lines, "PART", 30)
    for place in places:
        for kept in (0, 1, 7, 13, 49, 50):
            path = place / f"record{kept}.jsonl"
            _write(path, range(50))
            cut_lines(path, lambda line, kept=kept: int(line) < kept)
            assert _read(path) == list(range(kept))
            _write(path, range(kept, 60))
            assert _read(path) == list(range(60))


def test_an_object_is_written_anew_up_to_a_size_and_left_alone_then(bucket, monkeypatch):
    monkeypatch.setattr(lines, "PART", 30)
    uploads = []
    write = lines.write_whole

    def counted(file, data):
        uploads.append((file.name, len(data)))
        write(file, data)

    monkeypatch.setattr(lines, "write_whole", counted)
    writer = open_lines(at(bucket) / "record.jsonl")
    for number in range(1000, 1030):
        writer.append(b"%d" % number)
        writer.flush()
        writer.flush()
    assert len(uploads) == 30
    assert max(size for _, size in uploads) == 30
    assert names(bucket) == [f"record-{part:04}.jsonl" for part in range(1, 5)] + ["record.jsonl"]
    assert get(f"{bucket}/record.jsonl") == b"1000\n1001\n1002\n1003\n1004\n1005\n"


def test_lines_come_to_a_bucket_once_a_minute(bucket, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(lines.time, "monotonic", lambda: now[0])
    writer = open_lines(at(bucket) / "record.jsonl")
    writer.append(b"1")
    assert names(bucket) == []
    now[0] = lines.UPLOAD_SECONDS
    writer.append(b"2")
    assert get(f"{bucket}/record.jsonl") == b"1\n2\n"
    writer.append(b"3")
    writer.close()
    assert get(f"{bucket}/record.jsonl") == b"1\n2\n3\n"


def test_other_objects_are_no_lines(bucket):
    for name in ("record-1.jsonl", "record-0001.jsonl.bak", "other.jsonl"):
        put(f"{bucket}/{name}", b"0\n")
    _write(at(bucket) / "record.jsonl", [1])
    assert _read(at(bucket) / "record.jsonl") == [1]
