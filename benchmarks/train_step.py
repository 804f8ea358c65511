"""Tokens per second of one optimizer step: python -m benchmarks.train_step --config bench_moe [--dtype ...]

The last line of standard output is one JSON object; times are medians over `--steps` steps of random tokens.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.common import report
from ling_jax.cli import named_config, run_main
from ling_jax.config import RunConfig, train_flops_per_token
from ling_jax.train.state import make_trainer
from ling_jax.train.step import make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    config: str = "bench_moe"
    """A configuration in configs/."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and products."""
    layer_group_size: int = 0
    """Makes it a hybrid: layers of a group, all of which but the last have linear attention."""
    steps: int = 8
    """Steps to time, after two to warm up."""


def random_batch(config: RunConfig) -> dict[str, jax.Array]:
    """One document of random tokens per row."""
    rows, length = config.data.global_batch_size, config.data.sequence_length
    ids = np.random.default_rng(0).integers(2, config.model.vocab_size, (rows, length + 1), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "positions": positions}
    return {name: jnp.asarray(value) for name, value in batch.items()} | {
        "segment_ids": jnp.ones((rows, length), jnp.int32)
    }


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(Command, args=list(argv), prog="python -m benchmarks.train_step", description=__doc__)
    config = named_config(command.config)
    model = dataclasses.replace(config.model, layer_group_size=command.layer_group_size)
    config = dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, dtype=command.dtype))
    trainer = make_trainer(config)
    state, batch = trainer.new_state(), random_batch(config)
    started = time.perf_counter()
    step = make_train_step(trainer).lower(state, batch).compile()
    compile_s = time.perf_counter() - started
    times = []
    for count in range(command.steps + 2):
        started = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - started)
        print(f"step {count + 1}: {times[-1] * 1e3:.0f} ms", file=sys.stderr)
    seconds = statistics.median(times[2:])
    tokens = config.data.global_batch_size * config.data.sequence_length
    result = {
        "benchmark": "train_step",
        "config": command.config,
        "dtype": command.dtype,
        "tokens_per_second": tokens / seconds,
        "step_ms": seconds * 1e3,
        "compile_s": compile_s,
    }
    report(result, train_flops_per_token(config.model, config.data.sequence_length) * tokens, seconds)


if __name__ == "__main__":
    run_main(main)
