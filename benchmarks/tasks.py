"""Evaluation tasks' requests: python -m benchmarks.tasks [--config NAME | --checkpoint DIR] [--requests 200] [...]

Log-probabilities and answers of requests together, as `evaluate --tasks` makes them, against the same compiled code
with one request at a time, in turns. Texts are pieces of Python's standard library. The last line of standard output is
one JSON object; times are medians after a round that compiles.
"""

import dataclasses
import logging
import statistics
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from flax import nnx

from benchmarks.common import compiled_programs, report
from ling_jax.cli import named_config, run_main
from ling_jax.config import count_params
from ling_jax.convert.load import load_pretrained
from ling_jax.convert.tokenizer import tokenizer_of
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.generate.tasks import TaskModel
from ling_jax.model.model import Ling

COMPILED = compiled_programs()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    config: str = "ling_tiny"
    """A configuration in configs/, with random weights and a tokenizer trained on the texts."""
    checkpoint: str | None = None
    """A run or HF folder instead."""
    requests: int = 200
    """Continuations to score, three to a context."""
    answers: int = 48
    """Prompts to answer."""
    longest: int = 60
    """Most words of a context."""
    prompt: int = 20
    """Most words of a prompt to answer."""
    new_tokens: int = 64
    """Tokens of an answer."""
    batch_size: int = 8
    """Answers that are generated side by side."""
    window: int = 512
    """Most tokens that are run at once."""
    rounds: int = 3
    """Times that each is timed."""


def in_turns(together: Callable[[], list], alone: Callable[[], list], rounds: int) -> tuple[list, list, float, float]:
    """Runs both in turns; what each gives, and their median seconds after a first round."""
    times: tuple[list[float], list[float]] = ([], [])
    found: list[list] = []
    for number in range(rounds + 1):
        found = []
        for run, mine in zip((together, alone), times, strict=True):
            begun = time.perf_counter()
            found.append(run())
            if number:
                mine.append(time.perf_counter() - begun)
    return *found, *map(statistics.median, times)


def make_requests(words: Sequence[str], command: Command) -> tuple[list[tuple[str, str]], list[tuple[str, Any]]]:
    draw = np.random.default_rng(0)

    def text(longest: int) -> str:
        start, count = draw.integers(len(words) - longest), draw.integers(1, longest + 1)
        return " ".join(words[start : start + count])

    contexts = [text(command.longest) for _ in range(-(-command.requests // 3))]
    pairs = [(contexts[i // 3], f" {text(4)}") for i in range(command.requests)]
    settings = {"until": ["no such text"], "max_gen_toks": command.new_tokens}
    return pairs, [(text(command.prompt), settings) for _ in range(command.answers)]


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(Command, args=list(argv), prog="python -m benchmarks.tasks", description=__doc__)
    texts = [path.read_text("utf-8") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    if command.checkpoint is not None:
        model, tokenizer = load_pretrained(command.checkpoint), tokenizer_of(command.checkpoint)
    else:
        model = Ling(named_config(command.config).model, rngs=nnx.Rngs(0), init_std=0.02)
        tokenizer = Tokenizer.train(texts, model.config.vocab_size)
    pairs, asked = make_requests(" ".join(texts).split(), command)
    batched, single = (TaskModel(model, tokenizer, window=command.window, rows=n) for n in (command.batch_size, 1))
    logging.getLogger("ling_jax.generate.tasks").setLevel(logging.WARNING)  # a line for each single request
    COMPILED.clear()
    begun = time.perf_counter()
    batched.loglikelihood(pairs)
    batched.generate_until(asked)
    first, programs = time.perf_counter() - begun, len(COMPILED)
    single.generate_until(asked)  # its cache and pieces of prompts are as large as the other's
    scored, scored_alone, score_s, score_alone_s = in_turns(
        lambda: batched.loglikelihood(pairs),
        lambda: [single.loglikelihood([pair])[0] for pair in pairs],
        command.rounds,
    )
    answers, answers_alone, answer_s, answer_alone_s = in_turns(
        lambda: batched.generate_until(asked),
        lambda: [single.generate_until([one])[0] for one in asked],
        command.rounds,
    )
    differences = [abs(a - b) / max(1, abs(b)) for (a, _), (b, _) in zip(scored, scored_alone, strict=True)]
    result = {
        "benchmark": "tasks",
        "model": command.checkpoint or command.config,
        **{name: getattr(command, name) for name in ("requests", "longest", "answers", "new_tokens", "batch_size")},
        "first_call_s": first,
        "compiled_programs": programs,
        "loglikelihoods_per_second": len(pairs) / score_s,
        "loglikelihood_times_alone": score_alone_s / score_s,
        "answers_per_second": len(asked) / answer_s,
        "answer_times_alone": answer_alone_s / answer_s,
        "largest_relative_difference": max(differences),
        "answers_that_differ": sum(a != b for a, b in zip(answers, answers_alone, strict=True)),
    }
    tokens = sum(len(tokenizer.encode(context + continuation)) for context, continuation in pairs)
    result["mean_tokens"] = tokens / len(pairs)
    report(result, 2.0 * count_params(model.config).active * tokens, score_s)


if __name__ == "__main__":
    run_main(main)
