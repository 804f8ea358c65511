"""Scoring of continuations: python -m benchmarks.score [--config NAME | --checkpoint DIR] [--requests 400] [...]

Requests of mixed lengths are scored together, one by one, and by `token_logprobs` as it was before it was compiled. The
last line of standard output is one JSON object; times per request are medians after a call that compiles.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import tyro
from flax import nnx

from benchmarks.common import compiled_programs, report
from ling_jax.cli import named_config, run_main
from ling_jax.config import ModelConfig, count_params
from ling_jax.convert.load import load_pretrained
from ling_jax.generate.score import score
from ling_jax.model.model import Ling, split_model
from ling_jax.train.loss import row_logprobs

Pair = tuple[list[int], list[int]]
COMPILED = compiled_programs("_scores")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    config: str = "ling_tiny"
    """A configuration in configs/, with random weights."""
    checkpoint: str | None = None
    """A run or HF folder instead."""
    requests: int = 400
    """Pairs of a context and a continuation."""
    longest: int = 300
    """Most tokens of a context; continuations have up to a tenth."""
    alone: int = 40
    """Requests that are also scored one by one."""
    eager: int = 2
    """Requests that are also scored without compiling."""
    rounds: int = 3
    """Times that each is timed."""


def make_pairs(config: ModelConfig, command: Command) -> list[Pair]:
    draw = np.random.default_rng(0)

    def ids(longest: int) -> list[int]:
        return draw.integers(2, config.vocab_size, draw.integers(1, longest + 1)).tolist()

    return [(ids(command.longest), ids(max(command.longest // 10, 1))) for _ in range(command.requests)]


def seconds(run: Callable[[], object], rounds: int) -> float:
    """The median of some runs after one that compiles."""
    times = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def uncompiled(model: Ling, pair: Pair) -> float:
    """A request as it was scored before: the whole row's log-probabilities, operation by operation."""
    context, continuation = pair
    tokens = np.array([context + continuation], np.int32)
    values = row_logprobs(*split_model(model), tokens, None, None, None)
    return float(np.asarray(values)[0, len(context) - 1 :].sum())


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(Command, args=list(argv), prog="python -m benchmarks.score", description=__doc__)
    if command.checkpoint is not None:
        model = load_pretrained(command.checkpoint)
    else:
        model = Ling(named_config(command.config).model, rngs=nnx.Rngs(0), init_std=0.02)
    pairs = make_pairs(model.config, command)
    begun = time.perf_counter()
    found = score(model, pairs)
    first, programs = time.perf_counter() - begun, len(COMPILED)
    together = seconds(lambda: score(model, pairs), command.rounds) / len(pairs)
    some = pairs[:: max(len(pairs) // command.alone, 1)]
    alone = seconds(lambda: [score(model, [pair]) for pair in some], command.rounds) / len(some)
    few = pairs[:: max(len(pairs) // command.eager, 1)][: command.eager]
    eager = seconds(lambda: [uncompiled(model, pair) for pair in few], 1) / len(few)
    worst = max(abs(found[pairs.index(pair)][0] - uncompiled(model, pair)) for pair in few)
    result = {
        "benchmark": "score",
        "model": command.checkpoint or command.config,
        "requests": len(pairs),
        "first_call_s": first,
        "compiled_programs": programs,
        "requests_per_second": 1 / together,
        "together_ms": together * 1e3,
        "alone_ms": alone * 1e3,
        "uncompiled_ms": eager * 1e3,
        "times_alone": alone / together,
        "times_uncompiled": eager / together,
        "largest_difference_nats": worst,
    }
    tokens = sum(len(context) + len(continuation) - 1 for context, continuation in pairs)
    report(result, 2.0 * count_params(model.config).active * tokens, together * len(pairs))


if __name__ == "__main__":
    run_main(main)
