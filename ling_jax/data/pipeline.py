"""From a data configuration to training batches and scoring windows.

The state of the data is one number, the step: batch s holds the global examples s*B .. s*B+B-1 of an endless
sequence that the seed fixes, so a run resumes by starting there, on any number of hosts.

Legend: B rows of a global batch, T tokens per row, N windows.
"""

import hashlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np
from etils import epath

from ling_jax.config import DataConfig
from ling_jax.data.packing import IGNORE, Rows, build_stream, pad
from ling_jax.data.sources import Corpus, Document, read_corpus, size, source_names, stable_order
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.files.cache import can_write

log = logging.getLogger(__name__)

TOKENIZER_SAMPLE_BYTES = 20_000_000  # of training text; more changes a vocabulary little
READ_THREADS = 2
PREFETCHED_BATCHES = 8
FINGERPRINT_TOKENS = 100_000  # of a source that are compared between hosts


@dataclass(frozen=True)
class Data:
    """What a run reads: rows to train on and whole documents to score, each by source name."""

    tokenizer: Tokenizer
    rows: dict[str, Rows]
    heldout: dict[str, list[Document]]

    def fingerprint(self) -> int:
        """A number below 2^31 that follows from the tokenizer, the order of the documents and samples of the text."""
        digest = hashlib.sha256(self.tokenizer.to_json().encode())
        for name, rows in self.rows.items():
            tokens = rows.stream.tokens_S
            sample = np.ascontiguousarray(tokens[:: max(1, len(tokens) // FINGERPRINT_TOKENS)])
            for part in (name.encode(), str(tokens.shape).encode(), sample.tobytes(), rows.stream.starts_D.tobytes()):
                digest.update(part)
        for name, documents in self.heldout.items():
            digest.update("\0".join([name, *(document.text for document in documents)]).encode())
        return int.from_bytes(digest.digest()[:4]) >> 1


def open_data(config: DataConfig, vocab_size: int, tokenizer_dir: str, trained_with: str | None = None) -> Data:
    """Reads the corpus, finds or trains the tokenizer (kept in `tokenizer_dir`), and packs the training split.

    Args:
      trained_with: the fingerprint of the tokenizer that the run's checkpoint was trained with.
    Raises:
      ValueError: for a source, tokenizer or cache that can't be used; naming it, before any long work.
    """
    cache = _cache(config.cache_dir, epath.Path(tokenizer_dir).expanduser().parent)
    corpus = read_corpus(config)
    for name in corpus.train:
        train, heldout = corpus.train[name], corpus.heldout[name]
        log.info("%s: %d documents, %.2f MB to train on; %d documents, %.3f MB held out",
                 name, len(train), size(train) / 1e6, len(heldout), size(heldout) / 1e6)  # fmt: skip
    tokenizer = _open_tokenizer(config, corpus, vocab_size, tokenizer_dir, trained_with)
    rows = {}
    for name, documents in corpus.train.items():
        stream = build_stream(documents, tokenizer, name, config.seed, cache)
        rows[name] = Rows(stream, config.sequence_length)
        count = len(stream.tokens_S)
        log.info("%s: %d tokens in %d rows, %.2f bytes per token",
                 name, count, len(rows[name]), size(documents) / count)  # fmt: skip
    return Data(tokenizer, rows, corpus.heldout)


def _cache(wanted: str, run_dir: epath.Path) -> Path:
    """The folder for tokens: the one that is `wanted`, or one in the run's folder if that cannot be written."""
    hint = "set --data.cache-dir to a folder of this machine that can be written"
    if "://" in wanted:
        raise ValueError(f"data.cache_dir = {wanted!r} must be local, since tokens are mapped into memory: {hint}")
    folder = Path(os.path.expanduser(wanted))
    if can_write(folder):
        return folder
    own = Path(run_dir) / "cache"
    if "://" in str(run_dir) or not can_write(own):
        raise ValueError(f"data.cache_dir = {wanted!r} cannot be written: {hint}")
    log.info("%s cannot be written: tokens are kept in %s; --data.cache-dir names another place", folder, own)
    return own


def _open_tokenizer(
    config: DataConfig, corpus: Corpus, vocab_size: int, tokenizer_dir: str, trained_with: str | None
) -> Tokenizer:
    """The tokenizer of the config, else the one saved by this run, else a new one; saved in `tokenizer_dir`."""
    saved = None
    if (epath.Path(tokenizer_dir).expanduser() / "tokenizer.json").exists():
        saved = Tokenizer.load(tokenizer_dir)
        saved.check_fits(vocab_size)
        _check_unchanged(saved, trained_with, tokenizer_dir)
    if config.tokenizer is None and saved is not None:
        return saved
    if config.tokenizer is not None:
        tokenizer = Tokenizer.load(config.tokenizer)
        tokenizer.check_fits(vocab_size)
        if saved is not None and saved.to_json() != tokenizer.to_json():
            raise ValueError(
                f"data.tokenizer = {config.tokenizer!r} differs from the tokenizer this run began with, in "
                f"{tokenizer_dir}; leave data.tokenizer unset, or start a new run"
            )
    else:
        tokenizer = Tokenizer.train(_tokenizer_sample(corpus, config.seed), vocab_size)
    _check_unchanged(tokenizer, trained_with, tokenizer_dir)
    tokenizer.save(tokenizer_dir)
    return tokenizer


def _check_unchanged(tokenizer: Tokenizer, trained_with: str | None, tokenizer_dir: str) -> None:
    if trained_with is not None and tokenizer.fingerprint != trained_with:
        raise ValueError(
            f"the tokenizer in {tokenizer_dir} is not the one that this run's checkpoint was trained with (fingerprint "
            f"{tokenizer.fingerprint}, in the checkpoint {trained_with}): its ids mean other text. Put the run's own "
            "tokenizer.json back, or start a new run with another --run"
        )


def _tokenizer_sample(corpus: Corpus, seed: int) -> Iterator[str]:
    """Training documents in a seeded order, up to TOKENIZER_SAMPLE_BYTES of them."""
    documents = [document for source in corpus.train.values() for document in source]
    room = TOKENIZER_SAMPLE_BYTES
    for index in stable_order(len(documents), seed, "tokenizer"):
        if room <= 0:
            return
        room -= size([documents[index]])
        yield documents[index].text


def train_batches(
    rows: Mapping[str, Rows], config: DataConfig, start_step: int, here: Sequence[int] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of steps start_step, start_step + 1, ... without end; threads read ahead.

    Args:
      rows: by source name, as `open_data` gives them.
      here: which rows of each global batch to read, all by default; the batches are the same whoever reads them.

    Returns:
      Dicts of int32 [len(here), T]: tokens, targets, positions, segment_ids (see `Rows`).
    """
    total = config.global_batch_size
    examples = _examples(rows, config)
    wanted = range(total) if here is None else [int(row) for row in here]

    def load(step: int) -> dict[str, np.ndarray]:
        batch: list[Any] = [examples[step * total + row] for row in wanted]
        return {name: np.stack([row[name] for row in batch]) for name in batch[0]}

    steps = grain.MapDataset.range(start_step, sys.maxsize).map(load)
    return iter(steps.to_iter_dataset(grain.ReadOptions(READ_THREADS, PREFETCHED_BATCHES)))


def _examples(rows: Mapping[str, Rows], config: DataConfig) -> grain.MapDataset:
    """The endless sequence of rows: every source in a new order each epoch, interleaved by weight.

    grain seeds epoch e with seed + e, so neighbouring seeds would share orders: ours are hashes. It keeps weights
    as whole multiples of a hundredth of the smallest, which is exact enough for shares of a mixture.
    """
    sources, weights = [], []
    for name, source in zip(source_names(config), config.sources, strict=True):
        seed = int.from_bytes(hashlib.sha256(f"{config.seed}:{name}".encode()).digest()[:4])
        sources.append(grain.MapDataset.source(rows[name]).shuffle(seed).repeat())
        weights.append(source.weight)
    return sources[0] if len(sources) == 1 else grain.MapDataset.mix(sources, weights)


def scoring_windows(ids: list[int], prefix: list[int], length: int, stride: int) -> dict[str, np.ndarray]:
    """Windows over prefix + ids in which every token of `ids` is a target exactly once.

    Args:
      prefix: tokens to read but not score; at least one, or the first of `ids` could not be predicted.
      length: inputs per window.
      stride: tokens from one window to the next. A target outside the first window sees at least
        length - stride earlier tokens; stride == length means no overlap.

    Returns:
      tokens, targets, positions, segment_ids: int32 [N, length], padding as in `Rows`; N = 0 for no ids.

    Raises:
      ValueError: for an empty prefix or a stride outside 1 .. length.
    """
    if not prefix:
        raise ValueError("scoring needs a prefix of at least one token: use Tokenizer.scoring_prefix")
    if not 1 <= stride <= length:
        raise ValueError(f"stride = {stride} must be between 1 and the window's length = {length}")
    stream = np.array([*prefix, *ids], np.int32)
    inputs, targets = stream[:-1], stream[1:].copy()
    targets[: len(prefix) - 1] = IGNORE
    count = (1 + -(-max(0, len(inputs) - length) // stride)) if ids else 0
    rows: dict[str, list[np.ndarray]] = {"tokens": [], "targets": [], "positions": [], "segment_ids": []}
    for start in range(0, count * stride, stride):
        window = slice(start, start + length)
        scored = targets[window].copy()
        if start:
            scored[: length - stride] = IGNORE  # targets of the window before
        rows["tokens"].append(pad(inputs[window], length, "tokens"))
        rows["targets"].append(pad(scored, length, "targets"))
        rows["positions"].append(pad(np.arange(len(scored)), length, "positions"))
        rows["segment_ids"].append(pad(np.ones(len(scored)), length, "segment_ids"))
    return {name: np.array(values, np.int32).reshape(-1, length) for name, values in rows.items()}
