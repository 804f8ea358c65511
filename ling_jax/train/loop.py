"""The training loop: batches in, metrics and checkpoints out; stops early only on a signal or on lost numbers."""

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
from ling_jax.parallel.mesh import place_batch, rows_here
from ling_jax.parallel.processes import AnyProcess, CompiledTogether, leave_terminal, stop_signals
from ling_jax.train.fp8 import beyond, loss_metrics, losses
from ling_jax.train.hardware import peak_flops, peak_memory_bytes
from ling_jax.train.metrics import MetricsWriter, Progress
from ling_jax.train.state import Trainer, TrainState
from ling_jax.train.step import Metrics, make_train_step, make_watcher
from ling_jax.train.validate import HeldOut, make_scorer, score_metrics, validate

log = logging.getLogger(__name__)


class Saver(Protocol):
    """What the loop needs of a checkpointer."""

    def save(self, state: TrainState, fallen: Sequence[str]) -> None: ...

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
    pending: tuple[int, Metrics, float] | None = None  # on the device
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

    def push(self, step: int, metrics: Metrics, data_wait: float) -> None:
        self.flush()
        self.pending = (step, metrics, data_wait)

    def fetch(self) -> None:
        """Waits for the pending step and takes its time."""
        if self.pending is None:
            return
        step, device_metrics, data_wait = self.pending
        values: dict[str, Any] = jax.device_get(device_metrics)
        now = time.perf_counter()
        tokens_per_second = float(values.pop("train/tokens")) / max(now - self.last_time, 1e-9)
        self.last_time = now
        self.skipped_in_a_row = int(values.pop("train/skipped_in_a_row"))
        values["train/tokens_per_second"] = tokens_per_second
        if self.peak_flops:
            values["train/mfu"] = tokens_per_second * self.flops_per_token / self.peak_flops
        values |= {"train/data_wait_s": data_wait, "mem/peak_bytes": peak_memory_bytes()}
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
    train = trainer.config.train
    tracing = False

    def at_step(done: int) -> None:
        nonlocal tracing
        if train.profile_steps and done == train.profile_start:
            jax.profiler.start_trace(f"{run_dir}/profile")
            tracing = True
        elif tracing and done == train.profile_start + train.profile_steps:
            jax.profiler.stop_trace()
            tracing = False

    try:
        yield at_step
    finally:
        if tracing:  # the window reaches past the last step
            jax.profiler.stop_trace()


def _programs(trainer: Trainer) -> tuple[Callable, Callable, Callable]:
    """The step, the scorer of held-out text, and what measures FP8."""
    step = CompiledTogether("the step", make_train_step(trainer))
    return step, make_scorer(trainer), CompiledTogether("the measurement of FP8", make_watcher(trainer))


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


def train(
    trainer: Trainer,
    state: TrainState,
    batches: Iterator[Mapping[str, np.ndarray]],
    held_out: Mapping[str, HeldOut],
    saver: Saver,
    writer: MetricsWriter | None,
    run_dir: str,
    stop: StopRequest,
) -> TrainState:
    """Runs from `state` to `train.steps`, or until `stop` is set; the last state is saved either way.

    Args:
      batches: from the step after `state.step` on; int32 arrays, the rows of the global batch that
        `parallel.mesh.rows_here` names.
      held_out: validation text by source.
      writer: cut back to `state.step` already; None on all processes but the first.
      stop: of this process; all stop together, one step later, where there are several.
    Raises:
      DivergedError: after saving nothing more: the last checkpoint holds finite weights.
    """
    config = trainer.config
    step_fn, scorer, watch = _programs(trainer)
    here = rows_here(trainer.mesh, config.data.global_batch_size)
    first = done = int(state.step)
    saved = first if first else -1

    def save() -> None:
        nonlocal saved
        recorder.flush()
        if recorder.skipped_in_a_row == 0:  # else the last good checkpoint must not give way
            if writer is not None:
                writer.flush()  # before the save: a resume must find every line up to its step
            saver.save(state, trainer.fallen)
            saved = done
        recorder.restart_clock()

    with Progress(config.train.steps, first) as progress, _profiler(trainer, run_dir) as at_step:
        recorder, any_process = _Recorder(trainer, writer, progress), AnyProcess(trainer.mesh)
        while done < config.train.steps and not any_process(stop.received is not None):
            at_step(done)
            started = time.perf_counter()
            batch = place_batch(trainer.mesh, next(batches), here, config.data.global_batch_size)
            data_wait = time.perf_counter() - started
            state, metrics = step_fn(state, batch)
            done += 1
            recorder.push(done, metrics, data_wait)
            last = done == config.train.steps
            if trainer.fp8 and config.train.fp8_watch_every and done % config.train.fp8_watch_every == 0:
                kept = _measure(trainer, done, watch(state.params, state.bias, batch), recorder)
                if kept is not trainer:
                    trainer = kept
                    step_fn, scorer, watch = _programs(trainer)
            if held_out and (last or (config.train.eval_every and done % config.train.eval_every == 0)):
                recorder.fetch()
                scores = validate(scorer, state.params, state.bias, held_out, config.data.global_batch_size)
                recorder.flush(score_metrics(scores))
                recorder.restart_clock()
            if last or done % config.checkpoint.every == 0:
                save()
        if saved != done:
            save()
        saver.wait()
    return state
