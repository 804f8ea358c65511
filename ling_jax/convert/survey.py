"""The contents of a folder of weights: `convert.py inspect`."""

import dataclasses
import math
import re
import zlib
from collections.abc import Iterator

import numpy as np

from ling_jax.config import count_params, layer_kinds
from ling_jax.config.text import columns
from ling_jax.convert.beyond import left_out
from ling_jax.convert.mapping import ArrayPath
from ling_jax.convert.merge_weights import Lineage
from ling_jax.convert.tensorfile import NAMES
from ling_jax.convert.transfer import TensorRecord, pieces, strides, tensors_in
from ling_jax.convert.weights import LINEAGE, StoredWeights, Weights, narrow, open_weights
from ling_jax.files.progress import ByteProgress


@dataclasses.dataclass(frozen=True)
class Survey:
    """Every tensor of a folder, in HF's terms; `checked`: its checksums are there."""

    weights: Weights
    records: dict[str, TensorRecord]
    checked: bool

    def render(self, each: bool = False) -> str:
        """The configuration, the counts, and a line for each of our arrays, or for `each` tensor."""
        config = self.weights.config
        counts = count_params(config)
        kinds = layer_kinds(config)
        fields = {name: value for name, value in dataclasses.asdict(config).items() if name != "hf_json"}
        facts = {
            "folder": str(self.weights.folder),
            "parameters": f"{counts.total:,}, of which {counts.active:,} are active per token; MTP {counts.mtp:,}",
            "saved checksums": self._saved_checksums(),
            "left out": left_out(self.weights.beyond) if self.weights.beyond else "none",
            "layers": ", ".join(f"{kinds.count(kind)} {kind.key}" for kind in dict.fromkeys(kinds)),
        }
        if isinstance(self.weights, StoredWeights):
            if (lineage := self.weights.meta.get(LINEAGE)) is not None:
                facts["average of"] = Lineage.from_json(lineage).render()
            if self.weights.run.origin:
                facts["run started from"] = self.weights.run.origin
        rows: list[tuple[str, ...]] = [
            ("tensor", "number", "shape", "dtype", "MB", "crc32" if self.checked else "", "NaN, inf")
        ]
        for path in self.weights.stacks:
            rows += self._rows(path, each)
        total = sum(record.nbytes for record in self.records.values())
        rows.append(("all", f"{len(self.records):,}", "", "", f"{total / 1e6:,.1f}", "", ""))
        settings = columns([(name, str(value)) for name, value in fields.items()])
        return "\n\n".join([columns(list(facts.items())), settings, columns(rows)])

    def _saved_checksums(self) -> str:
        """Says whether the files have checksums of their own: a changed file would have ended the reading of the
        weights."""
        if not isinstance(self.weights, StoredWeights) or not self.weights.arrays.has_checksums:
            return "none"
        told = "those of the weights compared, and right" if self.checked else "not compared"
        return f"XXH3-64 of {self.weights.arrays.count_files():,} files, {told}"

    def _rows(self, path: ArrayPath, each: bool) -> Iterator[tuple[str, ...]]:
        names = [name for name in map(str, self.weights.stacks[path].names.flat) if name in self.records]
        for group in [[name] for name in names] if each else [names] if names else []:
            records = [self.records[name] for name in group]
            checksum = f"{records[0].crc32:08x}"
            if not each:  # of the tensors' checksums, in order
                checksum = f"{zlib.crc32(np.array([r.crc32 for r in records], '>u4').tobytes()):08x}"
            yield (
                group[0] if each else _pattern(group),
                f"{len(group):,}",
                "x".join(map(str, records[0].shape)),
                ", ".join(sorted({record.dtype for record in records})),
                f"{sum(record.nbytes for record in records) / 1e6:,.1f}",
                checksum if self.checked else "",
                str(sum(record.not_finite for record in records)) if self.checked else "",
            )


def _pattern(names: list[str]) -> str:
    """HF's names with what counts layers and experts written as a range."""
    numbers = [list(map(int, re.findall(r"(?<=\.)\d+(?=\.)", name))) for name in names]
    spans = [
        f"{min(column)}-{max(column)}" if len(set(column)) > 1 else str(column[0])
        for column in zip(*numbers, strict=True)
    ]
    spans_left = iter(spans)
    return re.sub(r"(?<=\.)\d+(?=\.)", lambda _: next(spans_left), names[0])


def survey(path: str, checksums: bool = True) -> Survey:
    """Reads a HF folder or a checkpoint; ValueError if it is not whole. Without `checksums` no weight is read."""
    weights = open_weights(path)
    records: dict[str, TensorRecord] = {}
    for stack in weights.stacks.values():
        for name in map(str, stack.names.flat):
            if name in weights.dtypes:
                records[name] = TensorRecord(NAMES[weights.dtypes[name]], list(stack.shape))
    if checksums:
        with ByteProgress(sum(record.nbytes for record in records.values())) as bar:
            for path_, stack in weights.stacks.items():
                cut = strides(stack, weights.chunk(path_), weights.dtype(path_).itemsize)
                for piece in pieces(path_, stack, cut):
                    for part in piece.parts:
                        for name, rows in tensors_in(stack, part, weights.read(path_, part)):
                            if name in records:
                                records[name].add(own := narrow(rows, weights.dtypes[name]))
                                bar.advance(math.prod(own.shape) * own.dtype.itemsize)
    return Survey(weights, records, checksums)
