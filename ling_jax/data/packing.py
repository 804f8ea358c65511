"""Documents as one stream of tokens per source, cut into rows by an integer index.

The plan is made once, before hosts are told apart, so row i is the same row wherever it is read. A document is
prefix_ids + ids + [EOD]. Row i of length T holds the stream's tokens i*T .. i*T+T-1 and looks one token further for
its last target, so every token of a document but its first is predicted exactly once.

Legend: T tokens per row, S tokens of a stream, D documents.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from etils import epath

from ling_jax.data.sources import Document, stable_order
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.files.one_writer import HOLDER, OneWriter

log = logging.getLogger(__name__)

IGNORE = -100  # the target of a position that has none
CHUNK_CHARACTERS = 4_000_000  # text given to the tokenizer at a time
FORMAT = "ling_jax stream 1"  # part of the cache key: change it when a stream's layout changes


@dataclass(frozen=True)
class Stream:
    """Documents one after the other.

    Attributes:
      tokens_S: uint16 or uint32.
      starts_D: int64, where each document begins in tokens_S; ascending, the first is 0.
    """

    tokens_S: np.ndarray
    starts_D: np.ndarray


@dataclass(frozen=True)
class Rows:
    """The rows of a stream, by index."""

    stream: Stream
    sequence_length: int

    def __len__(self) -> int:
        # The stream's last token has no successor, so it needs no row of its own.
        return max(1, -(-(len(self.stream.tokens_S) - 1) // self.sequence_length))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """tokens, targets, positions, segment_ids: int32 [T].

        Targets are IGNORE where the document ends; positions restart at 0 with each piece of a document; segments
        count 1, 2, ... in the row, and 0 is the padding at the end of the last row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        begin = index * self.sequence_length
        ids = self.stream.tokens_S[begin : begin + self.sequence_length + 1].astype(np.int32)
        first, last = np.searchsorted(self.stream.starts_D, (begin + 1, begin + len(ids)))
        cuts = np.concatenate(([0], self.stream.starts_D[first:last] - begin))
        lengths = np.diff(cuts, append=len(ids))
        segments = np.repeat(np.arange(1, len(cuts) + 1), lengths)
        positions = np.arange(len(ids)) - np.repeat(cuts, lengths)
        targets = np.where(segments[1:] == segments[:-1], ids[1:], IGNORE)
        row = {"tokens": ids[:-1], "targets": targets, "positions": positions[:-1], "segment_ids": segments[:-1]}
        return {name: pad(values, self.sequence_length, name) for name, values in row.items()}


def pad(values: np.ndarray, length: int, name: str) -> np.ndarray:
    """int32 [length]: a row's array with padding behind it (segment 0, no target)."""
    padded = np.full(length, IGNORE if name == "targets" else 0, np.int32)
    padded[: len(values)] = values
    return padded


def build_stream(
    documents: Sequence[Document], tokenizer: Tokenizer, name: str, seed: int, cache: str | Path
) -> Stream:
    """Tokenizes a source's documents in a seeded order, or maps the result of an earlier run, in `cache`, into memory.

    The cache is keyed by the texts, their order and the tokenizer; a killed run leaves no broken file behind.
    """
    ordered = [documents[i] for i in stable_order(len(documents), seed, f"documents of {name}")]
    key, folder = _cache_key(ordered, tokenizer), Path(cache)
    starts_file, tokens_file = folder / f"{key}.starts.npy", folder / f"{key}.tokens.npy"
    if (found := _kept(tokens_file, starts_file)) is not None:
        return found
    with OneWriter(epath.Path(folder), f"{key}.{HOLDER}", wait=True):
        if (found := _kept(tokens_file, starts_file)) is not None:  # another process has just made it
            return found
        log.info("%s: tokenizing %d documents into %s", name, len(ordered), tokens_file)
        stream = _tokenize(ordered, tokenizer)
        _write_atomically(starts_file, lambda file: np.save(file, stream.starts_D))
        _write_atomically(tokens_file, lambda file: np.save(file, stream.tokens_S))
    return Stream(np.load(tokens_file, mmap_mode="r"), np.load(starts_file))


def _kept(tokens_file: Path, starts_file: Path) -> Stream | None:
    """The stream that an earlier run left, if it did and both files are whole."""
    if not tokens_file.exists():  # written last: where it exists, both do
        return None
    try:
        return Stream(np.load(tokens_file, mmap_mode="r"), np.load(starts_file))
    except (ValueError, OSError, EOFError) as error:
        log.warning("%s is damaged (%s): it is made anew", tokens_file, error)
        return None


def _cache_key(documents: Sequence[Document], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(f"{FORMAT} {tokenizer.prefix_ids} {tokenizer.to_json()}".encode())
    for document in documents:
        data = document.text.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]


def _tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> Stream:
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    pieces: list[np.ndarray] = []
    for texts in _chunks(documents):
        for ids in tokenizer.encode_batch(texts):
            pieces.append(np.array([*tokenizer.prefix_ids, *ids, tokenizer.eod_id], dtype))
    lengths = [len(piece) for piece in pieces]
    return Stream(np.concatenate(pieces), np.cumsum([0, *lengths[:-1]], dtype=np.int64))


def _chunks(documents: Sequence[Document]) -> Iterator[list[str]]:
    chunk: list[str] = []
    characters = 0
    for document in documents:
        chunk.append(document.text)
        characters += len(document.text)
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _write_atomically(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Lets `write` fill a temporary file beside `path`, then moves it there."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        temporary = Path(file.name)
        try:
            write(file.file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
