"""Documents as one stream of tokens per source, cut into rows by an integer index.

The plan is made once, before hosts are told apart, so row i is the same row wherever it is read. A document is
prefix_ids + ids + [EOD]. Row i of length T holds the stream's tokens i*T .. i*T+T-1 and looks one token further for
its last target, so every token of a document but its first is predicted exactly once.

Legend: T tokens per row, S tokens of a stream, D documents.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ling_jax.data.reading import Document
from ling_jax.data.remote import Column
from ling_jax.data.shards import Prepared, Tokens
from ling_jax.data.sources import Training
from ling_jax.data.store import Columns, keep, parts, stable_order
from ling_jax.data.survey import key_of
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.files import paths
from ling_jax.files.whole import checksum

IGNORE = -100  # the target of a position that has none
ROW = ("tokens", "targets", "positions", "segment_ids")  # the arrays of a row
CHUNK_CHARACTERS = 4_000_000  # text given to the tokenizer at a time
PIECE_CHARACTERS = 1_000_000  # of a document from which it is tokenized in pieces
CUTS = (re.compile(r"(?<=\n)(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))  # where a text may be cut, the better place first
CUTS_TRIED = 64
CUT_CONTEXT = 200  # characters on either side of a cut that must keep their ids
LAYOUT = "ling_jax stream 2"  # part of the key: change it when the columns or what is in them change


@dataclass(frozen=True)
class Stream:
    """Documents one after the other.

    Attributes:
      tokens_S: uint16 or uint32, in the order of the files; in a bucket a document is a request. Shards may hold
        tokens besides that are not the stream's.
      starts_D: int64, where each document begins in the stream, in the stream's order; ascending, the first is 0.
      places_D: int64, where it begins in tokens_S; None: at the same place.
      checksum: follows from tokens_S and the documents' lengths.
      length: of the stream, in tokens; None: as many as tokens_S.
    """

    tokens_S: np.ndarray | Column | Tokens
    starts_D: np.ndarray
    places_D: np.ndarray | None = None
    checksum: str = ""
    length: int | None = None

    def __len__(self) -> int:
        return len(self.tokens_S) if self.length is None else self.length

    def read(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, cuts): int32 tokens begin .. end-1 of the stream, and the places in them where a document begins, the
        first of them 0 in any case."""
        return self.start(begin, end)()

    def start(self, begin: int, end: int) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
        """Begins to `read`; the call gives what that does."""
        end = min(end, len(self))
        first, last = np.searchsorted(self.starts_D, (begin + 1, end))
        cuts = np.concatenate(([0], self.starts_D[first:last] - begin))
        if self.places_D is None:
            begins, ends = np.array([begin]), np.array([end])
        else:
            begins = begin + cuts + self.places_D[first - 1 : last] - self.starts_D[first - 1 : last]
            ends = begins + np.diff(cuts, append=end - begin)
        pieces = [_start(self.tokens_S, *piece) for piece in zip(begins.tolist(), ends.tolist(), strict=True)]
        return lambda: (np.concatenate([piece() for piece in pieces]).astype(np.int32), cuts)


def _start(tokens_S: np.ndarray | Column | Tokens, begin: int, end: int) -> Callable[[], np.ndarray]:
    return (lambda: tokens_S[begin:end]) if isinstance(tokens_S, np.ndarray) else tokens_S.start(begin, end)


@dataclass(frozen=True)
class Rows:
    """The rows of a stream, by index."""

    stream: Stream
    sequence_length: int

    def __len__(self) -> int:
        # The stream's last token has no successor, so it needs no row of its own.
        return max(1, -(-(len(self.stream) - 1) // self.sequence_length))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """tokens, targets, positions, segment_ids: int32 [T].

        Targets are IGNORE where the document ends; positions restart at 0 with each piece of a document; segments
        count 1, 2, ... in the row, and 0 is the padding at the end of the last row.
        """
        return self.start(index)()

    def start(self, index: int) -> Callable[[], dict[str, np.ndarray]]:
        """Begins to read a row, from a bucket perhaps; the call gives it."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.start_at(index * self.sequence_length, self.sequence_length)

    def start_at(self, begin: int, count: int) -> Callable[[], dict[str, np.ndarray]]:
        """The same of `count` tokens from any place of the stream on."""
        reading = self.stream.start(begin, begin + count + 1)
        return lambda: self._row(*reading())

    def _row(self, ids: np.ndarray, cuts: np.ndarray) -> dict[str, np.ndarray]:
        lengths = np.diff(cuts, append=len(ids))
        segments = np.repeat(np.arange(1, len(cuts) + 1), lengths)
        positions = np.arange(len(ids)) - np.repeat(cuts, lengths)
        targets = np.where(segments[1:] == segments[:-1], ids[1:], IGNORE)
        row = dict(zip(ROW, (ids[:-1], targets, positions[:-1], segments[:-1]), strict=True))
        return {name: pad(values, self.sequence_length, name) for name, values in row.items()}


def pad(values: np.ndarray, length: int, name: str) -> np.ndarray:
    """int32 [length]: a row's array with padding behind it (segment 0, no target)."""
    padded = np.full(length, IGNORE if name == "targets" else 0, np.int32)
    padded[: len(values)] = values
    return padded


def build_stream(documents: Training, tokenizer: Tokenizer, name: str, seed: int, cache: paths.Path) -> Stream:
    """Tokenizes a source's documents, or finds that an earlier run did in `cache`, and puts them in a seeded order.

    Tokens lie in the order of the files, whatever the seed; the order is an entry of its own. Entries follow from the
    texts and the tokenizer; a killed run leaves none that is not whole. Tokens of a prepared source stay in its shards.
    """
    prepared = documents.prepared
    if prepared is None:
        key = key_of("tokens", LAYOUT, documents.digest, tokenizer.prefix_ids, tokenizer.to_json())
        what = f"{name}: tokenizing {len(documents)} documents"
        tokens = keep(cache, key, what, lambda columns: tokenize(documents.blocks(), tokenizer, columns))
        tokens_S, total, mark = tokens.columns["tokens"], len(tokens.columns["tokens"]), tokens.checksum
    else:
        key = key_of("places", prepared.checksum, documents.digest)
        what = f"{name}: finding {len(documents)} documents"
        tokens = keep(cache, key, what, lambda columns: _find(documents.kept_D, prepared, columns))
        tokens_S, total = prepared.tokens, tokens.facts["tokens"]
        mark = checksum(f"{prepared.checksum} {tokens.checksum}".encode())

    def put_in_order(columns: Columns) -> dict[str, Any]:
        starts_D, at = tokens["starts"], 0
        places_D = starts_D if prepared is None else tokens["places"]
        for numbers in stable_order(len(starts_D), seed, f"documents of {name}", cache):
            ends = np.where(numbers + 1 < len(starts_D), starts_D[np.minimum(numbers + 1, len(starts_D) - 1)], total)
            after = at + np.cumsum(ends - starts_D[numbers])
            columns.append("starts", np.concatenate(([at], after[:-1])))
            columns.append("places", places_D[numbers])
            at = int(after[-1])
        return {}

    order = keep(cache, key_of("order", mark, seed, name), f"{name}: shuffling", put_in_order)
    return Stream(tokens_S, order["starts"], order["places"], mark, total)


def _find(kept_D: np.ndarray | Column, prepared: Prepared, columns: Columns) -> dict[str, Any]:
    """Fills the columns `places` and `starts` (int64): where each document of a stream is in the shards, and where it
    would be if only those of the stream were there."""
    at = 0
    for part in parts(len(kept_D)):
        begins, ends = prepared.spans(part.start + np.flatnonzero(kept_D[part]))
        after = at + np.cumsum(ends - begins)
        columns.append("places", begins)
        columns.append("starts", after - (ends - begins))
        at = int(after[-1]) if len(after) else at
    return {"tokens": at}


Note = Callable[[str, Sequence[int], int, bool], None]


def tokenize(
    blocks: Iterable[Document], tokenizer: Tokenizer, columns: Columns, note: Note | None = None
) -> dict[str, Any]:
    """Fills the columns `tokens` (uint16 or uint32) and `starts` (int64), in the order of the files.

    Args:
      note: is given each piece of text, its ids, where they begin in the tokens, and whether a document begins there.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    texts: list[str] = []
    ends: list[bool] = []
    total, begins = 0, True

    def write() -> None:
        nonlocal total, begins
        pieces, starts = [], []
        for text, ids, end in zip(texts, tokenizer.encode_batch(texts), ends, strict=True):
            if note is not None:
                note(text, ids, total, begins)
            if begins:
                starts.append(total)
            prefix, suffix = tokenizer.prefix_ids * begins, [tokenizer.eod_id] * end
            pieces.append(np.array([*prefix, *ids, *suffix], dtype))
            total, begins = total + len(pieces[-1]), end
        columns.append("tokens", np.concatenate(pieces))
        columns.append("starts", np.array(starts, np.int64))
        texts.clear()
        ends.clear()

    waiting = 0
    for text, end in pieces_of(blocks, tokenizer):
        texts.append(text)
        ends.append(end)
        waiting += len(text)
        if waiting >= CHUNK_CHARACTERS:
            write()
            waiting = 0
    if texts:
        write()
    return {}


def pieces_of(blocks: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """(text, whether it ends a document): the documents, long ones in pieces whose ids, one after the other, are those
    of the whole.

    A text is cut after a line end or before a space where the tokenizer cuts the text around it too
    (`Tokenizer.cuts_between`); one where it never does stays whole.
    """
    text, at = "", 0
    for block in blocks:
        text, at = text[at:] + block.text if text else block.text, 0
        while len(text) - at > PIECE_CHARACTERS and (cut := _cut(text, at + PIECE_CHARACTERS, tokenizer)):
            yield text[at:cut], False
            at = cut
        if not block.continues:
            yield text[at:] if at else text, True
            text, at = "", 0


def _cut(text: str, begin: int, tokenizer: Tokenizer) -> int:
    """Where to cut a text, at `begin` or a little later; 0 if nowhere."""
    for pattern in CUTS:
        for found in itertools.islice(pattern.finditer(text, begin, begin + PIECE_CHARACTERS), CUTS_TRIED):
            cut = found.start()
            left, right = text[max(0, cut - CUT_CONTEXT) : cut], text[cut : cut + CUT_CONTEXT]
            if tokenizer.cuts_between(left, right):
                return cut
    return 0
