"""The exact train step, compiled for TPUs that are not here: whether it fits, and what bounds it."""

import json
import logging
import math
import os
import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from ling_jax.config import Counts, RunConfig, count_params, train_flops_per_token
from ling_jax.parallel.mesh import BATCH_AXES
from ling_jax.plan.count import Count, count_step
from ling_jax.plan.gpu import gpu_devices, names_gpus
from ling_jax.plan.hardware import Chip, chip_of, peak_flops
from ling_jax.plan.memory import Buffer, Memory, buffers_of, memory_of, memory_of_error
from ling_jax.plan.roofline import Bound, bound
from ling_jax.plan.traffic import Traffic, traffic_of
from ling_jax.train.state import Trainer, make_trainer
from ling_jax.train.step import make_train_step

log = logging.getLogger(__name__)

BATCH = ("tokens", "targets", "positions", "segment_ids")
# libtpu asks the machine it runs on, unless told; any accelerator type serves for all topologies.
COMPILE_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-128", "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The plan of one step of `config` on a topology; figures are per JAX device."""

    config: RunConfig
    topology: str
    slices: int
    mesh: Any
    counts: Counts
    count: Count
    memory: Memory
    buffers: list[Buffer]
    traffic: dict[str, Traffic]
    compile_s: float

    @property
    def devices(self) -> int:
        return self.mesh.devices.size

    @property
    def chip(self) -> Chip:
        return chip_of(self.mesh.devices.flat[0])

    @property
    def bound(self) -> Bound:
        return bound(self.count.total(), self.mesh)

    @property
    def tokens(self) -> int:
        """Tokens of all devices in one step."""
        return self.config.data.global_batch_size * self.config.data.sequence_length

    @property
    def mfu(self) -> float:
        """Useful FLOPs over what the matrix units could do in the bound's time."""
        useful = train_flops_per_token(self.config.model, self.config.data.sequence_length) * self.tokens
        peak = peak_flops(self.mesh.devices.flat[0], "bfloat16")
        return useful / self.devices / (peak * self.bound.seconds)

    def to_json(self) -> str:
        total, seconds = self.count.total(), self.bound
        sent: dict[str, float] = {}
        for one in total.sent:
            sent[one.kind] = sent.get(one.kind, 0.0) + one.bytes
        values = {
            "topology": self.topology,
            "slices": self.slices,
            "devices": self.devices,
            "chips": self.devices // self.chip.devices,
            "params_total": self.counts.total,
            "params_active": self.counts.active,
            "bytes_per_device": {
                name: None if math.isinf(size) else int(size)
                for name, size in zip(("arguments", "temporaries", "peak", "hbm"), self.memory[:4], strict=True)
            },
            "fits": self.memory.fits,
            "buffer_factor": self.config.mesh.buffer_factor,
            "flops_per_device": total.total_flops,
            "hbm_bytes_per_device": total.hbm_bytes,
            "collective_bytes_per_device": sent,
            "roofline_seconds": {**seconds._asdict(), "step": seconds.seconds},
            "mfu_at_roofline": self.mfu,
            "tokens_per_second_per_device": self.tokens / self.devices / seconds.seconds,
            "traffic": {name: one.to_json() for name, one in self.traffic.items()},
            "compile_s": self.compile_s,
        }
        return json.dumps(values)


def topology_devices(name: str, slices: int) -> list[Any]:
    """The devices of a TPU topology such as "v5p:4x4x4", or of GPUs such as "h100:8" (see `plan.gpu`).

    Raises:
      ValueError: without the compiler for them, or for a name that it does not know.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for others cannot be read back here
    jax.config.update("jax_platforms", "cpu")  # nothing is run, and a TPU that is here is left alone
    if names_gpus(name):
        if slices > 1:
            raise ValueError(f"{name!r} of {slices} slices: GPUs have none; h100:8x4 are four hosts of eight")
        return gpu_devices(name)
    for variable, value in COMPILE_ONLY.items():
        os.environ.setdefault(variable, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices).devices)
    except Exception as error:
        hint = "such as v5p:4x4x4, v6e:16x16 or tpu7x:4x4x4; the compiler is in the package libtpu (pip install libtpu)"
        raise ValueError(
            f"no TPU topology {name!r} of {slices} slices: {str(error).splitlines()[0]}; {hint}"
        ) from error


def platform_of(device: Any) -> str:
    """The name that a branch by platform (`kernels.choose`) has for a topology's device."""
    return "tpu" if device.platform == "tpu" else "cuda"


class Step(NamedTuple):
    """A train step, traced with the shapes that a run has."""

    trainer: Trainer
    traced: jax.stages.Traced
    count: Count
    given: float  # bytes per device of its arguments
    parameters: float  # elements per device


def shard_bytes(tree: Any) -> list[float]:
    """Bytes of each array that one device holds."""
    leaves = jax.tree.leaves(tree)
    return [float(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize) for a in leaves]


def trace_step(config: RunConfig, devices: list[Any]) -> Step:
    """Traces and counts the step of a run of `config` on `devices`, with its whole batch, whatever it grows from; a few
    seconds, whatever their number."""
    data = replace(config.data, batch_ramp_from=0, batch_ramp_by=0, batch_ramp_tokens=0)
    config = replace(config, data=data)
    trainer = make_trainer(config, devices)
    state = jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        jax.eval_shape(trainer.init),
        trainer.shardings(),
    )
    shape = (config.data.global_batch_size, config.data.sequence_length)
    rows = NamedSharding(trainer.compute.mesh, PartitionSpec(BATCH_AXES))
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for name in BATCH}
    traced = make_train_step(trainer).trace(state, batch)
    given = shard_bytes((state, batch))
    metrics = [float(a.size * a.dtype.itemsize) for a in jax.tree.leaves(traced.out_info[1])]
    tokens = config.rows_per_device * config.data.sequence_length // config.mesh.context
    balanced = tokens * config.model.num_experts_per_tok
    sizes = dict(trainer.compute.mesh.shape)
    count = count_step(traced, given, shard_bytes(state) + metrics, sizes, balanced, platform_of(devices[0]))
    held = sum(math.prod(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(state.params))
    return Step(trainer, traced, count, sum(given), held)


def make_plan(config: RunConfig, topology: str, slices: int = 1) -> Plan:
    """Traces, counts and compiles the train step of `config` for a topology.

    Raises:
      ValueError: for a topology that is none, a chip without figures, or a mesh that does not fit the topology.
    """
    return compile_plan(config, topology, slices, trace_step(config, topology_devices(topology, slices)))


def compile_plan(config: RunConfig, topology: str, slices: int, step: Step) -> Plan:
    mesh = step.trainer.compute.mesh
    device = mesh.devices.flat[0]
    hbm = chip_of(device).hbm_bytes
    log.info("compiling the train step for %d %s devices, a few minutes", mesh.devices.size, device.device_kind)
    start, buffers = time.perf_counter(), []
    try:
        compiled = step.traced.lower().compile()
        memory, buffers = memory_of(compiled, hbm), buffers_of(compiled)
    except jax.errors.JaxRuntimeError as error:
        if "HbmOom" not in str(error):  # a kernel can run out of VMEM too, which is our mistake
            raise
        memory = memory_of_error(str(error), step.given, hbm)
    seconds = time.perf_counter() - start
    counts, traffic = count_params(config.model), traffic_of(step.trainer)
    return Plan(config, topology, slices, mesh, counts, step.count, memory, buffers, traffic, seconds)
