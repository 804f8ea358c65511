"""The report of a conversion, printed and saved beside what it made."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping

from ling_jax.config import ModelConfig, count_params
from ling_jax.config.text import columns
from ling_jax.convert.beyond import left_out
from ling_jax.convert.mapping import SCALE
from ling_jax.convert.transfer import TensorRecord
from ling_jax.convert.weights import some


@dataclasses.dataclass(frozen=True)
class Audit:
    """Every tensor of one conversion. `records` are as in HF's files, whichever side they were on."""

    source: str
    target: str
    form: str  # the dtype or format asked for
    config: ModelConfig
    records: dict[str, TensorRecord]
    wanted: list[str]  # the names that had to be there
    seconds: float
    files: list[str]  # carried along
    beyond: Mapping[str, str]  # tensors of the source that are no part of the model, with the reason

    @property
    def missing(self) -> list[str]:
        return [name for name in self.wanted if name not in self.records]

    @property
    def unused(self) -> list[str]:
        return sorted(self.records.keys() - set(self.wanted))

    @property
    def parameters(self) -> int:
        return sum(math.prod(r.shape) for name, r in self.records.items() if not name.endswith(SCALE))

    def check(self) -> None:
        """ValueError for any gap."""
        gaps = []
        if self.missing:
            gaps.append(f"{len(self.missing)} tensor(s) were not copied: {some(self.missing)}")
        if self.unused:
            gaps.append(f"{len(self.unused)} tensor(s) have no place: {some(self.unused)}")
        if self.parameters != (expected := count_params(self.config).total):
            gaps.append(f"{self.parameters:,} parameters were copied, the configuration has {expected:,}")
        if gaps:
            raise ValueError(f"converting {self.source} left gaps: {'; '.join(gaps)}")

    def to_json(self) -> str:
        names = ("source", "target", "form", "seconds", "files", "parameters", "missing", "unused", "beyond")
        tensors = {name: dataclasses.asdict(record) for name, record in self.records.items()}
        return json.dumps({name: getattr(self, name) for name in names} | {"tensors": tensors}, indent=1)

    def render(self) -> str:
        """A table: tensors and bytes by dtype, then what a reader must know."""
        records = self.records.values()
        size = sum(record.nbytes for record in records)
        rows = [("dtype", "tensors", "MB")]
        for dtype, count in sorted(Counter(record.dtype for record in records).items()):
            rows.append((dtype, f"{count:,}", f"{sum(r.nbytes for r in records if r.dtype == dtype) / 1e6:,.1f}"))
        rows.append(("all", f"{len(self.records):,}", f"{size / 1e6:,.1f}"))
        casts = Counter(record.cast for record in records if record.cast)
        bad = {name: record.not_finite for name, record in self.records.items() if record.not_finite}
        facts = {
            "source": self.source,
            "target": self.target,
            "used": f"{len(self.records):,} of {len(self.wanted):,} tensors",
            "unused, missing": f"{len(self.unused)}, {len(self.missing)}",
            "left out": left_out(self.beyond) if self.beyond else "none",
            "cast": ", ".join(f"{count:,} {cast}" for cast, count in casts.items()) or "none: every byte is kept",
            "NaN or infinite": f"{sum(bad.values()):,} numbers in {len(bad)} tensors" if bad else "none",
            "parameters": f"{self.parameters:,}, as the configuration has",
            "files carried along": ", ".join(self.files) or "none",
            "time": f"{self.seconds:.1f} s, {size / 1e6 / max(self.seconds, 1e-9):,.0f} MB/s",
        }
        return columns(rows, numbers=True) + "\n\n" + columns(list(facts.items()))
