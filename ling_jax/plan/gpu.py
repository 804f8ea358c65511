"""NVIDIA GPUs that are not here, for programs to be compiled for: XLA's CUDA compiler needs a description of one, not a
GPU nor its driver."""

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from jax.experimental import topologies


class Gpu(NamedTuple):
    """A GPU as CUDA's driver describes it, where kinds differ."""

    name: str
    capability: tuple[int, int]
    processors: int
    lanes: int  # float32 units of a processor
    shared_bytes: int  # of a processor, 1,024 of them CUDA's own in each block
    l2_bytes: int
    hbm_bytes: int
    hbm_bytes_per_second: int
    ghz: float

    @property
    def description(self) -> str:
        """XLA's `GpuTargetConfigProto`, as text."""
        major, minor = self.capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_bytes}
  threads_per_core_limit: 2048
  core_count: {self.processors}
  fpus_per_core: {self.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.hbm_bytes_per_second}
  l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.ghz}
  device_memory_size: {self.hbm_bytes}
  shared_memory_per_block_optin: {self.shared_bytes - 1024}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 23 }}
runtime_version {{ major: 13 }}
device_description_str: "{self.name}"
"""


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167936, 40 << 20, 80 << 30, 2039_000_000_000, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233472, 50 << 20, 84929347584, 3352_320_000_000, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 233472, 50 << 20, 150754820096, 4800_000_000_000, 1.98),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 128, 233472, 126 << 20, 191503204352, 8000_000_000_000, 1.965),
}
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


def names_gpus(topology: str) -> bool:
    """Whether a topology such as "h100:8" is one of GPUs."""
    return topology.split(":")[0] in GPUS


def _assembler() -> bool:
    """Whether XLA finds `ptxas`: on the path, in CUDA's usual place or in NVIDIA's wheel."""
    wheels = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (wheels.submodule_search_locations or ())] if wheels else []
    places = [Path("/usr/local/cuda/bin/ptxas"), *(path for folder in folders for path in folder.glob("*/bin/ptxas"))]
    return shutil.which("ptxas") is not None or any(place.exists() for place in places)


def missing() -> str | None:
    """One sentence about what is not installed of the compiler for NVIDIA GPUs; None if it is all there."""
    if not any(importlib.util.find_spec(name) for name in PLUGINS):
        return (
            "JAX's compiler for NVIDIA GPUs is not installed (Linux on x86-64: pip install jax-cuda13-plugin "
            "jax-cuda13-pjrt, in the version of jax)"
        )
    if not _assembler():
        return "NVIDIA's assembler ptxas is not on the path (install CUDA, or pip install nvidia-cuda-nvcc nvidia-nvvm)"
    return None


def gpu_devices(name: str) -> list[Any]:
    """The devices of a topology of GPUs: "h100:8" is a host of eight, "h100:8x4" are four such hosts; so with a100,
    h200 and b200.

    Raises:
      ValueError: without the compiler, or for a name that is none.
    """
    kind, _, sizes = name.partition(":")
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", sizes)
    if kind not in GPUS or not found:
        raise ValueError(
            f"no GPU topology {name!r}; h100:8 is a host of eight GPUs, h100:8x4 are four such hosts (others: "
            f"{', '.join(kind for kind in GPUS if kind != 'h100')})"
        )
    if reason := missing():
        raise ValueError(f"no topology {name!r}: {reason}")
    shape = f"1x{found[2] or 1}x{found[1]}"  # slices, hosts of a slice, GPUs of a host
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=GPUS[kind].description, topology=shape)
    except Exception as error:
        raise ValueError(f"no topology {name!r}: {str(error).splitlines()[0]}") from error
    return list(topology.devices)
