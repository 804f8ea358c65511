"""Paths of users, files in buckets, and what is said of buckets that cannot be used."""

import asyncio
import importlib.util
import os
import random

import pytest

from ling_jax.files import buckets, paths
from ling_jax.files.paths import at, check_bucket, entries, entry, local, move, open_to_read, write_whole
from tests.support.buckets import get, names, put


@pytest.mark.parametrize("wrong", ["gs:/bucket/text", "gs:bucket", "s3:/bucket", "gs:///text", "s3://"])
def test_a_misspelled_bucket_is_refused_and_no_folder_is_made(wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="a path in a bucket is (gs|s3)://BUCKET/FOLDER"):
        at(wrong)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("unknown", ["https://host/text", "az://bucket/text", "hdfs://name/text"])
def test_an_unknown_scheme_is_refused(unknown):
    with pytest.raises(ValueError, match="only local paths, gs://BUCKET/... and s3://BUCKET/... are known"):
        at(unknown)


@pytest.mark.parametrize(("path", "package"), [("gs://bucket/text", "gcsfs"), ("s3://bucket/text", "s3fs")])
def test_a_missing_package_is_named(path, package, monkeypatch):
    buckets.prepare.cache_clear()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(ValueError, match=f"needs the package {package}, which is not installed: pip install {package}"):
        at(path)
    buckets.prepare.cache_clear()


def test_local_paths_are_expanded_and_may_be_demanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert os.fspath(at("~/text")) == f"{tmp_path}/text"
    assert local("~/text", "--trace") == tmp_path / "text"


def test_what_must_be_local_says_so(bucket):
    with pytest.raises(ValueError, match=f"--trace {bucket}/x must be a local path: it cannot be in a bucket"):
        local(f"{bucket}/x", "--trace")


def test_a_bucket_that_is_not_there_is_one_sentence(bucket):
    check_bucket(at(f"{bucket}/folder"))
    with pytest.raises(ValueError, match=f"^{bucket}-no: there is no such bucket: look at its name$"):
        check_bucket(at(f"{bucket}-no/folder"))


def test_files_of_a_bucket_are_written_listed_and_moved(bucket):
    root = at(f"{bucket}/root/")
    files = {"a/1.txt": b"one", "a/b/2.txt": b"two", "c": b"three"}
    for name, data in files.items():
        write_whole(root / name, data)
    put(f"{bucket}/root/folder/", b"")
    put(f"{bucket}/rootless", b"")
    found = entries(root)
    assert [one.name for one in found] == sorted(files)
    assert [one.size for one in found] == [3, 3, 5]
    assert found[0] == paths.Entry("a/1.txt", 3, entry(root / "a/1.txt").stamp, found[0].time)
    assert found[0].time > 1.6e9
    before = entry(root / "c").stamp
    write_whole(root / "c", b"four!")
    assert entry(root / "c").stamp != before
    move(root / "a", root / "z")
    move(root / "c", root / "d")
    assert {name: get(f"{bucket}/root/{name}") for name in ("z/1.txt", "z/b/2.txt", "d")} == {
        "z/1.txt": b"one", "z/b/2.txt": b"two", "d": b"four!",
    }  # fmt: skip
    assert not any(name.startswith(("root/a/", "root/c")) for name in names(bucket))
    assert entries(at(f"{bucket}/nowhere")) == []


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1234])
def test_an_object_is_read_as_a_file(size, bucket, monkeypatch):
    monkeypatch.setattr(paths, "BLOCK", 100)
    data = random.Random(size).randbytes(size)
    put(f"{bucket}/folder/data", data)
    rng = random.Random(0)
    with open_to_read(at(f"{bucket}/folder/data")) as file:
        assert file.read() == data
        for _ in range(50):
            start, length = rng.randrange(size + 20), rng.randrange(300)
            file.seek(start)
            assert file.read(length) == data[start : start + length]
        file.seek(-min(size, 7), os.SEEK_END)
        assert file.read() == data[size - min(size, 7) :]


def test_only_some_blocks_are_under_way(bucket, monkeypatch):
    monkeypatch.setattr(paths, "BLOCK", 1000)
    put(f"{bucket}/data", bytes(100_000))
    under_way, most = 0, 0
    start = paths.Ranges.start

    def counted(self, begin, end):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        finish = start(self, begin, end)

        def done():
            nonlocal under_way
            under_way -= 1
            return finish()

        return done

    monkeypatch.setattr(paths.Ranges, "start", counted)
    with open_to_read(at(f"{bucket}/data")) as file:
        while file.read(500):
            pass
    assert 1 < most <= paths.AHEAD


def test_an_object_that_changes_while_it_is_read_is_noticed(bucket):
    put(f"{bucket}/data", b"before")
    ranges = paths.Ranges(at(f"{bucket}/data"))
    assert ranges.read(0, 3) == b"bef"
    put(f"{bucket}/data", b"after!")
    with pytest.raises(ValueError, match="data changed while it was read"):
        ranges.read(3, 6)
    with pytest.raises(ValueError, match="nothing is missing"):
        paths.Ranges(at(f"{bucket}/nothing")).read(0, 1)


class _Answer(Exception):
    def __init__(self, code):
        super().__init__(f"answer {code}")
        self.code = code


def _call(answers):
    """Raises the answers, one a call; then returns how many there were."""
    left = iter(answers)

    async def call():
        for answer in left:
            raise answer
        return len(answers)

    return call


@pytest.fixture
def retries(monkeypatch):
    monkeypatch.setattr(buckets, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(buckets, "retries", buckets._Retries())
    return lambda answers: asyncio.run(buckets._retried("gs://bucket/x", _call(answers)))


@pytest.mark.parametrize("passing", [_Answer(429), _Answer("503"), TimeoutError(), ConnectionResetError()])
def test_what_passes_is_tried_again_and_counted(passing, retries):
    assert retries([passing] * (buckets.ATTEMPTS - 1)) == buckets.ATTEMPTS - 1
    assert f"repeated: {buckets.ATTEMPTS - 1} (" in buckets.retries.told()


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (_Answer(403), "no permission: give this account the right to"),
        (PermissionError("AccessDenied"), "no permission"),
        (_Answer(401), "no valid credentials: log in"),
        (_Answer(301), "cannot be reached"),
    ],
)
def test_what_does_not_pass_is_said_at_once(answer, sentence, retries):
    with pytest.raises(ValueError, match=f"gs://bucket/x: .*{sentence}"):
        retries([answer])
    assert not buckets.retries.told()


def test_other_answers_are_the_library_s_affair(retries):
    with pytest.raises(FileNotFoundError):
        retries([FileNotFoundError("x")])
    with pytest.raises(_Answer, match="412"):
        retries([_Answer(412)])


def test_once_a_bucket_is_given_up_others_are_tried_once(retries, monkeypatch):
    with pytest.raises(ValueError, match="gs://bucket/x: it cannot be reached"):
        retries([_Answer(503)] * buckets.ATTEMPTS)
    with pytest.raises(ValueError, match="cannot be reached"):
        retries([_Answer(503)])
    monkeypatch.setattr(buckets, "TOGETHER", 0.0)
    assert retries([_Answer(503)]) == 1
