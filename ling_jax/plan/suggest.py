"""A search for the settings with the best bound that fit a topology."""

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

from ling_jax.config import RunConfig
from ling_jax.config.text import columns
from ling_jax.plan.hardware import chip_of
from ling_jax.plan.plan import Plan, Step, compile_plan, topology_devices, trace_step
from ling_jax.plan.report import gb, mesh_text
from ling_jax.plan.roofline import Bound, bound

log = logging.getLogger(__name__)

LONG_ROW = 16384  # tokens from which rows are also cut over context
POLICIES = ("save_attention", "save_dispatch", "full")
BUFFERS = (1.0, 1.25, 2.0)
MOST_COMPILED = 4  # each takes minutes


class Candidate(NamedTuple):
    config: RunConfig
    bound: Bound
    floor: float  # bytes per device that it needs at the least

    @property
    def seconds(self) -> float:
        return self.bound.seconds


class Suggestion(NamedTuple):
    candidates: list[Candidate]  # by their bounds, the best first
    verdicts: list[str]  # of the first ones: what the compiler said
    best: Plan | None


def suggest(config: RunConfig, topology: str, slices: int) -> Suggestion:
    """Meshes first, then for the best of them the microbatches, remat policies and buffer factors; all by their
    bounds, a few seconds each. What could fit is then compiled, best bound first, until one does.

    The rows and tokens of a step, the model and the dtypes stay as `config` has them. `data` is the number of slices
    (more repeats the whole state), `tensor` stays 1 (it cuts the experts' narrow products).
    """
    devices = topology_devices(topology, slices)
    hbm = chip_of(devices[0]).hbm_bytes
    seen: dict[RunConfig, tuple[Candidate, Step]] = {}

    def consider(configs: Iterator[RunConfig]) -> RunConfig:
        for changed in configs:
            if changed not in seen:
                step = trace_step(changed, devices)
                one = Candidate(changed, bound(step.count.total(), step.trainer.compute.mesh), _floor(changed, step))
                seen[changed] = one, step
                log.info("%s: at least %.3f s", describe(changed), one.seconds)
        return min(seen.values(), key=lambda pair: (pair[0].floor > hbm, pair[0].seconds))[0].config

    best = consider(_meshes(config, len(devices), slices))
    best = consider(_microbatches(best))
    for _ in range(2):  # each setting once more, now that the other is chosen
        best = consider(_changed(best, train={"remat": policy}) for policy in POLICIES)
        best = consider(_changed(best, mesh={"buffer_factor": factor}) for factor in BUFFERS)
    ranked = sorted((one for one, _ in seen.values()), key=lambda one: one.seconds)
    verdicts, plan, compiled = [], None, 0
    for one in ranked:
        if plan is not None or compiled == MOST_COMPILED:
            break
        if one.floor > hbm:
            verdicts.append(f"needs {gb(one.floor)} and more")
            continue
        compiled += 1
        made = compile_plan(one.config, topology, slices, seen[one.config][1])
        plan = made if made.memory.fits else None
        verdicts.append(f"fits: {gb(made.memory.peak)}" if plan else f"does not fit: {gb(made.memory.peak)}")
    return Suggestion(ranked, verdicts, plan)


def _changed(config: RunConfig, **parts: dict[str, Any]) -> RunConfig:
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in parts.items()}
    )


def _valid(config: RunConfig, **parts: dict[str, Any]) -> list[RunConfig]:
    """The changed configuration, or none where its checks refuse it."""
    try:
        return [_changed(config, **parts)]
    except ValueError:
        return []


def _meshes(config: RunConfig, devices: int, slices: int) -> Iterator[RunConfig]:
    contexts = (1, 2, 4, 8, 16) if config.data.sequence_length >= LONG_ROW else (1,)
    for context, expert in itertools.product(contexts, (2**power for power in range(9))):
        fsdp, left = divmod(devices, slices * context * expert)
        if left or not fsdp:
            continue
        mesh = dict(data=slices, fsdp=fsdp, expert=expert, context=context, tensor=1)
        parts = config.data.global_batch_size // (slices * fsdp * expert)  # one row a device at a time
        yield from _valid(config, mesh=mesh, train={"microbatches": max(parts, 1)})


def _microbatches(config: RunConfig) -> Iterator[RunConfig]:
    for rows in (1, 2, 4, 8):
        yield from _valid(
            config, train={"microbatches": config.data.global_batch_size // config.mesh.batch_shards // rows or 1}
        )


def _floor(config: RunConfig, step: Step) -> float:
    """Bytes that no compiler can do without: the step's arguments, float32 gradients of the parameters held, and the
    layers' inputs where the device keeps them."""
    gradients = step.parameters * 4.0
    tokens = config.rows_per_device * config.data.sequence_length // config.mesh.context
    inputs = tokens * config.model.hidden_size * 2.0 * config.model.num_hidden_layers
    return step.given + gradients + (0.0 if config.train.remat == "offload" else inputs)


def describe(config: RunConfig) -> str:
    t, m = config.train, config.mesh
    return (
        f"{mesh_text(config.mesh)}; {t.microbatches} microbatch(es), remat {t.remat}, buffer factor {m.buffer_factor:g}"
    )


def flags(config: RunConfig) -> str:
    """The command-line flags of the searched settings."""
    mesh = " ".join(f"--mesh.{axis} {getattr(config.mesh, axis)}" for axis in ("data", "fsdp", "expert", "context"))
    return (
        f"{mesh} --mesh.buffer-factor {config.mesh.buffer_factor:g} --train.microbatches {config.train.microbatches} "
        f"--train.remat {config.train.remat}"
    )


def render(name: str, suggestion: Suggestion, shown: int = 20) -> str:
    rows = [("", "settings", "step at least", "by", "memory")]
    verdicts = suggestion.verdicts + ["not compiled"] * len(suggestion.candidates)
    for place, (one, verdict) in enumerate(zip(suggestion.candidates[:shown], verdicts, strict=False), 1):
        rows.append((str(place), describe(one.config), f"{one.seconds:.3f} s", one.bound.by, verdict))
    if suggestion.best is None:
        return columns(rows) + "\nnothing that was compiled fits: a larger topology, or fewer rows a step"
    head = f"{columns(rows)}\n\nThe best that fits, beside your other flags:"
    return f"{head}\npython train.py {name} {flags(suggestion.best.config)}"
