"""The TPUs that plans are made for: what their makers and their compiler say, per JAX device.

Peak FLOP/s are `train.hardware`'s. HBM bandwidth and interconnect are those of Google's TPU system pages (a link's
rate is the bidirectional bandwidth per chip, over its links, over two directions); usable HBM is what the compiler
reports as available when a program does not fit.
"""

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
    link_bytes_per_second: float  # one link, one direction
    dcn_bytes_per_second: float  # between slices, one direction
    devices: int = 1  # of a chip


CHIPS = {
    "TPU v4": Chip(30.75 * GIB, 1228e9, 50e9, 6.25e9),
    "TPU v5 lite": Chip(15.75 * GIB, 819e9, 50e9, 3.1e9),
    "TPU v5": Chip(95.73 * GIB, 2765e9, 100e9, 6.25e9),
    "TPU v6 lite": Chip(31.24 * GIB, 1638e9, 100e9, 12.5e9),
    "TPU7x": Chip(94.74 * GIB, 3690e9, 50e9, 6.25e9, devices=2),
}


def chip_of(device: Any) -> Chip:
    """Raises ValueError, with those known, for a device that this table lacks."""
    if device.device_kind not in CHIPS:
        raise ValueError(f"no figures for {device.device_kind!r}; plans are made for {', '.join(CHIPS)}")
    return CHIPS[device.device_kind]


def peak_flops(device: Any, dtype: str) -> float:
    """FLOP/s of products of `dtype`: float32 ones are made of six bfloat16 ones (Precision.HIGHEST)."""
    return PEAK_BF16_FLOPS[device.device_kind] / (6 if dtype == "float32" else 1)


@dataclass(frozen=True)
class Wire:
    """The links that a collective over some mesh axes travels on."""

    name: str  # "ici x", ..., "dcn"
    ring: int  # devices along it
    bytes_per_second: float  # that a device can send over it, both directions of a ring together
    is_ring: bool = True


def wires_of(mesh: Any, axes: tuple[str, ...]) -> list[Wire]:
    """The dims of the torus, or the network between slices, along which devices that differ only in `axes` lie.

    A dim of four or more that the axes span whole is a ring: two links. Any less is a line: one.
    """
    sub = np.moveaxis(mesh.devices, [mesh.axis_names.index(axis) for axis in axes], range(len(axes)))
    group = sub.reshape(*sub.shape[: len(axes)], -1)[..., 0].reshape(-1)
    everyone, chip = mesh.devices.reshape(-1), chip_of(group[0])
    slices = {getattr(device, "slice_index", 0) for device in group}
    if len(slices) > 1:
        return [Wire("dcn", len(slices), chip.dcn_bytes_per_second)]
    wires = []
    for dim, name in enumerate("xyz"):
        size = len({device.coords[dim] for device in group})
        if size > 1:
            whole = size == len({device.coords[dim] for device in everyone}) and size >= 4
            wires.append(Wire(f"ici {name}", size, (2 if whole else 1) * chip.link_bytes_per_second, whole))
    return wires or [Wire("on chip", len(group), 2 * chip.link_bytes_per_second)]
