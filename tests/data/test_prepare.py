"""Text that is tokenized once gives the rows that the text itself gives, whatever happens while it is tokenized."""

import gzip
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from ling_jax import runner
from ling_jax.config import DataConfig, DataSource
from ling_jax.data import packing, prepare, reading, sources
from ling_jax.data.pipeline import Data, Earlier, open_data, train_batches
from ling_jax.data.prepare import Portion, Preparation, in_processes, make_shard
from ling_jax.data.shards import SUFFIX
from ling_jax.data.sources import source_names
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.files.one_writer import OneWriter
from ling_jax.train.metrics import read_metrics
from tests.support.commands import call
from tests.support.dying import dies_once
from tests.support.marks import nightly
from tests.support.texts import write_texts
from tests.support.tokenizers import OWN
from tests.tiny_run import DENSE, REPO, numbers, train_args

# Prepares the source argv[2], with the tokenizer argv[3], into argv[4], in portions of argv[1] bytes.
PREPARE = """
import sys
from etils import epath
from ling_jax.config import DataSource
from ling_jax.data import prepare
from ling_jax.data.tokenizer import Tokenizer
portion, source, tokenizer, folder = sys.argv[1:]
prepare.PORTION = int(portion)
tokenizer = Tokenizer.load(tokenizer)
prepare.prepare("text", DataSource(path=source), epath.Path(folder), tokenizer, prepare.in_processes(2))
"""


def here(job: Preparation, portions: Sequence[Portion]) -> Iterator[int]:
    """An engine of this process, which makes the last shard first."""
    return (make_shard(job, number, portion) for number, portion in reversed(list(enumerate(portions))))


def records(draw: random.Random, count: int) -> list[dict[str, str]]:
    words = "naïve Straße 你好 one two three <|endoftext|> 🙂 1234".split()
    return [{"text": " ".join(draw.choices(words, k=draw.randrange(1, 60)))} for _ in range(count)]


def write_lines(path: Path, lines: list[dict[str, str]]) -> None:
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """Two sources with weights, JSONL and packed, blank documents, and texts that come twice: in one file, in two, and
    in both sources."""
    draw = random.Random(0)
    few, more, twice = records(draw, 40), records(draw, 90), records(draw, 15)
    for name in "ab":
        (tmp_path / "text" / name).mkdir(parents=True)
    write_lines(tmp_path / "text" / "a" / "1.jsonl", [*few, *twice, {"text": " \n"}, *few[:5]])
    write_lines(tmp_path / "text" / "a" / "2.jsonl.gz", [*twice, *records(draw, 30)])
    (tmp_path / "text" / "a" / "3.txt").write_text("a text of one file\n" * 30)
    write_lines(tmp_path / "text" / "b" / "1.jsonl", [*more, *few[5:20]])
    OWN.save(str(tmp_path / "own"))
    sources = [
        DataSource(path=str(tmp_path / "text" / name), weight=weight) for name, weight in (("a", 1.0), ("b", 2.5))
    ]
    return DataConfig(
        sources=tuple(sources),
        tokenizer=str(tmp_path / "own"),
        holdout_fraction=0.2,
        sequence_length=32,
        global_batch_size=6,
        cache_dir=str(tmp_path / "cache"),
    )


def prepared(config: DataConfig, target: Path, engine=here) -> DataConfig:
    """The same settings with prepared sources, and a cache of their own."""
    tokenizer, sources = Tokenizer.load(config.tokenizer or ""), []
    for name, source in zip(source_names(config), config.sources, strict=True):
        folder = target / f"{name}{SUFFIX}"
        prepare.prepare(name, source, prepare.paths.at(folder), tokenizer, engine)
        sources.append(replace(source, path=str(folder)))
    return replace(config, sources=tuple(sources), tokenizer=None, cache_dir=str(target / "cache"))


def opened(config: DataConfig, folder: Path) -> Data:
    return open_data(config, 400, str(folder / "run"))


def assert_equal_data(one: Data, other: Data, config: DataConfig) -> None:
    """Held-out texts, the sample, all rows, and the first batches, on one host and on two."""
    for name, documents in one.heldout.items():
        assert [d.text for d in documents] == [d.text for d in other.heldout[name]] != []
        facts, others = one.facts[name], other.facts[name]
        assert all(facts[key] == others[key] for key in ("documents", "bytes", "table", "heldout"))
    assert list(one.training_sample()) == list(other.training_sample())
    for name, rows in one.rows.items():
        assert len(rows) == len(other.rows[name])
        for i in range(len(rows)):
            assert_equal_arrays(rows[i], other.rows[name][i])
    half = config.global_batch_size // 2
    for here in (None, range(half), range(half, 2 * half)):
        batches = [train_batches(data.rows, config, 0, here) for data in (one, other)]
        for batch, same in itertools.islice(zip(*batches, strict=False), 9):
            assert_equal_arrays(batch.arrays, same.arrays)


def assert_equal_arrays(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(
    "changes", [{}, {"max_bytes": 3000, "seed": 3}, {"holdout_max_bytes": 200, "holdout_fraction": 0.4}]
)
def test_prepared_text_gives_the_rows_of_the_text(config, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(prepare, "PORTION", 2500)
    monkeypatch.setattr(reading, "BLOCK", 1000)  # lines are cut into parts after the last end in a block
    config = replace(config, **changes)
    ready = prepared(config, tmp_path / "ready")
    text = opened(config, tmp_path / "one")
    shutil.rmtree(tmp_path / "text")
    shards = len(list((tmp_path / "ready").glob("*/shard-*.json")))
    assert shards >= 8 and source_names(ready) == ["a", "b"]
    assert_equal_data(text, opened(ready, tmp_path / "other"), config)


def test_a_run_that_began_on_text_goes_on_with_prepared_text_and_not_with_other(config, tmp_path):
    begun = opened(config, tmp_path)
    earlier = Earlier(config, {"next_step": 3, "next_row": 18, "text": json.loads(json.dumps(begun.facts))})
    ready = prepared(config, tmp_path / "ready")
    assert open_data(ready, 400, str(tmp_path / "run"), None, earlier).state.rows == 18
    assert open_data(config, 400, str(tmp_path / "run"), None, earlier._replace(config=ready)).state.rows == 18
    write_lines(Path(config.sources[0].path) / "4.jsonl", records(random.Random(7), 9))
    with pytest.raises(ValueError, match="text of data source 'a' is not the one that the run has read"):
        open_data(prepared(config, tmp_path / "other"), 400, str(tmp_path / "run"), None, earlier)


def test_prepared_and_other_text_go_together_and_equal_documents_of_both_stay_once(config, tmp_path):
    ready = prepared(config, tmp_path / "ready")
    mixed = replace(config, sources=(ready.sources[0], config.sources[1]))
    assert_equal_data(opened(config, tmp_path / "one"), opened(mixed, tmp_path / "other"), config)


CASES = ["one text", "long texts", "one document of a sample", "a tokenizer that changes texts"]


@pytest.mark.parametrize("case", [*CASES, nightly("python-stdlib")])
def test_hard_cases_are_equal_too(config, tmp_path, monkeypatch, case):
    folder = tmp_path / "c"
    config = replace(config, sources=(DataSource(path=str(folder)),))
    if case == "one text":
        config = replace(config, sources=(DataSource(path=str(write_texts(folder, 1, 9000) / "000.txt")),))
    elif case == "long texts":
        monkeypatch.setattr(packing, "PIECE_CHARACTERS", 300)
        write_texts(folder, 30, 2000)
    elif case == "one document of a sample":
        write_texts(folder, 5, 4000)
        monkeypatch.setattr(sources, "LONGEST_SAMPLED", 500)
        config = replace(config, max_bytes=1500)  # it is cut there
    elif case == "python-stdlib":
        config = replace(config, sources=(DataSource(path=case),))
    else:
        core = json.loads(OWN.to_json()) | {"normalizer": {"type": "Lowercase"}}
        Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(core)), {}, "lower").save(str(tmp_path / "lower"))
        config = replace(config, tokenizer=str(tmp_path / "lower"))
        write_texts(folder, 30)
        (folder / "capitals.txt").write_text("TEXT In Capitals\n" * 9)
    ready = prepared(config, tmp_path / "ready")
    assert_equal_data(opened(config, tmp_path / "one"), opened(ready, tmp_path / "other"), config)


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


MOMENTS = [0, *(nightly(seed) for seed in range(1, 11))]


@pytest.mark.parametrize("seed", MOMENTS)
def test_after_a_kill_no_shard_is_half_and_the_same_command_goes_on(config, tmp_path, monkeypatch, seed):
    source, folder = config.sources[0], tmp_path / f"text{SUFFIX}"
    for i in range(20):
        write_lines(tmp_path / "text" / "a" / f"more{i}.jsonl", records(random.Random(i), 60))
    command = [sys.executable, "-c", PREPARE, "4000", source.path, config.tokenizer, str(folder)]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    killed = subprocess.Popen(command, cwd=REPO, env=env, stderr=subprocess.DEVNULL)
    while killed.poll() is None and not list(folder.glob("shard-*")):
        time.sleep(0.002)
    time.sleep(random.Random(seed).random() * 0.1)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    left = shards(folder)
    assert "documents.json" not in left and any(name.startswith("shard") for name in left)
    time.sleep(0.2)  # its processes end with it
    with pytest.raises(ValueError, match="has not ended: run its `prepare` command again"):
        opened(replace(config, sources=(DataSource(path=str(folder)),)), tmp_path)
    monkeypatch.setattr(prepare, "PORTION", 4000)
    at, own = prepare.paths.at, Tokenizer.load(config.tokenizer or "")
    prepare.prepare("text", source, at(folder), own, here)
    prepare.prepare("text", source, at(tmp_path / "whole"), own, here)
    assert shards(folder) == shards(tmp_path / "whole")
    assert all(
        data == shards(folder)[name] for name, data in left.items() if not name.endswith("tmp") and "json" not in name
    )


def test_the_command_prepares_all_sources_once_and_says_how_to_train_on_them(config, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PORTION", 2500)
    args = [str(tmp_path / "text" / "a"), "--target", tmp_path / "t", "--processes", 1]
    assert "give --data.tokenizer" in call("prepare", *args, code=2)[1]
    args += ["--data.tokenizer", config.tokenizer]
    out, _ = call("prepare", *args)
    assert f"--data.sources.0.path {tmp_path / 't' / 'a.prepared'}" in out and "tokens of a document" in out
    assert shards(tmp_path / "t" / "a.prepared") == shards(Path(prepared(config, tmp_path / "here").sources[0].path))
    with pytest.raises(ValueError, match=r"holds prepared sources: give each of them, .*a\.prepared"):
        opened(replace(config, sources=(DataSource(path=str(tmp_path / "t")),)), tmp_path)
    with OneWriter(prepare.paths.at(tmp_path / "t")):
        assert "is in use: process" in call("prepare", *args, code=2)[1]
    write_lines(tmp_path / "text" / "a" / "2.jsonl", records(random.Random(3), 4))
    error = call("prepare", *args, code=2)[1]
    assert f"{tmp_path / 'text' / 'a' / '2.jsonl'}: changed, added or removed since" in error


def test_another_tokenizer_is_refused(config, tmp_path):
    ready = prepared(config, tmp_path / "ready")
    Tokenizer.train(["other " * 99], 272).save(str(tmp_path / "other"))
    other = replace(ready, tokenizer=str(tmp_path / "other"))
    message = r"a\.prepared was prepared with another tokenizer \(fingerprint \w+\) than .*other"
    with pytest.raises(ValueError, match=message):
        opened(other, tmp_path)
    with pytest.raises(ValueError, match="began with other settings .tokenizer: "):
        prepared(replace(config, tokenizer=other.tokenizer), tmp_path / "ready")
    shutil.copytree(tmp_path / "other", tmp_path / "ready" / "a.prepared" / "tokenizer", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=message.replace("other$", "a.prepared")):
        opened(ready, tmp_path / "second")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [flip, Path.unlink, lambda path: os.truncate(path, path.stat().st_size - 2)])
@pytest.mark.parametrize("name", ["shard-000001.tokens.npy", "documents.share.npy", "documents.json"])
def test_a_damaged_or_missing_shard_is_named_and_made_anew_by_the_same_command(
    config, tmp_path, monkeypatch, harm, name
):
    monkeypatch.setattr(prepare, "PORTION", 2500)
    ready = prepared(config, tmp_path / "ready")
    before = shards(Path(ready.sources[0].path))
    harm(Path(ready.sources[0].path) / name)
    said = "has not ended" if (harm, name) == (Path.unlink, "documents.json") else f"{name}.*run the `prepare` command"
    with pytest.raises(ValueError, match=said):
        opened(ready, tmp_path)
    prepared(config, tmp_path / "ready")
    assert shards(Path(ready.sources[0].path)) == before


def test_a_run_on_prepared_text_is_the_run_on_the_text(tmp_path, monkeypatch):
    for slow in ("_sample", "_report"):
        monkeypatch.setattr(runner, slow, lambda *args: None)
    changes = dict(**DENSE, train__steps=4, train__eval_every=2)
    text = train_args(tmp_path, "text", **changes)
    call("train.py", *text)
    own = tmp_path / "runs" / "text" / "tokenizer"
    call("prepare", tmp_path / "text", "--target", tmp_path, "--data.tokenizer", own, "--processes", 1)
    shutil.rmtree(tmp_path / "text")
    (tmp_path / "text").mkdir()  # nor are there any files left
    ready = {"data__sources__0__path": tmp_path / f"text{SUFFIX}", "data__cache_dir": tmp_path / "other"}
    call("train.py", *train_args(tmp_path, "ready", **changes, **ready))
    one, other = (numbers(read_metrics(tmp_path / "runs" / name)) for name in ("text", "ready"))
    assert one == other and len([record for record in one if "train/loss" in record]) == 4


def test_the_same_shards_on_a_ray_cluster_of_two_workers_with_one_killed(config, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason='the engine is an extra: pip install "ling-jax[ray]"')
    monkeypatch.setattr(prepare, "PORTION", 2500)
    monkeypatch.setattr(reading, "BLOCK", 1000)
    expected = shards(Path(prepared(config, tmp_path / "here").sources[0].path))
    monkeypatch.setattr(prepare, "make_shard", dies_once)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        one = replace(config, sources=config.sources[:1])
        assert shards(Path(prepared(one, tmp_path / "there", prepare.on_ray).sources[0].path)) == expected
    finally:
        ray.shutdown()
    killed = int((tmp_path / "there" / "killed").read_text())
    assert killed != os.getpid() and not Path(f"/proc/{killed}").exists()


def test_a_process_that_is_killed_is_one_line_and_the_same_command_goes_on(config, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PORTION", 2500)
    monkeypatch.setattr(reading, "BLOCK", 1000)
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "make_shard", dies_once)
        with pytest.raises(ValueError, match="a process was killed while it made a shard.*the same command goes on"):
            prepared(config, tmp_path / "there", in_processes(1))
    folders = [Path(prepared(config, tmp_path / name).sources[0].path) for name in ("there", "here")]
    assert shards(folders[0]) == shards(folders[1]) and (tmp_path / "there" / "killed").exists()


def test_processes_of_this_machine_make_the_same_shards_and_tell_what_is_wrong_with_a_file(config, tmp_path):
    source = Path(config.sources[0].path)
    (source / "bad.jsonl").write_text('{"text": "good"}\n{"text": 3}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: field 'text' is int, not a string"):
        prepared(config, tmp_path / "ready", in_processes(1))
