"""The cost of a training token as the batch and the number of experts grow: python -m benchmarks.scaling [--dtype ...].

The train step of bench_moe with 2 to 16 rows, and with 32 to 256 experts of which a token takes 8: each size in a
process of its own, so that none has another's memory, and in turns, so that a machine whose speed wanders slows all
alike. A turn trains on the same number of tokens whatever the size, after a step that finds what a pause left: in
training, steps follow one another. The best turn is what a token costs on an idle machine; the median is what this
machine gave. The optimizer works on weights, not on tokens: --part gradients leaves it out. Draws a picture of the best
turns; the last line is one JSON object.
"""

import dataclasses
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from benchmarks.train_step import random_batch
from ling_jax.cli import named_config, run_main
from ling_jax.config import RunConfig
from ling_jax.config.text import columns
from ling_jax.train.figures import bars_figure
from ling_jax.train.objective import step_counts
from ling_jax.train.state import TrainState, make_trainer
from ling_jax.train.step import accumulate_gradients, make_train_step

SPAWN = multiprocessing.get_context("spawn")
BATCHES, EXPERTS = (2, 4, 8, 16), (32, 64, 128, 256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and products."""
    part: Literal["step", "gradients"] = "step"
    """The whole step, or forward and backward alone."""
    rounds: int = 10
    """Turns of each size, after two steps to warm up."""
    figure: Path = Path("docs/scaling.png")
    """The PNG to draw."""


def resized(config: RunConfig, rows: int, experts: int) -> RunConfig:
    data = dataclasses.replace(config.data, global_batch_size=rows)
    return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, num_experts=experts))


def timed_step(config: RunConfig, part: str) -> Callable[[], float]:
    """Returns a function that runs one step, or a part of it, and gives its microseconds per token."""
    trainer = make_trainer(config)
    held, batch, step = [trainer.new_state()], random_batch(config), make_train_step(trainer)

    @jax.jit
    def gradients(state: TrainState, batch: Any) -> Any:
        return accumulate_gradients(trainer, state.params, state.bias, batch, step_counts(trainer.objective, batch))

    def run() -> float:
        started = time.perf_counter()
        if part == "gradients":
            jax.block_until_ready(gradients(held[0], batch))
        else:
            held[0], metrics = step(held[0], batch)
            jax.block_until_ready((held[0], metrics))
        return 1e6 * (time.perf_counter() - started) / batch["tokens"].size

    return run


def answer(line: Connection, config: RunConfig, part: str) -> None:
    """Says when it is ready, then takes a turn and tells its mean time for every True that comes."""
    run, steps = timed_step(config, part), max(BATCHES) // config.data.global_batch_size
    for _ in range(2):
        run()
    line.send(None)
    while line.recv():
        run()
        line.send(statistics.mean(run() for _ in range(steps)))


def measure(configs: dict[str, RunConfig], part: str, rounds: int) -> dict[str, list[float]]:
    """Microseconds per token of each in all its turns."""
    lines: dict[str, Connection] = {}
    for name, config in configs.items():
        lines[name], other = SPAWN.Pipe()
        SPAWN.Process(target=answer, args=(other, config, part), daemon=True).start()
        other.close()
        lines[name].recv()
        print(f"{name}: ready", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in configs}
    for _ in range(rounds):
        for name, line in lines.items():
            line.send(True)
            times[name].append(line.recv())
    for line in lines.values():
        line.send(False)
    return times


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(Command, args=list(argv), prog="python -m benchmarks.scaling", description=__doc__)
    config = named_config("bench_moe")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype=command.dtype))
    rows, experts = config.data.global_batch_size, config.model.num_experts
    turns = {
        "rows": measure({str(n): resized(config, n, experts) for n in BATCHES}, command.part, command.rounds),
        "experts": measure({str(n): resized(config, rows, n) for n in EXPERTS}, command.part, command.rounds),
    }
    result: dict[str, Any] = {"benchmark": "scaling", "part": command.part, "dtype": command.dtype}
    cells = [("size", "microseconds a token: best turn", "median")]
    for name, sizes in turns.items():
        best, median = ({n: of(times) for n, times in sizes.items()} for of in (min, statistics.median))
        cells += [(f"{n} {name}", f"{best[n]:.0f}", f"{median[n]:.0f}") for n in sizes]
        result[name] = {
            statistic: {"us_per_token": found, "most_over_least": max(found.values()) / min(found.values())}
            for statistic, found in (("best", best), ("median", median))
        }
    print(columns(cells, numbers=True))
    bars = {name: result[name]["best"]["us_per_token"] for name in turns}
    bars_figure(bars, "microseconds a token", command.figure)
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
