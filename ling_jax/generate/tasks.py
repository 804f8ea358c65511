"""Text in, numbers and text out: what evaluation tasks ask of a model, many requests at a time.

Texts become ids as in lm-eval's Hugging Face model, so that results can be compared: special tokens are read where
their text stands, a text begins with the tokenizer's start token if the tokenizer adds one, and of what is longer than
the window the last tokens count. That package is not needed here; `commands.harness` brings it.
"""

import itertools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ling_jax.data.tokenizer import Tokenizer
from ling_jax.generate.engine import SHORTEST, Engine, bucket, in_common
from ling_jax.generate.requests import Request
from ling_jax.generate.sampling import Sampling
from ling_jax.generate.score import score
from ling_jax.generate.text import Asker
from ling_jax.model.model import Ling

log = logging.getLogger(__name__)

NEW_TOKENS = 256  # of an answer, where its task does not say
# What tasks call the most tokens of an answer; the first that is there counts.
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLED = ("top_p", "top_k", "min_p", "repetition_penalty")  # further settings, by the names that `Sampling` has too
LONGEST_PIECE = 512  # tokens of a prompt that are run at once, at most
LOG_SECONDS = 10.0


class Wanted(NamedTuple):
    """How an answer is to be made, from a task's generation settings."""

    new: int  # most tokens
    stop: tuple[str, ...]  # texts that end it, cut off
    options: tuple[tuple[str, Any], ...]  # of a `Sampling`

    @property
    def sampling(self) -> Sampling:
        return Sampling(**dict(self.options))


def wanted_of(settings: Mapping[str, Any], window: int) -> Wanted:
    """Reads a task's generation settings (`until`, `max_gen_toks`, `do_sample`, `temperature`, ...).

    Args:
      settings: as lm-eval's tasks spell them; greedy unless `do_sample` is true or there is a temperature.
      window: most tokens of a prompt with its answer.
    Raises:
      ValueError: for a setting that is not known, or has another type or range; or an answer with no room for a prompt.
    """
    left = {name: value for name, value in settings.items() if value is not None}
    until = left.pop("until", ())
    stop = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(text, str) for text in stop):
        raise ValueError(f"until = {until!r} must be a text or a list of texts")
    limits = [left.pop(name) for name in LIMITS if name in left]
    new = limits[0] if limits else NEW_TOKENS
    if isinstance(new, bool) or not isinstance(new, int) or new < 1:
        raise ValueError(f"{LIMITS[0]} = {new!r} must be a whole number from 1 on")
    if new >= window:
        raise ValueError(
            f"an answer of {new} tokens leaves no room for its prompt in a window of {window}: lower {LIMITS[0]}, or "
            "raise --length if the model has more positions"
        )
    sampled, temperature = left.pop("do_sample", None), left.pop("temperature", None)
    if temperature is None:
        temperature = 1.0 if sampled else 0.0
    options = {"temperature": temperature if sampled is not False else 0.0}
    options |= {name: left.pop(name) for name in SAMPLED if name in left}
    if left.pop("num_beams", 1) != 1 or left:
        known = ", ".join(("until", *LIMITS, "do_sample", "temperature", *SAMPLED))
        raise ValueError(f"generation settings {dict(settings)!r} ask for what is not known here, only {known}")
    wanted = Wanted(new, stop, tuple(options.items()))
    _ = wanted.sampling  # its own checks
    return wanted


def windows(ids: Sequence[int], start: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cuts a text into (context, continuation) that predict each token once, `length` of them or fewer at a time.

    The first comes after the token `start`, the others after the token before them; the last has more context, as much
    as fits.
    """
    for begin in range(0, len(ids), length):
        end = min(begin + length, len(ids))
        yield list(ids[end - length - 1 : begin]) if begin else [start], list(ids[begin:end])


class TaskModel:
    """Answers the requests of evaluation tasks.

    Args:
      model: what is evaluated; also one that was loaded onto a mesh.
      tokenizer: its own.
      window: most tokens that are run at once, at most the model's positions.
      rows: answers that are generated side by side.
      stop_ids: tokens that end an answer.
    """

    def __init__(
        self, model: Ling, tokenizer: Tokenizer, *, window: int, rows: int = 8, stop_ids: Sequence[int] = ()
    ) -> None:
        self.model, self.tokenizer, self.window, self.rows = model, tokenizer, window, rows
        self.stop_ids = tuple(stop_ids)
        known = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eod_id)
        self.start = next(token for token in known if token is not None)  # stands before what has no context
        self._engine: Engine | None = None

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Scores continuations after their contexts.

        Context and continuation are encoded together and split by the context's own length; spaces at its end count
        with the continuation, and an empty context is the start token.

        Returns:
          For each pair the sum of log-probabilities in nats, and whether greedy decoding gives the continuation.
        Raises:
          ValueError: naming the request, for an empty continuation or one longer than the window.
        """
        moved = [_moved(context, continuation) for context, continuation in pairs]
        contexts = self._encode([context for context, _ in moved])
        wholes = self._encode([context + continuation for context, continuation in moved])
        asked = []
        for place, (context, whole) in enumerate(zip(contexts, wholes, strict=True)):
            if not pairs[place][1]:
                raise ValueError(f"request {place} has an empty continuation: there is nothing to score")
            asked.append(self._split(place, moved[place][1], context, whole))
        return self._score(asked)

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each whole text in nats, in windows that predict each token once (see `windows`)."""
        places, asked = [], []
        for place, ids in enumerate(self.tokenizer.encode_batch(texts, parse_special=True)):
            for window in windows(ids, self.start, self.window):
                places.append(place)
                asked.append(window)
        totals = [0.0] * len(texts)
        for place, (total, _) in zip(places, self._score(asked), strict=True):
            totals[place] += total
        return totals

    def generate_until(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The answer to each (prompt, generation settings), cut at the first stop text.

        Of a prompt that is too long the last tokens count. Equal requests that are sampled get an answer each, of
        other seeds.

        Raises:
          ValueError: as `wanted_of`.
        """
        groups: dict[Wanted, dict[str, list[int]]] = {}
        for place, (prompt, settings) in enumerate(asked):
            group = groups.setdefault(wanted_of(settings, self.window), {})
            group.setdefault(prompt, []).append(place)
        ids = {wanted: self._prompts(list(group), wanted.new) for wanted, group in groups.items()}
        slots = max((len(one) + wanted.new for wanted, prompts in ids.items() for one in prompts), default=0)
        found, told = [""] * len(asked), time.monotonic()
        for wanted, group in groups.items():
            order = sorted(zip(ids[wanted], group.values(), strict=True), key=lambda pair: -len(pair[0]))
            samples = max(map(len, group.values())) if wanted.sampling.temperature else 1
            prompts = [prompt for prompt, _ in order]
            answers = self._asker(wanted, prompts, slots).complete(prompts, samples, apart=samples)
            for number, (i, sample, text, _) in enumerate(answers, start=1):
                for place in order[i][1][sample : sample + 1] if samples > 1 else order[i][1]:
                    found[place] = text
                if time.monotonic() - told > LOG_SECONDS:
                    log.info("%d of %d answers", number, len(order) * samples)
                    told = time.monotonic()
        return found

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts, each after the start token if the tokenizer adds one."""
        prefix = self.tokenizer.prefix_ids
        found = self.tokenizer.encode_batch(texts, parse_special=True)
        return [ids if ids[: len(prefix)] == prefix else prefix + ids for ids in found]

    def _split(
        self, place: int, continuation: str, context: list[int], whole: list[int]
    ) -> tuple[list[int], list[int]]:
        """The ids of a context and of its continuation, within the window."""
        if not context:
            context, whole = [self.start], whole if whole[:1] == [self.start] else [self.start, *whole]
        after = whole[len(context) :]
        if not after:  # they have grown into one token
            after = self.tokenizer.encode(continuation, parse_special=True)
        if len(after) > self.window:
            raise ValueError(
                f"request {place} has a continuation of {len(after)} tokens, which exceeds the window of "
                f"{self.window}: raise --length if the model has more positions, or shorten it"
            )
        return (context + after)[-self.window - 1 : -len(after)], after

    def _score(self, asked: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        tokens = sum(len(context) + len(continuation) - 1 for context, continuation in asked)
        log.info("scoring %d continuations, %d tokens with their contexts", len(asked), tokens)
        return score(self.model, asked)

    def _prompts(self, prompts: Sequence[str], new: int) -> list[list[int]]:
        """The ids of prompts, within a window that has `new` tokens to come."""
        return [(ids or [self.start])[new - self.window :] for ids in self._encode(prompts)]

    def _asker(self, wanted: Wanted, prompts: Sequence[Sequence[int]], slots: int) -> Asker:
        if self._engine is None or self._engine.slots < slots:
            piece, stops = _piece(prompts), max(len(self.stop_ids), 1)
            made = Engine(self.model, rows=self.rows, slots=bucket(slots), chunk=piece, least=piece, stops=stops)
            self._engine = made
        request = Request(prompt=(), max_new_tokens=wanted.new, sampling=wanted.sampling, stop_ids=self.stop_ids)
        return Asker(self._engine, self.tokenizer, request, wanted.stop)


def _piece(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens of a prompt to run at once: one size for all, or every length and number of rows would be compiled. Half
    of the prompts have as many or fewer that none before them, in alphabetical order, has run."""
    order = [np.zeros(0, np.int32), *(np.array(ids, np.int32) for ids in sorted(map(list, prompts)))]
    new = [len(ids) - in_common(before, ids) for before, ids in itertools.pairwise(order)]
    return min(bucket(sorted(new)[len(new) // 2], SHORTEST), LONGEST_PIECE)


def _moved(context: str, continuation: str) -> tuple[str, str]:
    """The pair with the spaces at the context's end moved to the continuation, where a tokenizer puts them."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
