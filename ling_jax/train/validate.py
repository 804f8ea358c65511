"""Scoring held-out text: every token once, in nats, per byte, and by its position in its document.

Positions are told apart in buckets, each as long as all before it. A bucket holds targets of documents that reach its
end and of no others, so every document of a bucket has the same weight in it, and a bucket is the same tokens whatever
the length of a row.

Legend: B rows, T tokens, P buckets.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ling_jax.data.pipeline import scoring_windows
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.parallel.mesh import TOKEN_AXES, psum
from ling_jax.parallel.processes import CompiledTogether
from ling_jax.train.compute import Compute
from ling_jax.train.fp8 import with_codes
from ling_jax.train.loss import IGNORE
from ling_jax.train.objective import MODEL_FIELDS, logprobs

FIRST_BUCKET = 512  # tokens of the first bucket
BUCKETS = 12  # up to position 2^20
NO_BUCKET = -1


class Score(NamedTuple):
    """Sums over a text: nats, predicted tokens, UTF-8 bytes; `buckets` float64 [P, 2], the nats and tokens of each."""

    nats: float
    tokens: int
    bytes: int
    buckets: np.ndarray

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
    nats, tokens, size = (sum(values) for values in zip(*(score[:3] for score in scores), strict=True))
    return Score(nats, tokens, size, np.sum([score.buckets for score in scores], axis=0))


def bucket_ends() -> list[int]:
    """The position before which each bucket ends; it begins where the one before ends."""
    return [FIRST_BUCKET << number for number in range(BUCKETS)]


def position_labels() -> tuple[str, ...]:
    """How buckets of positions are called."""
    return tuple(f"position_{begin}-{end}" for begin, end in zip([0, *bucket_ends()], bucket_ends(), strict=False))


def _buckets(places: np.ndarray, size: int) -> np.ndarray:
    """int32: the buckets of positions in a document, of those buckets that end within its first `size` tokens."""
    whole = [end for end in bucket_ends() if end <= size]
    found = np.searchsorted(whole, places, side="right")
    return np.where(found < len(whole), found, NO_BUCKET).astype(np.int32)


def packed_windows(
    tokenizer: Tokenizer, texts: Sequence[str], length: int, stride: int, longest: int = 0
) -> dict[str, np.ndarray]:
    """All texts' scoring windows, several short ones sharing a row as separate segments: int32 [rows, length].

    `bucket` is that of the target, up to the position `longest`.
    """
    pieces: list[dict[str, np.ndarray]] = []
    prefix = tokenizer.scoring_prefix
    for ids in tokenizer.encode_batch(texts):
        rows = scoring_windows(ids, prefix, length, stride)
        places = stride * np.arange(len(rows["tokens"]))[:, None] + np.arange(length) + 1 - len(prefix)
        rows["bucket"] = _buckets(places, min(len(ids), longest))
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
    out = {name: np.zeros((len(packed), length), np.int32) for name in ("tokens", "positions", "segment_ids", "bucket")}
    out["targets"] = np.full((len(packed), length), IGNORE, np.int32)
    for row, row_pieces in enumerate(packed):
        at = 0
        for segment, piece in enumerate(row_pieces, 1):
            span = slice(at, at + len(piece["tokens"]))
            for name in ("tokens", "positions", "targets", "bucket"):
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


def make_scorer(compute: Compute) -> Callable[[dict, dict, Mapping[str, np.ndarray]], tuple[jax.Array, jax.Array]]:
    """Returns scorer(params, bias, batch) -> the batch's summed nats, and float32 [P], those of each bucket; the MTP
    layer does not run. `batch` is the whole one, the same on every process, in one shape."""

    def nll(params, bias, batch):
        model = compute.model(with_codes(params, compute.quantise(params), {}), bias)
        out = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], mtp=False)
        nats_BT = -jnp.where(batch["targets"] >= 0, logprobs(model, out.hidden_BTD, batch["targets"]), 0)
        mine_BTP = batch["bucket"][:, :, None] == jnp.arange(BUCKETS)
        sums = nats_BT.sum(), jnp.where(mine_BTP, nats_BT[:, :, None], 0).sum((0, 1))
        return psum(sums, *TOKEN_AXES)

    fields = {**MODEL_FIELDS, "targets": "BT", "bucket": "BT"}
    return CompiledTogether("the scorer", jax.jit(compute.on_shards(nll, fields, PartitionSpec())))


class HeldOut(NamedTuple):
    """One source's held-out text, ready to be scored.

    Attributes:
      bytes: of the text, in UTF-8; 0 where not all of it is scored.
      labels: how its buckets are called; (): `position_labels`.
    """

    rows: dict[str, np.ndarray]
    bytes: int
    labels: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return int((self.rows["targets"] >= 0).sum())

    def bucket_tokens(self) -> np.ndarray:
        """int64 [P]: the targets of each bucket."""
        found = self.rows["bucket"][(self.rows["targets"] >= 0) & (self.rows["bucket"] >= 0)]
        return np.bincount(found, minlength=BUCKETS)


def prepare_held_out(tokenizer: Tokenizer, texts: Sequence[str], length: int, longest: int = 0) -> HeldOut:
    """Windows of `length` that overlap by half, so that a token has at least length/2 of context; buckets as in
    `packed_windows`."""
    rows = packed_windows(tokenizer, texts, length, max(length // 2, 1), longest)
    return HeldOut(rows, sum(len(text.encode()) for text in texts))


def score_held_out(scorer: Callable, params: dict, bias: dict, part: HeldOut, batch_size: int) -> Score:
    """The score of all targets of a held-out text."""
    nats, by_bucket = 0.0, np.zeros(BUCKETS)
    for batch in batches(part.rows, batch_size):
        batch_nats, batch_buckets = jax.device_get(scorer(params, bias, batch))
        nats += float(batch_nats)
        by_bucket += batch_buckets
    return Score(nats, part.tokens, part.bytes, np.stack([by_bucket, part.bucket_tokens()], 1))


def validate(
    scorer: Callable, params: dict, bias: dict, held_out: Mapping[str, HeldOut], batch_size: int
) -> dict[str, Score]:
    """The score of each source."""
    return {source: score_held_out(scorer, params, bias, part, batch_size) for source, part in held_out.items()}


def score_metrics(scores: Mapping[str, Score], labels: Sequence[str] = ()) -> dict[str, float]:
    """The `eval/...` metrics of a step: of each source, of all together, and of all by bucket."""
    metrics = {}
    for source, score in scores.items():
        metrics |= _metrics(f"eval/{source}/", score)
    total = add_scores(list(scores.values()))
    metrics |= _metrics("eval/", total)
    for label, (nats, tokens) in zip(labels or position_labels(), total.buckets, strict=True):
        if tokens:
            metrics[f"eval/nats_per_token/{label}"] = float(nats / tokens)
    return metrics


def merged_metrics(scores: Mapping[str, Score]) -> dict[str, float]:
    """The `eval/merged_...` metrics of merged snapshots, of all sources together."""
    return _metrics("eval/merged_", add_scores(list(scores.values())))


def _metrics(head: str, score: Score) -> dict[str, float]:
    per_byte = {f"{head}bits_per_byte": score.bits_per_byte} if score.bytes else {}
    return {f"{head}nats_per_token": score.nats_per_token, **per_byte}
