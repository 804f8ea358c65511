"""Scores a text: python -m ling_jax.evaluate --checkpoint DIR --text FILE

Prints nats per token, perplexity and bits per byte; every byte is scored, after a start token, in windows
that overlap by half.
"""

import dataclasses
from collections.abc import Sequence
from typing import get_args

import tyro

from ling_jax.cli import program, run_main
from ling_jax.config import DataConfig, TrainConfig, layer_kinds
from ling_jax.config.text import columns
from ling_jax.convert.load import load_pretrained
from ling_jax.convert.tokenizer import tokenizer_of
from ling_jax.convert.weights import StoredWeights, model_config_of, open_weights
from ling_jax.files.paths import at
from ling_jax.kernels.lightning import Slopes
from ling_jax.model.model import split_model
from ling_jax.train.compute import make_compute
from ling_jax.train.validate import Score, make_scorer, prepare_held_out, score_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    checkpoint: str
    """A run folder, its checkpoints/, one step of it, a HF folder, or a hub id (ORG/NAME or ORG/NAME@REVISION)."""
    text: str
    """The UTF-8 text file to score, local or in a bucket."""
    length: int | None = None
    """Tokens per window; by default those of a row that the run was trained on, of other weights 512."""
    batch_size: int = 8
    """Windows per call."""
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


def window_of(checkpoint: str) -> int:
    """Tokens of a row that a run was trained on; for other weights 512, or their positions if those are fewer."""
    weights = open_weights(checkpoint)
    data = weights.run.data if isinstance(weights, StoredWeights) else DataConfig()
    return min(data.sequence_length, weights.config.max_positions)


def evaluate(checkpoint: str, text: str, length: int | None, batch_size: int, slopes: str | None = None) -> Score:
    """The score of one text under a checkpoint's model, if asked with other `slopes` (`model.slope_convention`)."""
    if batch_size < 1:
        raise ValueError(f"--batch-size = {batch_size} must be at least 1")
    length, limit = window_of(checkpoint) if length is None else length, model_config_of(checkpoint).max_positions
    if not 2 <= length <= limit:
        raise ValueError(f"length = {length} must be between 2 and the model's {limit} positions")
    tokenizer = tokenizer_of(checkpoint)
    tokenizer.check_fits(model_config_of(checkpoint).vocab_size)
    model = load_pretrained(checkpoint)
    config = model.config if slopes is None else dataclasses.replace(model.config, slope_convention=slopes)
    _, params, bias = split_model(model)
    part = prepare_held_out(tokenizer, [text], length)
    train = TrainConfig(dtype="float32" if model.dtype == "float32" else "bfloat16", remat="none")
    scorer = make_scorer(make_compute(config, train))
    return Score(score_rows(scorer, params, bias, part.rows, batch_size), part.tokens, part.bytes)


def compared_slopes(command: EvaluateCommand) -> str:
    """A table of the scores under each convention, the best first; ValueError for a model without linear attention."""
    config = model_config_of(command.checkpoint)
    if not any(kind.mixer == "linear" for kind in layer_kinds(config)):
        raise ValueError(f"--compare-slopes: {command.checkpoint} has no layers with linear attention")
    text, scores = read_text(command.text), {}
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
    if command.compare_slopes:
        print(compared_slopes(command))
        return
    score = evaluate(command.checkpoint, read_text(command.text), command.length, command.batch_size)
    print(f"tokens          {score.tokens:,} ({score.bytes:,} bytes)")
    print(f"nats per token  {score.nats_per_token:.6f}")
    print(f"perplexity      {score.perplexity:.4f}")
    print(f"bits per byte   {score.bits_per_byte:.6f}")


def run() -> None:
    """The command `ling-evaluate`."""
    run_main(main)


if __name__ == "__main__":
    run()
