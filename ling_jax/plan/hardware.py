"""The TPUs and GPUs that plans are made for: what their makers and their compilers say, per JAX device.

Peak FLOP/s are `train.hardware`'s. A TPU's HBM bandwidth and interconnect are those of Google's TPU system pages (a
link's rate is the bidirectional bandwidth per chip, over its links, over two directions); usable HBM is what the
compiler reports as available when a program does not fit. A GPU's figures are those of NVIDIA's data sheets: NVLink's
rate is half of the bidirectional one, and each GPU has a network port of 400 Gbit/s (A100: 200), as in DGX systems; of
its memory JAX is taken to have 90% (XLA_PYTHON_CLIENT_MEM_FRACTION=.9).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ling_jax.train.hardware import PEAK_BF16_FLOPS

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Figures of one JAX device; a tpu7x chip is two, which share its links."""

    hbm_bytes: float  # that a program can use
    hbm_bytes_per_second: float
    link_bytes_per_second: float  # one link, one direction; of a GPU, all of its NVLinks
    dcn_bytes_per_second: float  # between slices, or hosts of GPUs, one direction
    devices: int = 1  # of a chip
    is_gpu: bool = False
    fp8_gain: int = 1  # FLOP/s of E4M3 products, over those of bfloat16


CHIPS = {
    "TPU v4": Chip(30.75 * GIB, 1228e9, 50e9, 6.25e9),
    "TPU v5 lite": Chip(15.75 * GIB, 819e9, 50e9, 3.1e9),
    "TPU v5": Chip(95.73 * GIB, 2765e9, 100e9, 6.25e9),
    "TPU v6 lite": Chip(31.24 * GIB, 1638e9, 100e9, 12.5e9),
    "TPU7x": Chip(94.74 * GIB, 3690e9, 50e9, 6.25e9, devices=2),
    "NVIDIA A100": Chip(0.9 * 80 * GIB, 2039e9, 300e9, 25e9, is_gpu=True),
    "NVIDIA H100": Chip(0.9 * 79.1 * GIB, 3352e9, 450e9, 50e9, is_gpu=True, fp8_gain=2),
    "NVIDIA H200": Chip(0.9 * 140.4 * GIB, 4800e9, 450e9, 50e9, is_gpu=True, fp8_gain=2),
    "NVIDIA B200": Chip(0.9 * 178.4 * GIB, 8000e9, 900e9, 50e9, is_gpu=True, fp8_gain=2),
}


def chip_of(device: Any) -> Chip:
    """Raises ValueError, with those known, for a device that this table lacks."""
    return CHIPS[_row(device, CHIPS)]


def _row(device: Any, table: Mapping[str, Any]) -> str:
    """The device's row; a GPU's kind names its memory too, as "NVIDIA H100 80GB HBM3" does."""
    kind = device.device_kind
    if kind not in table and kind.startswith("NVIDIA"):
        kind = next((name for name in table if kind.startswith(name)), kind)
    if kind not in table:
        raise ValueError(f"no figures for {kind!r}; plans are made for {', '.join(CHIPS)}")
    return kind


def peak_flops(device: Any, dtype: str) -> float:
    """FLOP/s of products of `dtype`. A TPU's float32 ones are made of six bfloat16 ones (Precision.HIGHEST); a GPU's
    are no matrix unit's, and take 15 times as long on an H100. E4M3 products count as bfloat16's on TPUs: their kernels
    are bounded by the vector unit."""
    peak, chip = PEAK_BF16_FLOPS[_row(device, PEAK_BF16_FLOPS)], chip_of(device)
    if dtype == "float32":
        return peak / (15 if chip.is_gpu else 6)
    return peak * chip.fp8_gain if dtype.startswith("float8") else peak


@dataclass(frozen=True)
class Wire:
    """The links that a collective over some mesh axes travels on."""

    name: str  # "ici x", ..., "nvlink", "dcn"
    ring: int  # devices along it
    bytes_per_second: float  # that a device can send over it, both directions of a ring together
    is_ring: bool = True
    is_switched: bool = False  # every device reaches every other without passing a third


def wires_of(mesh: Any, axes: tuple[str, ...]) -> list[Wire]:
    """The dims of the torus, or the network between slices, along which devices that differ only in `axes` lie.

    A dim of four or more that the axes span whole is a ring: two links. Any less is a line: one. GPUs of one host have
    NVLink, through its switch; those of several are taken to send all over the network.
    """
    sub = np.moveaxis(mesh.devices, [mesh.axis_names.index(axis) for axis in axes], range(len(axes)))
    group = sub.reshape(*sub.shape[: len(axes)], -1)[..., 0].reshape(-1)
    everyone, chip = mesh.devices.reshape(-1), chip_of(group[0])
    slices = {getattr(device, "slice_index", 0) for device in group}
    if len(slices) > 1:
        return [Wire("dcn", len(slices), chip.dcn_bytes_per_second, is_switched=True)]
    if chip.is_gpu:
        inside = len({device.process_index for device in group}) == 1
        name, rate = ("nvlink", chip.link_bytes_per_second) if inside else ("dcn", chip.dcn_bytes_per_second)
        return [Wire(name, len(group), rate, is_switched=True)]
    wires = []
    for dim, name in enumerate("xyz"):
        size = len({device.coords[dim] for device in group})
        if size > 1:
            whole = size == len({device.coords[dim] for device in everyone}) and size >= 4
            wires.append(Wire(f"ici {name}", size, (2 if whole else 1) * chip.link_bytes_per_second, whole))
    return wires or [Wire("on chip", len(group), 2 * chip.link_bytes_per_second)]
