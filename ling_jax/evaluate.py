"""Scores a text: python -m ling_jax.evaluate --checkpoint DIR --text FILE
Scores a run's held-out text: python -m ling_jax.evaluate --checkpoint DIR --held-out
Runs evaluation tasks: python -m ling_jax.evaluate --checkpoint DIR --tasks NAMES [--task-path DIR]

Of a text it prints nats per token, perplexity and bits per byte; every byte is scored, after a start token, in windows
that overlap by half. Tasks are lm-eval's, an extra; their metrics are printed, and kept in the checkpoint's run.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import get_args

import tyro

from ling_jax.cli import program, run_main
from ling_jax.commands.harness import TaskSettings, run_tasks
from ling_jax.config import DataConfig, SFTRun, TrainConfig, layer_kinds
from ling_jax.config.text import columns
from ling_jax.convert.load import load_pretrained
from ling_jax.convert.tokenizer import tokenizer_of
from ling_jax.convert.weights import LINEAGE, StoredWeights, model_config_of, open_weights
from ling_jax.data.sources import read_corpus
from ling_jax.files.paths import at
from ling_jax.kernels.lightning import Slopes
from ling_jax.model.model import split_model
from ling_jax.train.compute import make_compute
from ling_jax.train.validate import Score, add_scores, make_scorer, prepare_held_out, validate


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    checkpoint: str
    """A run folder, its checkpoints/, one step of it, a HF folder, or a hub id (ORG/NAME or ORG/NAME@REVISION)."""
    text: str | None = None
    """The UTF-8 text file to score, local or in a bucket."""
    held_out: bool = False
    """Score the held-out text of each source of the checkpoint's run (and stage), or of the run that it averages."""
    tasks: tuple[str, ...] = ()
    """Tasks, groups or tags of lm-eval, or patterns of their names such as arc_*; apart by spaces or commas."""
    task_path: str | None = None
    """A folder of task files (.yaml) of your own, which go before those that come with lm-eval."""
    num_fewshot: int | None = None
    """Examples before each question; by default as many as a task says."""
    limit: int | None = None
    """Only the first so many documents of each task: to try it out."""
    chat: bool = False
    """Ask the tasks' questions in the chat template."""
    length: int | None = None
    """Tokens per window; by default those of a row that the run was trained on. Of other weights 512 for a text, and
    all positions for tasks."""
    batch_size: int = 8
    """Windows of a text per call, or a task's answers that are generated side by side."""
    compare_slopes: bool = False
    """Of a model with linear attention: score it with its states decaying as each of the published codes has it, which
    no released config.json says. The best one is that of its training."""


def read_text(path: str) -> str:
    """A UTF-8 file's text; ValueError for one that is missing, empty or not UTF-8."""
    file = at(path)
    if not file.is_file():
        raise ValueError(f"no file {path}")
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} cannot be decoded; convert it first") from error
    if not text:
        raise ValueError(f"{path} is empty: there is nothing to score")
    return text


def window_of(checkpoint: str, others: int = DataConfig().sequence_length) -> int:
    """Tokens of a row that a run was trained on; for other weights `others`, or their positions if those are fewer."""
    weights = open_weights(checkpoint)
    length = weights.run.data.sequence_length if isinstance(weights, StoredWeights) else others
    return min(length, weights.config.max_positions)


def checked_window(checkpoint: str, length: int | None, others: int = DataConfig().sequence_length) -> int:
    """`length`, or without one `window_of`; ValueError if the model has fewer positions."""
    length, limit = (
        window_of(checkpoint, others) if length is None else length,
        model_config_of(checkpoint).max_positions,
    )
    if not 2 <= length <= limit:
        raise ValueError(f"length = {length} must be between 2 and the model's {limit} positions")
    return length


def scores_of(
    checkpoint: str,
    texts: Mapping[str, Sequence[str]],
    length: int | None,
    batch_size: int,
    slopes: str | None = None,
) -> dict[str, Score]:
    """The scores of texts under a checkpoint's model, if asked with other `slopes` (`model.slope_convention`).

    Args:
      texts: by name, each a list of documents.
    """
    length = checked_window(checkpoint, length)
    tokenizer = tokenizer_of(checkpoint)
    tokenizer.check_fits(model_config_of(checkpoint).vocab_size)
    model = load_pretrained(checkpoint)
    config = model.config if slopes is None else dataclasses.replace(model.config, slope_convention=slopes)
    _, params, bias = split_model(model)
    parts = {name: prepare_held_out(tokenizer, documents, length) for name, documents in texts.items()}
    train = TrainConfig(dtype="float32" if model.dtype == "float32" else "bfloat16", remat="none")
    return validate(make_scorer(make_compute(config, train)), params, bias, parts, batch_size)


def evaluate(checkpoint: str, text: str, length: int | None, batch_size: int, slopes: str | None = None) -> Score:
    """The score of one text; see `scores_of`."""
    return scores_of(checkpoint, {"text": [text]}, length, batch_size, slopes)["text"]


def held_out_table(command: EvaluateCommand) -> str:
    """A table of the scores of each source's held-out text; ValueError for weights whose sources are not known."""
    weights = open_weights(command.checkpoint)
    if not isinstance(weights, StoredWeights) or not {"data", LINEAGE} & weights.meta.keys():
        raise ValueError(
            f"--held-out: {command.checkpoint} is no checkpoint of a run, nor an average of some: give --text"
        )
    if isinstance(weights.run, SFTRun):
        raise ValueError(
            f"--held-out: {command.checkpoint} was fine-tuned on conversations, whose held-out loss its report shows; "
            "python -m ling_jax.post.evaluate measures its answers"
        )
    held_out = read_corpus(weights.run.data).heldout
    texts = {name: [document.text for document in documents] for name, documents in held_out.items()}
    rows = [("held-out text", "tokens", "nats per token", "bits per byte")]
    scores = scores_of(command.checkpoint, texts, command.length, command.batch_size)
    for name, score in {**scores, "all": add_scores(list(scores.values()))}.items():
        rows.append((name, f"{score.tokens:,}", f"{score.nats_per_token:.6f}", f"{score.bits_per_byte:.6f}"))
    return columns(rows)


def task_table(command: EvaluateCommand) -> str:
    """Runs the command's tasks; the table of their metrics."""
    settings = TaskSettings(
        tasks=tuple(name for names in command.tasks for name in names.split(",") if name),
        window=checked_window(command.checkpoint, command.length, sys.maxsize),
        num_fewshot=command.num_fewshot,
        limit=command.limit,
        chat=command.chat,
    )
    return run_tasks(command.checkpoint, settings, command.task_path, command.batch_size)


def check(command: EvaluateCommand) -> None:
    """Raises ValueError for flags that do not go together, or have no meaning."""
    if (command.text is not None) + bool(command.tasks) + command.held_out != 1:
        raise ValueError("give one of --text FILE, --held-out and --tasks NAMES")
    if command.text is None and command.compare_slopes:
        raise ValueError("--compare-slopes goes with --text")
    if not command.tasks and (command.task_path or command.num_fewshot is not None or command.limit or command.chat):
        raise ValueError("--task-path, --num-fewshot, --limit and --chat go with --tasks")
    for name, least in {"batch_size": 1, "limit": 1, "num_fewshot": 0}.items():
        if (value := getattr(command, name)) is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} = {value} must be at least {least}")


def compared_slopes(command: EvaluateCommand, text: str) -> str:
    """A table of the scores under each convention, the best first; ValueError for a model without linear attention."""
    config = model_config_of(command.checkpoint)
    if not any(kind.mixer == "linear" for kind in layer_kinds(config)):
        raise ValueError(f"--compare-slopes: {command.checkpoint} has no layers with linear attention")
    scores = {}
    for name in get_args(Slopes):
        scores[name] = evaluate(command.checkpoint, text, command.length, command.batch_size, name)
    rows = [("slope_convention", "nats per token", "perplexity", "bits per byte")]
    for name, score in sorted(scores.items(), key=lambda item: item[1].nats_per_token):
        own = " (its setting)" if name == config.slope_convention else ""
        rows.append(
            (name + own, f"{score.nats_per_token:.6f}", f"{score.perplexity:.4f}", f"{score.bits_per_byte:.6f}")
        )
    return columns(rows)


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(
        EvaluateCommand, args=list(argv), prog=program("python -m ling_jax.evaluate"), description=__doc__
    )
    check(command)
    if command.text is None:
        print(held_out_table(command) if command.held_out else task_table(command))
        return
    text = read_text(command.text)
    if command.compare_slopes:
        print(compared_slopes(command, text))
        return
    score = evaluate(command.checkpoint, text, command.length, command.batch_size)
    print(f"tokens          {score.tokens:,} ({score.bytes:,} bytes)")
    print(f"nats per token  {score.nats_per_token:.6f}")
    print(f"perplexity      {score.perplexity:.4f}")
    print(f"bits per byte   {score.bits_per_byte:.6f}")


def run() -> None:
    """The command `ling-evaluate`."""
    run_main(main)


if __name__ == "__main__":
    run()
