"""Prefill and a step of decoding, compiled for TPUs that are not here."""

import json
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ling_jax.config import MESH_AXES, MeshConfig, ModelConfig, count_params
from ling_jax.config.text import columns
from ling_jax.generate.cache import cache_bytes
from ling_jax.generate.rows import DecodingRows, advance, empty_rows, one_step
from ling_jax.generate.sampling import Kinds, empty_options
from ling_jax.generate.serving import Program, in_fp8, row_specs, serving_model
from ling_jax.model.model import Ling, abstract_model, param_specs, split_model
from ling_jax.parallel.mesh import make_mesh
from ling_jax.plan.count import Count, count_step
from ling_jax.plan.hardware import chip_of
from ling_jax.plan.memory import Memory, memory_of, memory_of_error
from ling_jax.plan.plan import platform_of, shard_bytes, topology_devices
from ling_jax.plan.report import gb, mesh_text, scopes_table
from ling_jax.plan.roofline import Bound, bound

STOPS = 8


@dataclass(frozen=True)
class Call:
    """One call of a program; bytes and work are per device."""

    name: str  # "prefill" or "decode"
    tokens: int  # that all devices run in it
    count: Count
    memory: Memory
    compile_s: float


@dataclass(frozen=True)
class ServingPlan:
    model: ModelConfig
    split: MeshConfig
    topology: str
    mesh: Any
    rows: int
    slots: int
    dtype: str
    fp8: bool
    weights: float  # bytes of a device's weights that a decoding step reads
    cache: float  # bytes of a device's cache
    calls: list[Call]

    def bound(self, call: Call) -> Bound:
        return bound(call.count.total(), self.mesh)

    @property
    def fits(self) -> bool:
        return all(call.memory.fits for call in self.calls)

    def to_json(self) -> str:
        found: dict[str, Any] = {
            "topology": self.topology,
            "devices": self.mesh.devices.size,
            "mesh": {axis: getattr(self.split, axis) for axis in MESH_AXES if getattr(self.split, axis) > 1},
            "batch_size": self.rows,
            "context_length": self.slots,
            "dtype": self.dtype,
            "fp8_weights": self.fp8,
            "params_total": count_params(self.model).total,
            "weight_bytes_read_per_device": self.weights,
            "cache_bytes_per_device": self.cache,
            "fits": self.fits,
        }
        for call in self.calls:
            times = self.bound(call)
            sizes = zip(("arguments", "temporaries", "peak", "hbm"), call.memory[:4], strict=True)
            found[call.name] = {
                "tokens": call.tokens,
                "bytes_per_device": {name: None if math.isinf(size) else int(size) for name, size in sizes},
                "hbm_bytes_per_device": call.count.total().hbm_bytes,
                "roofline_seconds": {**times._asdict(), "step": times.seconds},
                "collective_seconds_per_layer": times.interconnect / self.model.num_hidden_layers,
                "tokens_per_second": call.tokens / times.seconds,
                "compile_s": call.compile_s,
            }
        return json.dumps(found)


def make_serving_plan(
    model: ModelConfig,
    split: MeshConfig,
    topology: str,
    *,
    rows: int,
    slots: int,
    chunk: int = 512,
    dtype: str,
    fp8: bool = False,
) -> ServingPlan:
    """Traces, counts and compiles both programs as `generate.engine` runs them: greedy, without drafts.

    Args:
      rows: requests side by side; the cache has room for whole batch shards of them.
      slots: tokens of each, prompt and answer.
      chunk: tokens of a prompt that are run at once, of one row on each batch shard.
      dtype: of weights, cache and computation.  fp8: matrices of attention and FFNs as FP8 blocks.
    Raises:
      ValueError: for a topology that is none, a chip without figures, or a mesh that does not fit.
    """
    split.check(model)
    mesh = make_mesh(split, topology_devices(topology, 1))
    served = serving_model(abstract_model(model, mesh=split, dtype=dtype, param_dtype=dtype))
    graph, params, bias = split_model(served)
    program = Program(graph, mesh)
    asked, rows = rows, -(-rows // program.batch_shards) * program.batch_shards
    make = partial(empty_rows, config=model, batch=rows, slots=slots, stops=STOPS, drafts=0, routing=False)
    state = jax.eval_shape(partial(make, dtype=jnp.dtype(dtype), tensor=split.tensor), empty_options(rows))

    def placed(tree: Any, specs: Any) -> Any:
        def place(a: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(lambda spec, part: jax.tree.map(lambda a: place(a, spec), part), specs, tree)

    bias = placed(bias, jax.tree.map(lambda _: PartitionSpec(), bias))
    if fp8:
        served.mesh.check_fp8(served.config)
        params = jax.eval_shape(partial(in_fp8, model), params)
    arguments = placed(params, param_specs(served)), bias, placed(state, row_specs(state))
    calls = []
    for name, tokens in {"prefill": chunk * program.batch_shards, "decode": asked}.items():
        f = partial(_prefill, chunk) if name == "prefill" else partial(one_step, kinds=Kinds())
        step = jax.jit(partial(program, f), donate_argnums=(2,)).trace(*arguments)
        calls.append(_call(name, step, arguments, tokens, program, model))
    weights = _weights_read(arguments[0], _experts_read(model, asked))
    held = cache_bytes(model, rows, slots, jnp.dtype(dtype)) / program.batch_shards
    held /= min(split.tensor, model.num_key_value_heads)
    return ServingPlan(model, split, topology, mesh, rows, slots, dtype, fp8, weights, held, calls)


def _prefill(chunk: int, model: Ling, rows: DecodingRows) -> DecodingRows:
    """A chunk of one row's prompt on each device."""
    first = jnp.zeros(1, jnp.int32)
    return rows.with_rows(first, advance(model, rows.of(first), chunk, Kinds()))


def _experts_read(model: ModelConfig, tokens: int) -> float:
    """The share of experts that some of `tokens` tokens chooses, if all are equally likely."""
    if not model.num_experts:
        return 0.0
    return 1 - (1 - model.num_experts_per_tok / model.num_experts) ** tokens


def _weights_read(params: Any, share: float) -> float:
    """Bytes per device: all but the embedding table, and of the experts those chosen."""
    total = 0.0
    for path, a in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        (size,) = shard_bytes(a)
        if name.startswith("word_embeddings") or name.startswith("mtp"):
            continue
        total += size * (share if ".experts." in name else 1.0)
    return total


def _call(name: str, traced: Any, arguments: Any, tokens: int, program: Program, model: ModelConfig) -> Call:
    mesh = program.mesh
    assert mesh is not None
    given, returned = shard_bytes(arguments), shard_bytes(arguments[2])
    rows = -(-tokens * model.num_experts_per_tok // program.batch_shards)
    read = _experts_read(model, tokens) * model.num_experts / mesh.shape["expert"]
    platform = platform_of(mesh.devices.flat[0])
    count = count_step(traced, given, returned, dict(mesh.shape), rows, platform, experts_read=read)
    start = time.perf_counter()
    hbm = chip_of(mesh.devices.flat[0]).hbm_bytes
    try:
        memory = memory_of(traced.lower().compile(), hbm)
    except jax.errors.JaxRuntimeError as error:
        if "HbmOom" not in str(error):
            raise
        memory = memory_of_error(str(error), sum(given), hbm)
    return Call(name, tokens, count, memory, time.perf_counter() - start)


def render(plan: ServingPlan) -> str:
    """The plan for people."""
    kept = f"{plan.dtype} and FP8" if plan.fp8 else plan.dtype
    head = [
        f"{plan.topology}: {plan.mesh.devices.size} devices; mesh {mesh_text(plan.split) or 'of one device'}",
        f"{count_params(plan.model).total:,} parameters in {kept}; {plan.rows} rows of {plan.slots} tokens",
        f"a decoding step reads {gb(plan.weights)} of weights and at most {gb(plan.cache)} of cache on each device",
    ]
    rows: list[tuple[str, ...]] = [
        ("call", "tokens", "arguments", "temporaries", "HBM", "compute ms", "HBM ms", "link ms", "tokens/s")
    ]
    for call in plan.calls:
        times, m = plan.bound(call), call.memory
        figures = [f"{1e3 * seconds:,.3f}" for seconds in times]
        speed = f"{call.tokens / times.seconds:,.0f}"
        rows.append((call.name, f"{call.tokens:,}", gb(m.arguments), gb(m.temporaries), gb(m.hbm), *figures, speed))
    fits = "fits" if plan.fits else "DOES NOT FIT: more devices, a shorter --context-length or a smaller --batch-size"
    tables = [f"{call.name}\n{scopes_table(call.count, plan.mesh)}" for call in plan.calls]
    notes = "bounds, not forecasts: every resource at its peak, all overlapped, no latency of a collective"
    return "\n\n".join(["\n".join(head), columns(rows, numbers=True), *tables, f"{fits}\n{notes}"])
