"""Scoring held-out text: every token once, in nats, and per byte.

Legend: B rows, T tokens.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from ling_jax.data.pipeline import scoring_windows
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.parallel.mesh import TOKEN_AXES, psum
from ling_jax.parallel.processes import CompiledTogether
from ling_jax.train.compute import Compute
from ling_jax.train.fp8 import with_codes
from ling_jax.train.loss import IGNORE, target_nll
from ling_jax.train.objective import MODEL_FIELDS


class Score(NamedTuple):
    """Sums over a text: nats, predicted tokens, UTF-8 bytes."""

    nats: float
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats_per_token, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(self.bytes, 1)


def add_scores(scores: Sequence[Score]) -> Score:
    return Score(*(sum(values) for values in zip(*scores, strict=True)))


def packed_windows(tokenizer: Tokenizer, texts: Sequence[str], length: int, stride: int) -> dict[str, np.ndarray]:
    """All texts' scoring windows, several short ones sharing a row as separate segments: int32 [rows, length]."""
    pieces: list[dict[str, np.ndarray]] = []
    for ids in tokenizer.encode_batch(texts):
        rows = scoring_windows(ids, tokenizer.scoring_prefix, length, stride)
        for row in range(rows["tokens"].shape[0]):
            real = rows["segment_ids"][row] > 0
            pieces.append({name: value[row][real] for name, value in rows.items()})
    pieces.sort(key=lambda piece: -len(piece["tokens"]))
    packed: list[list[dict[str, np.ndarray]]] = []
    room: list[int] = []
    for piece in pieces:  # first fit, longest first
        size = len(piece["tokens"])
        row = next((i for i, left in enumerate(room) if left >= size), None)
        if row is None:
            packed.append([])
            room.append(length)
            row = len(room) - 1
        packed[row].append(piece)
        room[row] -= size
    out = {name: np.zeros((len(packed), length), np.int32) for name in ("tokens", "positions", "segment_ids")}
    out["targets"] = np.full((len(packed), length), IGNORE, np.int32)
    for row, row_pieces in enumerate(packed):
        at = 0
        for segment, piece in enumerate(row_pieces, 1):
            span = slice(at, at + len(piece["tokens"]))
            for name in ("tokens", "positions", "targets"):
                out[name][row, span] = piece[name]
            out["segment_ids"][row, span] = segment
            at = span.stop
    return out


def batches(rows: Mapping[str, np.ndarray], size: int) -> Iterator[dict[str, np.ndarray]]:
    """Whole batches of `size` rows; the last is filled up with padding."""
    count = rows["tokens"].shape[0]
    for start in range(0, count, size):
        batch = {name: value[start : start + size] for name, value in rows.items()}
        lacking = size - batch["tokens"].shape[0]
        if lacking:
            fill = {"targets": IGNORE}
            batch = {
                name: np.pad(value, ((0, lacking), (0, 0)), constant_values=fill.get(name, 0))
                for name, value in batch.items()
            }
        yield batch


def make_scorer(compute: Compute) -> Callable[[dict, dict, Mapping[str, np.ndarray]], jax.Array]:
    """Returns scorer(params, bias, batch) -> the batch's summed nats; the MTP layer does not run. `batch` is the
    whole one, the same on every process, in one shape."""

    def nll(params, bias, batch):
        model = compute.model(with_codes(params, compute.quantise(params), {}), bias)
        out = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], mtp=False)
        return psum(target_nll(model, out.hidden_BTD, batch["targets"]), *TOKEN_AXES)

    fields = {**MODEL_FIELDS, "targets": "BT"}
    return CompiledTogether("the scorer", jax.jit(compute.on_shards(nll, fields, PartitionSpec())))


def score_rows(scorer: Callable, params: dict, bias: dict, rows: Mapping[str, np.ndarray], batch_size: int) -> float:
    """Summed nats of all targets in `rows`."""
    return float(sum(float(scorer(params, bias, batch)) for batch in batches(rows, batch_size)))


class HeldOut(NamedTuple):
    """One source's held-out text, ready to be scored."""

    rows: dict[str, np.ndarray]
    bytes: int

    @property
    def tokens(self) -> int:
        return int((self.rows["targets"] >= 0).sum())


def prepare_held_out(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> HeldOut:
    """Windows of `length` that overlap by half, so that a token has at least length/2 of context."""
    rows = packed_windows(tokenizer, texts, length, max(length // 2, 1))
    return HeldOut(rows, sum(len(text.encode()) for text in texts))


def validate(
    scorer: Callable, params: dict, bias: dict, held_out: Mapping[str, HeldOut], batch_size: int
) -> dict[str, Score]:
    """The score of each source."""
    return {
        source: Score(score_rows(scorer, params, bias, part.rows, batch_size), part.tokens, part.bytes)
        for source, part in held_out.items()
    }


def score_metrics(scores: Mapping[str, Score]) -> dict[str, float]:
    """The `eval/...` metrics of a step."""
    metrics = {}
    for source, score in scores.items():
        metrics[f"eval/{source}/nats_per_token"] = score.nats_per_token
        metrics[f"eval/{source}/bits_per_byte"] = score.bits_per_byte
    total = add_scores(list(scores.values()))
    return metrics | {"eval/nats_per_token": total.nats_per_token, "eval/bits_per_byte": total.bits_per_byte}


def merged_metrics(scores: Mapping[str, Score]) -> dict[str, float]:
    """The `eval/merged_...` metrics of merged snapshots, of all sources together."""
    total = add_scores(list(scores.values()))
    return {"eval/merged_nats_per_token": total.nats_per_token, "eval/merged_bits_per_byte": total.bits_per_byte}
