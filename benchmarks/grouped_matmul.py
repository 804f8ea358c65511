"""The experts' grouped products by every implementation: python -m benchmarks.grouped_matmul [--dtype ...] [--rows ...]

Skewed groups; the product, its gradient for the rows and that for the weights. Beside them a batched product of equal
groups (`dense`) with the same FLOPs, decoding (few rows, one or none per group), and `lax.ragged_dot` on a small part,
since on CPU it multiplies every row with every group. All take turns in one process; times are medians of `--rounds`.
A table goes to standard error; the last line of standard output is one JSON object.

Legend: R rows, E groups, I inputs, O outputs.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.common import report
from ling_jax.cli import run_main
from ling_jax.kernels.grouped import block_rows, grouped_product, grouped_weight_gradient, padded_rows

PARTS = ("product", "dx", "dw")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of rows; weights are float32."""
    rows: int = 32768
    """Token-expert pairs."""
    groups: int = 64
    """Experts."""
    inputs: int = 256
    """Hidden size."""
    outputs: int = 128
    """Width of an expert."""
    block: int = 0
    """Rows to whose multiples groups are padded; 0: as the model does."""
    decode_rows: tuple[int, ...] = (8, 64)
    """Token-expert pairs when decoding."""
    rounds: int = 9
    """Timed turns, after two to warm up."""


def skewed_sizes(rows: int, groups: int, block: int) -> np.ndarray:
    """int32 [E]: rows of each group, the largest two to three times the mean, each padded to whole blocks."""
    rng = np.random.default_rng(0)
    share = rng.lognormal(sigma=0.4, size=groups)
    sizes = rng.multinomial(rows, share / share.sum())
    return (-(-sizes // block) * block).astype(np.int32)


def inputs_of(command: Command, rows: int, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [R, I], w [E, O, I], g [R, O]."""
    rng = np.random.default_rng(seed)
    x, w, g = (
        jnp.asarray(rng.standard_normal(shape, np.float32))
        for shape in (
            (rows, command.inputs),
            (command.groups, command.outputs, command.inputs),
            (rows, command.outputs),
        )
    )
    return x.astype(command.dtype), w, g.astype(command.dtype)


def grouped(implementation: str, x, w, g, sizes: np.ndarray, block: int) -> dict[str, Callable[[], jax.Array]]:
    """Calls of the three products."""
    product = jax.jit(partial(grouped_product, block=block, implementation=implementation), static_argnames="out_dim")
    weights = jax.jit(partial(grouped_weight_gradient, block=block, implementation=implementation))
    sizes_E = jnp.asarray(sizes)
    return {
        "product": lambda: product(x, w, sizes_E, out_dim=1),
        "dx": lambda: product(g, w, sizes_E, out_dim=2),
        "dw": lambda: weights(g, x, sizes_E),
    }


def dense(command: Command) -> dict[str, Callable[[], jax.Array]]:
    """The same FLOPs where every group has the mean number of rows."""
    x, w, g = inputs_of(command, command.rows)
    x, g = (a.reshape(command.groups, -1, a.shape[1]) for a in (x, g))
    w = w.astype(x.dtype)

    @partial(jax.jit, static_argnums=2)
    def dot(a, b, contract):
        return jax.lax.dot_general(a, b, (contract, ((0,), (0,))), preferred_element_type=jnp.float32)

    return {
        "product": lambda: dot(x, w, ((2,), (2,))).astype(x.dtype),
        "dx": lambda: dot(g, w, ((2,), (1,))).astype(x.dtype),
        "dw": lambda: dot(g, x, ((1,), (1,))),
    }


def take_turns(calls: dict[str, Callable[[], Any]], rounds: int, repeats: int = 1) -> dict[str, dict[str, float]]:
    """Milliseconds of one call each, by the clock and of all threads' work: medians."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds + 2):
        for name, call in calls.items():
            clock, work = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                jax.block_until_ready(call())
            times[name].append((time.perf_counter() - clock, time.process_time() - work))
    result = {}
    for name, rows in times.items():
        clock, work = (statistics.median(column) / repeats * 1e3 for column in zip(*rows[2:], strict=True))
        result[name] = {"ms": clock, "cpu_ms": work}
    return result


def training(command: Command) -> dict[str, dict[str, float]]:
    block = command.block or block_rows(command.rows, command.groups)
    sizes = skewed_sizes(command.rows, command.groups, block)
    arrays = inputs_of(command, padded_rows(command.rows, command.groups, block))
    calls = {"native": grouped("native", *arrays, sizes, block), "blocked": grouped("blocked", *arrays, sizes, block)}
    calls["dense"] = dense(command)
    named = {f"{part} {name}": call[part] for part in PARTS for name, call in calls.items()}
    return take_turns(named, command.rounds)


def decoding(command: Command, rows: int) -> dict[str, dict[str, float]]:
    """`rows` rows of random groups; each call's weights are others, as in a model of many layers."""
    rng = np.random.default_rng(0)
    sizes = np.bincount(rng.integers(0, command.groups, rows), minlength=command.groups).astype(np.int32)
    layers = [inputs_of(command, rows, seed) for seed in range(8)]

    def through(implementation: str) -> Callable[[], Any]:
        calls = [grouped(implementation, *arrays, sizes, 1)["product"] for arrays in layers]
        return lambda: [call() for call in calls]

    times = take_turns({name: through(name) for name in ("native", "blocked")}, command.rounds, repeats=5)
    return {name: {unit: ms / len(layers) for unit, ms in value.items()} for name, value in times.items()}


def ragged(command: Command) -> dict[str, dict[str, float]]:
    small = dataclasses.replace(command, rows=1024, groups=4)
    arrays, sizes = inputs_of(small, small.rows), np.full(small.groups, small.rows // small.groups, np.int32)
    calls = {name: grouped(name, *arrays, sizes, 64)["product"] for name in ("native", "ragged")}
    return take_turns(calls, min(command.rounds, 3))


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(Command, args=list(argv), prog="python -m benchmarks.grouped_matmul", description=__doc__)
    flops = 2.0 * command.rows * command.inputs * command.outputs
    times = training(command)
    for value in times.values():
        value["gflops"] = flops / value["ms"] / 1e6
        value["gflops_per_core"] = flops / value["cpu_ms"] / 1e6
    decode = {str(rows): decoding(command, rows) for rows in command.decode_rows}
    few = ragged(command)
    sections = {"training": times} | {f"decoding {rows} rows": value for rows, value in decode.items()}
    for title, values in (sections | {"1024 rows, 4 groups": few}).items():
        print(f"{title}, {command.dtype}", file=sys.stderr)
        for name, value in values.items():
            cells = "  ".join(f"{unit} {number:9.3f}" for unit, number in value.items())
            print(f"  {name:16s} {cells}", file=sys.stderr)
    seconds = sum(times[f"{part} native"]["ms"] for part in PARTS) / 1e3
    result = {"benchmark": "grouped_matmul", **dataclasses.asdict(command), "training": times, "decoding": decode}
    report(result | {"small": few}, 3 * flops, seconds)


if __name__ == "__main__":
    run_main(main)
