"""Training under way: batches in, metrics and checkpoints out; ends early only on a signal or on lost numbers."""

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from ling_jax.config import train_flops_per_token
from ling_jax.data.pipeline import DataBatch
from ling_jax.files.paths import at, made_locally
from ling_jax.parallel.mesh import place_batch, rows_here
from ling_jax.parallel.processes import AnyProcess, CompiledTogether, leave_terminal, stop_signals
from ling_jax.train.fp8 import beyond, loss_metrics, losses
from ling_jax.train.hardware import peak_flops, peak_memory_bytes
from ling_jax.train.metrics import MetricsWriter, Progress
from ling_jax.train.needle import Needles, NeedleScorer, make_needle_scorer, needle_metrics
from ling_jax.train.objective import Batch, Metrics, check_batch
from ling_jax.train.state import Trainer, TrainState
from ling_jax.train.step import make_train_step, make_watcher
from ling_jax.train.validate import HeldOut, make_scorer, merged_metrics, score_metrics, validate

log = logging.getLogger(__name__)


class Saver(Protocol):
    """The part of a checkpointer that a session needs."""

    def save(self, state: TrainState, fallen: Sequence[str]) -> None: ...

    def after_step(self, state: TrainState) -> None:
        """Called after every step: takes a snapshot of the weights if one is due."""
        ...

    def merged(self, state: TrainState) -> tuple[dict, dict] | None:
        """The (params, bias) of merged snapshots that are scored beside those of now; None if there are none."""
        ...

    def wait(self) -> None: ...


class DivergedError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


@dataclass
class StopRequest:
    """Which signal asked the run to save and end, if one did."""

    received: signal.Signals | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """SIGTERM, SIGINT and SIGHUP set `received` inside; one that comes more than a second later acts as it did
        before (a scheduler's signal may reach a process twice, by itself and through its parent). A signal that was
        ignored, as nohup has it, stays so."""
        found = {number: signal.getsignal(number) for number in stop_signals()}
        before = {number: handler for number, handler in found.items() if handler != signal.SIG_IGN}
        first = 0.0

        def handle(number, frame):
            nonlocal first
            if number == signal.SIGHUP:
                leave_terminal()
            if self.received is None:
                self.received, first = signal.Signals(number), time.monotonic()
                log.warning("%s: finishing this step, then saving", self.received.name)
            elif time.monotonic() - first > 1.0:
                for old_number, handler in before.items():
                    signal.signal(old_number, handler)
                signal.raise_signal(number)

        for number in before:
            signal.signal(number, handle)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class _Recorder:
    """Turns a step's device metrics into a logged line, one step late so that the device never waits."""

    trainer: Trainer
    writer: MetricsWriter | None  # of process 0
    progress: Progress
    pending: tuple[int, Metrics, Mapping[str, float]] | None = None  # on the device, and what the host adds
    ready: tuple[int, dict[str, Any]] | None = None  # on the host, not yet written
    more: bool = False  # whether something was added to it
    skipped_in_a_row: int = 0  # up to the last step that is ready

    def __post_init__(self):
        config = self.trainer.config
        self.flops_per_token = train_flops_per_token(config.model, config.data.sequence_length)
        self.peak_flops = peak_flops()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Validation and saving are not training time."""
        self.last_time = time.perf_counter()

    def push(self, step: int, metrics: Metrics, more: Mapping[str, float]) -> None:
        self.flush()
        self.pending = (step, metrics, more)

    def fetch(self) -> None:
        """Waits for the pending step and takes its time."""
        if self.pending is None:
            return
        step, device_metrics, more = self.pending
        values: dict[str, Any] = jax.device_get(device_metrics)
        now = time.perf_counter()
        tokens_per_second = float(values.pop("train/tokens")) / max(now - self.last_time, 1e-9)
        self.last_time = now
        self.skipped_in_a_row = int(values.pop("train/skipped_in_a_row"))
        values["train/tokens_per_second"] = tokens_per_second
        if self.peak_flops:
            values["train/mfu"] = tokens_per_second * self.flops_per_token / self.peak_flops
        values |= {**more, "mem/peak_bytes": peak_memory_bytes()}
        self.pending, self.ready = None, (step, values)

    def add(self, extra: Mapping[str, Any]) -> None:
        """Puts more into the line of the step that was fetched, which is then logged whatever `train.log_every`."""
        assert self.ready is not None
        self.ready[1].update(extra)
        self.more = True

    def flush(self, extra: Mapping[str, float] | None = None) -> None:
        """Logs the pending step, with `extra` in its line.

        Raises:
          DivergedError: see `TrainConfig.max_skipped_steps`.
        """
        self.fetch()
        if self.ready is None:
            return
        (step, values), self.ready = self.ready, None
        more, self.more = self.more, False
        values |= extra or {}
        train, in_a_row = self.trainer.config.train, self.skipped_in_a_row
        logged = step % train.log_every == 0 or step == train.steps or extra or more or in_a_row
        if logged and self.writer is not None:
            self.writer.write(step, values)
        self.progress.update(step, values)
        if in_a_row:
            log.warning("step %d skipped: its loss or gradient is not finite (%d in a row)", step, in_a_row)
        if in_a_row >= train.max_skipped_steps:
            raise DivergedError(
                f"{in_a_row} steps in a row, up to step {step}, had a loss or gradient that is not finite "
                f"(train.max_skipped_steps = {train.max_skipped_steps}); lower schedule.peak_lr or look at the "
                "data, and run the same command to continue from the last checkpoint"
            )


@contextlib.contextmanager
def _profiler(trainer: Trainer, run_dir: str) -> Iterator[Callable[[int], None]]:
    """Gives a function to call before each step: it opens and closes the profiler's window."""
    train, folder = trainer.config.train, at(run_dir) / "profile"
    trace: contextlib.ExitStack | None = None

    def at_step(done: int) -> None:
        nonlocal trace
        if train.profile_steps and done == train.profile_start:
            trace = contextlib.ExitStack()
            local = trace.enter_context(made_locally(folder))
            jax.profiler.start_trace(local)
            trace.callback(jax.profiler.stop_trace)
        elif trace is not None and done == train.profile_start + train.profile_steps:
            trace.close()
            trace = None

    try:
        yield at_step
    finally:
        if trace is not None:  # the window reaches past the last step
            trace.close()


def _programs(trainer: Trainer) -> tuple[Callable, Callable, NeedleScorer, Callable]:
    """The step, the scorers of held-out text and of needles, and what measures FP8."""
    step = CompiledTogether("the step", make_train_step(trainer))
    watch = CompiledTogether("the measurement of FP8", make_watcher(trainer))
    return step, make_scorer(trainer.compute), make_needle_scorer(trainer.compute), watch


def _measure(trainer: Trainer, step: int, sums: Any, recorder: _Recorder) -> Trainer:
    """Records what FP8 loses; the trainer to go on with: modules that lose too much leave FP8, which compiles anew."""
    train = trainer.config.train
    recorder.fetch()
    found = losses(jax.device_get(sums))
    recorder.add(loss_metrics(found))
    recorder.restart_clock()
    fallen = beyond(found, train.fp8_max_lost, train.fp8_min_cosine)
    limits = f"train.fp8_max_lost {train.fp8_max_lost}, train.fp8_min_cosine {train.fp8_min_cosine}"
    for module, loss in fallen.items():
        log.warning("step %d: %s goes back to %s (%s; %s)", step, module, train.dtype, loss, limits)
    return trainer.without_fp8(list(fallen)) if fallen else trainer


class Session:
    """Training under way: a state that takes one batch after another, logs, validates and saves.

    The caller hands it batches and may do what it likes between them, such as generating the next one with `weights`.
    Inside its `with` block signals and progress are looked after; at its end the last state is saved, unless an error
    ends it.

    Args:
      trainer, state: what is trained, and from where on.
      held_out: validation text by source.
      saver: keeps states.
      writer: cut back to `state.step` already; None on all processes but the first.
      run_dir: the run's folder.
      stop: of this process; all stop together, one step later, where there are several.
      needles: what is looked for beside `held_out`.
    """

    def __init__(
        self,
        trainer: Trainer,
        state: TrainState,
        held_out: Mapping[str, HeldOut],
        saver: Saver,
        writer: MetricsWriter | None,
        run_dir: str,
        stop: StopRequest,
        needles: Needles | None = None,
    ) -> None:
        self.trainer, self.state, self.held_out, self.saver = trainer, state, held_out, saver
        self.writer, self.run_dir, self.stop, self.needles = writer, run_dir, stop, needles or {}
        self.step_fn, self.scorer, self.needle_scorer, self.watch = _programs(trainer)
        self.done = int(state.step)  # steps
        self.saved = self.done if self.done else -1
        self.here = rows_here(trainer.compute.mesh, trainer.config.data.global_batch_size)
        self.any_process = AnyProcess(trainer.compute.mesh)

    def __enter__(self) -> "Session":
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(Progress(self.trainer.config.train.steps, self.done))
            self.before_step = stack.enter_context(_profiler(self.trainer, self.run_dir))
            self.recorder = _Recorder(self.trainer, self.writer, progress)
            self.contexts = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        with self.contexts:
            if kind is None:
                if self.saved != self.done:
                    self.save()
                self.saver.wait()

    @property
    def weights(self) -> tuple[dict, dict]:
        """(params, bias) of now; the next step takes their memory."""
        return self.state.params, self.state.bias

    def goes_on(self) -> bool:
        """Whether there is another step to do. Every process asks, before each step."""
        return self.done < self.trainer.config.train.steps and not self.any_process(self.stop.received is not None)

    def run(self, batches: Iterator[DataBatch]) -> None:
        """Takes batches until the last step or a signal."""
        while self.goes_on():
            started = time.perf_counter()
            batch = next(batches)
            self.step(batch.arrays, time.perf_counter() - started, batch.metrics)

    def step(
        self, rows: Mapping[str, np.ndarray], waited: float = 0.0, metrics: Mapping[str, float] | None = None
    ) -> None:
        """One optimizer step, and what is due after it.

        Args:
          rows: the arrays of the objective's `fields`, of those rows of the global batch that `parallel.mesh.rows_here`
            names for this process.
          waited: seconds that the caller waited for them.
          metrics: what the caller wants to be logged with this step.
        Raises:
          ValueError: for arrays that the objective does not take.
          DivergedError: after saving nothing more: the last checkpoint holds finite weights.
        """
        self.before_step(self.done)
        started = time.perf_counter()
        batch = self._placed(rows)
        waited += time.perf_counter() - started
        self.state, on_device = self.step_fn(self.state, batch)
        self.done += 1
        self.recorder.push(self.done, on_device, {**(metrics or {}), "train/data_wait_s": waited})
        train, last = self.trainer.config.train, self.done == self.trainer.config.train.steps
        if self.trainer.compute.fp8 and train.fp8_watch_every and self.done % train.fp8_watch_every == 0:
            self._measure_fp8(batch)
        self.saver.after_step(self.state)
        if self.held_out and (last or (train.eval_every and self.done % train.eval_every == 0)):
            self._validate()
        if last or self.done % self.trainer.config.checkpoint.every == 0:
            self.save()

    def save(self) -> None:
        """Saves the state, unless its last step was skipped: the last good checkpoint must not give way."""
        self.recorder.flush()
        if self.recorder.skipped_in_a_row == 0:
            if self.writer is not None:
                self.writer.flush()  # before the save: a resume must find every line up to its step
            self.saver.save(self.state, self.trainer.fallen)
            self.saved = self.done
        self.recorder.restart_clock()

    def _placed(self, rows: Mapping[str, np.ndarray]) -> Batch:
        fields, count = self.trainer.objective.fields, self.trainer.config.data.global_batch_size
        check_batch(rows, fields, len(self.here))
        return place_batch(self.trainer.compute.mesh, rows, fields, self.here, count)

    def _measure_fp8(self, batch: Batch) -> None:
        """Records what FP8 loses; modules that lose too much leave FP8, which compiles anew."""
        kept = _measure(self.trainer, self.done, self.watch(*self.weights, batch), self.recorder)
        if kept is not self.trainer:
            self.trainer = kept
            self.step_fn, self.scorer, self.needle_scorer, self.watch = _programs(kept)

    def _validate(self) -> None:
        self.recorder.fetch()
        rows = self.trainer.config.data.global_batch_size
        labels = next(iter(self.held_out.values())).labels
        metrics = score_metrics(validate(self.scorer, *self.weights, self.held_out, rows), labels)
        if (merged := self.saver.merged(self.state)) is not None:
            metrics |= merged_metrics(validate(self.scorer, *merged, self.held_out, rows))
        metrics |= needle_metrics(self.needle_scorer, *self.weights, self.needles, self.trainer.config)
        self.recorder.flush(metrics)
        self.recorder.restart_clock()
