"""Linear attention beside softmax attention as rows grow longer: python -m benchmarks.lightning [--dtype ...] [...]

A layer's kernel alone, forward and with its gradients: lightning attention by its implementations, and softmax
attention with as many key as query heads. Every call works on the same number of tokens, in fewer rows the longer they
are; a row is one document. All calls of a length take turns in one process. Times are microseconds a token, medians of
`--rounds`: `us` by the clock, `cpu_us` the work of all threads, which tells more on a busy machine. A table goes to
standard error; the last line of standard output is one JSON object.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.grouped_matmul import take_turns
from ling_jax.cli import run_main
from ling_jax.config.text import columns
from ling_jax.kernels.attention import attention
from ling_jax.kernels.lightning import lightning, slopes_of
from ling_jax.train.figures import lengths_figure

LAYER, LAYERS = 3, 20  # whose rates of decay


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of queries, keys and values."""
    heads: int = 8
    head_dim: int = 32
    tokens: int = 8192
    """Of a call."""
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    """Of rows, at most `tokens`."""
    implementations: tuple[str, ...] = ("native", "xla")
    """Of lightning attention."""
    softmax: bool = True
    """Softmax attention beside it."""
    rounds: int = 9
    """Timed turns, after two to warm up."""
    figure: Path | None = None
    """The PNG to draw, such as docs/lightning.png."""


def calls_of(command: Command, length: int) -> dict[str, Callable[[], Any]]:
    """Everything that is timed, by "kernel, part"."""
    rows, (heads, width) = command.tokens // length, (command.heads, command.head_dim)
    rng = np.random.default_rng(0)
    q, k, v, g = (
        jnp.asarray(rng.standard_normal((rows, length, heads, width), np.float32)).astype(command.dtype)
        for _ in range(4)
    )
    segments, nothing = jnp.ones((rows, length), jnp.int32), jnp.zeros((rows, heads, width, width), jnp.float32)
    slopes, scale = jnp.asarray(slopes_of(heads, LAYER, LAYERS), jnp.float32), width**-0.5

    def linear(implementation: str, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return lightning(q, k, v, slopes, segments, nothing, scale, implementation)[0].astype(q.dtype)

    def softmax(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, segments, scale)

    def with_gradients(f: Callable[..., jax.Array], *args: jax.Array) -> Any:
        out, pull = jax.vjp(f, *args)
        return out, pull(g)

    kernels: dict[str, Callable[..., jax.Array]] = {f"linear {x}": partial(linear, x) for x in command.implementations}
    kernels |= {"softmax": softmax} if command.softmax else {}
    calls: dict[str, Callable[[], Any]] = {}
    for name, kernel in kernels.items():
        calls[f"{name}, forward"] = partial(jax.jit(kernel), q, k, v)
        calls[f"{name}, with gradients"] = partial(jax.jit(partial(with_gradients, kernel)), q, k, v)
    return calls


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(Command, args=list(argv), prog="python -m benchmarks.lightning", description=__doc__)
    if any(command.tokens % length for length in command.lengths):
        raise ValueError(f"--tokens {command.tokens} is not a multiple of each of --lengths {command.lengths}")
    times: dict[str, dict[int, dict[str, float]]] = {}
    for length in command.lengths:
        for name, value in take_turns(calls_of(command, length), command.rounds).items():
            per_token = {unit.replace("ms", "us"): 1e3 * ms / command.tokens for unit, ms in value.items()}
            times.setdefault(name, {})[length] = per_token
        print(f"{length} tokens: done", file=sys.stderr)
    for unit in ("us", "cpu_us"):
        cells = [(f"{unit} a token, rows of", *map(str, command.lengths), "last over first")]
        for name, by_length in times.items():
            found = [value[unit] for value in by_length.values()]
            cells.append((name, *(f"{x:.2f}" for x in found), f"{found[-1] / found[0]:.2f}"))
        print(columns(cells, numbers=True), file=sys.stderr)
    if command.figure:
        parts = {
            part: {
                name.split(",")[0]: {length: value["us"] for length, value in by_length.items()}
                for name, by_length in times.items()
                if name.endswith(part)
            }
            for part in ("forward", "with gradients")
        }
        lengths_figure(parts, "microseconds a token", command.figure)
    options = dataclasses.asdict(command) | {"figure": str(command.figure)}
    print(json.dumps({"benchmark": "lightning", **options, "device": jax.devices()[0].device_kind, "times": times}))


if __name__ == "__main__":
    run_main(main)
