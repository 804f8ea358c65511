"""A program's memory, as the compiler reports it."""

import logging
import math
import re
from typing import Any, NamedTuple

import jax

from ling_jax.plan.count import key_of
from ling_jax.plan.hardware import GIB

log = logging.getLogger(__name__)

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
NOT_STORED = {"parameter", "get-tuple-element", "bitcast", "tuple", "while", "constant", "iota", "broadcast"}


class Buffer(NamedTuple):
    """Arrays of one shape that one scope makes and that live in HBM."""

    bytes: int  # of one
    shape: str  # such as "f32[4096,2048]"
    scope: str
    count: int


class Memory(NamedTuple):
    """Bytes per device; `temporaries` and `peak` are infinite where the compiler gave up without saying."""

    arguments: float
    temporaries: float
    peak: float
    hbm: float
    error: str  # the compiler's own words where the program does not fit

    @property
    def fits(self) -> bool:
        return not self.error and self.peak <= self.hbm


def memory_of(compiled: Any, hbm: float) -> Memory:
    stats = compiled.memory_analysis()
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak = stats.argument_size_in_bytes + stats.temp_size_in_bytes + results
    return Memory(stats.argument_size_in_bytes, stats.temp_size_in_bytes, peak, hbm, "")


def memory_of_error(error: str, arguments: float, hbm: float) -> Memory:
    """From the text of an out-of-memory error of the compiler: what it needed, in its own units of 2^30 bytes."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of|required for HLO temporaries \(([\d.]+)([KMGT])", error)
    groups = [] if found is None else [group for group in found.groups() if group]
    needed = float(groups[0]) * UNITS[groups[1]] if groups else math.inf
    total = needed if found is not None and found[1] else needed + arguments
    return Memory(arguments, total - arguments, total, hbm, error)


def buffers_of(compiled: jax.stages.Compiled) -> list[Buffer]:
    """The largest buffers; none, with a warning, where this version of JAX cannot print the program (0.10 cannot)."""
    try:
        return largest_buffers(compiled.as_text() or "")
    except jax.errors.JaxRuntimeError as error:
        why = str(error).splitlines()[0]
        log.warning("the largest buffers are not known: jax %s cannot print this program (%s)", jax.__version__, why)
        return []


def largest_buffers(text: str, number: int = 10) -> list[Buffer]:
    """Finds the largest results that an optimised module stores in HBM, one row a shape and scope, in its text.

    Which of them live at the same time the text does not say; together they can be more than the temporaries.
    """
    fused = set(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", text))
    found: dict[tuple[int, str, str], int] = {}
    inside = ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            inside = head[1]
        made = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (\w+)\[([\d,]+)\](\{\S*)? ([\w\-]+)\(", line)
        if made is None or inside in fused or made[4] in NOT_STORED or "S(1)" in (made[3] or ""):
            continue
        dims = [int(dim) for dim in made[2].split(",")]
        scope = re.search(r'op_name="([^"]*)"', line)
        key = (math.prod(dims) * WIDTHS.get(made[1], 1), f"{made[1]}[{made[2]}]", _label(scope[1] if scope else ""))
        found[key] = found.get(key, 0) + 1
    return [Buffer(*key, count) for key, count in sorted(found.items(), reverse=True)[:number]]


def _label(op_name: str) -> str:
    key = key_of(op_name)
    return f"{key.scope} ({key.phase})" if op_name else "-"
