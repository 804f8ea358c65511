"""The work of a traced step on one device: FLOPs, bytes of HBM, bytes over the mesh, by scope.

The whole step is one manual region, so its jaxpr has each device's shapes, every collective with its axes, and every
loop with its length: nothing is guessed from an optimised module, in which a loop's body stands once. What XLA drops
as dead is dropped here too. Bytes of HBM are those that must move: results of products, kernels, collectives, gathers
and reductions are written once and read by each user; elementwise work is taken to be fused into its users.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from ling_jax.kernels.work import Cost, KernelCall, cost_of

# Names of `jax.named_scope` that make up a scope's label, outermost first.
SCOPES = (
    "embedding", "mtp", "attention", "dense_ffn", "router", "plan", "dispatch", "experts", "combine",
    "shared_expert", "loss", "quantise_weights", "gather_weights", "swap_inputs_for_heads", "reduce_gradients",
    "optimizer",
)  # fmt: skip
PHASES = ("forward", "recompute", "backward", "update")
# Results that are written to HBM; all else is elementwise, a view, or too small to count.
WRITTEN = {
    "dot_general", "ragged_dot_general", "pallas_call", "gather", "scatter", "scatter-add", "sort", "top_k", "cumsum",
    "reduce_sum", "reduce_max", "reduce_min", "argmax", "concatenate",
}  # fmt: skip
SCATTERS = {"scatter", "scatter-add"}
VIEWS = {"reshape", "slice", "dynamic_slice", "squeeze", "split"}  # of which only the part is read
CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # parameters of primitives that run another jaxpr once
COLLECTIVES = {
    "all_gather": "all-gather", "reduce_scatter": "reduce-scatter", "psum": "all-reduce", "pmax": "all-reduce",
    "ppermute": "collective-permute", "all_to_all": "all-to-all", "ragged_all_to_all": "ragged-all-to-all",
}  # fmt: skip


class Key(NamedTuple):
    """Where work belongs."""

    scope: str  # named scopes joined by "/"
    phase: str  # one of PHASES


class Sent(NamedTuple):
    """Bytes that a device sends for one collective."""

    kind: str
    axes: tuple[str, ...]  # of more than one device
    bytes: float


@dataclass
class Work:
    """The work of one device in one step."""

    flops: dict[str, float] = field(default_factory=dict)  # by dtype of the operands
    hbm_bytes: float = 0.0
    sent: list[Sent] = field(default_factory=list)

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())


class Count(NamedTuple):
    work: dict[Key, Work]
    uncounted_loops: int  # loops whose length depends on the data: dispatch's further rounds, counted as none

    def total(self, wanted: Callable[[Key], bool] = lambda key: True) -> Work:
        total = Work()
        for key, work in self.work.items():
            if wanted(key):
                total.hbm_bytes += work.hbm_bytes
                total.sent += work.sent
                for dtype, flops in work.flops.items():
                    total.flops[dtype] = total.flops.get(dtype, 0.0) + flops
        return total


class Value(NamedTuple):
    """A value in a trace: the arrays in HBM that it is made of, by number, with their bytes."""

    sources: dict[int, float]
    written: bool  # whether it is itself one of them
    branch: int | None = None  # of a conditional on the platform, if it chooses one


def count_step(
    traced: jax.stages.Traced,
    given: Sequence[float],
    returned: Sequence[float],
    axis_sizes: dict[str, int],
    expected_rows: int,
    platform: str,
    experts_read: float = math.inf,
) -> Count:
    """The work of a traced step.

    Args:
      traced: of a jitted function whose work is inside one `shard_map` over all mesh axes; outside it are only
        elementwise functions of what is given and returned, and sums of them.
      given, returned: bytes per device of each argument and result, which have their whole shapes there.
      axis_sizes: devices along each mesh axis.
      expected_rows: rows of a grouped product and of a ragged exchange when the router is balanced; their arrays
        have room for more.
      experts_read: how many of a device's experts have rows; grouped products read no other's weights.
      platform: whose branch of `jax.lax.platform_dependent` is counted.
    """
    jaxpr, consts = _open(traced.jaxpr)
    jaxpr, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    assert all(used) and len(given) == len(jaxpr.invars) and len(returned) == len(jaxpr.outvars)
    counter = _Counter(axis_sizes, expected_rows, platform, experts_read)
    closed = [counter.written(float(np.asarray(c).nbytes)) for c in consts]
    outputs = counter.run(jaxpr, closed, [counter.written(size) for size in given], "", 1)
    counter.write(Key("optimizer", "update"), 1, outputs, returned)
    return Count(counter.work, counter.uncounted_loops)


def _open(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """(jaxpr, its constants), closed or not."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _bytes(v: Any) -> float:
    aval = v.aval
    shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
    return float(math.prod(shape) * getattr(dtype, "itemsize", 0))


def key_of(stack: str) -> Key:
    """The scope and phase of a name stack such as "transpose(jvp(attention))/gather_weights"."""
    names: list[str] = []
    for name in re.findall(r"\w+", stack):
        if name in SCOPES and name not in names:
            names.append(name)
    if "optimizer" in names or "reduce_gradients" in names:
        return Key("/".join(names), "update")
    if "transpose" in stack:
        return Key("/".join(names) or "other", "recompute" if "rematted_computation" in stack else "backward")
    return Key("/".join(names) or "other", "forward")


@dataclass
class _Counter:
    axis_sizes: dict[str, int]
    expected_rows: int
    platform: str
    experts_read: float
    work: dict[Key, Work] = field(default_factory=dict)
    uncounted_loops: int = 0
    numbers: int = 0

    def written(self, size: float) -> Value:
        self.numbers += 1
        return Value({self.numbers: size}, True)

    def at(self, key: Key) -> Work:
        return self.work.setdefault(key, Work())

    def write(self, key: Key, trips: float, values: Iterable[Value], sizes: Iterable[float]) -> list[Value]:
        """`values` as arrays in HBM: those that are not yet are computed from their sources and written."""
        out = []
        for value, size in zip(values, sizes, strict=True):
            if not value.written:
                self.at(key).hbm_bytes += trips * (sum(value.sources.values()) + size)
                value = self.written(size)
            out.append(value)
        return out

    def run(self, jaxpr: Any, consts: Sequence[Value], args: Sequence[Value], stack: str, trips: float) -> list[Value]:
        """Counts `jaxpr`, run `trips` times under the name stack `stack`; returns what its results are made of."""
        known: dict[Any, Value] = {}
        known |= dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))

        def read(v: Any) -> Value:
            return Value({}, True) if isinstance(v, core.Literal) else known[v]

        for eqn in jaxpr.eqns:
            name, inner = eqn.primitive.name, f"{stack}/{eqn.source_info.name_stack}"
            inputs = [read(v) for v in eqn.invars]
            if name == "platform_index":
                outputs = [Value({}, True, self._branch(eqn.params["platforms"]))]
            elif name == "cond":
                outputs = self._cond(eqn, inputs, inner, trips)
            else:
                outputs = self._eqn(eqn, name, inputs, inner, trips)
            known |= dict(zip(eqn.outvars, outputs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _branch(self, platforms: Sequence[Any]) -> int:
        named = [i for i, names in enumerate(platforms) if names is not None and self.platform in names]
        return named[0] if named else next(i for i, names in enumerate(platforms) if names is None)

    def _cond(self, eqn: Any, inputs: list[Value], stack: str, trips: float) -> list[Value]:
        branch = inputs[0].branch
        assert branch is not None, f"a conditional that does not choose by platform: {stack}"
        return self._inline(eqn.params["branches"][branch], inputs[1:], stack, trips)

    def _inline(self, jaxpr: Any, inputs: list[Value], stack: str, trips: float) -> list[Value]:
        inner, consts = _open(jaxpr)
        return self.run(inner, [self.written(float(np.asarray(c).nbytes)) for c in consts], inputs, stack, trips)

    def _eqn(self, eqn: Any, name: str, inputs: list[Value], stack: str, trips: float) -> list[Value]:
        if name == "scan":
            return self._scan(eqn, inputs, stack, trips)
        if name == "while":
            self.uncounted_loops += 1
            carry = len(eqn.outvars)
            return inputs[-carry:]
        called = [eqn.params[p] for p in CALLED if p in eqn.params and name != "pallas_call"]
        if called:
            return self._inline(called[0], inputs, f"{stack}/{eqn.params.get('name', name)}", trips)
        sizes = [_bytes(v) for v in eqn.outvars]
        if "optimizer" in key_of(stack).scope:  # outside the manual region: the shapes are of all devices
            sizes = [size / math.prod(self.axis_sizes.values()) for size in sizes]
        if name in VIEWS:
            return [self.written(size) if inputs[0].written else Value(inputs[0].sources, False) for size in sizes]
        sources = {number: size for value in inputs for number, size in value.sources.items()}
        if name in COLLECTIVES:
            self._collective(eqn, name, key_of(stack), trips)
        elif name not in WRITTEN:
            return [Value(sources, False) for _ in sizes]
        work = self.at(key_of(stack))
        if name == "gather":  # of a table, only the rows
            sources = {0: sum(sizes)}
        if name in SCATTERS and inputs[0].written:  # in place
            updates = _bytes(eqn.invars[2])
            work.hbm_bytes += trips * (2 if name == "scatter" else 3) * updates
            return [inputs[0]]
        cost = Cost(self._flops(eqn, name))
        if name == "pallas_call":
            self._materialise(eqn, inputs, key_of(stack), trips)
            cost = cost_of(self._call(eqn, stack))
        moved = sum(sources.values()) + sum(sizes) if cost.bytes is None else cost.bytes
        work.hbm_bytes += trips * moved
        for dtype, flops in cost.flops.items():
            work.flops[dtype] = work.flops.get(dtype, 0.0) + trips * flops
        return [self.written(size) for size in sizes]

    def _scan(self, eqn: Any, inputs: list[Value], stack: str, trips: float) -> list[Value]:
        """Each trip reads its part of the stacked inputs, and writes what it carries and its part of the results."""
        inner, consts = _open(eqn.params["jaxpr"])
        length, key = eqn.params["length"], key_of(stack)
        whole = self.write(key, trips, inputs, [_bytes(v) for v in eqn.invars])
        args = [
            value if v.aval.shape == outer.aval.shape else self.written(_bytes(v))
            for v, outer, value in zip(inner.invars, eqn.invars, whole, strict=True)
        ]
        closed = [self.written(float(np.asarray(c).nbytes)) for c in consts]
        outputs = self.run(inner, closed, args, stack, trips * length)
        self.write(key, trips * length, outputs, [_bytes(v) for v in inner.outvars])
        return [self.written(_bytes(v)) for v in eqn.outvars]

    def _flops(self, eqn: Any, name: str) -> dict[str, float]:
        if name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            a, out = eqn.invars[0].aval, eqn.outvars[0].aval
            return {a.dtype.name: 2.0 * math.prod(out.shape) * math.prod(a.shape[i] for i in contract)}
        if name == "ragged_dot_general":
            a, b, out = eqn.invars[0].aval, eqn.invars[1].aval, eqn.outvars[0].aval
            return {
                a.dtype.name: 2.0 * self._rows(a.shape[0]) * math.prod(b.shape[1:] if out.ndim == 2 else out.shape[1:])
            }
        return {}

    def _rows(self, room: int) -> int:
        return min(room, self.expected_rows)

    def _materialise(self, eqn: Any, inputs: list[Value], key: Key, trips: float) -> None:
        """Counts the writing of a kernel's weights that are computed from less: FP8 ones multiplied out. Others are
        taken to come as they are, with no more than a cast that XLA drops."""
        for value, v in zip(inputs, eqn.invars, strict=True):
            weight = getattr(v.aval, "ndim", 0) == 3 and not value.written
            if weight and (found := sum(value.sources.values())) < 0.9 * _bytes(v):
                self.at(key).hbm_bytes += trips * (found + _bytes(v))

    def _call(self, eqn: Any, stack: str) -> KernelCall:
        """A Pallas call, as its formula takes it."""
        operands, results = ([v.aval for v in vs if getattr(v.aval, "ndim", 0)] for vs in (eqn.invars, eqn.outvars))
        names = [str(eqn.params.get("name")), *reversed(stack.rsplit("/", 2)[-2:])]
        return KernelCall(names, stack, operands, results, self._rows, self.experts_read)

    def _collective(self, eqn: Any, name: str, key: Key, trips: float) -> None:
        named = eqn.params.get("axis_name", eqn.params.get("axes"))
        axes = tuple(axis for axis in ((named,) if isinstance(named, str) else named) if self.axis_sizes[axis] > 1)
        ranks = math.prod(self.axis_sizes[axis] for axis in axes)
        if ranks == 1:
            return
        into, out = sum(map(_bytes, eqn.invars)), sum(map(_bytes, eqn.outvars))
        away = (ranks - 1) / ranks
        if name == "ragged_all_to_all":  # operand and output have room for more than the expected rows
            operand = eqn.invars[0].aval
            into = self.expected_rows * _bytes(eqn.invars[0]) / operand.shape[0]
        sent = {
            "all_gather": away * out,
            "reduce_scatter": away * into,
            "psum": 2 * away * into,
            "pmax": 2 * away * into,
            "ppermute": into,
            "all_to_all": away * into,
            "ragged_all_to_all": away * into,
        }[name]
        self.at(key).sent.append(Sent(COLLECTIVES[name], axes, trips * sent))
