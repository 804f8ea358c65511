"""Error and speed of every GPU path, in under nine minutes: python -m benchmarks.h100 [--seconds ...] > h100.jsonl

For one NVIDIA GPU. Each line of standard output is one JSON record, written as soon as it is known: first the machine,
then every case, last `"done": true` and the cases that failed. A table for people follows on standard error.

A case is one form of a computation. Its reference is made of XLA's operations: `rel_err` is the largest difference over
the reference's largest magnitude, `rms_err` the norm of the difference over the reference's. (FP8 codes that round the
other way differ by up to 0.07 of the largest.) `ms` and what follows from it are of one layer, `of_copy` is the share
of the rate at which this GPU copies. Cases come in the order of their value. None begins after `--seconds`, and one
that fails does not end the others; but after an illegal address all fail, and their `--parts` must be run again.
`--dry` runs everything at tiny sizes, the kernels interpreted where there is no GPU.

Legend: R rows, E groups (experts), I inputs, O outputs, B rows of tokens, T queries, S keys, H query heads, G kv heads,
C head_dim.
"""

import dataclasses
import functools
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.grouped_matmul import skewed_sizes
from ling_jax.cli import named_config, run_main
from ling_jax.config import DataConfig, ModelConfig, RunConfig, count_params
from ling_jax.config.text import columns
from ling_jax.kernels import blockwise
from ling_jax.kernels.attention import attend, attention, cached_attention
from ling_jax.kernels.fp8 import BLOCK, quantise_weight
from ling_jax.kernels.grouped import grouped_product, grouped_weight_gradient, padded_rows
from ling_jax.kernels.precision import dot

WINDOW, WINDOWS, MOST_CALLS = 0.05, 5, 200  # seconds of calls that are timed together, how often, and the most calls
LONGEST_COMMAND = 180  # seconds
QUERIES = 256  # of a row, whose attention is compared
BF16 = jnp.bfloat16
REPO = Path(__file__).parents[1]

Form = Callable[..., Any]  # one implementation of a computation
Forms = dict[str, Form]
Part = Literal["ceilings", "grouped", "attention", "fp8", "steps"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    seconds: float = 520
    """No case begins later than this."""
    parts: tuple[Part, ...] = get_args(Part)
    """Parts to run, in this order."""
    dry: bool = False
    """Tiny sizes, one call each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Ling-mini's shapes: a quarter of its experts when training, all of them when decoding."""

    matrix: int = 8192
    copied: int = 2**29  # float32 numbers
    rows: int = 65536
    experts: tuple[int, int, int] = (64, 512, 2048)  # groups, outputs, inputs
    decoding_experts: int = 256
    decoding_rows: tuple[int, ...] = (8, 64, 512)
    layers: int = 8  # of decoding: more weights or caches than a GPU's own cache holds
    heads: tuple[int, int, int] = (16, 4, 128)  # query heads, kv heads, head_dim
    tokens: tuple[tuple[int, int, int], ...] = ((4, 4096, 1), (1, 32768, 1), (4, 4096, 8))  # rows, tokens, documents
    xla_tokens: int = 4096  # the gradient of 32,768 takes XLA 41 GB
    cache: tuple[int, int] = (8, 4096)  # rows, slots
    fp8: int = 4096


TINY = Sizes(
    matrix=64, copied=2**12, rows=1024, experts=(2, 128, 128), decoding_experts=8, decoding_rows=(2, 8), layers=2,
    heads=(4, 2, 32), tokens=((2, 128, 1), (1, 256, 1), (2, 128, 4)), xla_tokens=128, cache=(2, 64), fp8=256,
)  # fmt: skip


def two_layers() -> RunConfig:
    """Ling-mini with two layers."""
    run = named_config("ling_mini_2_0")
    return dataclasses.replace(run, model=dataclasses.replace(run.model, num_hidden_layers=2))


def tiny() -> RunConfig:
    model = ModelConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=1, first_k_dense_replace=0,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, moe_intermediate_size=16, max_position_embeddings=128, pad_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return RunConfig(model=model, data=DataConfig(sequence_length=32, global_batch_size=2))


OWN = {"two_layers": two_layers, "tiny": tiny}  # configurations that are not in configs/


def rounded(number: Any) -> float:
    return float(f"{number:.4g}")


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, BF16)


def errors(got: Any, want: Any) -> dict[str, float]:
    """Differences of two results, the worst of all their arrays; a ValueError if they are not finite."""
    pairs = zip(*map(jax.tree.leaves, (got, want)), strict=True)
    found = [_shares(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in pairs]
    largest, norm = np.array(found).max(0)
    if not math.isfinite(largest + norm):
        raise ValueError("the result is not finite")
    return {"rel_err": rounded(largest), "rms_err": rounded(norm)}


@jax.jit
def _shares(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.abs(a - b).max() / jnp.abs(b).max(), jnp.linalg.norm(a - b) / jnp.linalg.norm(b)


def rates(seconds: float, flops: float = 0.0, moved: float = 0.0, layers: int = 1) -> dict[str, float]:
    """Figures of a layer, from the time of all: its own FLOPs and the bytes that it must move."""
    each = {"tflops": flops * layers / seconds / 1e12, "gb_s": moved * layers / seconds / 1e9}
    return {"ms": rounded(seconds / layers * 1e3)} | {unit: rounded(rate) for unit, rate in each.items() if rate}


def seconds_of(call: Callable[[], Any], dry: bool) -> float:
    """One call's time: the median of windows of many calls. Only a window's last is waited for, so that the GPU does
    not wait for the host."""

    def window(calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls - 1):
            call()
        jax.block_until_ready(call())
        return (time.perf_counter() - started) / calls

    once = window(1)
    calls = min(max(round(WINDOW / once), 1), MOST_CALLS)
    return once if dry else statistics.median(window(calls) for _ in range(WINDOWS))


class Bench:
    """Runs cases while there is time, and keeps their records."""

    def __init__(self, command: Command):
        self.command, self.sizes = command, TINY if command.dry else Sizes()
        self.started = time.perf_counter()
        self.records: dict[str, dict[str, Any]] = {}

    def spent(self) -> float:
        return time.perf_counter() - self.started

    def say(self, **record: Any) -> None:
        print(json.dumps(record | {"at_s": round(self.spent(), 1)}), flush=True)

    def attempt(self, case: str, run: Callable[[], dict[str, Any]]) -> None:
        """Writes a case's record: what `run` returns, or why there is none."""
        try:
            record = run() if self.spent() < self.command.seconds else {"skipped": "no time left"}
        except Exception as error:
            record = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        copied = self.records.get("copy: float32", {}).get("gb_s")
        of_copy = {"of_copy": rounded(record["gb_s"] / copied)} if copied and "gb_s" in record else {}
        self.records[case] = record | of_copy
        self.say(case=case, **self.records[case])

    def compare(
        self, title: str, make: Form, reference: Form | None, forms: Forms, view: Form = lambda a: a, **work: Any
    ) -> None:
        """A case for each of `forms`.

        Args:
          make: returns the arguments of `reference` and of every form.
          view: the part of a result that is compared.
          work: see `rates`.
        """

        @functools.cache
        def setting() -> tuple[Any, Any]:
            args = make()
            return args, None if reference is None else jax.block_until_ready(view(jax.jit(reference)(*args)))

        def run(form: Form) -> dict[str, Any]:
            args, want = setting()
            started = time.perf_counter()
            program = jax.jit(form).lower(*args).compile()
            memory, compile_s = program.memory_analysis(), rounded(time.perf_counter() - started)
            found = {} if want is None else errors(view(program(*args)), want)
            found |= {"compile_s": compile_s, "temp_gb": memory and rounded(memory.temp_size_in_bytes / 1e9)}
            return rates(seconds_of(partial(program, *args), self.command.dry), **work) | found

        for name, form in forms.items():
            self.attempt(f"{title}: {name}", partial(run, form))

    def peer(self, case: str, module: str) -> Any:
        """An optional library to compare with; None, and a record that says why, where it cannot be had."""
        why = "needs a GPU"
        if jax.default_backend() == "gpu":
            try:
                return importlib.import_module(module)
            except Exception as error:
                why = f"not installed: {str(error)[:200]}"
        self.attempt(case, lambda: {"skipped": why})


def ceilings(bench: Bench) -> None:
    side, size = bench.sizes.matrix, bench.sizes.copied
    bench.compare("matmul", lambda: [normal(0, side, side)] * 2, None, {"bfloat16": jnp.matmul}, flops=2.0 * side**3)
    bench.compare("copy", lambda: [jnp.zeros(size)], None, {"float32": lambda x: x + 1}, moved=8.0 * size)


def grouped(bench: Bench) -> None:
    rows = bench.sizes.rows
    training(bench, rows, 128, ("blocked", "triton"), peers=True)
    for few in bench.sizes.decoding_rows:
        decoding(bench, few)
    training(bench, rows, 64, ("blocked", "triton"))
    training(bench, rows // 4, 128, ("ragged", "triton"))  # XLA's multiplies every row with every group


def training(bench: Bench, rows: int, block: int, names: tuple[str, ...], peers: bool = False) -> None:
    """The three products of a layer's experts. Rows past the last group hold any numbers: our forms make zeros of them,
    other libraries need not."""
    groups, outputs, inputs = bench.sizes.experts
    total, sizes_E = padded_rows(rows, groups, block), skewed_sizes(rows, groups, block)
    used = int(sizes_E.sum())

    def make():
        w = normal(1, groups, outputs, inputs)
        return normal(0, total, inputs), w, w.swapaxes(1, 2), normal(2, total, outputs), jnp.array(sizes_E)

    def forms(name: str) -> Forms:
        return {
            "product": lambda x, w, turned, g, sizes: grouped_product(x, w, sizes, block, 1, name),
            "dx": lambda x, w, turned, g, sizes: grouped_product(g, w, sizes, block, 2, name),
            "dw": lambda x, w, turned, g, sizes: grouped_weight_gradient(g, x, sizes, block, name),
        }

    flops = 2.0 * used * inputs * outputs
    references = forms("blocked") | {"dw": lambda x, w, turned, g, sizes: gradient_by_groups(g, x, sizes)}
    for part, reference in references.items():
        title = f"grouped {part}, {rows} rows, blocks of {block}"
        mine = [name for name in names if (part, name) != ("dw", "blocked")]  # which XLA compiles for minutes
        bench.compare(title, make, reference, {name: forms(name)[part] for name in mine}, flops=flops)
        if peers and part == "product":
            bench.compare(title, make, reference, product_peers(bench, title), lambda y: y[:used], flops=flops)


def gradient_by_groups(g_RO: jax.Array, x_RI: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """float32 [E, O, I], for each group from all rows."""
    rows_R, ends_E = jnp.arange(len(x_RI)), jnp.cumsum(sizes_E)

    def of_group(start, end):
        inside_R = (rows_R >= start) & (rows_R < end)
        return dot(jnp.where(inside_R[:, None], g_RO, 0), x_RI, ((0,), (0,)))

    return jax.lax.map(lambda bounds: of_group(*bounds), (ends_E - sizes_E, ends_E))


def product_peers(bench: Bench, title: str) -> Forms:
    """Functions of x [R, I], w [E, O, I], w [E, I, O], g and group sizes."""
    forms: Forms = {}
    if mgpu := bench.peer(f"{title}: mgpu", "jax.experimental.pallas.ops.gpu.ragged_dot_mgpu"):
        tiles = dict(block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=2)
        f = partial(mgpu.ragged_dot, transpose_rhs=True, **tiles)
        forms["mgpu"] = lambda x, w, turned, g, sizes, f=f: f(x, w, group_sizes=sizes)
    if tokamax := bench.peer(f"{title}: tokamax", "tokamax"):
        for name in ("mosaic", "triton"):
            f = partial(tokamax.ragged_dot, preferred_element_type=BF16, implementation=name)
            forms[f"tokamax {name}"] = lambda x, w, turned, g, sizes, f=f: f(x, turned, group_sizes=sizes)
    return forms


def decoding(bench: Bench, rows: int) -> None:
    """Rows of random experts, others in each layer; the bytes that must be moved are the chosen ones'."""
    (_, outputs, inputs), groups, layers = bench.sizes.experts, bench.sizes.decoding_experts, bench.sizes.layers
    chosen = np.random.default_rng(0).integers(0, groups, (layers, rows))
    sizes_LE = (chosen[:, :, None] == np.arange(groups)).sum(1).astype(np.int32)

    def make():
        weights = [normal(1 + layer, groups, outputs, inputs) for layer in range(layers)]
        return normal(0, rows, inputs), weights, list(jnp.array(sizes_LE))

    def through(name: str) -> Form:
        return lambda x, *stacks: [grouped_product(x, w, sizes, 1, 1, name) for w, sizes in zip(*stacks, strict=True)]

    forms = {name: through(name) for name in ("ragged", "blocked", "triton")}
    title, moved = f"decoding product, {rows} rows", 2.0 * np.count_nonzero(sizes_LE) / layers * inputs * outputs
    bench.compare(title, make, forms["ragged"], forms, moved=moved, layers=layers)


def by_formula(q_BTHC: jax.Array, k_BSGC: jax.Array, v_BSGC: jax.Array, seen_BTS: jax.Array) -> jax.Array:
    """Attention [B, T, H, C] in float32."""
    repeats = q_BTHC.shape[2] // k_BSGC.shape[2]
    q, k, v = q_BTHC.astype(jnp.float32), *(jnp.repeat(x.astype(jnp.float32), repeats, 2) for x in (k_BSGC, v_BSGC))
    einsum = partial(jnp.einsum, precision="highest")
    scores = einsum("bthc,bshc->bhts", q, k) * q.shape[-1] ** -0.5
    return einsum("bhts,bshc->bthc", jax.nn.softmax(jnp.where(seen_BTS[:, None], scores, -jnp.inf)), v)


def whole_rows(bench: Bench, rows: int, tokens: int, documents: int) -> None:
    """Training's attention. Of some queries the outputs and gradients are compared, and the gradients of keys and
    values, for which no other query has a cotangent."""
    heads, kv_heads, width = bench.sizes.heads
    places = np.arange(tokens)
    segments_BT = np.tile(1 + places * documents // tokens, (rows, 1)).astype(np.int32)
    every = max(tokens // QUERIES, 1)
    some = (slice(None), slice(every - 1, None, every))

    def make():
        q, k, v, g = (normal(i, rows, tokens, n, width) for i, n in enumerate((heads, kv_heads, kv_heads, heads)))
        return q, k, v, jnp.zeros_like(g).at[some].set(g[some]), jnp.array(segments_BT)

    def reference(q, k, v, segments):
        seen = (segments[some][:, :, None] == segments[:, None]) & (places <= places[some[1], None])
        return jnp.zeros(q.shape).at[some].set(by_formula(q[some], k, v, seen))

    def forward(f: Form) -> Form:
        return lambda q, k, v, g, segments: [f(q, k, v, segments)]

    def both(f: Form) -> Form:
        def run(q, k, v, g, segments):
            out, backward = jax.vjp(lambda q, k, v: f(q, k, v, segments), q, k, v)
            return out, *backward(g.astype(out.dtype))

        return run

    def compared(result):
        return [x[some] for x in result[:2]] + list(result[2:])

    title = f"attention, {tokens} tokens" + (f" in {documents} documents" if documents > 1 else "")
    forms = attention_forms(bench, title, tokens, documents)
    flops = 2.0 * rows * heads * tokens**2 * width / documents  # half of two products of all scores
    for part, wrap, times in (("forward", forward, 1.0), ("forward and gradients", both, 3.5)):
        wrapped = {name: wrap(f) for name, f in forms.items()}
        bench.compare(f"{title}, {part}", make, wrap(reference), wrapped, compared, flops=times * flops)


def attention_forms(bench: Bench, title: str, tokens: int, documents: int) -> Forms:
    """Functions of q, k, v and segments; of several documents ours alone."""
    scale, one = bench.sizes.heads[2] ** -0.5, documents == 1
    names = ("xla", "triton") if one and tokens <= bench.sizes.xla_tokens else ("triton",)
    forms: Forms = {name: partial(lambda name, *args: attention(*args, scale, name), name) for name in names}
    if not one:
        return forms
    if nn := bench.peer(f"{title}: cudnn", "jax.nn"):
        cudnn = partial(nn.dot_product_attention, is_causal=True, implementation="cudnn")
        forms["cudnn"] = lambda q, k, v, segments: cudnn(q, k, v)
    if tokamax := bench.peer(f"{title}: tokamax", "tokamax"):
        for name in ("mosaic", "triton"):
            f = partial(tokamax.dot_product_attention, is_causal=True, implementation=name)
            forms[f"tokamax {name}"] = lambda q, k, v, segments, f=f: f(q, k, v)
    return forms


def one_token(bench: Bench) -> None:
    """One more token's attention over full caches, a layer's after another's."""
    (heads, kv_heads, width), (rows, slots), layers = bench.sizes.heads, bench.sizes.cache, bench.sizes.layers

    def make():
        caches = [[normal(2 * i + j, rows, slots, kv_heads, width) for j in range(2)] for i in range(layers)]
        return normal(2 * layers, rows, 1, heads, width), caches

    def flash(q, k, v):
        ones = [jnp.ones((rows, n), jnp.int32) for n in (1, slots)]
        return attend(q, k, v, *ones, scale=width**-0.5, causal=False, implementation="triton").out_BTHC

    def through(f: Form) -> Form:
        return lambda q, caches: [f(q, k, v) for k, v in caches]

    reference = through(lambda q, k, v: by_formula(q, k, v, jnp.ones((rows, 1, slots), bool)))
    cached = through(lambda q, k, v: cached_attention(q, k, v, jnp.full((rows, 1), slots - 1), width**-0.5))
    title, forms = f"attention, one token after {slots}", {"cached": cached, "triton": through(flash)}
    bench.compare(title, make, reference, forms, moved=2 * 2.0 * rows * slots * kv_heads * width, layers=layers)


def attention_part(bench: Bench) -> None:
    for row in bench.sizes.tokens:
        whole_rows(bench, *row)
    one_token(bench)


def fp8(bench: Bench) -> None:
    (groups, outputs, inputs), rows, side = bench.sizes.experts, bench.sizes.rows, bench.sizes.fp8
    fp8_products(bench, f"{side} x {side} x {side}", side, None, side, side)
    fp8_products(bench, f"{rows} rows, {groups} groups", rows, groups, outputs, inputs)
    for dim in (1, 0):
        forms = {name: partial(blockwise.quantise_tiles, dim=dim, implementation=name) for name in ("xla", "triton")}
        moved = rows * inputs * (2 + 1 + 4 / BLOCK)
        bench.compare(f"quantise along dim {dim}", lambda: [normal(0, rows, inputs)], forms["xla"], forms, moved=moved)


def fp8_products(bench: Bench, title: str, rows: int, groups: int | None, outputs: int, inputs: int) -> None:
    """The three products of a layer, beside bfloat16's where all rows have one weight (`groups` None)."""
    sizes_E = None if groups is None else skewed_sizes(rows, groups, BLOCK)
    total = rows if groups is None else padded_rows(rows, groups, BLOCK)
    flops = 2.0 * (rows if sizes_E is None else int(sizes_E.sum())) * inputs * outputs

    def wide():
        w = normal(1, outputs, inputs) if groups is None else normal(1, groups, outputs, inputs)
        return normal(0, total, inputs), normal(2, total, outputs), w

    @jax.jit
    def quantised(x, g, w):
        tiles = [blockwise.quantise_tiles(a, dim, "xla") for dim in (1, 0) for a in (x, g)]
        return *tiles, quantise_weight(w), sizes_E

    def forms(name: str) -> Forms:
        return {
            "product": lambda x1, g1, x0, g0, w, sizes: blockwise.product(x1, w, sizes, 1, BF16, name),
            "dx": lambda x1, g1, x0, g0, w, sizes: blockwise.product(g1, w, sizes, 2, BF16, name),
            "dw": lambda x1, g1, x0, g0, w, sizes: blockwise.weight_gradient(g0, x0, sizes, name),
        }

    for part, reference in forms("loop").items():
        both = {name: forms(name)[part] for name in ("loop", "triton")}
        bench.compare(f"fp8 {part}, {title}", lambda: quantised(*wide()), reference, both, flops=flops)
    bf16: Forms = {
        "product": lambda x, g, w: dot(x, w, ((1,), (1,))).astype(BF16),
        "dx": lambda x, g, w: dot(g, w, ((1,), (0,))).astype(BF16),
        "dw": lambda x, g, w: dot(g, x, ((0,), (0,))),
    }
    for part, form in bf16.items() if groups is None else ():
        bench.compare(f"fp8 {part}, {title}", wide, None, {"bfloat16": form}, flops=flops)


def steps(bench: Bench) -> None:
    """Whole steps, each command in a process of its own."""
    if bench.command.dry:
        whole(bench, "train_step", "tiny", "--steps", "1")
        whole(bench, "decode", "tiny", "--prompt-len", "33", "--new-tokens", "31", "--runs", "1")
    else:
        whole(bench, "train_step", "bench_moe")
        whole(bench, "decode", "bench_moe")
        whole(bench, "decode", "two_layers")


def whole(bench: Bench, module: str, config: str, *flags: str) -> None:
    """A case: a benchmark of a configuration in configs/ or in OWN."""

    def run() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            name = config
            if config in OWN:
                name = str(Path(folder, f"{config}.py"))
                Path(name).write_text(f"from benchmarks.h100 import {config} as config\n")
            words = [sys.executable, "-m", f"benchmarks.{module}", "--config", name, "--dtype", "bfloat16", *flags]
            limit = min(LONGEST_COMMAND, bench.command.seconds - bench.spent() + 20)
            done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, timeout=limit)
            model = named_config(name).model
        if done.returncode:
            raise ValueError(f"exit code {done.returncode}: {done.stderr[-250:]}")
        result = json.loads(done.stdout.splitlines()[-1])
        weights = 2.0 * (count_params(model).active - model.vocab_size * model.hidden_size)  # bytes that a token reads
        flops, moved = (result["useful_flops"], 0.0) if module == "train_step" else (0.0, weights)
        return rates(result["step_ms"] / 1e3, flops, moved) | {"result": result}

    bench.attempt(f"{module}, {config}", run)


PARTS = {"ceilings": ceilings, "grouped": grouped, "attention": attention_part, "fp8": fp8, "steps": steps}


def table(records: dict[str, dict[str, Any]]) -> str:
    rows: list[Sequence[str]] = [("case", "ms", "TFLOP/s", "GB/s", "rel_err", "")]
    for case, record in records.items():
        figures = (f"{record[key]:.4g}" if key in record else "" for key in ("ms", "tflops", "gb_s", "rel_err"))
        rows.append((case, *figures, "FAILED" if "error" in record else "skipped" if "skipped" in record else ""))
    return columns(rows, numbers=True)


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(Command, args=list(argv), prog="python -m benchmarks.h100", description=__doc__)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the steps' processes need memory too
    bench, device, driver = Bench(command), jax.devices()[0], Path("/proc/driver/nvidia/version")
    bench.say(
        benchmark="h100",
        device=device.device_kind,
        platform=device.client.platform_version.splitlines(),
        driver=driver.read_text().splitlines()[0] if driver.exists() else None,
        jax=jax.__version__,
        **dataclasses.asdict(command),
    )
    for part in command.parts:
        PARTS[part](bench)
    of = {key: [case for case, record in bench.records.items() if key in record] for key in ("error", "skipped")}
    bench.say(done=True, cases=len(bench.records), failed=of["error"], skipped=len(of["skipped"]))
    print(table(bench.records), file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
