"""Times that a step cannot beat, from its work and the hardware's peaks."""

from typing import Any, NamedTuple

from ling_jax.plan.count import Work
from ling_jax.plan.hardware import Wire, chip_of, peak_flops, wires_of


class Bound(NamedTuple):
    """Seconds that each resource alone would take."""

    compute: float
    hbm: float
    interconnect: float  # of the busiest dim of the torus, or the network between slices

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def by(self) -> str:
        return self._fields[self.index(self.seconds)]


def bound(work: Work, mesh: Any) -> Bound:
    """The time that `work` takes at the peaks of the devices of `mesh`, perfectly overlapped.

    A collective's bytes are shared by the dims its axes lie along, each at its links' rate. Rows that are sent from
    each device to every other travel a quarter of a ring, or a third of a line, on average.
    """
    device = mesh.devices.reshape(-1)[0]
    compute = sum(flops / peak_flops(device, dtype) for dtype, flops in work.flops.items())
    busy: dict[str, float] = {}
    for sent in work.sent:
        wires = wires_of(mesh, sent.axes)
        rate = sum(wire.bytes_per_second / _hops(sent.kind, wire) for wire in wires)
        for wire in wires:
            busy[wire.name] = busy.get(wire.name, 0.0) + sent.bytes / rate
    return Bound(compute, work.hbm_bytes / chip_of(device).hbm_bytes_per_second, max(busy.values(), default=0.0))


def _hops(kind: str, wire: Wire) -> float:
    """Links that a byte takes on average: one where each device passes on what the next one needs too."""
    if kind not in ("all-to-all", "ragged-all-to-all") or wire.is_switched:
        return 1.0
    return max(1.0, wire.ring / (4 if wire.is_ring else 3))
