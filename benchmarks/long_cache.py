"""Decoding speed at the end of a long context: python -m benchmarks.long_cache [--model.layer-group-size 4] [...]

Two models decode side by side in turns, the one that the flags describe and its like whose every layer is softmax; the
states of both are random numbers, as of rows that are `--context` tokens long. A table of medians and of their spread
comes first: steps of decoding, whole; the softmax layers' attention alone, over all of its layers' keys and values in
turn; and np.copyto of an array of 256 MB. The last line of standard output is one JSON object.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks.common import report
from ling_jax.cli import FLAGS, named_config, run_main
from ling_jax.config import ModelConfig, count_params
from ling_jax.config.text import columns
from ling_jax.generate.engine import Engine
from ling_jax.generate.rows import DecodingRows, decode
from ling_jax.generate.sampling import Kinds
from ling_jax.generate.states import KeysAndValues
from ling_jax.kernels.attention import cached_attention
from ling_jax.model.model import Ling

COPIED = 1 << 28  # bytes
MODEL = dataclasses.replace(
    named_config("bench_moe").model, num_hidden_layers=8, layer_group_size=4, max_position_embeddings=1 << 20
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    model: ModelConfig = dataclasses.field(default_factory=lambda: MODEL)
    """bench_moe's widths, 8 layers, of which every fourth is softmax."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights, computation and the cache."""
    batch: int = 8
    """Rows decoded together."""
    context: int = 16384
    """Tokens that each row has."""
    steps: int = 8
    """Steps timed at once."""
    rounds: int = 5
    """Each measures all once, after a round to compile."""


def filled(rows: DecodingRows, context: int, vocab: int) -> DecodingRows:
    """Rows of `context` tokens, the last of which is to be run next; states are random, and hold all before it."""
    held = jnp.full_like(rows.known_B, context - 1)

    def random(path: Any, a: jax.Array) -> jax.Array:
        if not jnp.issubdtype(a.dtype, jnp.floating):  # how many tokens a state stands for, or the number of a layer
            return jnp.full_like(a, context - 1) if a.ndim else a
        return jax.random.normal(jax.random.key(hash(jax.tree_util.keystr(path)) % 1000), a.shape, a.dtype)

    kinds = jax.jit(lambda kinds: jax.tree.map_with_path(random, kinds), donate_argnums=0)(rows.cache.kinds)
    return rows._replace(
        cache=dataclasses.replace(rows.cache, kinds=kinds, length_B=held),
        tokens_BS=jax.random.randint(jax.random.key(0), rows.tokens_BS.shape, 2, vocab, jnp.int32),
        known_B=held + 1,
        limit_B=jnp.full_like(held, rows.tokens_BS.shape[1]),
        active_B=jnp.ones_like(rows.active_B),
    )


class Side(NamedTuple):
    """A model, and what is measured of it."""

    config: ModelConfig
    step: Callable[[], None]
    attend: Callable[[], None]
    bytes_read: int  # by `attend`, and by a step


def softmax_states(rows: DecodingRows) -> list[KeysAndValues]:
    return [states for states in rows.cache.kinds.values() if isinstance(states, KeysAndValues)]


@jax.jit
def attend_everywhere(q_B1HC: jax.Array, states: list[KeysAndValues], slots_B1: jax.Array) -> jax.Array:
    """The queries' attention over each layer's keys and values, one layer's answers being the next one's queries."""
    for one in states:

        def layer(q_B1HC: jax.Array, number: jax.Array, one: KeysAndValues = one) -> tuple[jax.Array, None]:
            return cached_attention(q_B1HC, one.k_LBSGC, one.v_LBSGC, slots_B1, 1.0, layer=number), None

        q_B1HC, _ = jax.lax.scan(layer, q_B1HC, jnp.arange(one.k_LBSGC.shape[0]))
    return q_B1HC


def side_of(config: ModelConfig, command: Command) -> Side:
    dtype = jnp.dtype(command.dtype)
    model = Ling(config, rngs=nnx.Rngs(0), init_std=0.02, dtype=dtype, param_dtype=dtype)
    engine = Engine(model, rows=command.batch, slots=command.context + command.steps * (command.rounds + 2))
    engine.rows = filled(engine.rows, command.context, config.vocab_size)
    q_B1HC = jax.random.normal(
        jax.random.key(1), (command.batch, 1, config.num_attention_heads, config.head_dim), dtype
    )
    slots_B1 = jnp.full((command.batch, 1), command.context - 1, jnp.int32)

    def step() -> None:
        rows = decode(*engine.weights, engine.rows, Kinds(), np.int32(command.steps), np.bool_(False))
        engine.rows = jax.block_until_ready(rows)

    def attend() -> None:
        jax.block_until_ready(attend_everywhere(q_B1HC, softmax_states(engine.rows), slots_B1))

    layers = sum(one.k_LBSGC.shape[0] for one in softmax_states(engine.rows))
    each = command.batch * command.context * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return Side(config, step, attend, 2 * layers * each)


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(sides: dict[str, Side], command: Command) -> dict[str, list[float]]:
    """Seconds of each round, by what took them; all are measured in turns."""
    source, target = np.ones((2, COPIED), np.uint8)
    runs: dict[str, tuple[Callable[[], object], int]] = {}
    for name, side in sides.items():
        runs[f"{name}: step"] = side.step, command.steps
        runs[f"{name}: its softmax layers"] = side.attend, 1
    runs["np.copyto"] = lambda: np.copyto(target, source), 1
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(command.rounds + 1):
        for name, (run, count) in runs.items():
            took = seconds(run) / count
            times[name] += [took] if number else []  # the first compiles
    return times


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(
        Command, args=list(argv), prog="python -m benchmarks.long_cache", description=__doc__, registry=FLAGS
    )
    softmax = dataclasses.replace(command.model, layer_group_size=0)
    configs = {"softmax": softmax} | ({"hybrid": command.model} if command.model.layer_group_size else {})
    sides = {name: side_of(config, command) for name, config in configs.items()}
    times = measure(sides, command)
    moved = {f"{name}: its softmax layers": side.bytes_read for name, side in sides.items()}
    moved |= {f"{name}: step": side.bytes_read for name, side in sides.items()} | {"np.copyto": 2 * COPIED}
    medians = {name: statistics.median(took) for name, took in times.items()}
    rates = {name: moved[name] / took / 1e9 for name, took in medians.items()}
    table = [("", "ms", "least", "most", "GB/s of keys and values")]
    for name, took in times.items():
        median, least, most = (f"{1e3 * x:.2f}" for x in (medians[name], min(took), max(took)))
        table.append((name, median, least, most, f"{rates[name]:.2f}"))
    print(columns(table, numbers=True))
    result = {
        "benchmark": "long_cache",
        **{name: getattr(command, name) for name in ("dtype", "batch", "context", "steps", "rounds")},
        "layer_group_size": command.model.layer_group_size,
        "seconds": times,
        "gigabytes_per_second": rates,
    }
    if "hybrid" in sides:
        pairs = zip(times["softmax: step"], times["hybrid: step"], strict=True)
        result["speedup"] = medians["softmax: step"] / medians["hybrid: step"]
        result["speedup_of_rounds"] = [slow / fast for slow, fast in pairs]
    active = count_params(softmax).active - softmax.vocab_size * softmax.hidden_size
    report(result, 2.0 * active * command.batch, medians["softmax: step"])


if __name__ == "__main__":
    run_main(main)
