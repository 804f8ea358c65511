"""The settings of a run's text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ling_jax.config.checks import check, check_at_least


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Documents under one name.

    `path` is a folder or file of .jsonl, .txt, .parquet or .json, all but parquet also packed as .gz or .zst, or one of
    the built-in corpora: `python-stdlib` (any Python has it), `site-packages` (the installed requirements),
    `worked-arithmetic` and `retrieval` (made as they are read); see docs/data.md.
    """

    path: str
    weight: float = 1.0  # share of training tokens, relative to the other sources
    licence: str = "unknown"  # used where a document does not state its own
    text_field: str = "text"  # of a JSON object or parquet row
    max_epochs: float | None = None  # how often it is read at most; its share then goes to the others in proportion
    tag: str = ""  # its kind of text, such as "reasoning": shares are logged by tag too, and `by_tag` mixes by it

    def __post_init__(self):
        check(self.weight > 0, f"weight = {self.weight} of data source {self.path!r} must be positive")
        often = self.max_epochs
        check(often is None or often > 0, f"max_epochs = {often} of data source {self.path!r} must be positive")
        check("/" not in self.tag, f"tag = {self.tag!r} of data source {self.path!r} must have no slash")


def by_tag(sources: Sequence[DataSource], shares: Mapping[str, float]) -> tuple[DataSource, ...]:
    """The sources of a mixture that is given by tag, such as {"general": 68, "reasoning": 32}.

    Each tag has its share of the tokens, of which each of its sources has a part by its `weight` among them. Sources of
    tags that have no share are left out.

    Raises:
      ValueError: for a share that is not positive, a tag that no source has, or a source without a tag.
    """
    if untagged := [source.path for source in sources if not source.tag]:
        raise ValueError(f"data source {untagged[0]!r} has no tag: of a mixture that is given by tag, each needs one")
    totals = {tag: sum(source.weight for source in sources if source.tag == tag) for tag in shares}
    for tag, share in shares.items():
        check(share > 0, f"the share {share} of the tag {tag!r} must be positive; leave out a tag that has none")
        known = ", ".join(sorted({source.tag for source in sources}))
        check(totals[tag] > 0, f"the tag {tag!r} has a share, but no data source: their tags are {known or 'none'}")
    return tuple(replace(s, weight=shares[s.tag] * s.weight / totals[s.tag]) for s in sources if s.tag in shares)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    sources: tuple[DataSource, ...] = (DataSource(path="python-stdlib"),)
    tokenizer: str | None = None  # a tokenizer.json, a folder with one, or a hub id; None trains one on the text
    sequence_length: int = 512  # tokens per row
    global_batch_size: int = 8  # rows per optimizer step
    block_length: int = 0  # tokens of the longest rows that the run will ever have; 0: sequence_length
    long_document: int = 0  # tokens of one document that make a row a long one; 0: no rows are told apart
    long_share: float | None = None  # of the tokens, in long rows; None: as many as there are
    batch_ramp_from: int = 0  # rows of the first steps; 0: there is no ramp
    batch_ramp_by: int = 0  # rows that are added at a time, until they are global_batch_size
    batch_ramp_tokens: int = 0  # tokens over which that is done, evenly
    holdout_fraction: float = 0.02  # share of files kept for validation, chosen by a hash of their path
    holdout_max_bytes: int = 400_000  # of each source, scored at every validation
    max_bytes: int | None = None  # use a seeded sample of each source of about this size
    cache_dir: str = "~/.cache/ling_jax"  # of tokens, and of what is known of each document
    seed: int = 0

    def __post_init__(self):
        check_at_least(self, 1, "sequence_length", "global_batch_size", "holdout_max_bytes")
        check(len(self.sources) > 0, "data.sources is empty: name at least one")
        check(0 < self.holdout_fraction < 1, f"holdout_fraction = {self.holdout_fraction} must be between 0 and 1")
        block = self.block_length
        check(
            not block or block >= self.sequence_length,
            f"data.block_length = {block} must be at least data.sequence_length = {self.sequence_length}, or 0",
        )
        share = self.long_share
        check_at_least(self, 0, "long_document")
        check(
            share is None or (self.long_document > 0 and 0 <= share < 1),
            f"data.long_share = {share} must be from 0 to below 1, and data.long_document above 0",
        )
        self._check_ramp()

    def _check_ramp(self) -> None:
        first, by, tokens = self.batch_ramp_from, self.batch_ramp_by, self.batch_ramp_tokens
        if first == by == tokens == 0:
            return
        said = f"data.batch_ramp_from = {first}, batch_ramp_by = {by} and batch_ramp_tokens = {tokens}"
        check(min(first, by, tokens) > 0, f"{said} must be set together, each at least 1, or all 0: no ramp")
        rows = self.global_batch_size
        check(
            first < rows and (rows - first) % by == 0,
            f"{said} do not lead to data.global_batch_size = {rows}: batch_ramp_by must divide what is lacking",
        )

    def batch_at(self, tokens: int) -> int:
        """Rows of a step before which so many tokens have been read, padding counted."""
        if not self.batch_ramp_tokens:
            return self.global_batch_size
        increments = (self.global_batch_size - self.batch_ramp_from) // self.batch_ramp_by
        done = min(increments * tokens // self.batch_ramp_tokens, increments)
        return self.batch_ramp_from + done * self.batch_ramp_by

    def steps_for(self, tokens: int, budget: int) -> int:
        """How many steps it takes to read `budget` tokens more, after so many; the last one may read beyond."""
        end, steps = tokens + budget, 0
        while tokens < end and self.batch_at(tokens) < self.global_batch_size:
            tokens += self.batch_at(tokens) * self.sequence_length
            steps += 1
        return steps + max(-(-(end - tokens) // (self.global_batch_size * self.sequence_length)), 0)

    def tokens_of(self, tokens: int, steps: int) -> int:
        """How many tokens so many steps read, padding counted, after `tokens`."""
        first = tokens
        while steps and self.batch_at(tokens) < self.global_batch_size:
            tokens += self.batch_at(tokens) * self.sequence_length
            steps -= 1
        return tokens - first + steps * self.global_batch_size * self.sequence_length
