"""Where the time goes, by the model's parts: python -m benchmarks.profile --what decode [--batch 1], or --what train.

A trace of JAX's profiler, its operations summed by the scope that made them. Beside each part's time stand the bytes
that it must read (of experts those that this run's tokens chose) and the FLOPs it must do, and which share that is of
what the machine does: the rate at which two threads read an array as large as the weights, and that of a float32
product of 2048^3, both measured in this run. The last line is one JSON object.
"""

import dataclasses
import json
import math
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.profiler import ProfileData

from benchmarks.train_step import random_batch
from ling_jax.cli import named_config, run_main
from ling_jax.config import RunConfig, count_params
from ling_jax.config.text import columns
from ling_jax.generate.engine import Engine, Request
from ling_jax.generate.rows import decode
from ling_jax.generate.sampling import Kinds
from ling_jax.model.model import Ling
from ling_jax.plan.count import key_of
from ling_jax.train.hardware import matmul_rate
from ling_jax.train.state import make_trainer
from ling_jax.train.step import make_train_step

PROMPT, STEPS = 128, 64
# Scopes by what is in the path of their parameters; the first that fits.
PARTS = {
    "attention": "attention", "shared_experts": "shared_expert", "experts": "experts", "gate": "router",
    "mlp": "dense_ffn",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    config: str = "bench_moe"
    """A configuration in configs/."""
    what: Literal["decode", "train"] = "decode"
    """Steps of greedy decoding after a prompt of 128 tokens, or of the optimizer."""
    batch: int = 1
    """With decode: rows."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and products, and with decode of the weights."""
    fp8: bool = False
    """With decode: matrices of attention and FFNs as FP8 blocks."""


class Need(NamedTuple):
    """The bytes and FLOPs that a part of a step cannot do without."""

    bytes: float = 0.0  # read, or with an optimizer moved
    flops: float = 0.0


class Run(NamedTuple):
    """Something to profile."""

    text: str  # of the compiled program
    run: Callable[[], Any]
    steps: int
    needs: Callable[[], dict[str, Need]]  # of a step, by scope, once it has run


def decoding(command: Command) -> Run:
    config, dtype = named_config(command.config).model, jnp.dtype(command.dtype)
    model = Ling(config, rngs=nnx.Rngs(0), init_std=0.02, dtype=dtype, param_dtype=dtype)
    engine = Engine(model, rows=command.batch, slots=PROMPT + 4 * STEPS, fp8=command.fp8, routing=True)
    for prompt in np.random.default_rng(0).integers(2, config.vocab_size, (command.batch, PROMPT)).tolist():
        engine.submit(Request(prompt=prompt, max_new_tokens=4 * STEPS - 1))
    engine.step(STEPS)
    arguments = (*engine.weights, engine.rows, Kinds(), np.int32(STEPS), np.bool_(False))
    text = decode.lower(*arguments).compile().as_text() or ""
    return Run(text, lambda: engine.step(STEPS), STEPS, lambda: _decoding_needs(engine, command, dtype.itemsize))


def _decoding_needs(engine: Engine, command: Command, width: int) -> dict[str, Need]:
    c, rows, shapes = engine.config, command.batch, dict[str, int]()
    for path, value in flatten_dict(engine.weights[1]).items():  # stacks of all layers
        for name, kind in PARTS.items() if value.ndim > 2 else ():
            if name in path:
                shapes[kind] = shapes.get(kind, 0) + math.prod(value.shape)
                break
    matrices = 1 if command.fp8 else width
    length = int(engine.rows.known_B.max())
    cached = 2 * c.num_hidden_layers * rows * (length - STEPS // 2) * c.num_key_value_heads * c.head_dim
    assert engine.rows.routing_BSLK is not None
    run = np.asarray(engine.rows.routing_BSLK)[:, length - STEPS : length - 1]
    chosen = np.mean([[len(np.unique(run[:, s, layer])) for layer in range(run.shape[2])] for s in range(run.shape[1])])
    scores = 2 * cached * c.num_attention_heads // c.num_key_value_heads
    dense = {name: Need(shapes[name] * matrices, 2.0 * rows * shapes[name]) for name in ("shared_expert", "dense_ffn")}
    return dense | {
        "attention": Need(shapes["attention"] * matrices + cached * width, 2.0 * rows * shapes["attention"] + scores),
        "experts": Need(
            shapes["experts"] * matrices * chosen / c.num_experts,
            2.0 * rows * shapes["experts"] * c.num_experts_per_tok / c.num_experts,
        ),
        "router": Need(shapes["router"] * width, 2.0 * rows * shapes["router"]),
        "head": Need(c.vocab_size * c.hidden_size * width, 2.0 * rows * c.vocab_size * c.hidden_size),
    }


def training(command: Command) -> Run:
    config = named_config(command.config)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype=command.dtype))
    trainer = make_trainer(config)
    batch, held = random_batch(config), [trainer.new_state()]
    step = make_train_step(trainer).lower(held[0], batch).compile()

    def run() -> None:
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready((held[0], metrics))

    for _ in range(4):  # in the first ones fresh memory costs more than the work
        run()
    return Run(step.as_text() or "", run, 1, lambda: _training_needs(config))


def _training_needs(config: RunConfig) -> dict[str, Need]:
    """Forward once and twice as much backward; of attention's scores the half below the diagonal, and 2.5 times that
    backward; AdamW reads four arrays and writes three."""
    c, d = config.model, config.data
    tokens, moe = d.global_batch_size * d.sequence_length, c.num_hidden_layers - c.first_k_dense_replace
    heads = c.num_attention_heads * c.head_dim
    projections = c.hidden_size * (2 * heads + 2 * c.num_key_value_heads * c.head_dim)
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    weights = {
        "attention": c.num_hidden_layers * projections,
        "dense_ffn": c.first_k_dense_replace * 3 * c.hidden_size * c.intermediate_size,
        "experts": moe * c.num_experts_per_tok * expert,
        "shared_expert": moe * 3 * c.hidden_size * c.shared_intermediate_size,
        "router": moe * c.hidden_size * c.num_experts,
        "loss": c.vocab_size * c.hidden_size,
    }
    needs = {name: Need(0.0, 6.0 * tokens * count) for name, count in weights.items()}
    scores = 3.5 * 2 * c.num_hidden_layers * tokens * d.sequence_length * heads
    needs["attention"] = Need(0.0, needs["attention"].flops + scores)
    return needs | {"optimizer": Need(28.0 * count_params(c).total)}


def read_rate(size: int) -> float:
    """Bytes a second at which two threads read an array of `size` bytes, the median of nine times."""
    halves = np.array_split(np.ones(size // 4, np.float32), 2)
    times = []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(9):
            started = time.perf_counter()
            list(pool.map(lambda half: [np.dot(part, part) for part in np.array_split(half, 64)], halves))
            times.append(time.perf_counter() - started)
    return size / statistics.median(times)


def scope_of(stack: str) -> str:
    """The part of the model that made an operation."""
    return "head" if re.search(r"\bhead\b", stack) else key_of(stack).scope


def table(spent: Mapping[str, float], needs: Mapping[str, Need], reading: float, products: float) -> str:
    """The table of milliseconds a step by scope, beside what each scope needs and the machine's rates."""
    total = sum(spent.values())
    rows = [("scope", "ms a step", "share", "MB", "GB/s", "of reading", "GFLOP", "GFLOP/s", "of products")]
    for name, ms in spent.items():
        need = needs.get(name, Need())
        row = [name, f"{ms:.3f}", f"{ms / total:.1%}"]
        for amount, scale, rate in ((need.bytes, 1e6, reading), (need.flops, 1e9, products)):
            speed = 1e3 * amount / ms
            row += [f"{amount / scale:.1f}", f"{speed / 1e9:.1f}", f"{speed / rate:.0%}"] if amount else [""] * 3
        rows.append(tuple(row))
    return columns(rows, numbers=True)


def by_scope(folder: Path, scopes: dict[str, str]) -> Counter[str]:
    """Nanoseconds of all operations of a trace that the program's text knows; a loop's own are its body's."""
    spent: Counter[str] = Counter()
    for path in folder.rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    name = event.name.removeprefix("end: ").split(" ")[0]
                    if name in scopes:
                        spent[scopes[name]] += event.duration_ns
    return spent


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(Command, args=list(argv), prog="python -m benchmarks.profile", description=__doc__)
    profiled = (decoding if command.what == "decode" else training)(command)
    pattern = r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\(.*?op_name=\"([^\"]*)\""
    found = re.findall(pattern, profiled.text, re.MULTILINE)
    scopes = {name: scope_of(stack) for name, kind, stack in found if kind not in ("while", "call", "conditional")}
    weights = count_params(named_config(command.config).model).total * (
        1 if command.fp8 else jnp.dtype(command.dtype).itemsize
    )
    reading, products = read_rate(weights), matmul_rate()
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        profiled.run()
        jax.profiler.stop_trace()
        traced = by_scope(Path(folder), scopes)
    started = time.perf_counter()
    profiled.run()
    step_ms = 1e3 * (time.perf_counter() - started) / profiled.steps  # the trace takes time itself
    spent = {name: ns / 1e6 / profiled.steps for name, ns in traced.most_common()}
    needs, total = profiled.needs(), sum(spent.values())
    print(table(spent, needs, reading, products))
    read = 1e3 * sum(need.bytes for need in needs.values()) / step_ms
    done = 1e3 * sum(need.flops for need in needs.values()) / step_ms
    print(
        f"a step takes {step_ms:.2f} ms: {read / 1e9:.1f} of {reading / 1e9:.1f} GB/s ({read / reading:.0%}), "
        f"{done / 1e9:.1f} of {products / 1e9:.1f} GFLOP/s ({done / products:.0%})"
    )
    result = {"benchmark": "profile", **dataclasses.asdict(command), "step_ms": step_ms}
    result |= {"shares": {name: ms / total for name, ms in spent.items()}, "operations_ms": total}
    result |= {"read_share": read / reading, "product_share": done / products, "read_bytes_per_second": reading}
    print(json.dumps(result | {"needs": {name: need._asdict() for name, need in needs.items()}}))


if __name__ == "__main__":
    run_main(main)
