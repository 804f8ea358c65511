"""Text in, text out, over an engine: streamed answers, files of prompts, conversations."""

import dataclasses
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ling_jax.data.tokenizer import Tokenizer
from ling_jax.generate.engine import Answer, Engine, Request


class Reply:
    """An answer's text as its ids come. Nothing is shown that may turn out to begin a stop string, nor half a
    character."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), stop_ids: Sequence[int] = ()):
        self.tokenizer, self.stop, self.stop_ids = tokenizer, [s for s in stop if s], set(stop_ids)
        self.ids: list[int] = []
        self.stream = tokenizer.stream()
        self.text, self.shown, self.stopped = "", 0, False

    def push(self, ids: Sequence[int]) -> str:
        """What these ids let be shown; `stopped` is set once a stop string has come, which is cut off."""
        for token in ids:
            if self.stopped or token in self.stop_ids:
                break
            self.ids.append(token)
            self.text += self.stream.push(token)
            found = [at for s in self.stop if (at := self.text.find(s, max(self.shown - len(s), 0))) >= 0]
            if found:
                self.text, self.stopped = self.text[: min(found)], True
        return self._show(len(self.text) if self.stopped else len(self.text) - self._held())

    def finish(self) -> str:
        """What is left once no more ids come; bytes that are no character become U+FFFD."""
        if not self.stopped:
            self.text += self.tokenizer.decode(self.ids)[len(self.text) :]
        return self._show(len(self.text))

    def _held(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        sizes = (n for s in self.stop for n in range(min(len(s) - 1, len(self.text)), 0, -1) if s[:n] == self.text[-n:])
        return max(sizes, default=0)

    def _show(self, end: int) -> str:
        start, self.shown = self.shown, max(end, self.shown)
        return self.text[start : self.shown]


@dataclass
class Stats:
    """Where the time went. The first step of a request runs its prompt, and may compile: it is told apart."""

    prompt_tokens: int = 0
    first_seconds: float = 0.0
    new_tokens: int = 0
    seconds: float = 0.0
    answers: list[Answer] = field(default_factory=list)

    def __str__(self) -> str:
        rate = self.new_tokens / self.seconds if self.seconds else 0.0
        text = f"{self.prompt_tokens} tokens read, first step {self.first_seconds:.2f} s; {rate:,.1f} tokens/s after it"
        if drafted := sum(answer.drafted for answer in self.answers):
            text += f"; {sum(answer.accepted for answer in self.answers) / drafted:.0%} of {drafted} drafts stood"
        return text


@dataclass(frozen=True)
class Asker:
    """How text is asked for: everything of a request but its prompt."""

    engine: Engine
    tokenizer: Tokenizer
    request: Request
    stop: Sequence[str] = ()

    def reply(self) -> Reply:
        return Reply(self.tokenizer, self.stop, self.request.stop_ids)

    def request_of(self, ids: Sequence[int], sample: int = 0) -> Request:
        return dataclasses.replace(self.request, prompt=ids, seed=(self.request.seed + sample) % 2**32)

    def stream(
        self, ids: Sequence[int], stats: Stats, sample: int = 0, cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[str]:
        """Yields pieces of one answer; `cancelled` is asked between steps."""
        reply, engine = self.reply(), self.engine
        ticket = engine.submit(self.request_of(ids, sample))
        stats.prompt_tokens += len(ids)
        begun, first = time.perf_counter(), True
        while True:
            [update] = engine.step(1 if first else 4)
            spent, begun = time.perf_counter() - begun, time.perf_counter()
            if first:
                stats.first_seconds, first = stats.first_seconds + spent, False
            else:
                stats.seconds, stats.new_tokens = stats.seconds + spent, stats.new_tokens + len(update.new_ids)
            yield reply.push(update.new_ids)
            ended = update.answer.end is not None
            if ended or reply.stopped or cancelled():
                if not ended:
                    engine.withdraw(ticket)
                stats.answers.append(update.answer)
                yield reply.finish()
                return

    def complete(self, prompts: Sequence[Sequence[int]], samples: int) -> Iterator[tuple[int, int, str, Answer]]:
        """(prompt, sample, text, answer) of every answer, each as it ends."""
        engine, running = self.engine, {}
        for i, ids in enumerate(prompts):
            for sample in range(samples):
                running[engine.submit(self.request_of(ids, sample))] = (i, sample, self.reply())
        while running:
            for update in engine.step():
                i, sample, reply = running[update.ticket]
                reply.push(update.new_ids)
                ended = update.answer.end is not None
                if not ended and not reply.stopped:
                    continue
                if not ended:
                    engine.withdraw(update.ticket)
                if reply.stopped:
                    update.answer.end = "stop"
                reply.finish()
                del running[update.ticket]
                yield i, sample, reply.text, update.answer


def read_prompts(file: str) -> list[dict[str, Any]]:
    """Lines of a JSONL file, each an object with a "prompt" (text) or "messages" (a conversation).

    Raises:
      ValueError: names the line that is not one.
    """
    records = []
    with open(file, encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.encode("utf-8", "surrogateescape").decode("utf-8"))
            except ValueError as error:
                raise ValueError(f"{file} line {number} is not JSON in UTF-8: {error}") from None
            if not isinstance(record, dict) or not (
                isinstance(record.get("prompt"), str) or isinstance(record.get("messages"), list)
            ):
                raise ValueError(f'{file} line {number} must be an object with a text "prompt" or a list "messages"')
            records.append(record)
    if not records:
        raise ValueError(f"{file} holds no prompts")
    return records


def converse(
    asker: Asker,
    system: str | None,
    encode: Callable[[list[dict[str, str]]], list[int]],
    read: Callable[[], str],
    write: Callable[[str], None],
    after: Callable[[Stats], None],
) -> None:
    """A conversation until `read` raises EOFError. SIGINT ends the answer that is being given, not the program."""
    messages = [{"role": "system", "content": system}] if system else []
    interrupted: list[bool] = []
    while True:
        try:
            text = read()
        except KeyboardInterrupt:
            write("\n(end with Ctrl-D)\n")
            continue
        except EOFError:
            write("\n")
            return
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        interrupted.clear()
        before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
        stats, answer = Stats(), ""
        try:
            for piece in asker.stream(encode(messages), stats, cancelled=lambda: bool(interrupted)):
                answer += piece
                write(piece)
        except ValueError as error:  # the conversation has grown too long
            messages.pop()
            write(f"error: {error}\n")
            continue
        finally:
            signal.signal(signal.SIGINT, before)
        write("\n")
        after(stats)
        messages.append({"role": "assistant", "content": answer})
