"""Text in, text out, over an engine: streamed answers, files of prompts, conversations."""

import dataclasses
import io
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ling_jax.data.chat import checked_messages
from ling_jax.data.tokenizer import Tokenizer, check_text
from ling_jax.files.paths import at, open_to_read
from ling_jax.generate.engine import Answer, Engine, Request
from ling_jax.generate.reply import Reply


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

    def complete(
        self, prompts: Sequence[Sequence[int]], samples: int, apart: int = 0
    ) -> Iterator[tuple[int, int, str, Answer]]:
        """(prompt, sample, text, answer) of every answer, each as it ends. The seeds of two prompts are `apart`: by
        default the same numbers are drawn for all."""
        engine, running = self.engine, {}
        for i, ids in enumerate(prompts):
            for sample in range(samples):
                running[engine.submit(self.request_of(ids, i * apart + sample))] = (i, sample, self.reply())
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


SHOWN = 5  # wrong lines of a file that are told in full; of the others the numbers


def read_prompts(file: str, check: Callable[[dict[str, Any]], None] = lambda record: None) -> list[dict[str, Any]]:
    """Lines of a JSONL file, each an object with a "prompt" (text) or "messages" (a conversation, which may bring
    "tools").

    Args:
      file: local or in a bucket.
      check: raises ValueError for a record that cannot be used.
    Raises:
      ValueError: names every line that is none, with what is wrong with it.
    """
    records, wrong = [], {}
    with io.TextIOWrapper(open_to_read(at(file)), encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                records.append(_record(line))
                check(records[-1])
            except ValueError as error:
                wrong[number] = f"line {number}{error}" if isinstance(error, _NoRecord) else f"line {number}: {error}"
    if wrong:
        others = ", ".join(map(str, list(wrong)[SHOWN:]))
        more = f"; and {len(wrong) - SHOWN} more, in lines {others}" if others else ""
        raise ValueError(f"{file} {'; '.join(list(wrong.values())[:SHOWN])}{more}")
    if not records:
        raise ValueError(f"{file} holds no prompts")
    return records


class _NoRecord(ValueError):
    """The reason why a line holds no record, which follows its number in the message."""


def _record(line: str) -> dict[str, Any]:
    """The object in a line of a file of prompts; ValueError if it is none that can be asked and written out again."""
    try:
        record = json.loads(line.encode("utf-8", "surrogateescape").decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _NoRecord(f" is not JSON in UTF-8: {error}") from None
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(record, dict) or (messages is None and not isinstance(record.get("prompt"), str)):
        raise _NoRecord(' must be an object with a text "prompt" or a list "messages"')
    for name, value in record.items():
        try:
            check_text(name)
            check_text(value if isinstance(value, str) else json.dumps([name, value], ensure_ascii=False))
        except ValueError as error:
            raise ValueError(f"{name!a}: {error}") from None
    if messages is not None and not checked_messages(messages):
        raise ValueError("messages is empty; give at least one")
    tools = record.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"tools is {tools!r}; it must be a list of objects")
    return record


def converse(
    asker: Asker,
    system: str | None,
    encode: Callable[[list[dict[str, str]]], list[int]],
    read: Callable[[], str],
    write: Callable[[str], None],
    after: Callable[[Stats], None],
) -> None:
    """A conversation until `read` raises EOFError. SIGINT ends the answer that is being given, not the program."""
    messages = [] if system is None else [{"role": "system", "content": system}]
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
