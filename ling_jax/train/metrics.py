"""The record of a run: `metrics.jsonl` (the truth), TensorBoard and wandb (views of it), and the progress display.

One JSON object per logged step, `step` first, then the keys in the caller's order. Scalars unless noted:

  train/loss, train/mtp_loss                 nats per token
  train/learning_rate, train/grad_norm       the norm is the one before clipping
  train/tokens_per_second, train/mfu, train/data_wait_s
  train/skipped_steps                        non-finite steps skipped so far in the run (cumulative)
  moe/load_max_over_mean                     the busiest expert's tokens over the mean, in the worst layer
  moe/load_max_over_mean_per_layer           list, MoE layers in layer order
  moe/bias_abs_max, moe/bias_min_per_layer, moe/bias_max_per_layer     (the last two are lists)
  moe/dropped                                token-expert pairs left out
  fp8/lost_max, fp8/cosine_min               of all modules, operands and layers, every `train.fp8_watch_every` steps
  fp8/lost/<module>/<operand>, fp8/cosine/<module>/<operand>           lists, layers of a stack in order
  mem/peak_bytes
  eval/<source>/nats_per_token, eval/<source>/bits_per_byte
  eval/nats_per_token, eval/bits_per_byte    of all sources together
  eval/nats_per_token/position_<A>-<B>       tokens A to B - 1 of held-out documents that have B or more
  eval/needle/<tokens>/accuracy, eval/needle/<tokens>/accuracy_per_depth   (the latter a list, from the beginning on)
  eval/merged_nats_per_token, eval/merged_bits_per_byte                of the mean of the last snapshots
  data/<source>/share, data/<source>/epochs  drawn since the shares are what they are, padding not counted; how often
  data/tag_<tag>                             the share of all sources of a tag

Only process 0 holds a `MetricsWriter` or a `Progress`.
"""

import contextlib
import datetime
import gc
import importlib
import json
import logging
import os
import pathlib
import re
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import rich.console
import rich.progress
from etils import epath
from tensorboardX import summary as tensorboard_summary
from tensorboardX import writer as tensorboard
from tensorboardX.event_file_writer import EventsWriter

from ling_jax.files.buckets import is_bucket
from ling_jax.files.lines import cut_lines, open_lines, parts_of, read_lines
from ling_jax.files.paths import at, write_whole
from ling_jax.files.progress import CONSOLE

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID = "wandb_id"  # a file of the run's folder


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Python's search for cyclic garbage is off inside: a long record is millions of objects, none of them
    garbage, and walking them again and again triples the time of a report."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@paused_collector()
def read_metrics(run_dir: epath.PathLike) -> list[dict[str, Any]]:
    """The logged steps of a run, in file order, without a last line that a crash left half-written.

    Raises:
      ValueError: if the run has no metrics.jsonl, or one of its lines but the last is damaged.
    """
    path = at(run_dir) / METRICS_FILE
    if not parts_of(path):
        raise ValueError(f"{path} does not exist: {os.fspath(run_dir)} is not the folder of a run that logged a step")
    return list(_read_records(path))


def _read_records(path: epath.Path) -> Iterator[dict[str, Any]]:
    """Parses each line; see `read_metrics`."""
    for number, (line, followed) in enumerate(read_lines(path), start=1):
        try:
            yield _record(line)
        except ValueError as error:  # half a line, or undecodable bytes after a power failure
            if followed:
                raise ValueError(
                    f"{path}, line {number} is damaged ({error}) and not the last, so no crash cut it short: "
                    "restore the file or move it away"
                ) from error
            logger.warning("%s: left out its half-written last line", path)


def _record(line: bytes) -> dict[str, Any]:
    record = json.loads(line.decode())
    if not isinstance(record, dict) or "step" not in record:
        raise ValueError("no object with a step")
    return record


def _cut_back(path: epath.Path, last_step: int) -> None:
    """Drops the lines after `last_step`; those kept stay byte for byte as they were."""
    for _ in _read_records(path):
        pass  # ValueError for damage, before anything is dropped

    def keep(line: bytes) -> bool:
        try:
            return _record(line)["step"] <= last_step
        except ValueError:  # the last line, cut short
            return False

    cut_lines(path, keep)


class _TensorBoard:
    """Scalars as TensorBoard events, one event per step; in a bucket, an object for each flush.

    This uses tensorboardX's record writer rather than its `SummaryWriter`, whose flush does not wait for its
    queue (a killed run would lose events that a checkpoint vouches for).
    """

    def __init__(self, folder: epath.Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._new = folder, False
        self._scratch = tempfile.TemporaryDirectory() if is_bucket(folder) else None
        self._writer = self._opened()
        # Readers forget the events from `first_step` on that earlier files hold.
        self._write(first_step, session_log=tensorboard.SessionLog(status=tensorboard.SessionLog.START))

    def _opened(self) -> EventsWriter:
        folder = os.fspath(self._folder) if self._scratch is None else self._scratch.name
        # The file's own stamp is in seconds: without more, a quick restart would overwrite the former file.
        return EventsWriter(os.path.join(folder, "events"), f".{time.time_ns()}")

    def append(self, step: int, record: Mapping[str, Any]) -> None:
        summary = tensorboard_summary.Summary()
        for key, value in record.items():
            if isinstance(value, int | float):
                name = re.sub(r"[^-/.\w]", "_", key)  # as tensorboardX does too, with a line in the log for each
                summary.MergeFrom(tensorboard_summary.scalar(name, value))
        self._write(step, summary=summary)

    def _write(self, step: int, **what: Any) -> None:
        self._writer.write_event(tensorboard.Event(wall_time=time.time(), step=step, **what))
        self._new = True

    def flush(self) -> None:
        self._writer.flush()
        if self._scratch is not None and self._new:
            self._writer.close()
            for file in pathlib.Path(self._scratch.name).iterdir():
                write_whole(self._folder / file.name, file.read_bytes())
                file.unlink()
            self._writer = self._opened()
        self._new = False

    def close(self) -> None:
        self.flush()
        self._writer.close()
        if self._scratch is not None:
            self._scratch.cleanup()


def wandb_library(project: str) -> Any:
    """The package wandb, which `train.wandb_project` needs; ValueError without it."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ValueError(
            f'train.wandb_project = {project!r} needs wandb: pip install "ling-jax[wandb]", or leave the setting out'
        ) from None


class WandbRun:
    """Scalars as a run of a project at Weights & Biases, under one id for all sessions of a run.

    WANDB_MODE=offline and wandb's other variables mean what they mean to it. What it has of a step stays: it ignores a
    step that a resume does once more.
    """

    def __init__(self, run_dir: epath.Path, project: str, settings: Mapping[str, Any]):
        """Args:
        settings: of the run, for wandb's table of them.
        """
        wandb, file = wandb_library(project), run_dir / WANDB_ID
        if not file.exists():
            write_whole(file, uuid.uuid4().hex[:8])
        try:
            self._run = wandb.init(
                project=project,
                id=file.read_text(),
                name=run_dir.name,
                resume="allow",
                dir=None if is_bucket(run_dir) else os.fspath(run_dir),
                config=dict(settings),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise ValueError(
                f"train.wandb_project = {project!r}: {error} Or set WANDB_MODE=offline, or leave the setting out"
            ) from error
        logger.info("wandb: %s", os.path.dirname(self._run.dir) if self._run.offline else self._run.url)

    def append(self, step: int, record: Mapping[str, Any]) -> None:
        self._run.log({key: value for key, value in record.items() if isinstance(value, int | float)}, step=step)

    def close(self) -> None:
        """Returns once all of it is on disk, or uploaded."""
        self._run.finish()


def _plain(key: str, value: Any) -> Any:
    """A number or a flat list of numbers for JSON, bit for bit; NaN and infinities, which JSON lacks, become None."""
    if value is None:
        return None
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" or array.ndim > 1:
        raise ValueError(f"metric {key!r} = {value!r}: only numbers and flat lists of numbers are logged")
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return array.tolist()
    return [x if np.isfinite(x) else None for x in array.tolist()] if array.ndim else None


class MetricsWriter:
    """Appends steps to `run_dir`/metrics.jsonl, to `run_dir`/tensorboard, and to wandb where it is given.

    In a bucket lines are uploaded once a minute and at `flush` (see `files.lines`), so call `flush` before saving a
    checkpoint: then the record is never shorter than what a resume starts from.
    """

    def __init__(self, run_dir: epath.PathLike, resume_step: int | None = None, wandb: WandbRun | None = None):
        """Opens the record of a run.

        Args:
          run_dir: the run's folder, made if missing; local or in a bucket.
          resume_step: the restored step; lines after it are dropped. None: the run starts anew, and all are.
        """
        folder = self._folder = at(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._last_step = -1 if resume_step is None else resume_step
        path = folder / METRICS_FILE
        _cut_back(path, self._last_step)
        self._lines = open_lines(path)
        self._tensorboard, self._wandb = _TensorBoard(folder / TENSORBOARD_FOLDER, self._last_step + 1), wandb

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs one step.

        Args:
          step: optimizer steps done; greater than that of the previous call and than `resume_step`.
          metrics: key to number or flat list of numbers (numpy or Python, any float dtype numpy knows).
        Raises:
          ValueError: for a step that does not advance, a value that is not numeric, or a disk that is full.
        """
        if step <= self._last_step:
            raise ValueError(f"metrics of step {step} come after step {self._last_step}: log each step once, in order")
        record = {"step": int(step)} | {key: _plain(key, value) for key, value in metrics.items()}
        try:
            self._lines.append(json.dumps(record, allow_nan=False).encode())
            del record["step"]
            self._tensorboard.append(step, record)
            if self._wandb is not None:
                self._wandb.append(step, record)
        except OSError as error:
            raise ValueError(
                f"cannot write the metrics of step {step} in {self._folder}: {error.strerror}; make room there and "
                "run the same command to resume (saved checkpoints are intact)"
            ) from error
        self._last_step = step

    def flush(self) -> None:
        """Returns once all that was written is on disk, or uploaded."""
        self._lines.flush()
        self._tensorboard.flush()

    def close(self) -> None:
        self._lines.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.close()
        except Exception:
            if error is None:  # else what is under way already tells it
                raise


class Progress:
    """How far a run is: a bar on a terminal, elsewhere a log line now and then. Used as a context manager.

    Args:
      total_steps: the run's last step.
      start_step: the step it starts or resumes from.
      log_seconds: between two log lines where there is no terminal; the first and the last step always get one.
      console: where the bar goes (standard error by default). Share it with a `rich` log handler, so that log
        lines and the bar do not overwrite each other.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        log_seconds: float = 10.0,
        console: rich.console.Console | None = None,
    ):
        self._total, self._step = total_steps, start_step
        self._console = console or CONSOLE
        self._log_seconds = log_seconds
        self._shown: dict[str, Any] = {}
        self._first: tuple[int, float] | None = None  # step and time of the first update: compilation is not progress
        self._logged: tuple[int, float] | None = None
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=24),
            rich.progress.TextColumn("{task.description}"),
            console=self._console,
        )
        self._task = self._bar.add_task(self._describe("-"), total=total_steps, completed=start_step)

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()
        elif self._logged is not None and self._logged[0] < self._step:
            self._log(time.monotonic())

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows `step`; a key that `metrics` lacks keeps its last value on show."""
        now = time.monotonic()
        self._step = step
        self._shown.update(metrics)
        self._first = self._first or (step, now)
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, description=self._describe(self._eta(now)))
        elif self._logged is None or now - self._logged[1] >= self._log_seconds:
            self._log(now)

    def _log(self, now: float) -> None:
        logger.info("%s", self._describe(self._eta(now)))
        self._logged = (self._step, now)

    def _eta(self, now: float) -> str:
        """Time left at the mean pace since the first update, as h:mm:ss."""
        if self._first is None or self._step <= self._first[0]:
            return "-"
        pace = (now - self._first[1]) / (self._step - self._first[0])
        return str(datetime.timedelta(seconds=round(pace * max(0, self._total - self._step))))

    def _describe(self, eta: str) -> str:
        def show(key: str, form: str) -> str:
            value = self._shown.get(key)
            return "-" if value is None else format(value, form)

        return (
            f"step {self._step}/{self._total}  loss {show('train/loss', '.4f')}  "
            f"{show('train/tokens_per_second', ',.0f')} tokens/s  "
            f"expert load {show('moe/load_max_over_mean', '.2f')}  ETA {eta}"
        )
