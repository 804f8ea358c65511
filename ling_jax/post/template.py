"""Which tokens of a conversation are learned: those that the assistant writes, as the run's chat template shows them.

An assistant's turn begins where the conversation before it, rendered with a generation prompt, ends, and ends with its
own end-of-turn token. Both are found by rendering the conversation up to there and comparing tokens, so that any
template will do: what a model is given when it answers is exactly what it was trained to go on from.

A template may drop the reasoning of earlier turns (Ling's does). A turn that loses its own is not learned there, since
that would teach the model to answer at once; `SFTConfig.on_dropped_reasoning` says what becomes of it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from ling_jax.config import DroppedReasoning
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.post.rows import NOT_LEARNED, Conversation, Message

TOGETHER = 512  # conversations that are tokenized at a time
MOST_TURNS = 255  # that are told apart; later ones count as the last of them
SHOWN = 24  # characters before a place in a text where it differs from another


class Example(NamedTuple):
    """A conversation as it is learned.

    Attributes:
      ids: int32 [tokens].
      turns: uint8 [tokens], for each token that is learned the number of the assistant's turn, from 1 on; 0 elsewhere.
      thinking: whether it shows reasoning before an answer.
      conversation: what it was made of.
    """

    ids: np.ndarray
    turns: np.ndarray
    thinking: bool
    conversation: Conversation


class _Turn(NamedTuple):
    """An assistant's turn as text: the conversation up to it, with a generation prompt, and the same with the turn."""

    number: int
    message: int
    asked: str
    answered: str


class _Rendered(NamedTuple):
    conversation: Conversation
    turns: list[_Turn]  # those to be learned
    whole: str
    ends: bool  # whether the last turn, which ends the conversation, is one of them
    thinking: bool

    def texts(self) -> list[str]:
        return [*(text for turn in self.turns for text in (turn.asked, turn.answered)), self.whole]


@dataclass
class Masker:
    """Makes examples of conversations.

    Attributes:
      counts: how many examples were split off, and turns left out, since the template drops their reasoning.
    """

    tokenizer: Tokenizer
    on_dropped_reasoning: DroppedReasoning = "split"
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self):
        tokenizer = self.tokenizer
        self.ends = {tokenizer.role_end_id, tokenizer.eos_id, tokenizer.eod_id} - {None}
        self.switched = tokenizer.switches_thinking

    def examples(self, conversations: Iterable[Conversation]) -> Iterator[Example]:
        """The examples of each conversation, those that were split off before the rest.

        Raises:
          ValueError: naming file, line and message, for a conversation that the template cannot show, or shows in
            another way when the turn is asked for than when it is there.
        """
        rendered = map(self._rendered, conversations)
        while together := list(islice(rendered, TOGETHER)):
            texts = [text for one in together for text in one.texts()]
            ids = iter(self.tokenizer.encode_batch(texts, parse_special=True))
            for one in together:
                yield from self._examples(one, list(islice(ids, len(one.turns) * 2 + 1)))

    def _rendered(self, conversation: Conversation) -> _Rendered:
        thinking = conversation.thinking
        if thinking is None:
            thinking = any(reasoning_of(message) for message in conversation.messages if NOT_LEARNED not in message)
        elif not self.switched:
            raise ValueError(
                f"{conversation.where}: field 'thinking' is {thinking}, but the chat template of {self.tokenizer.name} "
                "has no switch for thinking: leave the field out, or give the run another template"
            )
        messages = conversation.messages if thinking else [without_reasoning(m) for m in conversation.messages]
        messages = [{name: value for name, value in m.items() if name != NOT_LEARNED} for m in messages]
        turns, number = [], 0
        for index, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            number += 1
            if NOT_LEARNED not in message:
                asked = self._text(conversation, messages[:index], thinking, asks=True)
                answered = self._text(conversation, messages[: index + 1], thinking)
                self._check_shown(conversation, index, messages[index], answered)
                turns.append(_Turn(min(number, MOST_TURNS), index, asked, answered))
        ends = turns[-1].message == len(messages) - 1
        whole = turns[-1].answered if ends else self._text(conversation, messages, thinking)
        return _Rendered(conversation, turns, whole, ends, thinking)

    def _text(self, conversation: Conversation, messages: list[Message], thinking: bool, *, asks: bool = False) -> str:
        mode = thinking if self.switched else None
        try:
            return self.tokenizer.chat_text(messages, conversation.tools, asks, mode)
        except ValueError as error:
            raise ValueError(f"{conversation.where}: {error}") from None

    def _check_shown(self, conversation: Conversation, index: int, message: Message, text: str) -> None:
        if (reasoning := reasoning_of(message)) and reasoning.strip() not in text:
            raise ValueError(
                f"{conversation.where}: the chat template of {self.tokenizer.name} does not show the reasoning of "
                f"message {index}, even as the last one: a model that is to think would learn to answer at once. Give "
                "the run a template that shows it, or set the row's thinking to off"
            )

    def _examples(self, rendered: _Rendered, ids: list[list[int]]) -> Iterator[Example]:
        conversation, whole = rendered.conversation, ids[-1]
        turns = np.zeros(len(whole), np.uint8)
        for turn, asked, answered in zip(rendered.turns, ids[:-1:2], ids[1:-1:2], strict=True):
            if (place := first_difference(asked, answered)) is not None:
                raise self._other_prompt(rendered, turn, asked, answered, place)
            learned = slice(len(asked), self._end(answered, len(asked)))
            if first_difference(answered, whole) is None:
                turns[learned] = turn.number
                continue
            self._check_dropped(rendered, turn, answered, whole)
            self.counts[self.on_dropped_reasoning] += 1
            if self.on_dropped_reasoning == "split":
                own = np.zeros(len(answered), np.uint8)
                own[learned] = turn.number
                yield Example(np.array(answered, np.int32), own, rendered.thinking, conversation)
        if rendered.ends and turns.any() and whole[-1] != self.tokenizer.eod_id:
            whole = [*whole, self.tokenizer.eod_id]  # learned too (spec 3.4): the conversation is over
            turns = np.append(turns, turns.max())
        if turns.any():
            yield Example(np.array(whole, np.int32), turns, rendered.thinking, conversation)

    def _end(self, ids: list[int], begin: int) -> int:
        """Where a turn ends: after its end-of-turn token, behind which templates may write a line end."""
        last = max((place for place in range(begin, len(ids)) if ids[place] in self.ends), default=len(ids) - 1)
        return last + 1

    def _check_dropped(self, rendered: _Rendered, turn: _Turn, answered: list[int], whole: list[int]) -> None:
        """Raises ValueError unless dropped reasoning, and nothing else, changes a turn when others follow it."""
        conversation = rendered.conversation
        bare = [without_reasoning(m) for m in conversation.messages]
        bare = [{name: value for name, value in m.items() if name != NOT_LEARNED} for m in bare]
        texts = [self._text(conversation, bare[:count], rendered.thinking) for count in (turn.message + 1, len(bare))]
        where = f"{conversation.where}: the chat template of {self.tokenizer.name}"
        if not texts[1].startswith(texts[0]):
            place = first_difference(answered, whole)
            raise ValueError(
                f"{where} shows message {turn.message} in another way when others follow it: "
                f"{self._differ(answered, whole, place or 0)}"
            )
        if self.on_dropped_reasoning == "error":
            raise ValueError(
                f"{where} drops the reasoning of message {turn.message} when others follow it. Learn it in a row of "
                "its own with --on-dropped-reasoning split, or leave the turn out with last"
            )

    def _other_prompt(
        self, rendered: _Rendered, turn: _Turn, asked: list[int], answered: list[int], place: int
    ) -> ValueError:
        return ValueError(
            f"{rendered.conversation.where}: the chat template of {self.tokenizer.name} asks for message "
            f"{turn.message} with other tokens than it shows it with, so what is learned would never be asked for: "
            f"{self._differ(asked, answered, place)}. Mend the template's generation prompt"
        )

    def _differ(self, one: list[int], other: list[int], place: int) -> str:
        decode = self.tokenizer.decode
        before = decode(one[:place])[-SHOWN:]
        tokens = [repr(decode(ids[place : place + 1])) if place < len(ids) else "nothing" for ids in (one, other)]
        return f"after {before!r} token {place} is {tokens[0]} there and {tokens[1]} in the conversation"


def first_difference(one: list[int], other: list[int]) -> int | None:
    """The first place where `other` does not go on as `one`; None where it begins with all of it."""
    if other[: len(one)] == one:
        return None
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The reasoning of an assistant's message, in a field of its own or in think tags; "" for none."""
    if message["role"] != "assistant":
        return ""
    reasoning, content = message.get("reasoning_content"), message.get("content") or ""
    if reasoning is None and "</think>" in content:
        reasoning = content.split("</think>")[0].split("<think>")[-1]
    return (reasoning or "").strip()


def without_reasoning(message: Message) -> Message:
    """The message without its reasoning."""
    if message["role"] != "assistant":
        return message
    bare = {name: value for name, value in message.items() if name != "reasoning_content"}
    if "</think>" in (bare.get("content") or ""):
        bare["content"] = bare["content"].split("</think>")[-1].lstrip("\n")
    return bare
