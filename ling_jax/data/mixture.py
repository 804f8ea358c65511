"""Which row comes next: of several sources, one of the source that is furthest behind its share of the tokens.

A source is read in blocks of the run's longest row, in an order that the seed fixes and every epoch changes; a shorter
row is a part of a block. So a place in a source is a number of tokens, which means the same at every sequence length,
and a source that is added, or whose share changes, moves no other.

Legend: B rows of a global batch.
"""

import dataclasses
import hashlib
import logging
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import grain
import numpy as np

from ling_jax.config import DataConfig, DataSource
from ling_jax.data.packing import Rows, Stream
from ling_jax.data.sources import source_names
from ling_jax.data.store import parts

log = logging.getLogger(__name__)

LONG = " (long rows)"  # what the name of a source's long rows ends in
MANY_EPOCHS = 4  # up to which repeated text is nearly as good as new (Muennighoff et al., arXiv 2305.16264)


@dataclasses.dataclass(frozen=True)
class DataState:
    """How far a run has read: all that decides its next rows, besides the settings and the text.

    Attributes:
      rows, tokens: that were read in all, padding counted.
      block: tokens of a block.
      places: by source, also of those that are read no more: tokens of its blocks that are behind it, over all epochs.
      drawn: by source: tokens, padding not counted, since the shares are what they are.
      shares: what they are.
    """

    rows: int
    tokens: int
    block: int
    places: Mapping[str, int]
    drawn: Mapping[str, int]
    shares: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class NextRow(NamedTuple):
    """A row that comes: `count` tokens at most of a source's stream, from `begin` on."""

    source: str
    begin: int
    count: int


class _Source:
    """One source's rows by their place."""

    def __init__(
        self,
        name: str,
        rows: Rows,
        block: int,
        seed: int,
        max_epochs: float | None,
        only_D: np.ndarray | None = None,
        key: str = "",
    ):
        """Args:
        only_D: the blocks that it has, if it has not all.
        key: of the source in a `DataState`; its name by default.
        """
        self.name, self.block, self.only_D = name, block, only_D
        self.last = max(len(rows.stream) - 1, 1)  # the stream's last token has no successor to predict
        self.blocks = -(-self.last // block) if only_D is None else len(only_D)
        self.limit = None if max_epochs is None else round(max_epochs * self.blocks) * block
        # grain seeds epoch e with seed + e, so neighbouring seeds would share orders: ours are hashes.
        digest = int.from_bytes(hashlib.sha256(f"{seed}:{key or name}".encode()).digest()[:4])
        self.order: Any = grain.MapDataset.range(self.blocks).shuffle(digest).repeat()

    def is_open(self, place: int) -> bool:
        return self.limit is None or place < self.limit

    def epochs(self, place: int) -> float:
        """How often it has been read up to a place."""
        return place / (self.blocks * self.block)

    def piece(self, place: int, length: int) -> tuple[NextRow, int]:
        """The row of up to `length` tokens at a place, and the place behind it."""
        number, inside = divmod(place, self.block)
        block = self.order[number]
        begin = (block if self.only_D is None else int(self.only_D[block])) * self.block + inside
        count = min(length, self.block - inside, self.last - begin)
        at_end = inside + length >= self.block or begin + length >= self.last
        return NextRow(self.name, begin, count), (number + 1) * self.block if at_end else place + length


class Mixture:
    """The sources of a run, by their shares."""

    def __init__(self, rows: Mapping[str, Rows], config: DataConfig, block: int):
        self.length = config.sequence_length
        asked = dict(zip(source_names(config), config.sources, strict=True))
        total = sum(source.weight for source in asked.values())
        self.block, self.asked = block, {name: source.weight / total for name, source in asked.items()}
        self.sources = {name: _Source(name, rows[name], block, config.seed, s.max_epochs) for name, s in asked.items()}
        self.tags = {name: source.tag for name, source in asked.items() if source.tag}
        if config.long_document:
            self._tell_apart(rows, config, asked)

    def _tell_apart(self, rows: Mapping[str, Rows], config: DataConfig, asked: Mapping[str, DataSource]) -> None:
        """Makes two sources of each that has long rows and others; the long ones get their share of the tokens."""
        block, wanted, natural = self.block, config.long_share, {}
        if config.long_document > block:
            raise ValueError(
                f"data.long_document = {config.long_document} must be at most the run's longest row, {block} tokens"
            )
        for name, settings in asked.items():
            is_long = long_blocks(rows[name].stream, block, config.long_document)
            sizes = np.full(len(is_long), block)
            sizes[-1] = max(len(rows[name].stream) - 1, 1) - block * (len(sizes) - 1)  # perhaps a few tokens
            natural[name] = float(sizes[is_long].sum() / sizes.sum())
            for key, mine in ((name, ~is_long), (f"{name}{LONG}", is_long)):
                found = np.flatnonzero(mine)
                self.sources[key] = _Source(name, rows[name], block, config.seed, settings.max_epochs, found, key)
        long_total = sum(share for name, share in self.asked.items() if natural[name])
        if wanted and not long_total:
            raise ValueError(
                f"data.long_share = {wanted}, but no row of {block} tokens has {config.long_document} of one document: "
                "lower data.long_document, or add longer documents"
            )
        for name, share in list(self.asked.items()):
            part = natural[name] if wanted is None else wanted / long_total if natural[name] else 0.0
            part = 1.0 if natural[name] == 1 else min(part, 1.0)  # it has no others
            self.asked |= {name: share * (1 - part), f"{name}{LONG}": share * part}
        self.sources = {key: source for key, source in self.sources.items() if self.asked[key] > 0}
        self.asked = {key: self.asked[key] for key in self.sources}

    def start(self, earlier: DataState | None = None) -> DataState:
        """Where reading begins, or goes on after an earlier session, whose sources and shares may have been others."""
        places = {} if earlier is None else dict(earlier.places)
        places = {**dict.fromkeys(self.sources, 0), **places}
        shares = self._shares(places)
        kept = earlier is not None and dict(earlier.shares) == shares
        drawn = dict(earlier.drawn) if earlier is not None and kept else dict.fromkeys(shares, 0)
        rows, tokens = (0, 0) if earlier is None else (earlier.rows, earlier.tokens)
        return DataState(rows, tokens, self.block, places, drawn, shares)

    def draw(self, state: DataState, count: int) -> tuple[list[NextRow], DataState]:
        """The next rows, and the state behind them.

        Raises:
          ValueError: if every source has been read as often as it may be.
        """
        places, drawn, shares, pieces = dict(state.places), dict(state.drawn), dict(state.shares), []
        total = sum(drawn.values())
        for _ in range(count):
            if not shares:
                raise ValueError(self._all_read())
            name = max(shares, key=lambda n: shares[n] * (total + self.length) - drawn[n])
            piece, places[name] = self.sources[name].piece(places[name], self.length)
            pieces.append(piece)
            drawn[name] += piece.count
            total += piece.count
            if not self.sources[name].is_open(places[name]):
                shares = self._shares(places)
                drawn, total = dict.fromkeys(shares, 0), 0
        rows, tokens = state.rows + count, state.tokens + count * self.length
        return pieces, DataState(rows, tokens, state.block, places, drawn, shares)

    def _shares(self, places: Mapping[str, int]) -> dict[str, float]:
        """The shares of the sources that may still be read: of those that may not go to the others in proportion."""
        still = {name: share for name, share in self.asked.items() if self.sources[name].is_open(places[name])}
        total = sum(still.values())
        return {name: share / total for name, share in still.items()}

    def _all_read(self) -> str:
        told = ", ".join(f"{name} {s.epochs(s.limit):g}" for name, s in self.sources.items() if s.limit is not None)
        return (
            f"every data source has been read as often as its max_epochs allows ({told}): raise one, add a source, or "
            "set train.steps to the steps that are done"
        )

    def metrics(self, state: DataState) -> dict[str, float]:
        """The share that each of several sources has of the tokens drawn since the shares are what they are, and each
        tag, and how often each source has been read; {} for one alone."""
        if len(self.sources) == 1:
            return {}
        total = max(sum(state.drawn.values()), 1)
        shares = {f"data/{name}/share": state.drawn.get(name, 0) / total for name in self.sources}
        for tag in dict.fromkeys(self.tags.values()):
            drawn = (state.drawn.get(name, 0) for name in self.sources if self.tags.get(name.removesuffix(LONG)) == tag)
            shares[f"data/tag_{tag}"] = sum(drawn) / total
        return shares | {f"data/{name}/epochs": s.epochs(state.places[name]) for name, s in self.sources.items()}

    def planned(self, state: DataState, rows: int) -> dict[str, int]:
        """About how many tokens of each source the next rows will have.

        Raises:
          ValueError: if the sources that are left do not have so many.
        """
        room = {name: s.limit - state.places[name] for name, s in self.sources.items() if s.limit is not None}
        planned, shares, left = dict.fromkeys(self.sources, 0.0), dict(state.shares), float(rows * self.length)
        while left > 0:
            if not shares:
                raise ValueError(self._all_read())
            until = min([left, *((room[n] - planned[n]) / shares[n] for n in shares if n in room)])
            planned = {n: tokens + until * shares.get(n, 0.0) for n, tokens in planned.items()}
            left -= until
            shares = {n: share for n, share in shares.items() if n not in room or planned[n] < room[n] - 0.5}
            shares = {n: share / sum(shares.values()) for n, share in shares.items()}
        return {name: round(tokens) for name, tokens in planned.items()}

    def announce(self, state: DataState, rows: int) -> None:
        """Logs what of each source the next rows will have; ValueError as `planned`."""
        for name, tokens in self.planned(state, rows).items():
            epochs = self.sources[name].epochs(state.places[name] + tokens)
            share = tokens / (rows * self.length) if rows else 0.0
            log.info("%s: %.2f%% of the tokens to come, in all read %.2f times", name, 100 * share, epochs)
            if epochs > MANY_EPOCHS:
                log.warning("%s will have been read more than %d times: text that comes again teaches less and less; "
                            "its max_epochs would give its share to the others", name, MANY_EPOCHS)  # fmt: skip


def long_blocks(stream: Stream, block: int, least: int) -> np.ndarray:
    """bool [blocks]: which blocks of a stream have `least` tokens of one document, which is at most `block`."""
    total = max(len(stream) - 1, 1)
    changes = np.zeros(-(-total // block) + 1, np.int64)  # where runs of long blocks begin (1) and have ended (-1)
    starts_D = stream.starts_D
    for part in parts(len(starts_D)):
        begins = np.asarray(starts_D[part])
        ends = np.append(begins[1:], starts_D[part.stop] if part.stop < len(starts_D) else total)
        big = ends - begins >= least
        begins, ends = begins[big], np.minimum(ends[big], total)
        first, last = begins // block, (ends - 1) // block
        first += np.minimum(ends, (first + 1) * block) - begins < least
        last -= ends - np.maximum(begins, last * block) < least
        some = first <= last
        np.add.at(changes, first[some], 1)
        np.add.at(changes, last[some] + 1, -1)
    return np.cumsum(changes[:-1]) > 0


def mixture_of(rows: Mapping[str, Rows], config: DataConfig, state: DataState | None) -> tuple[Mixture, DataState]:
    """The mixture of a run, and where it begins to read, or goes on after the `state` of an earlier session."""
    block = config.block_length or config.sequence_length
    mixture = Mixture(rows, config, block if state is None else state.block)
    return mixture, mixture.start(state)


@dataclasses.dataclass
class Draws:
    """The rows of step after step, drawn once and in order, whichever thread asks first."""

    mixture: Mixture
    state: DataState  # before step `step`
    step: int
    config: DataConfig
    ready: dict[int, tuple[list[NextRow], DataState]] = dataclasses.field(default_factory=dict)
    lock: Any = dataclasses.field(default_factory=threading.Lock)

    def take(self, step: int) -> tuple[list[NextRow], DataState]:
        """The rows of a step, and the state behind them; every step is taken once."""
        with self.lock:
            while self.step <= step:
                pieces, self.state = self.mixture.draw(self.state, self.config.batch_at(self.state.tokens))
                self.ready[self.step] = pieces, self.state
                self.step += 1
            return self.ready.pop(step)
