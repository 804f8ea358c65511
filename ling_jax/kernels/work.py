"""The costs of Pallas kernels. Each registers its formula beside it, by its name: a compiler's own counts are not to be
trusted for them, and a trace shows only their operands."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class KernelCall(NamedTuple):
    """A call of a kernel in a traced program.

    Attributes:
      names: the kernel's own and those of the functions around it.
      scopes: the name stack it was traced under.
      operands, results: their shapes and dtypes, scalars left out.
      rows: how many rows of a room for so many are expected to be there.
      experts_read: how many experts have rows; no other's weights are read.
    """

    names: Sequence[str]
    scopes: str
    operands: Sequence[Any]
    results: Sequence[Any]
    rows: Callable[[int], float]
    experts_read: float


class Cost(NamedTuple):
    """The cost of a call.

    Attributes:
      flops: by the operands' dtype.
      bytes: that it moves; None: every operand and result once.
    """

    flops: dict[str, float]
    bytes: float | None = None


_FORMULAS: list[tuple[re.Pattern[str], Callable[[KernelCall], Cost]]] = []


def register(names: str, formula: Callable[[KernelCall], Cost]) -> None:
    """Makes `formula` that of kernels one of whose names matches a regular expression whole."""
    _FORMULAS.append((re.compile(names), formula))


def cost_of(call: KernelCall) -> Cost:
    """The cost of a call.

    Raises:
      ValueError: for a kernel without a formula.
    """
    for pattern, formula in _FORMULAS:
        if any(pattern.fullmatch(name) for name in call.names):
            return formula(call)
    raise ValueError(f"no formula for the work of the kernel {list(call.names)}: register one beside it (kernels.work)")


def size_of(array: Any) -> float:
    """Bytes of an array, known by its shape and dtype."""
    return float(math.prod(array.shape) * array.dtype.itemsize)


def grouped(call: KernelCall, rows_first: bool = False) -> Cost:
    """A product of rows sorted by group, with the groups' weights [E, O, I] or to make their gradients: 2 R I O for the
    expected R, with one group too. Bytes: those rows, and the weights of experts that have some.

    Args:
      rows_first: the first operand of rows has R as its first dim, also to make gradients.
    """
    matrices = [a for a in call.operands if a.ndim >= 2 and a.dtype.kind != "i"]
    a, b = [m for m in matrices if m.dtype.itemsize == matrices[0].dtype.itemsize][:2]  # not FP8's scales
    out = call.results[0]
    room, wide = (b.shape[0], out.shape[1:]) if b.ndim == 2 else (a.shape[0], b.shape[1:])
    arrays = [a for a in (*call.operands, *call.results) if a.ndim >= 2]
    of_rows = [a for a in arrays if a.ndim == 2 or a.shape[1] == 1]
    operands = [a for a in call.operands if a.ndim >= 2 and (a.ndim == 2 or a.shape[1] == 1)]
    total = operands[0 if rows_first else -1].shape[0]  # megablox's first operand is transposed to make gradients
    weights = sum(
        min(1.0, call.experts_read / a.shape[0]) * size_of(a) for a in arrays if not (a.ndim == 2 or a.shape[1] == 1)
    )
    moved = call.rows(total) / total * sum(map(size_of, of_rows)) + weights
    return Cost({a.dtype.name: 2.0 * call.rows(room) * math.prod(wide)}, moved)
