"""How long work with bytes is shown: a bar on a terminal, else a log line now and then."""

import contextlib
import logging
import time

import rich.console
import rich.progress

log = logging.getLogger(__name__)

# The log handler's too, so that lines and the bar do not overwrite each other.
CONSOLE = rich.console.Console(stderr=True)
LOG_SECONDS = 10.0  # between two lines where there is no terminal


class ByteProgress(contextlib.AbstractContextManager):
    """A bar with bytes per second and the time left; without a terminal, a log line now and then."""

    def __init__(self, total: int, done: int = 0):
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=24),
            rich.progress.DownloadColumn(),
            rich.progress.TransferSpeedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=CONSOLE,
        )
        self._task = self._bar.add_task("", completed=done, total=total)
        self._start, self._at_start, self._done, self._total = time.monotonic(), done, done, total
        self._logged = self._start

    def __enter__(self) -> "ByteProgress":
        if CONSOLE.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if CONSOLE.is_terminal:
            self._bar.stop()

    def advance(self, size: int) -> None:
        self._done += size
        self._bar.advance(self._task, size)
        now = time.monotonic()
        if not CONSOLE.is_terminal and (now - self._logged > LOG_SECONDS or self._done == self._total):
            self._logged = now
            rate = (self._done - self._at_start) / max(now - self._start, 1e-9)
            left = (self._total - self._done) / max(rate, 1.0)
            log.info(
                "%.2f of %.2f GB, %.2f GB/s, %.0f s left", *(x / 1e9 for x in (self._done, self._total, rate)), left
            )
