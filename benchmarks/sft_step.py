"""Whether fine-tuning is as fast as pre-training: python -m benchmarks.sft_step [--config bench_moe] [--rounds 5]

One program is run on rows of text and on packed conversations of the same length, in turns and in one process: the
tokens per second of each, padding not counted, and what share of the rows is no padding. The last line of standard
output is one JSON object.
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import tyro

from benchmarks.common import report
from ling_jax.cli import named_config, run_main
from ling_jax.config import DataSource, SFTConfig, SFTRun, train_flops_per_token
from ling_jax.data.pipeline import DataBatch
from ling_jax.parallel.mesh import place_batch
from ling_jax.post.sft import open_conversations
from ling_jax.train.feed import open_documents
from ling_jax.train.state import TrainState, make_trainer
from ling_jax.train.step import make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    config: str = "bench_moe"
    """A configuration in configs/; its rows are made 512 tokens long."""
    rounds: int = 5
    """Times that each kind of rows has its turn."""
    steps: int = 6
    """Steps of a turn."""
    length: int = 512
    """Tokens of a row."""


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(Command, args=list(argv), prog="python -m benchmarks.sft_step", description=__doc__)
    found = named_config(command.config)
    data = dataclasses.replace(found.data, sequence_length=command.length)
    run = dataclasses.replace(found, data=data)
    tuned = SFTRun(
        model=run.model, optimizer=run.optimizer, schedule=run.schedule, train=run.train,
        data=dataclasses.replace(data, sources=(DataSource(path="sums"),)), sft=SFTConfig(task_rows=40_000, epochs=0),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        documents = open_documents(run, None, folder, None, None)
        conversations = open_conversations(tuned, folder, f"{folder}/tuned", None, None)
    here = range(data.global_batch_size)
    batches = {
        "pre-training": documents.reading(run, 0, None, here).batches(None),
        "fine-tuning": conversations.reading(tuned, 0, None, here).batches(None),
    }
    trainer = make_trainer(run)
    step, state = make_train_step(trainer), trainer.new_state()
    rates: dict[str, list[float]] = {name: [] for name in batches}
    for number in range(command.rounds + 1):
        for name, source in batches.items():
            state, rate = turn(trainer, step, state, source, command.steps)
            if number:  # the first one compiles
                rates[name].append(rate)
                print(f"round {number}, {name}: {rate:,.0f} tokens/s", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    result = {
        "benchmark": "sft_step", "config": command.config, "tokens_per_second": medians["fine-tuning"],
        "ratio": medians["fine-tuning"] / medians["pre-training"], "full": conversations.packed.fullness(),
        "median": medians, "least": {name: min(values) for name, values in rates.items()},
        "most": {name: max(values) for name, values in rates.items()},
    }  # fmt: skip
    report(result, train_flops_per_token(run.model, command.length) * medians["fine-tuning"], 1.0)


def turn(trainer, step, state: TrainState, source: Iterator[DataBatch], steps: int) -> tuple[TrainState, float]:
    """The state after some steps, and the tokens that they took a second, from the reading of rows on."""
    fields, rows = trainer.objective.fields, trainer.config.data.global_batch_size
    tokens, begun = 0, time.perf_counter()
    for _ in range(steps):
        arrays = next(source).arrays
        tokens += int((arrays["segment_ids"] > 0).sum())
        batch = place_batch(trainer.compute.mesh, arrays, fields, np.arange(rows), rows)
        state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    return state, tokens / (time.perf_counter() - begun)


if __name__ == "__main__":
    run_main(main)
