"""Checkpoints averaged in place of a decay: the numbers, the bytes whatever happens on the way, and what comes out."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ling_jax.checkpoint import DamagedCheckpoint, read_meta
from ling_jax.config import DataConfig, RunConfig
from ling_jax.convert import merge as merging
from ling_jax.convert import to_jax, transfer
from ling_jax.convert.merge import merge
from ling_jax.convert.merge_weights import CURVES
from ling_jax.convert.origin import check_origin, origin_tokenizer
from ling_jax.convert.to_hf import to_hf
from ling_jax.convert.tokenizer import generation_config_of, tokenizer_of
from ling_jax.convert.transfer import Shard
from ling_jax.convert.verify import verify
from ling_jax.convert.weights import open_weights
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.files import arrays as stored
from ling_jax.files.paths import at
from ling_jax.runner import _first_state, _with_origin
from ling_jax.train.state import make_trainer
from tests.support.buckets import download, every_day, names, upload
from tests.support.checkpoints import CONFIG, Arrays, result, weights_at, write_run
from tests.support.commands import call
from tests.support.helpers import random_weights
from tests.support.marks import nightly
from tests.support.runs import NoCheckpoint
from tests.support.tokenizers import OWN
from tests.tiny_run import REPO, SPARSE, train_args

BF16 = np.dtype(ml_dtypes.bfloat16)
STEPS = (10, 20, 30, 40)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Four checkpoints in files of 4 kB, some of which hold parts of a tensor, others several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "CHUNK_BYTES", 1 << 12)
        return write_run(tmp_path_factory.mktemp("merge") / "run", {step: weights_at(step) for step in STEPS})


def average(states: list[Arrays], c: list[float]) -> Arrays:
    """In float64."""
    return {
        path: sum(w * state[path].astype(np.float64) for w, state in zip(c, states, strict=True)) for path in states[0]
    }


def assert_same_bytes(a: Path, b: Path) -> None:
    """Equal arrays, bit for bit, and equal metadata."""
    ours, theirs = result(a), result(b)
    assert ours.keys() == theirs.keys()
    different = [p for p in ours if ours[p].dtype != theirs[p].dtype or ours[p].tobytes() != theirs[p].tobytes()]
    assert different == [] and read_meta(a) == read_meta(b)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but the audit, which tells the time."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != transfer.AUDIT_FILE)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


# The numbers.

CLOSED = {  # w_1, w_2, w_3 with equal gaps
    "linear": [0.75, 0.5, 0.25],
    "sqrt": [0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)],
    "cosine": [(1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2],
}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Path:
    """The same weights in bfloat16."""
    return write_run(tmp_path_factory.mktemp("narrow") / "run", {step: weights_at(step, BF16) for step in STEPS})


@pytest.mark.parametrize("decay", CURVES)
@pytest.mark.parametrize("source", ["run", "narrow"])
def test_every_array_is_the_float64_average(request, tmp_path, decay, source):
    states = [weights_at(step, BF16 if source == "narrow" else None) for step in STEPS]
    audit = merge(str(request.getfixturevalue(source)), str(tmp_path / "merged"), last=4, decay=decay)
    assert audit is not None and not audit.missing and not audit.unused
    w = CLOSED[decay]
    want, got = average(states, [1 - w[0], w[0] - w[1], w[1] - w[2], w[2]]), result(tmp_path / "merged")
    assert got.keys() == want.keys()
    for path, values in got.items():
        assert values.dtype == states[0][path].dtype
        nearest = want[path].astype(values.dtype).astype(np.float64)
        rounding = np.abs(nearest - want[path]) if values.dtype == BF16 else 0
        error = np.abs(values.astype(np.float64) - want[path]) - rounding
        assert error.max() <= 1e-6 * np.abs(want[path]).max(), path
        if path[0] == "bias":
            assert values.dtype == np.float32 and np.abs(values.mean(-1)).max() < 1e-7


# The same bytes.


def merged(run: Path, target: Path, **options: Any) -> Path:
    merge(str(run), str(target), last=4, decay="sqrt", **options)
    return target


def in_pieces(patch: pytest.MonkeyPatch, size: int, threads: int = 3, scan: int = 1 << 16) -> None:
    for module in (to_jax, transfer, merging):
        patch.setattr(module, "PIECE_BYTES", size)
    patch.setattr(to_jax, "SMALL_BYTES", size)
    patch.setattr(merging, "READ_BYTES", size // 4)
    patch.setattr(merging, "THREADS", threads)
    patch.setattr(merging, "SCAN", scan)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory) -> Path:
    return merged(run, tmp_path_factory.mktemp("whole") / "merged")


@pytest.mark.parametrize(("size", "threads", "scan"), [(1 << 10, 7, 1 << 16), (1 << 20, 1, 100)])
def test_neither_pieces_nor_threads_change_a_bit(run, whole, tmp_path, monkeypatch, size, threads, scan):
    in_pieces(monkeypatch, size, threads, scan)
    assert_same_bytes(merged(run, tmp_path / "merged"), whole)


def by_columns(arrays: Arrays) -> dict[tuple[str, ...], jax.Array]:
    """Each array over two devices, cut in its last dim."""
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    specs = {path: jax.P(*[None] * (a.ndim - 1), "x" if a.shape[-1] % 2 == 0 else None) for path, a in arrays.items()}
    return {path: jax.device_put(a, jax.NamedSharding(mesh, specs[path])) for path, a in arrays.items()}


@pytest.mark.parametrize("cut", [(10, 30), nightly(STEPS)])
def test_a_run_whose_mesh_changed_and_files_cut_in_columns_change_no_bit(run, whole, tmp_path, monkeypatch, cut):
    monkeypatch.setattr(stored, "CHUNK_BYTES", 1 << 11)
    states = {step: by_columns(weights_at(step)) if step in cut else weights_at(step) for step in STEPS}
    found, want = result(merged(write_run(tmp_path / "run", states), tmp_path / "merged")), result(whole)
    assert [path for path in want if found[path].tobytes() != want[path].tobytes()] == []


# Merges slowly, in small pieces, the shard argv[3] of argv[4].
SLOWLY = """
import sys, time
from ling_jax.convert import merge, to_jax, transfer

to_jax.PIECE_BYTES = transfer.PIECE_BYTES = merge.PIECE_BYTES = to_jax.SMALL_BYTES = 1 << 11
def add(record, part, original=transfer.TensorRecord.add):
    time.sleep(0.01)
    original(record, part)
transfer.TensorRecord.add = add
shard = transfer.Shard(int(sys.argv[3]), int(sys.argv[4]))
merge.merge(sys.argv[1], sys.argv[2], last=4, decay="sqrt", shard=shard)
"""


def killed(run: Path, target: Path, shard: Shard) -> int:
    """Kills a merge that has copied 20 pieces or more; says how many."""
    journal = target.with_name(f"{target.name}.partial") / shard.own(transfer.JOURNAL)
    command = [sys.executable, "-c", SLOWLY, run, target, *map(str, shard)]
    process = subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 21):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read() if process.stderr else ""
    return journal.read_bytes().count(b"\n") - 1


def counting(patch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every chunk that is written."""
    written = []

    def write(*args: Any) -> Any:
        written.append(1)
        return stored.write_chunks(*args)

    patch.setattr(merging, "write_chunks", write)
    return written


@pytest.mark.parametrize("shard", [transfer.ALONE, nightly(Shard(1, 2))])
def test_after_a_kill_the_same_command_goes_on_and_ends_with_the_same_files(run, tmp_path, monkeypatch, shard):
    target = tmp_path / "merged"
    in_pieces(monkeypatch, 1 << 11)
    merged(run, tmp_path / "unbroken")
    pieces = len(files_of(tmp_path / "unbroken" / "state"))
    done = killed(run, target, shard)
    assert not target.exists()
    with pytest.raises(ValueError, match="no checkpoint in"):
        read_meta(tmp_path / "merged.partial")
    written = counting(monkeypatch)
    if shard != transfer.ALONE:
        assert merge(str(run), str(target), last=4, decay="sqrt", shard=Shard(2, 2)) is None
        assert not target.exists()
    assert merge(str(run), str(target), last=4, decay="sqrt", shard=shard) is not None
    assert 20 <= done and len(written) <= pieces - done
    assert files_of(target) == files_of(tmp_path / "unbroken")
    assert sorted(os.listdir(tmp_path)) == ["merged", "unbroken"]


def test_shards_end_in_any_order_and_the_last_one_completes_the_target(run, whole, tmp_path):
    target = str(tmp_path / "merged")
    options: dict[str, Any] = dict(last=4, decay="sqrt")
    assert merge(str(run), target, shard=Shard(3, 3), **options) is None
    assert merge(str(run), target, shard=Shard(3, 3), **options) is None  # once more: there is nothing to do
    for other in (dict(last=4), dict(options, shard=Shard(1, 2)), dict(options, decay="linear", shard=Shard(1, 3))):
        with pytest.raises(ValueError, match="unfinished conversion of other files or with other settings"):
            merge(str(run), target, **other)
    assert merge(str(run), target, shard=Shard(1, 3), **options) is None
    audit = merge(str(run), target, shard=Shard(2, 3), **options)
    assert audit is not None and len(audit.records) == len(audit.wanted)
    assert files_of(tmp_path / "merged") == files_of(whole)
    assert merge(str(run), target, shard=Shard(1, 3), **options) is None  # it is complete
    with pytest.raises(ValueError, match="exists: choose another --target"):
        merge(str(run), target, last=3, shard=Shard(1, 3))
    assert os.listdir(tmp_path) == ["merged"]


def test_shards_that_are_at_work_together_complete_the_target_once(run, whole, tmp_path):
    shards = [Shard(number, 4) for number in range(1, 5)]
    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(merge, str(run), str(tmp_path / "m"), last=4, decay="sqrt", shard=one) for one in shards]
        assert sum(one.result() is not None for one in work) == 1
    assert files_of(tmp_path / "m") == files_of(whole)
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize(
    ("shard", "moment"),
    [
        (transfer.ALONE, "seal"),
        (Shard(1, 2), "move"),
        nightly(transfer.ALONE, "move"),
        nightly(Shard(1, 2), "seal"),
    ],
)
def test_a_kill_while_the_target_is_completed_loses_nothing(run, whole, tmp_path, monkeypatch, shard, moment):
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    options: dict[str, Any] = dict(last=4, decay="sqrt")
    if shard != transfer.ALONE:
        merge(str(run), str(tmp_path / "m"), shard=Shard(2, 2), **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*{"seal": (stored, "seal"), "move": (transfer.OneWriter, "move")}[moment], die)
        merge(str(run), str(tmp_path / "m"), shard=shard, **options)
    assert os.listdir(tmp_path) == ["m.partial"]
    assert merge(str(run), str(tmp_path / "m"), shard=shard, **options) is not None
    assert files_of(tmp_path / "m") == files_of(whole) and os.listdir(tmp_path) == ["m"]


@every_day("gs")
def test_in_a_bucket_they_are_the_same_files(run, whole, bucket, tmp_path):
    upload(run, f"{bucket}/run")
    for number in (2, 1):
        audit = merge(f"{bucket}/run", f"{bucket}/m", last=4, decay="sqrt", shard=Shard(number, 2))
        assert (audit is None) == (number == 2)
    there = download(f"{bucket}/m", tmp_path / "m")
    assert files_of(there / "state") == files_of(whole / "state")
    assert names(f"{bucket}/m.partial") == []
    assert read_meta(f"{bucket}/m")["merge"] == read_meta(whole)["merge"] | {"run": f"{bucket}/run"}


# What is wrong.


def test_weights_come_from_a_file_or_from_a_curve(run, whole, tmp_path):
    file = tmp_path / "weights.json"
    file.write_text(json.dumps(read_meta(whole)["merge"]["weights"]))
    out, _ = call("convert.py", "merge", "--source", run / "checkpoints", "--steps", "40,10,20,30", "--weights", file,
                  "--target", tmp_path / "m", "--shard", "1/1")  # fmt: skip
    assert "mean of 4 F32" in out
    found = result(tmp_path / "m")
    assert all(found[path].tobytes() == values.tobytes() for path, values in result(whole).items())
    shown, _ = call("convert.py", "inspect", "--source", tmp_path / "m")
    assert re.search(rf"average of +{run}, given weights: steps 10 \(0.5\), 20 \(0.2071\), 30 ", shown)
    shown, _ = call("convert.py", "inspect", "--no-checksums", "--source", whole)
    assert f"{run}, sqrt: steps 10 (0.5), 20 (0.2071), 30 (0.1589), 40 (0.134)" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "give either --steps or --last"),
        (dict(steps="10,20", last=2), "give either --steps or --last"),
        (dict(steps="10,15,25"), "no step 15, 25: .* has 4 saved steps: 10, 20, 30, 40"),
        (dict(steps="10"), "two checkpoints or more, 1 asked for; .* 10, 20, 30, 40"),
        (dict(steps="10,10"), "--steps has 10 twice"),
        (dict(steps="10;20"), "--steps 10;20: give whole numbers with , between"),
        (dict(last=1), "two checkpoints or more, 1 asked for"),
        (dict(last=8), "--last 8, but .* has 4 saved steps"),
        (dict(last=2, shard="3/2"), "--shard 3/2: give i/n"),
        (dict(last=2, shard="0/2"), "--shard 0/2: give i/n"),
        (dict(last=2, decay="linear", weights="[0.5, 0.5]"), "either --decay or --weights"),
        (dict(last=2, weights="[0.5, 0.50001]"), r"the sum of --weights is 1.00001: it must be 1 \(to 1e-06\)"),
        (dict(last=2, weights="[1]"), "has 1 entries: give a list of 2 numbers"),
        (dict(last=2, weights='{"a": 1}'), "has a JSON dict: give a list of 2 numbers"),
        (dict(last=2, weights="[0.5, NaN]"), "give a list of 2 numbers"),
        (dict(last=2, weights="[0.5, true]"), "give a list of 2 numbers"),
        (dict(last=2, weights="[0.5,"), "is not valid JSON"),
        (dict(last=2, weights=None), "there is no such file"),
        (dict(last=2, source="checkpoints/10"), "no saved steps in .*checkpoints/10: give a run's folder"),
    ],
)
def test_what_cannot_be_done_is_one_error_before_anything_is_written(run, tmp_path, options, message):
    source = run / options.pop("source", ".")
    if "weights" in options:
        (file := tmp_path / "weights.json").write_text(options["weights"] or "")
        options["weights"] = file if options["weights"] else tmp_path / "gone.json"
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    _, err = call("convert.py", "merge", "--source", source, "--target", tmp_path / "m", *flags, code=2)
    assert re.fullmatch(f"error: .*{message}.*\n", err), err
    assert not list(tmp_path.glob("m*"))


def changed(meta: dict[str, Any]) -> Callable[[Path], None]:
    """Saves the last step anew with other metadata."""
    return lambda folder: (
        shutil.rmtree(folder / "checkpoints" / "40") or write_run(folder, {40: weights_at(40)}, **meta) and None
    )


def as_bf16(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints" / "40")
    write_run(folder, {40: weights_at(40, BF16)})


MODEL = dataclasses.replace(CONFIG.model, rope_theta=6e5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed({"tokenizer": "other"}), "they differ from step 10: step 40: tokenizer: that -> other; choose steps"),
        (changed({"config": dataclasses.asdict(dataclasses.replace(CONFIG, model=MODEL))}),
         "they differ from step 10: step 40: model.rope_theta: 10000.0 -> 600000.0; choose steps of one stage"),
        (as_bf16, "step 40: params/.*: float32 -> bfloat16"),
        (changed({"data": {"next_row": 120}}), "tokens .* 1280, 2560, 3840, 3840, do not ascend"),
    ],
)  # fmt: skip
def test_checkpoints_that_are_not_alike_are_refused_with_what_differs(run, tmp_path, change, message):
    copy = shutil.copytree(run, tmp_path / "run")
    change(copy)
    with pytest.raises(ValueError, match=message):
        merge(str(copy), str(tmp_path / "m"), last=4)
    assert os.listdir(tmp_path) == ["run"]


def test_fp8_is_refused(tmp_path):
    for step in ("1", "2"):
        to_jax.to_jax(str(REPO / "tests/golden/tiny-ling-fp8"), str(tmp_path / "run" / step))
    with pytest.raises(ValueError, match="has FP8 weights: write them out first"):
        merge(str(tmp_path / "run"), str(tmp_path / "m"), last=2)


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_damaged_file_is_named_and_no_target_made(run, tmp_path, how):
    copy = shutil.copytree(run, tmp_path / "run")
    file = max((copy / "checkpoints" / "30" / "state" / "params.lm_head.weight").iterdir())
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink() if how == "gone" else file.write_bytes(data)
    told = "is missing" if how == "gone" else "does not have the checksum"
    with pytest.raises(DamagedCheckpoint, match=rf"params/lm_head/weight: {file} {told}"):
        merge(str(copy), str(tmp_path / "m"), last=4)
    assert not (tmp_path / "m").exists()
    shutil.copy(run / "checkpoints" / "30" / "state" / "params.lm_head.weight" / file.name, file)
    assert merge(str(copy), str(tmp_path / "m"), last=4) is not None  # what was copied was right


def test_checkpoints_of_before_there_were_checksums_are_merged_with_one_line_each(run, whole, tmp_path, caplog):
    copy = shutil.copytree(run, tmp_path / "run")
    for step in STEPS[:2]:
        folder = copy / "checkpoints" / str(step)
        (folder / "state" / "checksums.json").unlink()
        (folder / "meta" / "meta.json").write_text(json.dumps(read_meta(run / "checkpoints" / str(step))))
    found = result(merged(copy, tmp_path / "m"))
    assert all(found[path].tobytes() == values.tobytes() for path, values in result(whole).items())
    told = [record.getMessage() for record in caplog.records if "has no checksums" in record.getMessage()]
    assert len(told) == 2


def test_a_full_disk_is_one_error_and_the_same_command_goes_on(run, whole, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(merging, "write_chunks", fail)
        with pytest.raises(ValueError, match="No space left on device. What is copied is kept: make room"):
            merged(run, tmp_path / "m")
    assert files_of(merged(run, tmp_path / "m")) == files_of(whole)


# What comes out.


@pytest.fixture(scope="module")
def at_home(run, tmp_path_factory) -> Path:
    """The merge of a run that has its tokenizer beside it, and is gone since."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(run, folder / "run")
    model = dataclasses.replace(CONFIG.model, vocab_size=400, eos_token_id=OWN.eod_id, pad_token_id=OWN.eod_id)
    config = dataclasses.replace(CONFIG, model=model)
    states = {}
    for step in (50, 60):
        _, params, bias = random_weights(model, step)
        states[step] = flatten_dict({"params": params, "bias": bias})
    about = {"config": dataclasses.asdict(config), "tokenizer": OWN.fingerprint}
    write_run(folder / "run", states, **about, data={})
    OWN.save(str(folder / "run" / "tokenizer"))
    (folder / "run" / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": [1], "top_p": 0.5}')
    assert merge(str(folder / "run"), str(folder / "merged"), steps=[60, 50]) is not None
    to_hf(str(folder / "run"), str(folder / "last"))
    (folder / "run").rename(folder / "gone")
    return folder


def test_a_new_run_starts_from_it_with_fresh_moments(at_home):
    origin = open_weights(at_home / "merged")
    check_origin(str(at_home / "merged"), origin.config, "same")
    assert origin_tokenizer(origin, None) == str(at_home / "merged" / "hf" / "tokenizer.json")
    trainer = make_trainer(RunConfig(model=origin.config, data=DataConfig(sequence_length=32)), jax.devices()[:1])
    state = _first_state(trainer, NoCheckpoint(), origin)
    found = flatten_dict({"params": state.params, "bias": state.bias})
    assert all(found[path].tobytes() == values.tobytes() for path, values in result(at_home / "merged").items())
    assert int(state.step) == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(state.optimizer))


def test_a_run_that_starts_from_it_knows_its_lineage(at_home, tmp_path):
    merged = at_home / "merged"
    begun = _with_origin(RunConfig(model=open_weights(merged).config), at(tmp_path / "new"), str(merged))
    assert begun.origin == f"{merged}, the average of {at_home}/run, linear: steps 50 (0.5), 60 (0.5)"
    write_run(tmp_path / "new", {1: weights_at(1)}, config=dataclasses.asdict(begun))
    assert _with_origin(CONFIG, at(tmp_path / "new"), None).origin == begun.origin  # when it is resumed


def test_it_is_exported_as_the_run_would_be(at_home):
    to_hf(str(at_home / "merged"), str(at_home / "hf"))
    assert verify(str(at_home / "merged"), str(at_home / "hf"), logits=False).good
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (at_home / "hf" / name).read_bytes() == (at_home / "last" / name).read_bytes()


def test_its_tokenizer_is_the_runs_and_no_other(at_home, tmp_path):
    copy = shutil.copytree(at_home / "merged", tmp_path / "copy")
    assert tokenizer_of(str(copy)).fingerprint == OWN.fingerprint
    assert generation_config_of(str(copy)) == {"eos_token_id": [1], "top_p": 0.5}
    Tokenizer.train(["other words make another tokenizer " * 9], 290).save(str(copy / "hf"))
    with pytest.raises(ValueError, match="is not the tokenizer that .* was trained with"):
        tokenizer_of(str(copy))


@pytest.mark.nightly
def test_a_run_is_merged_sampled_and_trained_on(tmp_path):
    few = dict(**SPARSE, train__eval_every=0, checkpoint__every=1, checkpoint__keep_last=3, train__steps=3)
    call("train.py", *train_args(tmp_path, "trunk", **few))
    call("convert.py", "merge", "--source", tmp_path / "runs/trunk", "--last", 3, "--target", tmp_path / "m")
    (tmp_path / "runs/trunk").rename(tmp_path / "elsewhere")
    out, _ = call("sample.py", "--checkpoint", tmp_path / "m", "--prompt", "the model", "--max-new-tokens", 4)
    assert out.startswith("the model") and len(out) > len("the model\n")
    _, err = call("train.py", *train_args(tmp_path, "on", **{**few, "train__steps": 1}), "--init-from", tmp_path / "m")
    assert "training from step 0" in err
    before, after = result(tmp_path / "m"), result(tmp_path / "runs/on")
    assert after["step",] == 1 and {path for path in before} < {path for path in after}
    moved = 0.005 / 5 * 1.2  # the first rate of the warmup; AdamW begins with 1 at most, and weight decay adds a tenth
    for path, values in before.items():
        assert path[0] == "bias" or np.abs(after[path] - values).max() <= moved * max(1, np.abs(values).max())
