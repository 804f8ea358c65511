"""Conversations as what a run is trained on: read, masked and packed once, then read in a new order every epoch.

Legend: T tokens of a row, D examples.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import grain
import numpy as np

from ling_jax.config import DataSource, RunConfig, SFTRun
from ling_jax.data import chat
from ling_jax.data.mixture import DataState
from ling_jax.data.packing import ROW, pad
from ling_jax.data.pipeline import ANEW, DataBatch, Earlier, in_background, run_tokenizer
from ling_jax.data.reading import list_files
from ling_jax.data.sources import TOKENIZER_SAMPLE_BYTES
from ling_jax.data.store import Columns, Kept, cache_dir, keep
from ling_jax.data.survey import key_of
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.files import paths
from ling_jax.files.whole import checksum
from ling_jax.post.pack import Packed, best_fit
from ling_jax.post.rows import Conversation, read_conversations
from ling_jax.post.tasks import TASKS, TaskRows, task_conversations
from ling_jax.post.template import Example, Masker
from ling_jax.train.feed import Reading
from ling_jax.train.validate import BUCKETS, NO_BUCKET, HeldOut

log = logging.getLogger(__name__)

LAYOUT = "ling_jax conversations 1"  # part of the key: change it when the columns or what is in them change
MODES = ("instant", "thinking")  # how parts of the held-out conversations are called, by whether they show reasoning
TURNS = tuple(f"turn_{number}" for number in range(1, BUCKETS + 1))  # the last one stands for later ones too
WRITTEN = 1024  # examples that are written at a time


def open_conversations(
    config: SFTRun, tokenizer: str | None, tokenizer_dir: str, trained_with: str | None, earlier: Earlier | None
) -> "ConversationFeed":
    """Opens the conversations of a run; what has been tokenized before is found in the cache.

    Args:
      tokenizer, tokenizer_dir, trained_with, earlier: as in `data.pipeline.open_data`.
    Raises:
      ValueError: naming file and line of what cannot be learned; for conversations that the earlier run did not read.
    """
    cache = cache_dir(config.data.cache_dir, paths.at(tokenizer_dir).parent)
    vocab_size = config.model.vocab_size
    found = run_tokenizer(tokenizer, vocab_size, tokenizer_dir, trained_with, lambda: new_tokenizer(config))
    kept = _kept(config, found, cache)
    feed = ConversationFeed(config, found, kept)
    if earlier is not None:
        feed.go_on(earlier)
    return feed


def new_tokenizer(config: SFTRun) -> Tokenizer:
    """The tokenizer that a run without one trains on its conversations."""
    texts = (text for source in config.data.sources for text in _texts(conversations_of(source, config)))
    return Tokenizer.train(_some(texts), config.model.vocab_size, at_most=True)


def conversations_of(source: DataSource, config: SFTRun) -> Iterator[Conversation]:
    """The conversations of a data source: those of its files, or of a task, which are made."""
    if source.path in TASKS:
        sft = config.sft
        return task_conversations(TASKS[source.path], _task_rows(config), sft.answer_tags)
    return read_conversations(source.path, tuple(TASKS))


def _task_rows(config: SFTRun) -> TaskRows:
    return TaskRows(config.sft.task_rows, config.sft.task_worked, config.data.seed)


def _texts(conversations: Iterable[Conversation]) -> Iterator[str]:
    """The conversations as Ling's template shows them."""
    for one in conversations:
        yield chat.render(one.messages, one.tools, False, None, {"enable_thinking": bool(one.thinking)})


def _some(texts: Iterable[str]) -> Iterator[str]:
    size = 0
    for text in texts:
        yield text
        size += len(text)
        if size > TOKENIZER_SAMPLE_BYTES:
            return


def _kept(config: SFTRun, tokenizer: Tokenizer, cache: paths.Path) -> Kept:
    """The examples of all sources: columns `tokens` and `turns`, one value a token; `sizes`, `thinking`, `bytes` and
    `share` (uint64, a hash of what is asked), one value an example."""
    stamps: list[Any] = []
    for source in config.data.sources:
        if source.path in TASKS:
            stamps.append([TASKS[source.path].stamp, *_task_rows(config), config.sft.answer_tags])
        else:
            files = list_files(source.path, tuple(TASKS))
            stamps.append([source.path, str(files.root), files.names, files.stamps])
    template = [tokenizer.to_json(), tokenizer.chat_templates, tokenizer.role_end_id, tokenizer.eos_id]
    key = key_of(LAYOUT, stamps, template, config.sft.on_dropped_reasoning)
    names = ", ".join(source.path for source in config.data.sources)
    return keep(cache, key, f"{names}: tokenizing conversations", lambda columns: _write(config, tokenizer, columns))


def _write(config: SFTRun, tokenizer: Tokenizer, columns: Columns) -> dict[str, Any]:
    masker = Masker(tokenizer, config.sft.on_dropped_reasoning)
    conversations = chain.from_iterable(conversations_of(source, config) for source in config.data.sources)
    count, waiting = 0, []
    for example in masker.examples(conversations):
        waiting.append(example)
        if len(waiting) == WRITTEN:
            count += _append(waiting, tokenizer, columns)
            waiting = []
    count += _append(waiting, tokenizer, columns)
    return {"examples": count, "counts": dict(masker.counts)}


def _append(examples: list[Example], tokenizer: Tokenizer, columns: Columns) -> int:
    if not examples:
        return 0
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    columns.append("tokens", np.concatenate([example.ids for example in examples]).astype(dtype))
    columns.append("turns", np.concatenate([example.turns for example in examples]))
    columns.append("sizes", np.array([len(example.ids) for example in examples], np.int64))
    columns.append("thinking", np.array([example.thinking for example in examples], np.uint8))
    sizes = [sum(len((m.get("content") or "").encode()) for m in e.conversation.messages) for e in examples]
    columns.append("bytes", np.array(sizes, np.int64))
    columns.append("share", np.array([_share(example.conversation) for example in examples], np.uint64))
    return len(examples)


def _share(conversation: Conversation) -> int:
    """A hash of what is asked first, so that all answers to a question are on one side of the split."""
    asked = []
    for message in conversation.messages:
        if message["role"] == "assistant":
            break
        if message["role"] == "user":
            asked.append(message["content"])
    return int.from_bytes(hashlib.sha256(json.dumps(asked).encode()).digest()[:8])


class ConversationFeed:
    """Conversations, for fine-tuning; a `train.feed.Feed`.

    Attributes:
      packed: the rows of an epoch.
      held_out: packed too, by mode.
    """

    def __init__(self, config: SFTRun, tokenizer: Tokenizer, kept: Kept):
        self.tokenizer, self.state = tokenizer, None
        self._config, self._kept = config, kept
        self._sizes = kept["sizes"]
        if not len(self._sizes):
            raise ValueError("no conversation has anything to learn: see what the log says of those that were left out")
        self._starts = np.concatenate(([0], np.cumsum(self._sizes)))
        held = self._held_out()
        fits = self._fitting()
        train = np.flatnonzero(~held & fits)
        if not len(train):
            raise ValueError(
                f"no conversation fits into data.sequence_length = {config.data.sequence_length} tokens: the shortest "
                f"has {self._sizes.min() - 1}; raise it, or set sft.too_long to cut"
            )
        self.packed = self._packed(train)
        modes = kept["thinking"]
        parts = {mode: np.flatnonzero(held & fits & (modes == number)) for number, mode in enumerate(MODES)}
        self.held_out = {mode: self._packed(examples) for mode, examples in parts.items() if len(examples)}
        self.facts = {"conversations": self._facts(train)}
        self._tell(train, int((held & fits).sum()), int((~fits).sum()))

    def _held_out(self) -> np.ndarray:
        """bool [D]: about `data.holdout_fraction` of what is asked, at least one question if there are several, and up
        to `data.holdout_max_bytes` of text."""
        data, share = self._config.data, self._kept["share"]
        distinct = np.unique(share)
        if len(distinct) == 1:
            return np.zeros(len(share), bool)
        limit = max(int(data.holdout_fraction * 2.0**64), int(distinct[0]) + 1)
        chosen = share < np.uint64(min(limit, int(distinct[-1])))
        numbers = np.flatnonzero(chosen)[np.argsort(share[chosen], kind="stable")]
        over = np.cumsum(self._kept["bytes"][numbers]) > data.holdout_max_bytes
        if over.any():  # the question at which it is too much is not held out, with none of its answers
            chosen &= share < max(share[numbers[np.argmax(over)]], share[numbers[0]] + np.uint64(1))
        return chosen

    def _fitting(self) -> np.ndarray:
        """bool [D]: which examples are learned, as `sft.too_long` has it."""
        length = self._config.data.sequence_length
        fits = self._sizes - 1 <= length
        if self._config.sft.too_long == "cut":
            for number in np.flatnonzero(~fits):
                begin = self._starts[number]
                fits[number] = self._kept["turns"][begin + 1 : begin + length + 1].any()
        return fits

    def _packed(self, examples: np.ndarray) -> Packed:
        length = self._config.data.sequence_length
        rows = best_fit(np.minimum(self._sizes[examples] - 1, length).tolist(), length, self._config.data.seed)
        rows = [[int(examples[i]) for i in row] for row in rows]
        return Packed(self._kept["tokens"], self._kept["turns"], self._starts, rows, length)

    def _facts(self, train: np.ndarray) -> dict[str, Any]:
        order = json.dumps([self.packed.rows, self._config.data.seed, self.packed.length])
        return {
            "examples": len(train),
            "rows": len(self.packed),
            "checksum": self._kept.checksum,
            "packing": checksum(order.encode()),
        }

    def _tell(self, train: np.ndarray, held: int, left: int) -> None:
        tokens = int(np.minimum(self._sizes[train] - 1, self.packed.length).sum())
        log.info("%d examples to learn from, %d held out; %d tokens in %d rows, %.1f%% full",
                 len(train), held, tokens, len(self.packed), 100 * self.packed.fullness())  # fmt: skip
        counts, told = self._kept.facts["counts"], {
            "split": "%d turns have a row of their own: the chat template drops their reasoning when others follow",
            "last": "%d turns are not learned: the chat template drops their reasoning when others follow",
        }  # fmt: skip
        for name, text in told.items():
            if count := counts.get(name):
                log.info(text, count)
        longer = int((self._sizes - 1 > self.packed.length).sum())
        if longer:
            what = f"{left} of them are left out" + (", the others are cut" if longer > left else "")
            log.warning("%d examples are longer than data.sequence_length = %d: %s (sft.too_long)",
                        longer, self.packed.length, what)  # fmt: skip

    def go_on(self, earlier: Earlier) -> None:
        """Goes on where a run was; ValueError if that was with other conversations, or packed in another way."""
        known, mine = earlier.state.get("text", {}).get("conversations"), self.facts["conversations"]
        if known != mine:
            changed = [f"{n}: {known.get(n)} -> {mine[n]}" for n in mine if known and known.get(n) != mine[n]]
            differ = "; ".join(changed) or "it has read none"
            raise ValueError(
                f"the conversations are not those that the run has read, or are packed in another way ({differ}): rows "
                f"would come twice or never. Bring back files, data.sequence_length, data.seed and sft's settings as "
                f"they were, or {ANEW}"
            )
        self.state = DataState(**earlier.state["read"])

    def fingerprint(self) -> int:
        facts = json.dumps([self.tokenizer.to_json(), self.facts])
        return int(checksum(facts.encode())[:8], 16) >> 1

    def settled(self, config: RunConfig, step: int) -> RunConfig:
        """`config`, which ends when each conversation has been read as often as `sft.epochs` says."""
        if (total := self._total(config)) is None:
            return config
        left = total - (0 if self.state is None else self.state.rows)
        steps = step + max(-(-left // config.data.global_batch_size), 0)
        return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=max(steps, 1)))

    def _total(self, config: RunConfig) -> int | None:
        """Rows that the whole run reads; None where `train.steps` says."""
        assert isinstance(config, SFTRun)
        return max(round(config.sft.epochs * len(self.packed)), 1) if config.sft.epochs else None

    def reading(self, config: RunConfig, step: int, read: DataState | None, here: Sequence[int]) -> Reading:
        length, size = self.packed.length, config.data.global_batch_size
        begin = DataState(0, 0, length, {}, {}, {}) if read is None else read
        held_out = {mode: _scored(packed) for mode, packed in self.held_out.items()}
        seed = hashlib.sha256(f"{config.data.seed}:conversations".encode()).digest()[:4]
        order: Any = grain.MapDataset.range(len(self.packed)).shuffle(int.from_bytes(seed)).repeat()
        total, padding = self._total(config), {name: pad(np.empty(0, np.int32), length, name) for name in ROW}

        def load(number: int) -> DataBatch:
            first = begin.rows + (number - step) * size
            last = first + size if total is None else min(first + size, total)
            rows = [self.packed[order[i]] if i < last else padding for i in (first + row for row in here)]
            arrays = {name: np.stack([row[name] for row in rows]) for name in ROW}
            done = max(last, first)
            after = dataclasses.replace(begin, rows=done, tokens=done * length)
            return DataBatch(arrays, after, {"data/epoch": done / len(self.packed)})

        return Reading(begin, lambda session: in_background(step, load), held_out, {})

    def baselines(self) -> dict[str, float]:
        return {}

    def prompt(self) -> tuple[str, list[int]]:
        packed = next(iter(self.held_out.values()), self.packed)
        example = packed.rows[0][0]
        begin, end = self._starts[example], self._starts[example + 1]
        learned = int(np.flatnonzero(self._kept["turns"][begin:end])[0])
        ids = self._kept["tokens"][begin : begin + learned].astype(int).tolist()
        return self.tokenizer.decode(ids), ids


def _scored(packed: Packed) -> HeldOut:
    """Held-out conversations to be scored on what is learned, each turn for itself too."""
    rows = [packed[index] for index in range(len(packed))]
    arrays = {name: np.stack([row[name] for row in rows]) for name in ROW}
    turns = np.stack([row["turns"] for row in rows])
    learned = np.where(turns > 0, np.minimum(turns, BUCKETS) - 1, NO_BUCKET)
    return HeldOut({**arrays, "bucket": learned.astype(np.int32)}, 0, TURNS)


def shown(examples: Iterable[Example], tokenizer: Tokenizer, mark: tuple[str, str]) -> Iterator[str]:
    """Each example as text in which what is learned stands between two marks, under a line that says where it is from.

    Args:
      mark: what stands before and behind it.
    """
    for example in examples:
        where, mode = example.conversation.where, MODES[example.thinking]
        learned = int((example.turns > 0).sum())
        text = f"{where}: {mode}, {learned} of {len(example.ids)} tokens are learned\n"
        edges = np.flatnonzero(np.diff(example.turns > 0)) + 1
        for piece, turns in zip(np.split(example.ids, edges), np.split(example.turns, edges), strict=True):
            part = tokenizer.decode(piece.tolist())
            text += f"{mark[0]}{part}{mark[1]}" if turns[0] else part
        yield text


def first_examples(config: SFTRun, tokenizer: Tokenizer) -> Iterator[Example]:
    """The examples of a run's conversations, as they are made."""
    masker = Masker(tokenizer, config.sft.on_dropped_reasoning)
    return masker.examples(chain.from_iterable(conversations_of(s, config) for s in config.data.sources))
