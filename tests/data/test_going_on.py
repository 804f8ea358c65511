"""A run goes on at the row where it stopped, with the text it began with, or says why it does not."""

import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ling_jax.checkpoint import read_meta
from ling_jax.config import DataConfig, DataSource
from ling_jax.data.mixture import DataState, mixture_of
from ling_jax.data.packing import Rows, Stream
from ling_jax.data.pipeline import Earlier, open_data, train_batches
from tests.support.commands import call
from tests.tiny_run import SPARSE, train_args

VOCAB = 274
ROWS = {"a": Rows(Stream(np.arange(4001, dtype=np.uint16), np.arange(0, 4001, 10)), 10)}
CONFIG = DataConfig(sources=(DataSource(path="a"),), sequence_length=10, global_batch_size=8)


def rows_of(batch: int, steps: int, state: DataState | None = None) -> tuple[list[int], DataState]:
    """First token of every row that some steps read, and how far they have read."""
    config = replace(CONFIG, global_batch_size=batch)
    batches = list(itertools.islice(train_batches(ROWS, config, 20 if state else 0, state=state), steps))
    return [int(row[0]) for one in batches for row in one.arrays["tokens"]], batches[-1].state


@pytest.mark.parametrize(("before", "after"), [(8, 4), (4, 8), (8, 12)])
def test_with_another_batch_no_row_comes_twice_and_none_is_left_out(before, after):
    first, state = rows_of(before, 20)
    state = DataState(**json.loads(json.dumps(state.to_json())))
    assert first + rows_of(after, 20, state)[0] == rows_of(1, 20 * (before + after))[0]
    rest = (400 - before * 20) // after
    counts = Counter(first + rows_of(after, rest, state)[0])
    assert max(counts.values()) == 1 and len(counts) == before * 20 + rest * after


@pytest.fixture
def config(tmp_path) -> DataConfig:
    folder = tmp_path / "one" / "text"
    folder.mkdir(parents=True)
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"text number {i}\n" * 9)
    return DataConfig(
        sources=(DataSource(path=str(folder)),),
        cache_dir=str(tmp_path / "cache"),
        sequence_length=16,
        global_batch_size=4,
    )


def begun(config: DataConfig, tmp_path: Path, row: int = 40) -> Earlier:
    """A run of this configuration that has read some rows."""
    data = open_data(config, VOCAB, str(tmp_path / "run" / "tokenizer"))
    mixture, state = mixture_of(data.rows, config, None)
    read = mixture.draw(state, row)[1]
    saved = {"next_step": row // config.global_batch_size, "next_row": row, "text": data.facts, "read": read.to_json()}
    return Earlier(config, json.loads(json.dumps(saved)))


def go_on(config: DataConfig, tmp_path: Path, earlier: Earlier) -> int:
    """The row at which a run goes on."""
    state = open_data(config, VOCAB, str(tmp_path / "run" / "tokenizer"), None, earlier).state
    assert state is not None
    return state.rows


def files_of(config: DataConfig) -> Path:
    return Path(config.sources[0].path)


def added(config: DataConfig) -> DataConfig:
    (files_of(config) / "new.txt").write_text("another text\n")
    return config


def removed(config: DataConfig) -> DataConfig:
    (files_of(config) / "7.txt").unlink()
    return config


def changed(config: DataConfig) -> DataConfig:
    (files_of(config) / "7.txt").write_text("text number 8\n" * 9)
    return config


def edited(config: DataConfig) -> DataConfig:
    (files_of(config) / "8.txt").write_text("texs number 8\n" * 9)
    return config


@pytest.mark.parametrize("change", [added, removed, changed, edited])
def test_other_text_is_refused_with_both_counts_and_the_remedy(config, tmp_path, change):
    earlier = begun(config, tmp_path)
    message = (
        r"text of data source 'text' is not the one .*: \d+ documents, \d+ bytes, \w+ in the checkpoint, \d+ .* here"
    )
    with pytest.raises(ValueError, match=message + ".*bring back files.*--init-from"):
        go_on(change(config), tmp_path, earlier)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("holdout_fraction", 0.5, r"data.holdout_fraction: 0.02 -> 0.5\).*bring back files and settings"),
        ("max_bytes", 1000, r"data.max_bytes: None -> 1000\)"),
        ("seed", 1, "data.seed: 0 -> 1.*rows would come twice or never; give the old one, .*--init-from"),
        (
            "sequence_length",
            32,
            "data.sequence_length: 16 -> 32: .* blocks of 16 tokens.*give at most 16, or",
        ),
    ],
)
def test_other_settings_that_choose_the_rows_are_refused_with_both_values(config, tmp_path, setting, value, message):
    earlier = begun(config, tmp_path)
    with pytest.raises(ValueError, match=message):
        go_on(replace(config, **{setting: value}), tmp_path, earlier)


def test_sources_and_weights_may_change_but_no_text_comes_under_another_name(config, tmp_path, caplog):
    caplog.set_level("INFO")
    copy, other = tmp_path / "copy", tmp_path / "other"
    for folder in (copy, other):
        shutil.copytree(files_of(config), folder)
    for path in other.iterdir():
        path.write_text("other " + path.read_text())
    earlier = begun(config, tmp_path)
    with pytest.raises(ValueError, match="'copy' is the text that the run has read as 'text'.*old name"):
        go_on(replace(config, sources=(DataSource(path=str(copy)),)), tmp_path, earlier)
    both = tuple(DataSource(path=str(path), weight=w) for path, w in ((files_of(config), 1.0), (other, 3.0)))
    assert go_on(replace(config, sources=both), tmp_path, earlier) == 40
    assert "other: new to this run, read from its beginning" in caplog.text


def test_a_copy_another_cache_new_times_a_weight_alone_and_another_batch_are_the_same_data(config, tmp_path):
    earlier = begun(config, tmp_path)
    copy = tmp_path / "two" / "text"
    shutil.copytree(files_of(config), copy, copy_function=shutil.copyfile)
    shutil.rmtree(files_of(config))
    moved = DataConfig(
        sources=(DataSource(path=str(copy), weight=5.0),), cache_dir=str(tmp_path / "cache2"), sequence_length=16,
        global_batch_size=7,
    )  # fmt: skip
    assert go_on(moved, tmp_path, earlier) == 40


def test_another_bound_of_the_held_out_side_goes_on_with_one_line(config, tmp_path, caplog):
    config = replace(config, holdout_fraction=0.4)
    earlier = begun(config, tmp_path)
    assert go_on(replace(config, holdout_max_bytes=50), tmp_path, earlier) == 40
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(said) == 1 and "data.holdout_max_bytes: 400000 -> 50" in said[0]


def test_a_checkpoint_without_a_fingerprint_goes_on_with_one_line_at_its_own_batchs_row(config, tmp_path, caplog):
    begun(config, tmp_path)
    old = Earlier(config, {"next_step": 10})
    assert go_on(replace(config, global_batch_size=7), tmp_path, old) == 40
    assert ["before texts had fingerprints" in r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        True
    ]


@pytest.mark.nightly
def test_a_run_with_another_batch_or_other_text_by_its_commands(tmp_path):
    tiny = dict(**SPARSE, train__eval_every=0, checkpoint__every=3, data__global_batch_size=8)

    def go(name: str, code: int = 0, **changes) -> str:
        return call("train.py", *train_args(tmp_path, name, **{**tiny, **changes}), code=code)[1]

    def state(name: str) -> dict:
        return read_meta(tmp_path / "runs" / name)["data"]

    go("a", train__steps=3)
    assert (state("a")["next_step"], state("a")["next_row"]) == (3, 24)
    go("a", train__steps=5, data__global_batch_size=4)
    assert (state("a")["next_step"], state("a")["next_row"]) == (5, 32)
    assert f"{32 * 32:,}" in (tmp_path / "runs" / "a" / "report.html").read_text()
    (tmp_path / "text" / "new.txt").write_text("a new file\nof two lines\n")
    log = go("a", code=2, train__steps=6)
    assert "error: the text of data source 'text' is not the one" in log.splitlines()[-1]
