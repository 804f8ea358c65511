"""A plan as text for people: what fits, which buffers are large, what bounds each scope."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ling_jax.config import MESH_AXES, MeshConfig, RunConfig
from ling_jax.config.text import columns
from ling_jax.plan.count import PHASES, Count, Work
from ling_jax.plan.plan import Plan
from ling_jax.plan.roofline import bound
from ling_jax.plan.traffic import ASSUMED, Traffic

SHARE = 0.001  # of the step: scopes below it are summed up in one row

# What to change where a step does not fit, the cheapest first: (whether it can still be done, what to say).
REMEDIES: tuple[tuple[Callable[[RunConfig], bool], str], ...] = (
    (lambda c: c.train.remat != "full", "--train.remat full: the backward pass keeps each layer's input only"),
    (lambda c: c.mesh.buffer_factor > 1, "--mesh.buffer-factor 1: smaller buffers at the experts, more rounds"),
    (lambda c: c.rows_per_device > 1, "--train.microbatches up: fewer rows at once"),
    (lambda c: not c.optimizer.eight_bit, "--optimizer.eight-bit: both moments in a quarter of their bytes"),
    (lambda c: c.train.param_dtype == "float32", "--train.param-dtype bfloat16: half of the weights' bytes"),
    (lambda c: not c.train.fp8, "--train.fp8: weights travel and wait in a byte each (docs/fp8.md)"),
    (lambda c: c.mesh.data > 1, "--mesh.fsdp up and --mesh.data down: data repeats the whole state"),
    (lambda c: True, "--mesh.context up: fewer tokens of a row on each device"),
    (lambda c: True, "a larger topology, with more --mesh.fsdp"),
)


def _moments(config: RunConfig) -> str:
    optimizer = config.optimizer
    return "moments of 8 bits" if optimizer.eight_bit else f"first moment {optimizer.mu_dtype}"


def gb(size: float) -> str:
    return "?" if math.isinf(size) else f"{size / 1e9:,.2f} GB"


def mesh_text(mesh: MeshConfig) -> str:
    return ", ".join(f"{axis} {getattr(mesh, axis)}" for axis in MESH_AXES if getattr(mesh, axis) > 1)


def render(plan: Plan) -> str:
    scopes = scopes_table(plan.count, plan.mesh)
    traffic = f"{columns(traffic_rows(plan.traffic), numbers=True)}\n{ASSUMED}"
    return "\n\n".join([_head(plan), _memory(plan), _buffers(plan), scopes, _phases(plan), _step(plan), traffic])


def _head(plan: Plan) -> str:
    c = plan.config
    rows = c.data.global_batch_size
    remat = f"remat {c.train.remat}, buffer factor {c.mesh.buffer_factor:g}, overflow in {c.mesh.overflow}"
    return "\n".join(
        [
            f"{plan.topology}: {plan.devices} devices, {plan.slices} slice(s); mesh {mesh_text(c.mesh) or 'of one'}",
            f"{plan.counts.total:,} parameters, {plan.counts.active:,} active; weights {c.train.param_dtype}, "
            f"{_moments(c)}, computation {'FP8 and ' if c.train.fp8 else ''}{c.train.dtype}",
            f"{rows} rows of {c.data.sequence_length} tokens a step in {c.train.microbatches} microbatch(es); {remat}",
        ]
    )


def _memory(plan: Plan) -> str:
    m = plan.memory
    text = columns(
        [
            ("memory of a device", ""),
            ("arguments (state and batch)", gb(m.arguments)),
            ("temporaries", gb(m.temporaries)),
            ("peak", gb(m.peak)),
            ("usable HBM", gb(m.hbm)),
        ],
        numbers=True,
    )
    if m.fits:
        return f"{text}\nfits, with {gb(m.hbm - m.peak)} left (compiled in {plan.compile_s:.0f} s)"
    over = "" if math.isinf(m.peak) else f" by {gb(m.peak - m.hbm)}"
    remedies = "\n".join(f"  {text}" for possible, text in REMEDIES if possible(plan.config))
    return f"{text}\nDOES NOT FIT{over}. Change, the cheapest first:\n{remedies}"


def _buffers(plan: Plan) -> str:
    if not plan.buffers:
        why = "the program was not made" if plan.memory.error else "this version of JAX cannot print the program"
        return f"largest buffers: not known, since {why}"
    rows = [("largest buffers", "each", "times", "made in")]
    rows += [(b.shape, gb(b.bytes), str(b.count), b.scope) for b in plan.buffers]
    return columns(rows)


def scopes_table(count: Count, mesh: Any) -> str:
    """A row for each scope: its work, the seconds each resource would take alone, and which takes the most."""
    scopes = {key.scope for key in count.work}
    works = {scope: count.total(lambda key, scope=scope: key.scope == scope) for scope in scopes}
    by_time = sorted(works.items(), key=lambda item: -bound(item[1], mesh).seconds)
    limit = SHARE * bound(count.total(), mesh).seconds
    shown = [(scope, work) for scope, work in by_time if bound(work, mesh).seconds >= limit]
    return _work_table(mesh, "scope", shown)


def _phases(plan: Plan) -> str:
    works = [(phase, plan.count.total(lambda key, phase=phase: key.phase == phase)) for phase in PHASES]
    return _work_table(plan.mesh, "phase", works)


def _work_table(mesh: Any, title: str, works: list[tuple[str, Work]]) -> str:
    rows: list[tuple[str, ...]] = [(title, "TFLOP", "HBM GB", "sent GB", "compute ms", "HBM ms", "link ms", "bound by")]
    for name, work in works:
        times = bound(work, mesh)
        figures = [work.total_flops / 1e12, work.hbm_bytes / 1e9, sum(sent.bytes for sent in work.sent) / 1e9]
        figures += [1e3 * seconds for seconds in times]
        rows.append((name, *(f"{figure:,.2f}" for figure in figures), times.by if times.seconds else "-"))
    return columns(rows, numbers=True)


def _step(plan: Plan) -> str:
    times = plan.bound
    lines = [
        f"step: at least {times.seconds:.3f} s, by {times.by} (compute {times.compute:.3f}, HBM {times.hbm:.3f}, "
        f"interconnect {times.interconnect:.3f}); at most {plan.mfu:.1%} MFU and "
        f"{plan.tokens / plan.devices / times.seconds:,.0f} tokens/s per device",
        "bounds, not forecasts: every resource at its peak and all of them overlapped, routing balanced",
    ]
    if plan.count.uncounted_loops:
        lines.append(f"{plan.count.uncounted_loops} loops of further dispatch rounds are counted as none")
    return "\n".join(lines)


def traffic_rows(traffic: Mapping[str, Traffic]) -> list[tuple[str, ...]]:
    """A head, and a row for each piece of work: what all hosts together move, and the busiest of them; the seconds that
    this takes, by bytes or by requests."""
    head = ("storage", "hosts", "read", "written", "objects", "largest", "busiest host", "seconds", "by")
    rows: list[tuple[str, ...]] = [head]
    for name, one in traffic.items():
        by, seconds = max(one.seconds.items(), key=lambda pair: pair[1])
        sizes = [gb(size) if size else "-" for size in (one.read, one.written)]
        objects = [f"{one.objects:,}", gb(one.largest)] if one.objects else ["-", "-"]
        rows.append((name, str(one.hosts), *sizes, *objects, gb(one.of_host), f"{seconds:,.0f}", by))
    return rows
