"""From a data configuration to training batches and scoring windows.

The rows of all sources form one endless sequence (`data.mixture`), and a batch is the next B of them. How far it has
been read is a few numbers for each source, so a run resumes by going on there, on any number of hosts and with any B.

Legend: B rows of a global batch, T tokens per row, N windows.
"""

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np

from ling_jax.config import DataConfig
from ling_jax.data.mixture import DataState, Draws, NextRow, mixture_of
from ling_jax.data.packing import IGNORE, ROW, Rows, build_stream, pad
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
      facts: see `Corpus.facts`; a run's checkpoints have them, also of sources that it reads no more.
      state: how far an earlier session has read, if there was one.
      chosen: where the sample of the training text is.
    """

    tokenizer: Tokenizer
    rows: dict[str, Rows]
    heldout: dict[str, list[Document]]
    facts: dict[str, dict[str, Any]]
    state: DataState | None
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
      state: `next_step`; since there are fingerprints also `next_row`, and as `text` the facts of `Data`; and since
        sources have places, as `read` the `DataState`.
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
        _check_sequence(earlier, config)
    corpus = read_corpus(config, cache)
    for name, train in corpus.train.items():
        heldout = corpus.heldout[name]
        log.info("%s: %d documents, %.2f MB to train on; %d documents, %.3f MB held out",
                 name, len(train), train.bytes / 1e6, len(heldout), size(heldout) / 1e6)  # fmt: skip
    facts = corpus.facts()
    state = None if earlier is None else _state_of(earlier, config, facts)
    tokenizer = _open_tokenizer(config, corpus, vocab_size, tokenizer_dir, trained_with)
    rows = {}
    for name, train in corpus.train.items():
        stream = build_stream(train, tokenizer, name, config.seed, cache)
        rows[name] = Rows(stream, config.sequence_length)
        count = len(stream)
        log.info("%s: %d tokens in %d rows, %.2f bytes per token",
                 name, count, len(rows[name]), train.bytes / count)  # fmt: skip
    known = {} if earlier is None else earlier.state.get("text", {})
    return Data(tokenizer, rows, corpus.heldout, {**known, **facts}, state, corpus.chosen)


def _open_tokenizer(
    config: DataConfig, corpus: Corpus, vocab_size: int, tokenizer_dir: str, trained_with: str | None
) -> Tokenizer:
    """The `run_tokenizer` of a corpus; a new one is that of prepared text, else trained."""

    def new() -> Tokenizer:
        prepared = [train.source.prepared for train in corpus.train.values() if train.source.prepared is not None]
        return prepared[0].tokenizer if prepared else train_tokenizer(corpus, vocab_size)

    def check(tokenizer: Tokenizer) -> None:
        for train in corpus.train.values():
            if train.source.prepared is not None:
                train.source.prepared.check(tokenizer)

    return run_tokenizer(config.tokenizer, vocab_size, tokenizer_dir, trained_with, new, check)


def run_tokenizer(
    named: str | None,
    vocab_size: int,
    tokenizer_dir: str,
    trained_with: str | None,
    new: Callable[[], Tokenizer],
    check: Callable[[Tokenizer], None] = lambda tokenizer: None,
) -> Tokenizer:
    """A run's tokenizer: the one that is `named`, else the one that it saved before, else a new one; saved in
    `tokenizer_dir`.

    Args:
      trained_with: the fingerprint of the one that the run's checkpoint was trained with.
      check: raises ValueError for one that does not fit the text.
    Raises:
      ValueError: for one that does not fit the model, or is not the one that the run began with.
    """
    saved = None
    if (paths.at(tokenizer_dir) / "tokenizer.json").exists():
        saved = Tokenizer.load(tokenizer_dir)
        saved.check_fits(vocab_size)
        _check_unchanged(saved, trained_with, tokenizer_dir)
        check(saved)
    if named is None and saved is not None:
        return saved
    tokenizer = new() if named is None else Tokenizer.load(named)
    tokenizer.check_fits(vocab_size)
    if saved is not None and saved.to_json() != tokenizer.to_json():
        raise ValueError(
            f"data.tokenizer = {named!r} differs from the tokenizer this run began with, in {tokenizer_dir}; leave "
            "data.tokenizer unset, or start a new run"
        )
    _check_unchanged(tokenizer, trained_with, tokenizer_dir)
    check(tokenizer)
    tokenizer.save(tokenizer_dir)
    return tokenizer


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """The tokenizer that a run without one trains on its text."""
    return Tokenizer.train((text for _, text in sorted(training_sample(corpus.chosen))), vocab_size)


def _check_unchanged(tokenizer: Tokenizer, trained_with: str | None, tokenizer_dir: str) -> None:
    if trained_with is not None and tokenizer.fingerprint != trained_with:
        raise ValueError(
            f"the tokenizer in {tokenizer_dir} is not the one that this run's checkpoint was trained with (fingerprint "
            f"{tokenizer.fingerprint}, in the checkpoint {trained_with}): its ids mean other text. Put the run's own "
            "tokenizer.json back, or start a new run with another --run"
        )


def _check_sequence(earlier: Earlier, config: DataConfig) -> None:
    """Refuses settings under which a token could come twice before its source's epoch ends."""
    saved, state = earlier
    if saved.seed != config.seed:
        raise ValueError(
            f"data.seed: {saved.seed} -> {config.seed}: the run has read its text in the order of the former, so rows "
            f"would come twice or never; give the old one, or {ANEW}"
        )
    if saved.long_document != config.long_document:
        raise ValueError(
            f"data.long_document: {saved.long_document} -> {config.long_document}: rows are read in another order, so "
            f"some would come twice or never; give the old one, or {ANEW}"
        )
    block = state["read"]["block"] if "read" in state else saved.sequence_length
    if (longest := max(config.sequence_length, config.block_length)) > block:
        raise ValueError(
            f"data.sequence_length: {saved.sequence_length} -> {longest}: the run reads its text in blocks of {block} "
            f"tokens, and of longer rows a part would come twice; give at most {block}, or {ANEW}"
        )


def _state_of(earlier: Earlier, config: DataConfig, facts: Mapping[str, Mapping[str, Any]]) -> DataState:
    """How far a run has read, whatever its batch was.

    Raises:
      ValueError: if the text is not the one that it read.
    """
    saved, state = earlier
    if "text" not in state:
        log.warning("the checkpoint is from before texts had fingerprints: whether this is its text is not checked")
        return _before_places(saved, state["next_step"] * saved.global_batch_size)
    _check_text(saved, config, state["text"], facts)
    if "read" not in state:
        return _before_places(saved, state["next_row"])
    return DataState(**state["read"])


def _check_text(
    saved: DataConfig, config: DataConfig, known: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuses text that is not what the run has read under its name, or what it has read under another."""
    splits = ("holdout_fraction", "max_bytes", "holdout_max_bytes")
    changed = [(name, getattr(saved, name), getattr(config, name)) for name in splits]
    told = "; ".join(f"data.{name}: {old} -> {new}" for name, old, new in changed if old != new)
    why = f" ({told})" if told else ""
    for name, new in facts.items():
        if name not in known:
            _check_new(name, new, {n: old for n, old in known.items() if n not in facts})
            continue
        old = known[name]
        if _identity(old, old) != _identity(new, old):
            there, here = (", ".join(map(str, _identity(f, old))) for f in (old, new))
            raise ValueError(
                f"the text of data source {name!r} is not the one that the run has read{why}: {there} in the "
                f"checkpoint, {here} here; bring back files and settings as they were, or {ANEW}"
            )
        if old["heldout"] != new["heldout"]:
            log.warning("%s: other text is held out than in the checkpoint%s: compare no scores", name, why)


def _check_new(name: str, new: Mapping[str, Any], left: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses a source under a new name that is one of those which were `left` out."""
    if same := [old for old, facts in left.items() if _identity(facts, facts) == _identity(new, facts)]:
        raise ValueError(
            f"data source {name!r} is the text that the run has read as {same[0]!r}: its rows would come twice; a "
            "source is called as its file or folder is: give it the old name (a link will do)"
        )
    log.info("%s: new to this run, read from its beginning", name)


def _identity(facts: Mapping[str, Any], saved: Mapping[str, Any]) -> tuple[str, str, Any]:
    """A text's identity, as far as the facts `saved` with a checkpoint go: those of older versions know only
    text that is not prepared."""
    mark = facts["table" if "table" in saved else "checksum"]
    return f"{facts['documents']} documents", f"{facts['bytes']} bytes", mark


def _before_places(config: DataConfig, rows: int) -> DataState:
    """How far a run had read that older versions saved: grain interleaved the sources by their weights."""
    names, weights = source_names(config), [source.weight for source in config.sources]
    counts = [rows]
    if len(names) > 1:
        sources = [grain.MapDataset.range(1).map(lambda _, i=i: i).repeat() for i in range(len(names))]
        mixed = grain.MapDataset.mix(sources, weights)
        drawn = Counter(mixed[row] for row in range(rows))
        counts = [drawn[i] for i in range(len(names))]
    places = {name: count * config.sequence_length for name, count in zip(names, counts, strict=True)}
    return DataState(rows, rows * config.sequence_length, config.sequence_length, places, {}, {})


class DataBatch(NamedTuple):
    """A step's rows, and what is known of them.

    Attributes:
      arrays: int32 [rows, T]: tokens, targets, positions, segment_ids (see `Rows`). Where the batch is still smaller
        than `data.global_batch_size`, the rows that are lacking are padding, the last ones.
      state: how far the data has been read when the step is done.
      metrics: the same, to be logged.
    """

    arrays: dict[str, np.ndarray]
    state: DataState
    metrics: dict[str, float]


def train_batches(
    rows: Mapping[str, Rows],
    config: DataConfig,
    start_step: int = 0,
    here: Sequence[int] | None = None,
    state: DataState | None = None,
) -> Iterator[DataBatch]:
    """The batches of steps start_step, start_step + 1, ... without end; threads read ahead.

    Args:
      rows: by source name, as `open_data` gives them.
      here: which rows of each global batch to read, all by default; the batches are the same whoever reads them.
      state: how far an earlier session has read; by default the steps before have read as many rows with this batch.
    """
    mixture, begin = mixture_of(rows, config, state)
    if state is None:
        begin = mixture.draw(begin, config.tokens_of(0, start_step) // config.sequence_length)[1]
    draws = Draws(mixture, begin, start_step, config)
    padding = {name: pad(np.empty(0, np.int32), config.sequence_length, name) for name in ROW}
    wanted = range(config.global_batch_size) if here is None else [int(row) for row in here]

    def start(row: NextRow) -> Callable[[], dict[str, np.ndarray]]:
        return rows[row.source].start_at(row.begin, row.count)

    def load(step: int) -> DataBatch:
        pieces, after = draws.take(step)
        begun = [
            rows[r.source].start_at(r.begin, r.count) for r in (pieces[row] for row in wanted if row < len(pieces))
        ]
        reads = iter(begun)  # all are on their way
        batch = [next(reads)() if row < len(pieces) else padding for row in wanted]
        arrays = {name: np.stack([row[name] for row in batch]) for name in ROW}
        size = {"data/batch_size": float(len(pieces))} if config.batch_ramp_tokens else {}
        return DataBatch(arrays, after, mixture.metrics(after) | size)

    return in_background(start_step, load)


def in_background(start_step: int, load: Callable[[int], DataBatch]) -> Iterator[DataBatch]:
    """load(start_step), load(start_step + 1), ... without end; threads load ahead."""
    steps = grain.MapDataset.range(start_step, sys.maxsize).map(load)
    return iter(steps.to_iter_dataset(grain.ReadOptions(READ_THREADS, PREFETCHED_BATCHES)))


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
