"""From a data configuration to training batches and scoring windows.

The state of the data is one number, how many rows have been read: the rows of all sources form one endless sequence
that the seed fixes, and a batch is the next B of them, so a run resumes by going on there, on any number of hosts and
with any B.

Legend: B rows of a global batch, T tokens per row, N windows.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np

from ling_jax.config import DataConfig
from ling_jax.data.packing import IGNORE, Rows, build_stream, pad
from ling_jax.data.reading import Document
from ling_jax.data.sources import Corpus, read_corpus, size, source_names, training_sample
from ling_jax.data.store import Kept, cache_dir
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.files import paths
from ling_jax.files.whole import checksum

log = logging.getLogger(__name__)

READ_THREADS = 2
PREFETCHED_BATCHES = 8
ANEW = "start a new run from these weights with another --run and --init-from"


@dataclass(frozen=True)
class Data:
    """The data of a run: rows to train on and whole documents to score, each by source name.

    Attributes:
      facts: see `Corpus.facts`; a run's checkpoints have them.
      start_row: how many rows the run has read when it goes on.
      chosen: where the sample of the training text is.
    """

    tokenizer: Tokenizer
    rows: dict[str, Rows]
    heldout: dict[str, list[Document]]
    facts: dict[str, dict[str, Any]]
    start_row: int
    chosen: Kept

    def fingerprint(self) -> int:
        """A number below 2^31 that follows from the tokenizer, the texts, their tokens and order."""
        tokens = [rows.stream.checksum for rows in self.rows.values()]
        facts = json.dumps([self.tokenizer.to_json(), self.facts, tokens])
        return int(checksum(facts.encode())[:8], 16) >> 1

    def training_sample(self) -> Iterator[str]:
        """Texts of the training split, all of them or about 20 MB, in the order of the files."""
        return (text for _, text in training_sample(self.chosen))


class Earlier(NamedTuple):
    """The data of a run as its checkpoint has them.

    Attributes:
      state: `next_step`, and since there are fingerprints `next_row`, and as `text` the facts of `Data`.
    """

    config: DataConfig
    state: Mapping[str, Any]


def open_data(
    config: DataConfig,
    vocab_size: int,
    tokenizer_dir: str,
    trained_with: str | None = None,
    earlier: Earlier | None = None,
) -> Data:
    """Reads the corpus, finds or trains the tokenizer (kept in `tokenizer_dir`), and packs the training split.

    What has been read and tokenized before is found in the cache, by the names, sizes and times of the files.

    Args:
      trained_with: the fingerprint of the tokenizer that the run's checkpoint was trained with.
      earlier: the run that goes on.
    Raises:
      ValueError: for a source, tokenizer or cache that can't be used; naming it, before any long work. For data whose
        rows are not those that the earlier run would have read next, with both values and the remedy.
    """
    cache = cache_dir(config.cache_dir, paths.at(tokenizer_dir).parent)
    if earlier is not None:
        _check_sequence(earlier.config, config)
    corpus = read_corpus(config, cache)
    for name, train in corpus.train.items():
        heldout = corpus.heldout[name]
        log.info("%s: %d documents, %.2f MB to train on; %d documents, %.3f MB held out",
                 name, len(train), train.bytes / 1e6, len(heldout), size(heldout) / 1e6)  # fmt: skip
    facts = corpus.facts()
    start_row = 0 if earlier is None else _next_row(earlier, config, facts)
    tokenizer = _open_tokenizer(config, corpus, vocab_size, tokenizer_dir, trained_with)
    rows = {}
    for name, train in corpus.train.items():
        stream = build_stream(train, tokenizer, name, config.seed, cache)
        rows[name] = Rows(stream, config.sequence_length)
        count = len(stream)
        log.info("%s: %d tokens in %d rows, %.2f bytes per token",
                 name, count, len(rows[name]), train.bytes / count)  # fmt: skip
    return Data(tokenizer, rows, corpus.heldout, facts, start_row, corpus.chosen)


def _open_tokenizer(
    config: DataConfig, corpus: Corpus, vocab_size: int, tokenizer_dir: str, trained_with: str | None
) -> Tokenizer:
    """The tokenizer of the config, else the one saved by this run, else that of prepared text, else a new one; saved
    in `tokenizer_dir`."""
    saved = None
    if (paths.at(tokenizer_dir) / "tokenizer.json").exists():
        saved = Tokenizer.load(tokenizer_dir)
        saved.check_fits(vocab_size)
        _check_unchanged(saved, trained_with, tokenizer_dir)
        _check_prepared(saved, corpus)
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
    elif prepared := [train.source.prepared for train in corpus.train.values() if train.source.prepared is not None]:
        tokenizer = prepared[0].tokenizer
        tokenizer.check_fits(vocab_size)
    else:
        tokenizer = train_tokenizer(corpus, vocab_size)
    _check_unchanged(tokenizer, trained_with, tokenizer_dir)
    _check_prepared(tokenizer, corpus)
    tokenizer.save(tokenizer_dir)
    return tokenizer


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """The tokenizer that a run without one trains on its text."""
    return Tokenizer.train((text for _, text in sorted(training_sample(corpus.chosen))), vocab_size)


def _check_prepared(tokenizer: Tokenizer, corpus: Corpus) -> None:
    for train in corpus.train.values():
        if train.source.prepared is not None:
            train.source.prepared.check(tokenizer)


def _check_unchanged(tokenizer: Tokenizer, trained_with: str | None, tokenizer_dir: str) -> None:
    if trained_with is not None and tokenizer.fingerprint != trained_with:
        raise ValueError(
            f"the tokenizer in {tokenizer_dir} is not the one that this run's checkpoint was trained with (fingerprint "
            f"{tokenizer.fingerprint}, in the checkpoint {trained_with}): its ids mean other text. Put the run's own "
            "tokenizer.json back, or start a new run with another --run"
        )


def _check_sequence(saved: DataConfig, config: DataConfig) -> None:
    """Refuses settings under which the rows that follow would not be the next ones of the same sequence."""
    old, new = _sequence(saved), _sequence(config)
    if changed := [f"data.{name}: {old[name]} -> {new[name]}" for name in old if old[name] != new[name]]:
        raise ValueError(
            f"the run has read its text with other settings ({'; '.join(changed)}): rows would come twice or never; "
            f"give the old ones (a source is called as its file or folder is; a link will do), or {ANEW}"
        )


def _sequence(config: DataConfig) -> dict[str, Any]:
    """The settings that decide the sequence of rows, besides the text."""
    names = source_names(config)
    shares = [f"{name} (weight {source.weight})" for name, source in zip(names, config.sources, strict=True)]
    sources = ", ".join(shares if len(shares) > 1 else names)  # alone, a source has all rows
    return {"seed": config.seed, "sequence_length": config.sequence_length, "sources": sources}


def _next_row(earlier: Earlier, config: DataConfig, facts: Mapping[str, Mapping[str, Any]]) -> int:
    """How many rows a run has read, whatever its batch was.

    Raises:
      ValueError: if the text is not the one that it read.
    """
    saved, state = earlier
    if "text" not in state:
        log.warning("the checkpoint is from before texts had fingerprints: whether this is its text is not checked")
        return state["next_step"] * saved.global_batch_size
    splits = ("holdout_fraction", "max_bytes", "holdout_max_bytes")
    changed = [(name, getattr(saved, name), getattr(config, name)) for name in splits]
    told = "; ".join(f"data.{name}: {old} -> {new}" for name, old, new in changed if old != new)
    why = f" ({told})" if told else ""
    for name, new in facts.items():
        old = state["text"][name]
        mark = "table" if "table" in old else "checksum"  # of older checkpoints, which know text that is read only
        if any(old[key] != new[key] for key in ("documents", "bytes", mark)):
            there, here = (f"{f['documents']} documents, {f['bytes']} bytes, {f[mark]}" for f in (old, new))
            raise ValueError(
                f"the text of data source {name!r} is not the one that the run has read{why}: {there} in the "
                f"checkpoint, {here} here; bring back files and settings as they were, or {ANEW}"
            )
        if old["heldout"] != new["heldout"]:
            log.warning("%s: other text is held out than in the checkpoint%s: compare no scores", name, why)
    return state["next_row"]


def train_batches(
    rows: Mapping[str, Rows],
    config: DataConfig,
    start_step: int,
    here: Sequence[int] | None = None,
    start_row: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of steps start_step, start_step + 1, ... without end; threads read ahead.

    Args:
      rows: by source name, as `open_data` gives them.
      here: which rows of each global batch to read, all by default; the batches are the same whoever reads them.
      start_row: how many rows the steps before have read; by default as many as with this batch size.

    Returns:
      Dicts of int32 [len(here), T]: tokens, targets, positions, segment_ids (see `Rows`).
    """
    total = config.global_batch_size
    examples = _examples(rows, config)
    first = start_step * total if start_row is None else start_row
    wanted = range(total) if here is None else [int(row) for row in here]

    def load(step: int) -> dict[str, np.ndarray]:
        begun: list[Any] = [examples[first + (step - start_step) * total + row] for row in wanted]
        batch = [read() for read in begun]
        return {name: np.stack([row[name] for row in batch]) for name in batch[0]}

    steps = grain.MapDataset.range(start_step, sys.maxsize).map(load)
    return iter(steps.to_iter_dataset(grain.ReadOptions(READ_THREADS, PREFETCHED_BATCHES)))


@dataclass(frozen=True)
class _Starts:
    """Begins to read rows ahead of their use: all rows of a batch are on their way before the first is waited for."""

    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Callable[[], dict[str, np.ndarray]]:
        return self.rows.start(index)


def _examples(rows: Mapping[str, Rows], config: DataConfig) -> grain.MapDataset:
    """The endless sequence of rows, as what gives them: every source in a new order each epoch, interleaved by weight.

    grain seeds epoch e with seed + e, so neighbouring seeds would share orders: ours are hashes. It keeps weights
    as whole multiples of a hundredth of the smallest, which is exact enough for shares of a mixture.
    """
    sources, weights = [], []
    for name, source in zip(source_names(config), config.sources, strict=True):
        seed = int.from_bytes(hashlib.sha256(f"{config.seed}:{name}".encode()).digest()[:4])
        sources.append(grain.MapDataset.source(_Starts(rows[name])).shuffle(seed).repeat())
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
