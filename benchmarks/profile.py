"""Where the time goes, by the model's parts: python -m benchmarks.profile --what decode [--batch 1], or --what train.

A trace of JAX's profiler, its operations summed by the scope that made them. The last line is one JSON object.
"""

import dataclasses
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from flax import nnx
from jax.profiler import ProfileData

from benchmarks.train_step import random_batch
from ling_jax.cli import named_config, run_main
from ling_jax.config.text import columns
from ling_jax.generate.engine import Engine, Request
from ling_jax.generate.rows import decode
from ling_jax.generate.sampling import Kinds
from ling_jax.model.model import Ling
from ling_jax.plan.count import key_of
from ling_jax.train.state import make_trainer
from ling_jax.train.step import make_train_step

PROMPT, STEPS = 128, 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    config: str = "bench_moe"
    """A configuration in configs/."""
    what: Literal["decode", "train"] = "decode"
    """Steps of greedy decoding after a prompt of 128 tokens, or of the optimizer."""
    batch: int = 1
    """With decode: rows."""


def decoding(command: Command) -> tuple[str, Callable[[], Any], int]:
    """(the compiled program's text, what runs it, steps)."""
    config = named_config(command.config).model
    model = Ling(config, rngs=nnx.Rngs(0), init_std=0.02)
    engine = Engine(model, rows=command.batch, slots=PROMPT + 4 * STEPS)
    for prompt in np.random.default_rng(0).integers(2, config.vocab_size, (command.batch, PROMPT)).tolist():
        engine.submit(Request(prompt=prompt, max_new_tokens=4 * STEPS - 1))
    engine.step(STEPS)
    arguments = (*engine.weights, engine.rows, Kinds(), np.int32(STEPS), np.bool_(False))
    return decode.lower(*arguments).compile().as_text() or "", lambda: engine.step(STEPS), STEPS


def training(command: Command) -> tuple[str, Callable[[], Any], int]:
    """As `decoding`."""
    config = named_config(command.config)
    trainer = make_trainer(config)
    batch, held = random_batch(config), [trainer.new_state()]
    step = make_train_step(trainer).lower(held[0], batch).compile()

    def run() -> None:
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready((held[0], metrics))

    for _ in range(4):  # in the first ones fresh memory costs more than the work
        run()
    return step.as_text() or "", run, 1


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
    text, run, steps = (decoding if command.what == "decode" else training)(command)
    found = re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\(.*?op_name=\"([^\"]*)\"", text, re.MULTILINE)
    scopes = {name: key_of(stack).scope for name, kind, stack in found if kind not in ("while", "call", "conditional")}
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        started = time.perf_counter()
        run()
        wall = time.perf_counter() - started
        jax.profiler.stop_trace()
        spent = by_scope(Path(folder), scopes)
    total = sum(spent.values())
    rows = [("scope", "ms a step", "share")]
    rows += [(name, f"{ns / 1e6 / steps:.3f}", f"{ns / total:.1%}") for name, ns in spent.most_common()]
    print(columns(rows, numbers=True))
    shares = {name: ns / total for name, ns in spent.most_common()}
    result = {"benchmark": "profile", **dataclasses.asdict(command), "step_ms": 1e3 * wall / steps, "shares": shares}
    print(json.dumps(result | {"operations_ms": total / 1e6 / steps}))


if __name__ == "__main__":
    run_main(main)
