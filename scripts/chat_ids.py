"""Token ids of conversations by transformers: python -m scripts.chat_ids --official FILE > tests/generate/chat_ids.json

FILE is the tokenizer_config.json of the official SFT tokenizer (Ling-V2, resource/tokenizer/config_sft), whose chat
template `apply_chat_template` renders; the tokenizer is one of bytes and Ling's special tokens, so the ids are the text
and nothing else. tests/generate/test_chat.py holds our template to them. Needs transformers (requirements-peers.txt).
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
import tyro

from ling_jax.data.tokenizer import SPECIAL_TOKENS, Tokenizer

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "zwei"}}}
THOUGHT = "<think>\ntwo and two\n</think>\n\n4"
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a + b", "parameters": {"type": "object"}}}]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [{"role": "user", "content": "Wie viel ist 2+2?"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<role>"}],
    "empty-system": [{"role": "system", "content": ""}, {"role": "user", "content": "a"}],
    "history": [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": THOUGHT},
        {"role": "system", "content": "Now in words."},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "\nfour", "reasoning_content": "\nin words\n"},
    ],
    "no-query": [{"role": "assistant", "content": THOUGHT}, {"role": "assistant", "content": "b"}],
    "tools": [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL["function"]]},
        {"role": "tool", "content": "4"},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "user", "content": "<tool_response>\n4\n</tool_response>"},
        {"role": "assistant", "content": THOUGHT},
    ],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    official: Path
    """The tokenizer_config.json of the official SFT tokenizer."""


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(Command, args=list(argv), prog="python -m scripts.chat_ids", description=__doc__)
    template = json.loads(command.official.read_text())["chat_template"]
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.train(["-"], 256 + len(SPECIAL_TOKENS)).save(folder)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        cases = []
        for i, (name, messages) in enumerate(CONVERSATIONS.items()):
            more = {"add_generation_prompt": i % 2 == 0, "tools": TOOLS if name == "tools" else None}
            ids = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False, **more)
            cases.append({"name": name, "messages": messages, **more, "ids": ids})
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    print(f'{{"transformers": "{transformers.__version__}", "cases": [\n{lines}\n]}}')


if __name__ == "__main__":
    main(sys.argv[1:])
