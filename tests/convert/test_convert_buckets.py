"""HF folders and checkpoints in buckets: read by ranges, converted in their place, complete with their last object."""

import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore as ts

from ling_jax import load_pretrained
from ling_jax.convert import tensorfile, transfer
from ling_jax.convert.origin import check_origin
from ling_jax.convert.survey import survey
from ling_jax.convert.tensorfile import TensorFile, write_tensors
from ling_jax.convert.to_hf import to_hf
from ling_jax.convert.to_jax import to_jax
from ling_jax.convert.verify import verify
from ling_jax.convert.weights import StoredWeights, open_weights
from ling_jax.files import buckets
from ling_jax.files.buckets import file_system
from ling_jax.files.paths import Entry, Ranges, at
from ling_jax.model.model import split_model
from tests.support.adapters import ATTENTION, pair, write_adapter
from tests.support.buckets import download, every_day, get, names, put, upload
from tests.support.commands import call
from tests.support.helpers import assert_trees_equal
from tests.support.hf_folders import FLOATS, QUANTISED, SHARDS, SLOWLY, assert_same_folder, tensors_of, write_folder
from tests.support.marks import nightly
from tests.tiny_run import REPO


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """A HF folder with random weights, in two files."""
    folder = tmp_path_factory.mktemp("hf") / "source"
    write_folder(folder, sharded=True)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def source(local, bucket) -> str:
    """The same in a bucket."""
    upload(local, f"{bucket}/hf")
    return f"{bucket}/hf"


def states(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint's arrays."""
    found = (file for file in (folder / "state").rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


# There and back.


def test_a_folder_in_a_bucket_is_the_model_that_it_is_on_a_disk(local, source):
    there, here = load_pretrained(source), load_pretrained(local)
    for a, b in zip(split_model(there)[1:], split_model(here)[1:], strict=True):
        assert_trees_equal(a, b)
    assert there.config == here.config
    check_origin(source, here.config, "same")


def test_a_checkpoint_in_a_bucket_has_the_bytes_it_has_on_a_disk(local, source, bucket, tmp_path):
    to_jax(str(local), str(tmp_path / "ours"))
    for target, origin in (("a", source), ("b", str(local))):
        audit = to_jax(origin, f"{bucket}/{target}")
        assert not audit.missing and not audit.unused and audit.files == ["tokenizer.json"]
        there = download(f"{bucket}/{target}", tmp_path / target)
        assert states(there) == states(tmp_path / "ours")
        assert (there / "meta" / "meta.json").read_bytes() == (tmp_path / "ours" / "meta" / "meta.json").read_bytes()
        assert get(f"{bucket}/{target}/hf/tokenizer.json") == b"{}"
        assert names(f"{bucket}/{target}.partial") == []
    to_jax(source, str(tmp_path / "c"))
    assert states(tmp_path / "c") == states(tmp_path / "ours")


@every_day("gs")
@pytest.mark.parametrize("case", [nightly(FLOATS[0]), QUANTISED[0]], ids=lambda case: case.name)
def test_from_a_bucket_to_a_bucket_and_back_every_byte_is_kept(case, bucket, tmp_path):
    upload(case, f"{bucket}/hf")
    to_jax(f"{bucket}/hf", f"{bucket}/ours")
    audit = to_hf(f"{bucket}/ours", f"{bucket}/back", max_shard_size="300KB")
    assert not audit.missing and not audit.unused
    assert_same_folder(case, download(f"{bucket}/back", tmp_path / "back"))
    assert len([name for name in names(f"{bucket}/back") if name.endswith(".safetensors")]) > 1
    assert names(f"{bucket}/back.partial") == []
    assert survey(f"{bucket}/ours").records == survey(str(case)).records == survey(f"{bucket}/back").records
    assert verify(str(case), f"{bucket}/ours", logits=False).good


@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_another_format_is_the_same_file_in_a_bucket_and_on_a_disk(local, source, bucket, tmp_path, form):
    to_hf(str(local), str(tmp_path / "here"), form)
    to_hf(source, f"{bucket}/new", form)
    there = download(f"{bucket}/new", tmp_path / "there")
    for file in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (there / file).read_bytes() == (tmp_path / "here" / file).read_bytes()


def test_an_adapter_in_a_bucket_is_merged_as_on_a_disk(bucket, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", pair(ATTENTION) | pair("lm_head", seed=3))
    upload(adapter, f"{bucket}/adapter")
    upload(FLOATS[0], f"{bucket}/{FLOATS[0].name}")
    to_hf(str(FLOATS[0]), str(tmp_path / "here"), adapter=str(adapter))
    to_hf(f"{bucket}/{FLOATS[0].name}", f"{bucket}/merged", adapter=f"{bucket}/adapter")
    assert_same_folder(tmp_path / "here", download(f"{bucket}/merged", tmp_path / "there"))
    assert tensors_of(tmp_path / "there") != tensors_of(FLOATS[0])


def test_the_command_converts_in_a_bucket(local, source, bucket):
    out, _ = call("convert.py", "to-jax", "--source", source, "--target", f"{bucket}/ours")
    assert "every byte is kept" in out
    out, _ = call("convert.py", "verify", "--no-logits", "--source", f"{bucket}/ours", "--target", local)
    assert "the same weights" in out
    _, err = call("convert.py", "to-jax", "--source", source, "--target", f"{bucket}/ours", code=2)
    assert err.splitlines()[-1].startswith(f"error: {bucket}/ours exists") and "Traceback" not in err


# Requests.


@pytest.fixture
def ranges(monkeypatch) -> list[tuple[str, int]]:
    """(file, bytes) of every range that is asked for."""
    found: list[tuple[str, int]] = []

    def start(self, begin, end, original=Ranges.start):
        found.append((self.path.name, end - begin))
        return original(self, begin, end)

    monkeypatch.setattr(Ranges, "start", start)
    return found


def test_of_a_tensor_only_the_rows_that_are_needed_are_read(local, source, ranges, monkeypatch):
    weights, here = open_weights(source), open_weights(local)
    assert len(ranges) == len(SHARDS)  # the headers
    monkeypatch.setattr(tensorfile, "BLOCK", 1 << 10)
    path = ("params", "layers", "softmax_moe", "mlp", "experts", "up_proj", "weight")
    size = here.stacks[path].shape[1] * 4
    index = (slice(1, 2), slice(3, 7), slice(4, 9), slice(1, 5))
    ranges.clear()
    np.testing.assert_array_equal(weights.read(path, index), here.read(path, index))
    assert sum(n for _, n in ranges) == 4 * 5 * size and len(ranges) == 4 * -(-5 * size // 1024)


def writes(scheme: str) -> int:
    """The objects that TensorStore has written."""
    driver = {"gs": "gcs", "s3": "s3"}[scheme]
    metrics = ts.experimental_collect_matching_metrics(f"/tensorstore/kvstore/{driver}/write_latency_ms")
    return sum(value["count"] for metric in metrics for value in metric["values"])  # no metric before the first


def test_each_object_is_one_request_and_is_not_read_again(source, bucket, ranges):
    scheme = bucket.partition(":")[0]
    writes_before, ranges_before = writes(scheme), len(ranges)
    to_jax(source, f"{bucket}/ours")
    objects, beats = len(names(f"{bucket}/ours")), 3  # the lease is taken, perhaps renewed, let go
    assert objects <= writes(scheme) - writes_before <= objects + beats
    assert {file for file, _ in ranges[ranges_before:]} <= set(SHARDS)


def test_small_arrays_are_not_asked_for_layer_by_layer(source, bucket):
    to_jax(source, f"{bucket}/ours")
    path = ("params", "layers", "softmax_moe", "input_layernorm", "weight")
    whole = StoredWeights(f"{bucket}/ours").arrays.array(path).read()
    weights = StoredWeights(f"{bucket}/ours")
    first = weights.read(path, (slice(0, 1), slice(0, 4)))
    at(f"{bucket}/ours/state/{'.'.join(path)}").rmtree()
    np.testing.assert_array_equal(weights.read(path, (slice(1, 2), slice(0, 4))), whole[1:2, :4])
    np.testing.assert_array_equal(first, whole[:1, :4])


# Kills, changes and other targets.


@every_day("s3")
@pytest.mark.parametrize("direction", [nightly("to_jax"), "to_hf"])
def test_a_conversion_in_a_bucket_that_is_killed_goes_on_and_nobody_takes_it_for_whole(
    local, source, bucket, tmp_path, direction
):
    target = f"{bucket}/target"
    journal = f"{target}.partial/{transfer.JOURNAL}"
    slowly = SLOWLY.replace("import sys, time\n", "import logging, sys, time\nlogging.basicConfig(level='INFO')\n")
    slowly = slowly.replace("weights.PIECE", "transfer.JOURNAL_SECONDS = 0.0\nweights.PIECE")
    command = [sys.executable, "-c", slowly, direction, source, target]

    def lines() -> int:
        try:
            return len(get(journal).splitlines())
        except FileNotFoundError:
            return 0

    for seen in (5, 10):
        process = subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and lines() < seen:
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -9, process.stderr.read() if process.stderr else ""
        for reader in (load_pretrained, survey):
            with pytest.raises(ValueError):
                reader(target)
        with pytest.raises(ValueError, match=r"target.partial is an unfinished conversion of other files"):
            to_hf(source, target, "fp32")
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on after" in done.stderr
    assert names(f"{target}.partial") == []
    there = download(target, tmp_path / "target")
    audit = json.loads((there / transfer.AUDIT_FILE).read_text())
    assert audit["missing"] == audit["unused"] == [] and len(audit["tensors"]) == len(tensors_of(local))
    assert verify(str(local), target, logits=False).good


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)  # those to gs:// cost nothing, and end by themselves
def test_parts_of_an_upload_that_a_kill_left_are_removed(source, bucket, monkeypatch):
    target = f"{bucket}/target"
    files = file_system(target)
    for key in ("target/model.safetensors", "target-2/model.safetensors"):
        files.call_s3("create_multipart_upload", Bucket=bucket.removeprefix("s3://"), Key=key)
    with monkeypatch.context() as patch:
        patch.setattr(transfer.TensorRecord, "add", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            to_hf(source, target)
    to_hf(source, target)
    left = files.list_multipart_uploads(bucket.removeprefix("s3://"))
    assert [upload["Key"] for upload in left] == ["target-2/model.safetensors"]


def test_an_upload_whose_last_answer_is_lost_has_succeeded(bucket, monkeypatch):
    files, rows = file_system(bucket), np.arange(5, dtype=np.float32)

    class Lossy:
        def open(self, *arguments, **settings):
            file = files.open(*arguments, **settings)

            def close(original=file.close):
                original()
                raise FileNotFoundError("no such upload")

            file.close = close
            return file

    monkeypatch.setattr(tensorfile, "file_system", lambda path: Lossy())
    file = at(f"{bucket}/x.safetensors")
    write_tensors(file, {"a": ("F32", (5,))}, {}, [("a", rows)])
    np.testing.assert_array_equal(TensorFile(file).read("a"), rows)
    monkeypatch.setattr(tensorfile, "entry", lambda path: Entry("x", 1, "", 0.0))
    with pytest.raises(FileNotFoundError, match="no such upload"):
        write_tensors(file, {"a": ("F32", (5,))}, {}, [("a", rows)])


def test_parts_of_an_upload_are_asked_for_again_after_503(monkeypatch):
    core, botocore = pytest.importorskip("s3fs.core"), pytest.importorskip("botocore.exceptions")
    calls = []

    async def answer(self, method, *arguments, **settings):
        calls.append(method)
        if len(calls) < 3:
            raise botocore.ClientError({"ResponseMetadata": {"HTTPStatusCode": 503}, "Error": {}}, method)
        return "done"

    monkeypatch.setattr(core.S3FileSystem, "_call_s3", answer)
    monkeypatch.setattr(buckets, "FIRST_WAIT", 0.01)
    assert file_system("s3://bucket/x").call_s3("upload_part", Bucket="bucket", Key="x") == "done"
    assert calls == ["upload_part"] * 3


def test_an_error_in_the_middle_of_a_file_leaves_no_object(source, bucket, monkeypatch):
    def fail(*_):
        raise OSError("a cable is pulled")

    monkeypatch.setattr(transfer.TensorRecord, "add", fail)
    with pytest.raises(ValueError, match="a cable is pulled"):
        to_hf(source, f"{bucket}/target")
    assert names(f"{bucket}/target") == []


def test_a_source_that_changed_since_is_not_gone_on_with(local, source, bucket, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(transfer.TensorRecord, "add", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            to_jax(source, f"{bucket}/target")
    data = bytearray((local / SHARDS[0]).read_bytes())
    data[-1] ^= 1
    put(f"{source}/{SHARDS[0]}", bytes(data))
    with pytest.raises(ValueError, match=r"target.partial is an unfinished conversion of other files"):
        to_jax(source, f"{bucket}/target")


def test_what_a_kill_at_the_very_end_left_is_removed_by_the_next_start(source, bucket):
    for convert, last in ((to_jax, "commit_success.txt"), (to_hf, "config.json")):
        target = f"{bucket}/{last}"
        convert(source, target)
        put(f"{target}.partial/{transfer.JOURNAL}", b"[]\n")
        with pytest.raises(ValueError, match="exists: choose another --target"):
            convert(source, target)
        assert names(f"{target}.partial") == [] and last in names(target)


def test_a_target_with_anything_in_it_is_refused_and_so_is_a_whole_bucket(source, bucket):
    put(f"{bucket}/there/notes.txt", b"mine")
    for convert in (to_jax, to_hf):
        with pytest.raises(ValueError, match="there exists: choose another --target"):
            convert(source, f"{bucket}/there")
        with pytest.raises(ValueError, match="is a bucket: name a folder in it"):
            convert(source, bucket)
        with pytest.raises(ValueError, match="there is no such bucket"):
            convert(source, f"{bucket}-not/there")
    assert names(f"{bucket}/there") == ["notes.txt"]


def test_a_file_that_is_cut_or_missing_is_one_error(local, source):
    data = (local / SHARDS[1]).read_bytes()
    put(f"{source}/{SHARDS[1]}", data[:-4])
    with pytest.raises(ValueError, match=rf"{SHARDS[1]} is damaged or truncated \(its header speaks of"):
        open_weights(source)
    at(f"{source}/{SHARDS[1]}").unlink()
    with pytest.raises(ValueError, match=f"{SHARDS[1]} is missing"):
        open_weights(source)


def test_a_header_longer_than_the_first_request_is_read(source, monkeypatch):
    monkeypatch.setattr(tensorfile, "FIRST_READ", 100)
    assert jax.tree.leaves(split_model(load_pretrained(source))[1])
    assert TensorFile(at(f"{source}/{SHARDS[0]}")).tensors


@pytest.mark.nightly
def test_300_mb_take_little_memory_and_no_disk(bucket):
    if bucket.startswith("s3://"):
        pytest.skip("the server for s3:// answers an upload of 400 MB later than its client waits")
    command = [sys.executable, "-m", "scripts.bucket_memory", "--bucket", bucket, "--size-gb", "0.3"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every byte came back" in done.stdout and names(bucket) == []
