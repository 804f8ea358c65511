"""The record of a run: what is written, what a resume keeps, and what the progress display says."""

import io
import json
import logging
import os
import struct
import sys
import types

import numpy as np
import pytest
import rich.console
from etils import epath
from tensorboardX import writer as tensorboard

from ling_jax.files.paths import at
from ling_jax.train import metrics
from ling_jax.train.metrics import MetricsWriter, Progress, WandbRun, read_metrics
from tests.support.commands import call


def _write(run_dir, steps, resume_step=None, loss=lambda step: 1.0 / step):
    with MetricsWriter(run_dir, resume_step) as writer:
        for step in steps:
            writer.write(step, {"train/loss": loss(step), "moe/load_max_over_mean_per_layer": [1.5, step / 3]})


def _steps(run_dir):
    return [record["step"] for record in read_metrics(run_dir)]


def test_numbers_come_back_bit_for_bit(tmp_path):
    values = {"a": 0.1 + 0.2, "b": np.float32(1) / np.float32(3), "c": 5e-324, "d": 2**60, "e": np.arange(3.0) / 7}
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, values)
    (record,) = read_metrics(tmp_path)
    assert record == {
        "step": 1,
        "a": values["a"],
        "b": float(values["b"]),
        "c": 5e-324,
        "d": 2**60,
        "e": values["e"].tolist(),
    }
    assert isinstance(record["d"], int)


def test_what_json_lacks_becomes_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": float("nan"), "norm": np.float32("inf"), "list": [1.0, -np.inf], "none": None})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=refuse)
    assert record == {"step": 1, "loss": None, "norm": None, "list": [1.0, None], "none": None}


@pytest.mark.parametrize("value", ["1.0", [[1.0]], {"a": 1}, True])
def test_only_numbers_and_flat_lists_are_logged(tmp_path, value):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="train/odd"):
        writer.write(1, {"train/odd": value})


@pytest.mark.parametrize("step", [2, 3])
def test_a_step_is_logged_once_and_in_order(tmp_path, step):
    with MetricsWriter(tmp_path, resume_step=1) as writer:
        writer.write(3, {})
        with pytest.raises(ValueError, match=f"step {step} come after step 3"):
            writer.write(step, {})


def test_each_line_is_readable_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"train/loss": 2.0})
    assert _steps(tmp_path) == [1]
    writer.close()


def test_resumed_file_equals_an_uninterrupted_one(tmp_path):
    _write(tmp_path / "straight", range(1, 9))
    _write(tmp_path / "broken", range(1, 7))
    _write(tmp_path / "broken", range(5, 9), resume_step=4)
    straight, broken = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("straight", "broken"))
    assert broken == straight


def test_resume_drops_a_half_written_line(tmp_path):
    _write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # step 3 is cut
    assert _steps(tmp_path) == [1, 2]
    _write(tmp_path, [4], resume_step=3)
    assert _steps(tmp_path) == [1, 2, 4]
    assert not (tmp_path / "metrics.jsonl.tmp").exists()


def test_a_run_without_checkpoint_starts_its_record_anew(tmp_path):
    _write(tmp_path, range(1, 4))
    _write(tmp_path, [1])
    assert _steps(tmp_path) == [1]


def test_the_old_record_survives_a_failed_cut(tmp_path, monkeypatch):
    _write(tmp_path, range(1, 4))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fail(self, data):
        with self.open("wb") as file:
            file.write(data[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_bytes", fail)
    with pytest.raises(OSError, match="No space"):
        MetricsWriter(tmp_path, resume_step=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", [b'{"step": 1, "tra\n', b"\x00\xff\n", b"[1]\n", b"{}\n"])
def test_a_damaged_line_within_the_file_is_an_error(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_bytes(damage + b'{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1 is damaged"):
        read_metrics(tmp_path)


def test_reading_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_metrics(tmp_path)


def _tensorboard_events(run_dir):
    """(step, tag, value) as TensorBoard shows them: a START event hides what earlier files say from its step on."""
    shown = []
    for name in sorted(os.listdir(run_dir / "tensorboard")):
        data = io.BytesIO((run_dir / "tensorboard" / name).read_bytes())
        while header := data.read(12):
            (length,) = struct.unpack("<Q", header[:8])
            event = tensorboard.Event.FromString(data.read(length))
            data.read(4)
            if event.HasField("session_log"):
                shown = [entry for entry in shown if entry[0] < event.step]
            shown += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return shown


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    _write(tmp_path, range(1, 7), loss=lambda step: float("nan") if step == 2 else 1.0)
    _write(tmp_path, range(5, 8), resume_step=4, loss=lambda step: 2.0)
    assert _tensorboard_events(tmp_path) == [
        (1, "train/loss", 1.0),
        (3, "train/loss", 1.0),
        (4, "train/loss", 1.0),
        (5, "train/loss", 2.0),
        (6, "train/loss", 2.0),
        (7, "train/loss", 2.0),
    ]


def test_a_name_that_tensorboard_does_not_take_is_changed_without_a_word(tmp_path, caplog):
    with caplog.at_level(logging.INFO), MetricsWriter(tmp_path) as writer:
        writer.write(1, {"data/text (long rows)/share": 0.5})
    assert not caplog.records
    assert _tensorboard_events(tmp_path) == [(1, "data/text__long_rows_/share", 0.5)]


def test_flush_leaves_no_event_behind(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 40):
        writer.write(step, {"train/loss": 1.0, "moe/dropped": step})
    writer.flush()
    assert len(_tensorboard_events(tmp_path)) == 2 * 39
    writer.close()


METRICS = {"train/loss": 2.34567, "train/tokens_per_second": 12345.6, "moe/load_max_over_mean": 1.5}


def _wandb_sessions(run_dir):
    """(id, project, name, settings, {step: {key: value}}) of each session that wandb kept, the earliest first."""
    from wandb.proto import wandb_internal_pb2 as records

    for file in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        data, run, history = io.BytesIO(file.read_bytes()), None, {}
        data.read(7)  # the format's mark; then records below 32 KB, each whole: checksum, length, type
        while header := data.read(7):
            record = records.Record.FromString(data.read(struct.unpack("<IHB", header)[1]))
            if record.HasField("run"):
                run = record.run
            elif record.HasField("history"):
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                history[record.history.step.num] = {key: json.loads(items[key]) for key in items if key[0] != "_"}
        settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        yield run.run_id, run.project, run.display_name, settings, history


def test_wandb_has_the_scalars_of_every_session_under_one_id(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="of requirements-test.txt; make the environment anew")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = at(tmp_path / "run")
    run_dir.mkdir()
    for first, resume_step in ((1, None), (3, 2)):
        run = WandbRun(run_dir, "tests", {"train": {"steps": 4}})
        with MetricsWriter(run_dir, resume_step, run) as writer:
            for step in (first, first + 1):
                writer.write(step, {"train/loss": step / 4, "moe/dropped": step, "none": None, "list": [1.0]})
    wandb.teardown()
    first, second = _wandb_sessions(tmp_path / "run")
    assert first[:3] == second[:3] == ((run_dir / "wandb_id").read_text(), "tests", "run")
    assert first[3]["train"] == {"steps": 4}
    expected = {step: {"train/loss": step / 4, "moe/dropped": step} for step in range(1, 5)}
    assert first[4] | second[4] == expected and len(first[4]) == len(second[4]) == 2


def test_without_wandb_the_message_says_what_to_install_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    _, log = call("train.py", "ling_tiny", "--runs-dir", tmp_path, "--train.wandb-project", "x", code=2)
    assert "train.wandb_project = 'x' needs wandb: pip install \"ling-jax[wandb]\"" in log
    assert not list(tmp_path.iterdir())


def test_wandb_that_cannot_start_is_one_error(tmp_path, monkeypatch):
    class Refused(Exception):
        pass

    def init(**settings):
        raise Refused("No API key configured.")

    stand_in = types.SimpleNamespace(init=init, Error=Refused, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    with pytest.raises(ValueError, match="'x': No API key configured. Or set WANDB_MODE=offline, or leave"):
        WandbRun(at(tmp_path), "x", {})


def test_without_a_terminal_the_first_and_last_step_are_logged(caplog):
    console = rich.console.Console(file=io.StringIO(), force_terminal=False)
    with caplog.at_level(logging.INFO), Progress(9, log_seconds=1e9, console=console) as progress:
        for step in range(1, 10):
            progress.update(step, METRICS)
    assert [r.getMessage().split("  ")[0] for r in caplog.records] == ["step 1/9", "step 9/9"]
    assert "loss 2.3457  12,346 tokens/s  expert load 1.50  ETA 0:00:00" in caplog.records[-1].getMessage()


def test_without_a_terminal_lines_keep_their_distance_and_tell_the_time_left(caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    console = rich.console.Console(file=io.StringIO(), force_terminal=False)
    with caplog.at_level(logging.INFO), Progress(100, 40, log_seconds=10, console=console) as progress:
        for step in range(41, 62):  # a step a second: 41 at 0 s, 51 at 10 s, 61 at 20 s
            progress.update(step, METRICS)
            now[0] += 1
    said = [(r.getMessage().split("  ")[0], r.getMessage().split("ETA ")[1]) for r in caplog.records]
    assert said == [("step 41/100", "-"), ("step 51/100", "0:00:49"), ("step 61/100", "0:00:39")]


def test_on_a_terminal_a_bar_shows_the_last_known_values(caplog):
    output = io.StringIO()
    console = rich.console.Console(file=output, force_terminal=True, width=140)
    with caplog.at_level(logging.INFO), Progress(4, console=console) as progress:
        progress.update(1, METRICS)
        progress.update(4, {"train/loss": None})
    assert "step 4/4  loss -  12,346 tokens/s  expert load 1.50" in output.getvalue()
    assert not caplog.records
