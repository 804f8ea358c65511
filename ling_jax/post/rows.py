"""Conversations from the rows of files, in the shapes in which other tools write them.

A row is an object of a .jsonl or .json file, or a row of a .parquet file. Its shape is told by the names of its fields:

  messages                           a list of {role, content}: OpenAI, Hugging Face, TRL
  conversations                      a list of {from, value}: ShareGPT
  prompt + completion (or response)  strings, or lists of messages
  instruction [+ input] + output     Alpaca
  question + answer                  question answering

Beside them a row may have `system`, `tools` (JSON schemas, also as a string) and `thinking` (true, false, "on", "off").
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ling_jax.data.chat import checked_messages
from ling_jax.data.reading import few, holds_records, list_files, read_records
from ling_jax.data.tokenizer import check_text

log = logging.getLogger(__name__)

Message = dict[str, Any]

LISTS = ("messages", "conversations", "conversation")
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("query", "response"),
    ("question", "answer"),
    ("question", "response"),
)
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
REASONING = ("reasoning_content", "reasoning", "thinking")  # what others call it in a message
MODES = {True: True, False: False, "on": True, "off": False}
NOT_LEARNED = "not_learned"  # marks an assistant's message that is context alone


@dataclass(frozen=True)
class Conversation:
    """A conversation to learn from.

    Attributes:
      messages: "role" (system, user, assistant, tool) and "content"; of the assistant perhaps "reasoning_content",
        "tool_calls", and NOT_LEARNED.
      tools: JSON schemas of functions.
      thinking: the mode that it is an example of; None where the row says nothing.
      where: file and line, for errors.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    thinking: bool | None
    where: str


def conversation_of(row: Any, where: str) -> Conversation:
    """The conversation of a row.

    Raises:
      ValueError: naming `where`, the field, and what is wrong with it.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a row must be an object, not {type(row).__name__}")
    row = {name: value for name, value in row.items() if value is not None}
    try:
        messages, field = _messages(row)
        messages = _checked(messages, field)
        return Conversation(messages, _tools(row), _thinking(row), where)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def read_conversations(path: str, tasks: Sequence[str]) -> Iterator[Conversation]:
    """The conversations of a file or of a folder's files, in their order.

    Args:
      tasks: names of what can be asked for instead, for errors.
    Raises:
      ValueError: for a path that holds none, or naming the file and line of a row that is none.
    """
    files = list_files(path, tasks)
    names = [name for name in files.names if holds_records(name)]
    if left_out := [*(name for name in files.names if name not in names), *files.left_out]:
        log.warning("%s: not read: %s", path, few(left_out))
    if not names:
        raise ValueError(f"data source {path!r} holds no rows: conversations are in .jsonl, .json or .parquet files")
    for name in names:
        for _, line, row in read_records(files.root / name):
            yield conversation_of(row, f"{files.root / name}:{line}")


def _messages(row: Mapping[str, Any]) -> tuple[list[Any], str]:
    """The messages of a row as they stand, and the field that they are in."""
    for field in LISTS:
        if field in row:
            if not isinstance(row[field], list) or not row[field]:
                raise ValueError(f"field {field!r} must be a list of messages, at least one, not {row[field]!r}")
            return row[field], field
    for asked, answered in PAIRS:
        if asked in row and answered in row:
            return _pair(row, asked, answered), f"{asked} + {answered}"
    shapes = ", ".join(["messages", "conversations", *(" + ".join(pair) for pair in PAIRS)])
    raise ValueError(f"fields {', '.join(map(str, row)) or 'none'} are no conversation: a row has one of {shapes}")


def _pair(row: Mapping[str, Any], asked: str, answered: str) -> list[Any]:
    """The messages of a question and its answer; of a list before the answer nothing is learned."""
    question, answer = row[asked], row[answered]
    if isinstance(question, str):
        extra = row.get("input", "") if asked == "instruction" else ""
        if not isinstance(extra, str):
            raise ValueError(f"field 'input' is {extra!r}; it must be a string")
        question = [{"role": "user", "content": f"{question}\n\n{extra}" if extra else question}]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    for field, value in ((asked, question), (answered, answer)):
        if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
            raise ValueError(f"field {field!r} is {row[field]!r}; it must be a string or a list of messages")
    system = [{"role": "system", "content": row["system"]}] if "system" in row else []
    return [*system, *({**message, "weight": 0} for message in question), *answer]


def _checked(raw: list[Any], field: str) -> list[Message]:
    """Messages with our names for roles and fields, up to the assistant's last one."""
    messages = []
    for index, message in enumerate(raw):
        if not isinstance(message, Mapping):
            raise ValueError(f"field {field!r}: message {index} is {message!r}; it must be an object")
        try:
            messages.append(_message(message))
        except ValueError as error:
            raise ValueError(f"field {field!r}: message {index}: {error}") from None
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    messages = messages[: last + 1]
    if all(message["role"] != "assistant" or NOT_LEARNED in message for message in messages):
        raise ValueError(f"field {field!r} has no message of the assistant to learn from")
    try:
        return checked_messages(messages)
    except ValueError as error:
        raise ValueError(f"field {field!r}: {error}") from None


def _message(raw: Mapping[str, Any]) -> Message:
    raw = {name: value for name, value in raw.items() if value is not None}
    said = raw.get("role", raw.get("from"))
    if said not in ROLES:
        raise ValueError(f"role {said!r} is none of {', '.join(dict.fromkeys(ROLES))}")
    message: Message = {"role": ROLES[said], "content": raw.get("content", raw.get("value"))}
    if said == "function_call":
        message |= {"content": None, "tool_calls": [_parsed(message["content"], "a function call", dict)]}
    elif calls := raw.get("tool_calls"):
        message["tool_calls"] = _parsed(calls, "tool_calls", list)
    elif message["content"] is None:
        raise ValueError("it has no content")
    if isinstance(message["content"], str):
        check_text(message["content"])
    reasoning = next((raw[name] for name in REASONING if name in raw), None)
    if reasoning is not None:
        check_text(reasoning)
        message["reasoning_content"] = reasoning
    if (weight := raw.get("weight", 1)) not in (0, 1):
        raise ValueError(f"weight {weight!r} must be 0, which is not learned, or 1")
    return message if weight else message | {NOT_LEARNED: True}


def _parsed(value: Any, what: str, kind: type) -> Any:
    """A value that may be written as JSON in a string."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{what} is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {value!r}; it must be {'a list' if kind is list else 'an object'}")
    return value


def _tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    tools = _parsed(row.get("tools") or [], "field 'tools'", list)
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"field 'tools' is {tools!r}; it must be a list of objects")
    return tools or None


def _thinking(row: Mapping[str, Any]) -> bool | None:
    """The mode that a row is an example of, which TRL writes among the template's own settings."""
    settings = row.get("chat_template_kwargs")
    settings = settings if isinstance(settings, Mapping) else {}
    for field, value in (("thinking", row.get("thinking")), ("enable_thinking", row.get("enable_thinking")),
                         ("chat_template_kwargs", settings.get("enable_thinking"))):  # fmt: skip
        if value is not None:
            if not isinstance(value, bool | str) or value not in MODES:
                raise ValueError(f"field {field!r} is {value!r}; thinking is true, false, 'on' or 'off'")
            return MODES[value]
    return None
