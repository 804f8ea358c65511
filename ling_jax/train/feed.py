"""The data that a run is trained on and scored by: its batches, its held-out text, its needles."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ling_jax.config import DataConfig, RunConfig, StageRun
from ling_jax.data.baselines import baselines
from ling_jax.data.mixture import DataState, mixture_of
from ling_jax.data.packing import Rows
from ling_jax.data.pipeline import Data, DataBatch, Earlier, open_data, train_batches
from ling_jax.data.sources import source_names
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.train.needle import Needles, prepare_needles
from ling_jax.train.session import Session
from ling_jax.train.validate import HeldOut, prepare_held_out

log = logging.getLogger(__name__)


class Reading(NamedTuple):
    """All that a stage of a run reads.

    Attributes:
      begin: how far the run has read before.
      batches: of the steps to come, without end, for the session that takes them: what its weights draw, perhaps.
      held_out: by source, or another part that is scored by itself.
    """

    begin: DataState
    batches: Callable[[Session], Iterator[DataBatch]]
    held_out: dict[str, HeldOut]
    needles: Needles


class Feed(Protocol):
    """All that a run reads.

    Attributes:
      facts: what its texts are told by, as JSON; the run's checkpoints have them.
      state: how far an earlier session has read, if there was one.
    """

    tokenizer: Tokenizer
    state: DataState | None

    @property
    def facts(self) -> Mapping[str, Any]: ...

    def fingerprint(self) -> int:
        """A number below 2^31 that follows from the tokenizer, the texts, their tokens and order."""
        ...

    def settled(self, config: RunConfig, step: int) -> RunConfig:
        """The run's settings with those that follow from what is read, when so many steps are done."""
        ...

    def reading(self, config: RunConfig, step: int, read: DataState | None, here: Sequence[int]) -> Reading:
        """All that a stage reads after `step` steps, of each global batch the rows `here`.

        Args:
          config: the stage's settings.
          read: how far an earlier stage or session has read.
        """
        ...

    def baselines(self) -> dict[str, float]:
        """How well others predict the held-out text, in bits per byte; {} where that has no meaning."""
        ...

    def prompt(self) -> tuple[str, list[int]]:
        """The beginning of the text that the run's report ends with, and its ids."""
        ...


@dataclasses.dataclass
class DocumentFeed:
    """Documents of text, for pre-training."""

    data: Data

    def __post_init__(self):
        self.tokenizer, self.facts, self.state = self.data.tokenizer, self.data.facts, self.data.state

    def fingerprint(self) -> int:
        return self.data.fingerprint()

    def settled(self, config: RunConfig, step: int) -> RunConfig:
        return config

    def reading(self, config: RunConfig, step: int, read: DataState | None, here: Sequence[int]) -> Reading:
        data, steps = config.data, config.train.steps
        rows = {name: Rows(self.data.rows[name].stream, data.sequence_length) for name in source_names(data)}
        mixture, begin = mixture_of(rows, data, read)
        to_come = data.tokens_of(begin.tokens, max(steps - step, 0))
        mixture.announce(begin, to_come // data.sequence_length)
        longest = data.block_length or data.sequence_length
        held_out = {
            source: prepare_held_out(self.tokenizer, [d.text for d in documents], data.sequence_length, longest)
            for source, documents in self.data.heldout.items()
        }
        needles = prepare_needles(self.tokenizer, config)
        return Reading(begin, lambda session: train_batches(rows, data, step, here, begin), held_out, needles)

    def baselines(self) -> dict[str, float]:
        held_out = [document.text for documents in self.data.heldout.values() for document in documents]
        return baselines(self.data.training_sample(), held_out)

    def prompt(self) -> tuple[str, list[int]]:
        text = "class"
        return text, self.tokenizer.prefix_ids + self.tokenizer.encode(text)


def open_documents(
    config: RunConfig,
    tokenizer: str | None,
    tokenizer_dir: str,
    trained_with: str | None,
    earlier: Earlier | None,
) -> DocumentFeed:
    """Opens the text of all stages of a run; arguments and errors as in `data.pipeline.open_data`.

    Args:
      tokenizer: where it is, before `data.tokenizer`.
    """
    wanted = dataclasses.replace(_all_sources(config, config.stage_runs()), tokenizer=tokenizer)
    return DocumentFeed(open_data(wanted, config.model.vocab_size, tokenizer_dir, trained_with, earlier))


def _all_sources(config: RunConfig, stages: Sequence[StageRun]) -> DataConfig:
    """The settings of all text that any stage reads, in rows as long as the longest."""
    if not config.stages:
        return config.data
    sources = {source.path: source for stage in reversed(stages) for source in stage.config.data.sources}
    longest = max(stage.config.data.sequence_length for stage in stages)
    every = dataclasses.replace(
        config.data, sources=tuple(sources.values()), sequence_length=longest, block_length=longest
    )
    for stage in stages:
        if unknown := set(source_names(stage.config.data)) - set(source_names(every)):
            raise ValueError(
                f"stage {stage.config.stage!r}: data source {min(unknown)!r} is called as one of another stage; rename "
                "its file or folder, or give a link to it"
            )
    return every
