"""lm-eval's tasks over a model of ours: its package, an extra, reads the tasks and reckons their metrics."""

import contextlib
import dataclasses
import datetime
import difflib
import importlib
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from ling_jax.config.text import columns
from ling_jax.convert.load import load_weights
from ling_jax.convert.tokenizer import ends_of, tokenizer_of
from ling_jax.convert.weights import CHECKPOINTS, StoredWeights, Weights, open_weights
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.files.paths import local
from ling_jax.files.whole import checksum
from ling_jax.generate.tasks import TaskModel, wanted_of
from ling_jax.snapshots import SNAPSHOTS
from ling_jax.train.evaluations import HEADINGS, Record, rows, save_record
from ling_jax.train.report import show_evaluations

log = logging.getLogger(__name__)

PACKAGE = "lm-eval>=0.4.13"
RESAMPLES = 1000  # of the bootstrap, for metrics whose standard error has no formula
SHOWN = 5  # names of tasks in an error
LONGEST_NAME = 100  # characters of the tasks in a file's name


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Tasks to evaluate, and how; part of the record."""

    tasks: tuple[str, ...]  # names or patterns of tasks, groups and tags
    window: int  # most tokens that are run at once
    num_fewshot: int | None  # None: as each task has it
    limit: int | None  # documents of each task; None: all
    chat: bool


def library() -> Any:
    """The package; ValueError without it, or for an old one."""
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        found = importlib.import_module("lm_eval")
        importlib.import_module("lm_eval.evaluator")
        tasks = importlib.import_module("lm_eval.tasks")
    except ModuleNotFoundError as error:
        missing = "lm-eval" if error.name == "lm_eval" else f"{error.name}, of lm-eval"
        raise ValueError(f"--tasks needs {missing}, which is not installed: pip install '{PACKAGE}'") from None
    if not hasattr(tasks.TaskManager, "load"):  # 0.4.13 has it
        raise ValueError(f"--tasks needs {PACKAGE}, and {found.__version__} is too old: pip install '{PACKAGE}'")
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # a request for each data set, local ones too
    return found


def load_tasks(library: Any, settings: TaskSettings, folder: str | None) -> list[Any]:
    """lm-eval's tasks and groups with their data, checked; no weights are needed.

    Args:
      folder: of task files, which go before those that come with the package.
    Raises:
      ValueError: naming the task, if it is not known, its file or data cannot be read, or it asks for what is not
        there: running code that a model wrote, generation settings, images.
    """
    if folder is not None and not local(folder, "--task-path").is_dir():
        raise ValueError(f"--task-path: no folder {folder}; it is the one that holds the tasks' .yaml files")
    if not settings.tasks:
        raise ValueError("--tasks names no task")
    index = _index(library, settings.tasks, folder)
    found = {}
    for name in settings.tasks:
        names = index.match_tasks([name])
        if not names:
            raise ValueError(f"--tasks: no task, group or tag {name!r}; {_known(index, name)}")
        found |= {one: _load(index, one) for one in names}
    for task in _leaves(found.values()):
        _check(task, settings)
    return list(found.values())


def _index(library: Any, names: Iterable[str], folder: str | None) -> Any:
    """A TaskManager. The package's own 15,000 tasks take ten seconds to list: only if a name is not the folder's."""
    if folder is not None:
        own = library.tasks.TaskManager(include_path=folder, include_defaults=False)
        if all(own.match_tasks([name]) and set(own.match_tasks([name])) <= set(own.all_subtasks) for name in names):
            return own
    return library.tasks.TaskManager(include_path=folder)


def _known(index: Any, name: str) -> str:
    near = difflib.get_close_matches(name, index.all_tasks, SHOWN)
    return f"names like it: {', '.join(near)}" if near else "`lm-eval ls tasks` lists those that come with lm-eval"


def _load(index: Any, name: str) -> Any:
    """The task or group of a name, or the list of a tag's tasks."""
    try:
        loaded = index.load([name])
    except Exception as error:  # a task is a program of somebody's, with data of somebody else's
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = f"there is no {reason} in its file or its data" if isinstance(error, KeyError) else reason
        raise ValueError(f"task {name} cannot be loaded: {reason}") from error
    groups = loaded.get("groups") or {}
    return groups[name] if name in groups else list(loaded["tasks"].values())


def _leaves(found: Iterable[Any]) -> Iterable[Any]:
    for one in found:
        yield from one if isinstance(one, list) else one.get_all_tasks()


def _check(task: Any, settings: TaskSettings) -> None:
    name = task.config.task
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError(f"task {name} runs code that the model writes, which is not done here: leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise ValueError(f"task {name} asks for more than text: leave it out")
    if task.OUTPUT_TYPE == "generate_until":
        try:
            wanted_of(task.config.generation_kwargs or {}, settings.window)
        except ValueError as error:
            raise ValueError(f"task {name}: {error}") from None


def adapter(model: TaskModel) -> Any:
    """A TaskModel as lm-eval's LM."""
    base: Any = importlib.import_module("lm_eval.api.model").LM

    class Adapter(base):
        tokenizer_name = model.tokenizer.fingerprint

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return model.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return model.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return model.generate_until([request.args for request in requests])

        def apply_chat_template(self, history: Sequence[Any], add_generation_prompt: bool = True) -> str:
            return chat_text(model.tokenizer, history, add_generation_prompt)

    return Adapter()


def chat_text(tokenizer: Tokenizer, history: Sequence[Any], add_generation_prompt: bool) -> str:
    """A conversation in the tokenizer's template; without the prompt for an answer it ends inside its last message,
    which the model is to go on with."""
    text = tokenizer.chat_text(history, add_generation_prompt=add_generation_prompt)
    if add_generation_prompt:
        return text
    last = history[-1]["content"].strip()
    return text[: text.rindex(last) + len(last)]


def evaluate_tasks(library: Any, model: TaskModel, tasks: list[Any], settings: TaskSettings) -> dict[str, Any]:
    """Runs tasks; returns lm-eval's "results" by task and group, "versions", "n-shot", "n-samples", ..."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork a process that runs JAX
    with contextlib.redirect_stdout(sys.stderr):  # which it prints to
        return library.evaluator.simple_evaluate(
            model=adapter(model),
            tasks=[task for one in tasks for task in (one if isinstance(one, list) else [one])],
            task_manager=library.tasks.TaskManager(include_defaults=False),
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            apply_chat_template=settings.chat,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
        )


def run_tasks(checkpoint: str, settings: TaskSettings, folder: str | None, batch_size: int) -> str:
    """Evaluates a checkpoint on tasks, keeps the record in its run, if it is one's, and returns the table.

    Raises:
      ValueError: before weights are read, for whatever is wrong with the tasks.
    """
    package = library()
    tokenizer, weights = tokenizer_of(checkpoint), open_weights(checkpoint)
    tokenizer.check_fits(weights.config.vocab_size)
    tasks = load_tasks(package, settings, folder)
    stops = ends_of(checkpoint, tokenizer)
    model = TaskModel(load_weights(weights), tokenizer, window=settings.window, rows=batch_size, stop_ids=stops)
    found = evaluate_tasks(package, model, tasks, settings)
    names = ("results", "higher_is_better", "n-shot", "n-samples", "versions")
    record = {
        "step": weights.step if isinstance(weights, StoredWeights) else None,
        **dataclasses.asdict(settings),
        **{name: found[name] for name in names},
        "lm_eval": package.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    keep_record(weights, file_name(settings), record)
    return columns([HEADINGS, *rows(record)])


def keep_record(weights: Weights, name: str, record: Record) -> epath.Path | None:
    """Saves a record in the run that the weights are a step or snapshot of, and in its report; returns its path, or
    None where they are none."""
    if not isinstance(weights, StoredWeights) or weights.folder.parent.name not in (CHECKPOINTS, SNAPSHOTS):
        return None
    run = weights.folder.parent.parent
    path = save_record(run, f"{weights.step}-{name}", record)
    show_evaluations(run)
    log.info("results: %s", path)
    return path


def file_name(settings: TaskSettings) -> str:
    """A name for what was asked: the tasks, and settings that are not the default."""
    asked = "+".join(settings.tasks)
    name = re.sub(r"[^\w.+-]", "_", asked)[:LONGEST_NAME]
    parts = [name if name == asked else f"{name}-{checksum(asked.encode())}"]
    parts += ["chat"] * settings.chat
    parts += [f"{settings.num_fewshot}-shot"] * (settings.num_fewshot is not None)
    parts += [f"first-{settings.limit}"] * (settings.limit is not None)
    return "-".join(parts)
