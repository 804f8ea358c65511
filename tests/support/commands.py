"""The commands, in the process of the test: for what a process of its own adds nothing to."""

import contextlib
import io
import logging
from typing import Any
from unittest import mock

from ling_jax import evaluate
from ling_jax.commands import chat_evaluation, convert, post, prepare, sample, train
from ling_jax.train import hardware

MAINS = {
    "train.py": train.main,
    "sample.py": sample.main,
    "convert.py": convert.main,
    "evaluate": evaluate.main,
    "post.py": post.main,
    "post.evaluate": chat_evaluation.main,
    "prepare": prepare.main,
}


@contextlib.contextmanager
def _logged_to(err: io.StringIO):
    """The package's lines, without a time before them, go to `err` alone."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers, quiet = [logging.StreamHandler(err)], logging.getLogger("absl")
    root.setLevel(logging.INFO)
    quiet.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)


def call(script: str, *args: Any, code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of `python script *args`, which must end with `code`, as `tests.tiny_run.run` has them.

    The compiler's work and the libraries' imports, which are most of a tiny run's time, are shared with the test's
    process; so are its eight devices, of which a run takes those of its mesh. A test of signals, of standard input or
    of the environment needs a process.
    """
    out, err = io.StringIO(), io.StringIO()
    rate = mock.patch.object(hardware, "matmul_rate", lambda *args: 1e11)  # measuring it takes a second of both cores
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _logged_to(err), rate:
        try:
            ended = MAINS[script]([str(arg) for arg in args]) or 0
        except (ValueError, OSError) as error:  # as `ling_jax.cli.run_main`
            print(f"error: {error}", file=err)
            ended = 2
        except SystemExit as end:
            ended = end.code
    assert ended == code, f"exit code {ended}, not {code}:\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()
