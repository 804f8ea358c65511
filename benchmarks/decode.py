"""Greedy decoding speed: python -m benchmarks.decode --config bench_moe [--dtype ...] [--batch 1] [...]

The last line of standard output is one JSON object. `tokens_per_second` is end to end, prefill included;
`step_ms` is the time of one more token, from runs of different lengths; medians of `--runs` runs.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks.common import report
from ling_jax.cli import named_config, run_main
from ling_jax.config import count_params
from ling_jax.generate.engine import generate
from ling_jax.model.model import Ling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    config: str = "bench_moe"
    """A configuration in configs/."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and computation."""
    batch: int = 1
    """Prompts decoded together."""
    prompt_len: int = 128
    """Tokens per prompt."""
    new_tokens: int = 128
    """Tokens to add to each."""
    runs: int = 3
    """Timed runs, after one to compile."""


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(Command, args=list(argv), prog="python -m benchmarks.decode", description=__doc__)
    config = named_config(command.config).model
    dtype = jnp.dtype(command.dtype)
    model = Ling(config, rngs=nnx.Rngs(0), init_std=0.02, dtype=dtype, param_dtype=dtype)
    prompts = np.random.default_rng(0).integers(2, config.vocab_size, (command.batch, command.prompt_len)).tolist()

    def seconds(new_tokens: int) -> tuple[float, float]:
        """(first call, median of the later ones)"""
        times = []
        for _ in range(command.runs + 1):
            started = time.perf_counter()
            generate(model, prompts, new_tokens)
            times.append(time.perf_counter() - started)
        return times[0], statistics.median(times[1:])

    first, whole = seconds(command.new_tokens)
    _, one = seconds(1)
    tokens = command.batch * command.new_tokens
    result = {
        "benchmark": "decode",
        "config": command.config,
        "dtype": command.dtype,
        "batch": command.batch,
        "prompt_len": command.prompt_len,
        "new_tokens": command.new_tokens,
        "tokens_per_second": tokens / whole,
        "step_ms": (whole - one) / max(command.new_tokens - 1, 1) * 1e3,
        "compile_s": first - whole,
    }
    active = count_params(config).active - config.vocab_size * config.hidden_size
    report(result, 2.0 * active * (tokens + command.batch * command.prompt_len), whole)


if __name__ == "__main__":
    run_main(main)
