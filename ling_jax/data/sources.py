"""A corpus: which documents of the data sources are trained on, which are held out, and the text of both.

The split looks only at a document's origin, so it is the same for every seed, machine and sample size, and text
derived from a file (its docstrings) stays on the file's side. What is decided is kept beside the sources' tables, with
the held-out text and a sample of the rest; a table takes one byte a document in memory, and the text none.

Legend: D documents of a source, in the order of its files.
"""

import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ling_jax.config import DataConfig
from ling_jax.data.built_in import BUILT_IN
from ling_jax.data.reading import PACKED, Document, whole
from ling_jax.data.remote import Column
from ling_jax.data.shards import DERIVED, Prepared
from ling_jax.data.store import Columns, Kept, by_range, cache_dir, keep, parts, stable_order
from ling_jax.data.survey import Source, key_of, numbered
from ling_jax.files import paths
from ling_jax.files.whole import checksum

log = logging.getLogger(__name__)

TOKENIZER_SAMPLE_BYTES = 20_000_000  # of training text; more changes a vocabulary little
LONGEST_SAMPLED = 250_000  # characters of a document that a sample takes whole, however small the sample
SAMPLED_AT_ONCE = 4096


@dataclass(frozen=True)
class Training:
    """The training documents of a source, which every iteration reads anew, each in one piece.

    Attributes:
      kept_D: uint8, 1 for a document that is trained on.
      limit: characters of the only document, where it alone is more than `data.max_bytes`.
      bytes: of all their texts, in UTF-8.
      digest: follows from their texts and origins.
      table: the same, and is equal whether they are read from text or were prepared.
    """

    source: Source
    kept_D: np.ndarray | Column
    limit: int | None
    count: int
    bytes: int
    digest: str
    table: str

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Document]:
        return whole(self.blocks())

    @property
    def prepared(self) -> Prepared | None:
        """The shards with the documents' tokens; None where they are in none, or are parts of what is there."""
        return None if self.source.cut or self.limit is not None else self.source.prepared

    def blocks(self) -> Iterator[Document]:
        """The documents as they are read: a long one comes in blocks."""
        kept = memoryview(np.asarray(self.kept_D))
        blocks = (block for index, block in numbered(self.source.read()) if index < len(kept) and kept[index])
        return blocks if self.limit is None else whole(blocks, self.limit)


@dataclass(frozen=True)
class Corpus:
    """Documents by data source (`source_names`), in the order of the config; no text is on both sides.

    Attributes:
      chosen: the entry that says so; see `training_sample`.
    """

    train: dict[str, Training]
    heldout: dict[str, list[Document]]
    chosen: Kept

    def facts(self) -> dict[str, dict[str, Any]]:
        """The fingerprint of each source's text that a checkpoint keeps, as JSON: it follows from the files' contents
        and their paths in the source, not from where that is or when they were written."""
        return {
            name: {
                "documents": len(train),
                "bytes": train.bytes,
                "checksum": train.digest,
                "table": train.table,
                "heldout": checksum("\0".join(document.text for document in self.heldout[name]).encode()),
            }
            for name, train in self.train.items()
        }


def training_sample(chosen: Kept) -> list[tuple[int, str]]:
    """(rank, text) of a seeded sample of a corpus's training documents, in the order of the files.

    It has about TOKENIZER_SAMPLE_BYTES, or all there is; of a long document only a share of that is taken.
    """
    return [tuple(json.loads(line)) for line in chosen["sample"].tobytes().splitlines()]


def source_names(config: DataConfig) -> list[str]:
    """A name per data source: the built-in's own, or the file's or folder's; the whole path where two agree."""
    paths = [source.path for source in config.sources]
    stems = [path if path in BUILT_IN else _stem(path) or path for path in paths]
    names = [stem if stems.count(stem) == 1 else path for stem, path in zip(stems, paths, strict=True)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"data source {name!r} is listed twice; list it once, with a larger weight")
    return names


def _stem(path: str) -> str:
    name = Path(path)
    return Path(name.stem).stem if name.suffix.lower() in PACKED else name.stem


def read_corpus(config: DataConfig, cache: paths.Path | None = None) -> Corpus:
    """Reads every source that has not been read before, splits, deduplicates and samples; held-out text wins over
    equal training text.

    Args:
      cache: where tables and samples are kept; `data.cache_dir` by default.
    Raises:
      ValueError: naming the path and what is wrong with it: missing, empty, undecodable, no documents.
    """
    cache = cache_dir(config.cache_dir) if cache is None else cache
    settings = zip(source_names(config), config.sources, strict=True)
    sources = [Source(name, source, cache, config.holdout_fraction) for name, source in settings]
    facts = [[source.name, source.settings.licence, source.table.facts["content"], source.cut] for source in sources]
    limits = [config.holdout_fraction, config.holdout_max_bytes, config.max_bytes, config.seed]
    what = f"{', '.join(source.name for source in sources)}: choosing what to hold out"
    chosen = keep(
        cache, key_of("corpus 2", facts, limits), what, lambda columns: _choose(sources, config, cache, columns)
    )
    heldout: dict[str, list[Document]] = {source.name: [] for source in sources}
    for line in chosen["heldout"].tobytes().splitlines():
        number, *fields = json.loads(line)
        heldout[sources[number].name].append(Document(*fields))
    train = {
        source.name: Training(source, chosen.columns[f"train{i}"], **chosen.facts["train"][i])
        for i, source in enumerate(sources)
    }
    return Corpus(train, heldout, chosen)


def size(documents: Iterable[Document]) -> int:
    """UTF-8 bytes of the documents' texts."""
    return sum(len(document.text.encode()) for document in documents)


# ---------------------------------------------------------------------------------------------------
# What goes where.


def _choose(sources: Sequence[Source], config: DataConfig, cache: paths.Path, columns: Columns) -> dict[str, Any]:
    """Fills the columns `train0`, `train1`, ... (uint8 [D]), `heldout` and `sample` (lines of JSON)."""
    tables = [source.table.in_memory() for source in sources]
    heldout = [held_out(table, config.holdout_fraction) for table in tables]
    train = [~held for held in heldout]
    for source, dropped, held, rest in zip(sources, duplicates(tables, heldout), heldout, train, strict=True):
        held &= ~dropped
        rest &= ~dropped
        if dropped.any():
            log.info("%s: %d duplicate documents dropped", source.name, dropped.sum())
        if not held.any() or not rest.any():
            raise ValueError(
                f"data source {source.name!r} has too few distinct documents: {rest.sum()} to train on and "
                f"{held.sum()} held out; add text, or change data.holdout_fraction"
            )
    facts: list[dict[str, Any]] = []
    held_limit = max(LONGEST_SAMPLED, config.holdout_max_bytes)
    for i, table in enumerate(tables):
        limit = None
        if config.max_bytes is not None and _sample(table, train[i], config.max_bytes, config.seed, cache):
            limit = max(LONGEST_SAMPLED, config.max_bytes)
        _sample(table, heldout[i], config.holdout_max_bytes, config.seed, cache)
        columns.append(f"train{i}", train[i].view(np.uint8))
        count, total = int(train[i].sum()), _bytes(table, train[i])
        digest = checksum(json.dumps([table.facts["content"], limit, checksum(train[i])]).encode())
        size = min(total, limit or total)
        told = {"digest": digest, "table": _digest(table, train[i], limit)}
        facts.append({"count": count, "bytes": size, "limit": limit, **told})
    picks, longest = _ranked_sample(tables, train, config.seed, cache)
    for name in ("heldout", "sample"):
        columns.append(name, np.empty(0, np.uint8))
    for i, source in enumerate(sources):
        indices = set(np.flatnonzero(heldout[i]).tolist())
        for index, document in _picked(source, indices | picks[i].keys(), max(held_limit, longest)):
            if index in indices:
                [short] = whole([document], held_limit)
                columns.append("heldout", _line([i, *astuple(short)]))
            else:
                [short] = whole([document], min(longest, facts[i]["limit"] or longest))
                columns.append("sample", _line([picks[i][index], short.text]))
    return {"train": facts}


def _digest(table: Kept, chosen_D: np.ndarray, limit: int | None) -> str:
    """A checksum of what the table says of the texts and origins of some documents."""
    sums = [
        checksum(np.ascontiguousarray(table[name][part][chosen_D[part]]))
        for part in parts(len(chosen_D))
        for name in ("share", "high", "low", "bytes")
    ]
    return checksum(json.dumps([limit, *sums]).encode())


def _line(value: list[Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode() + b"\n", np.uint8)


def held_out(table: Kept, fraction: float) -> np.ndarray:
    """bool [D]: about `fraction` of the origins are held out, at least one and not all of them."""
    least, most = table.facts["least"], table.facts["most"]
    held = np.empty(len(table["share"]), bool)
    for part in parts(len(held)):
        share = table["share"][part]
        held[part] = (share == np.uint64(least)) | ((share * 2.0**-64 < fraction) & (share < np.uint64(most)))
    return held


def duplicates(tables: Sequence[Mapping[str, np.ndarray] | Kept], heldout: Sequence[np.ndarray]) -> list[np.ndarray]:
    """bool [D] of every source: all but the first of equal texts, held-out ones before others.

    Texts are equal where 128 bits of their digests are. With a dropped file go the docstrings taken from it.
    """
    dropped = [np.zeros(len(held), bool) for held in heldout]
    begins = np.cumsum([0, *map(len, heldout)])

    def gathered(column: str, part: slice) -> np.ndarray:
        """The values of a slice of all documents, one source after the other."""
        pieces = [
            table[column][max(0, part.start - begin) : max(0, part.stop - begin)]
            for table, begin in zip(tables, begins.tolist(), strict=False)
        ]
        return np.concatenate(pieces)

    for numbers in by_range(int(begins[-1]), lambda part: gathered("high", part)):
        source = np.searchsorted(begins, numbers, side="right") - 1
        high, low = (np.empty(len(numbers), np.uint64) for _ in range(2))
        later = np.empty(len(numbers), bool)
        for i, table in enumerate(tables):
            at = numbers[source == i] - begins[i]
            high[source == i], low[source == i], later[source == i] = (
                table["high"][at],
                table["low"][at],
                ~heldout[i][at],
            )
        order = np.lexsort((numbers, later, low, high))
        equal = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
        again = order[1:][equal]
        for i in range(len(tables)):
            dropped[i][numbers[again[source[again] == i]] - begins[i]] = True
    for table, gone in zip(tables, dropped, strict=True):
        for part in parts(len(gone)):
            derived = part.start + np.flatnonzero(table["kind"][part] == DERIVED)
            gone[derived] |= gone[derived - 1]
    return dropped


# ---------------------------------------------------------------------------------------------------
# Samples.


def _bytes(table: Kept, chosen_D: np.ndarray) -> int:
    return sum(int(table["bytes"][part][chosen_D[part]].sum()) for part in parts(len(chosen_D)))


def _sample(table: Kept, chosen_D: np.ndarray, max_bytes: int, seed: int, cache: paths.Path) -> bool:
    """Leaves whole documents of at most `max_bytes` together, a seeded choice; where not even one fits, the smallest,
    and returns True."""
    if _bytes(table, chosen_D) <= max_bytes:
        return False
    places = np.flatnonzero(chosen_D)
    sizes = table["bytes"][places]
    chosen_D[:] = False
    room, least = max_bytes, int(sizes.min())
    for order in stable_order(len(places), seed, "sample", cache):
        for index in order[sizes[order] <= room].tolist():
            if sizes[index] <= room:
                chosen_D[places[index]] = True
                room -= int(sizes[index])
        if room < least:
            break
    if room < max_bytes:
        return False
    chosen_D[places[np.argmin(sizes)]] = True
    return True


def _ranked_sample(
    tables: Sequence[Kept], train: Sequence[np.ndarray], seed: int, cache: paths.Path
) -> tuple[list[dict[int, int]], int]:
    """(rank by number for each source, longest) of training documents in a seeded order, up to TOKENIZER_SAMPLE_BYTES
    of them; of each at most `longest` characters are taken."""
    ends = np.cumsum([int(chosen.sum()) for chosen in train])
    total = sum(_bytes(table, chosen) for table, chosen in zip(tables, train, strict=True))
    room = longest = TOKENIZER_SAMPLE_BYTES
    if total > room:
        longest = max(LONGEST_SAMPLED, room // int(ends[-1]))
    picks: list[dict[int, int]] = [{} for _ in tables]
    ranks = itertools.count()
    for order in stable_order(int(ends[-1]), seed, "tokenizer", cache):
        for start in range(0, len(order), SAMPLED_AT_ONCE):
            batch = order[start : start + SAMPLED_AT_ONCE]
            source = np.searchsorted(ends, batch, side="right")
            places, sizes = np.empty_like(batch), np.empty_like(batch)
            for i, (table, chosen) in enumerate(zip(tables, train, strict=True)):
                mine = source == i
                places[mine] = _places(chosen, batch[mine] - (ends[i] - int(chosen.sum())))
                sizes[mine] = table["bytes"][places[mine]]
            for i, place, length in zip(source.tolist(), places.tolist(), sizes.tolist(), strict=True):
                if room <= 0:
                    return picks, longest
                room -= min(length, longest)
                picks[i][place] = next(ranks)
    return picks, longest


def _places(chosen_D: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Where among all documents the chosen ones of these ranks are."""
    places, before = np.empty_like(ranks), 0
    for part in parts(len(chosen_D)):
        found = np.flatnonzero(chosen_D[part])
        here = (ranks >= before) & (ranks < before + len(found))
        places[here] = part.start + found[ranks[here] - before]
        before += len(found)
    return places


def _picked(source: Source, wanted: set[int], limit: int) -> Iterator[tuple[int, Document]]:
    """(number, document) of the wanted ones, each in one piece of about `limit` characters at most."""
    return zip(sorted(wanted), whole(source.pick(wanted), limit), strict=True)
