"""The tokens of a conversation that are learned, in twenty-odd conversations beside the text that each must give."""

import pytest

from ling_jax.data.chat import LING_CHAT_TEMPLATE
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.post.rows import conversation_of
from ling_jax.post.sft import shown
from ling_jax.post.template import Masker, first_difference
from tests.support.tokenizers import OWN

OFF = "<role>SYSTEM</role>detailed thinking off<|role_end|>"
ON = "<role>SYSTEM</role>detailed thinking on<|role_end|>"
HUMAN, ASSISTANT, END = "<role>HUMAN</role>", "<role>ASSISTANT</role>", "<|role_end|>"
SEEN = "<role>OBSERVATION</role>"


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def tool(text):
    return {"role": "tool", "content": text}


def marked(row: dict, policy: str = "split", tokenizer: Tokenizer = OWN) -> list[str]:
    """The examples of a row, with what is learned between [[ and ]]."""
    masker = Masker(tokenizer, policy)
    texts = shown(masker.examples([conversation_of(row, "rows.jsonl:1")]), tokenizer, ("[[", "]]"))
    return [text.split("\n", 1)[1] for text in texts]


CALL = {"name": "add", "arguments": {"a": 2}}
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
ADD = {"name": "add", "parameters": {}}
TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    'signatures within <tools></tools> XML tags:\n<tools>\n{"name": "add", "parameters": {}}\n</tools>\n\nFor each '
    "function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>\n'
)
EOD = "<|endoftext|>"
THOUGHT = "\n<think>\nhm\n</think>\n\n"

TABLE = {
    "one-turn": (
        {"messages": [user("2+2"), assistant("4")]},
        [f"{OFF}{HUMAN}2+2{END}{ASSISTANT}[[4{END}{EOD}]]"],
    ),
    "two-turns": (
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
        [f"{OFF}{HUMAN}a{END}{ASSISTANT}[[b{END}]]{HUMAN}c{END}{ASSISTANT}[[d{END}{EOD}]]"],
    ),
    "system": (
        {"messages": [{"role": "system", "content": "Be brief."}, user("a"), assistant("b")]},
        [f"<role>SYSTEM</role>Be brief.\ndetailed thinking off{END}{HUMAN}a{END}{ASSISTANT}[[b{END}{EOD}]]"],
    ),
    "empty-system": (
        {"messages": [{"role": "system", "content": ""}, user("a"), assistant("b")]},
        [f"<role>SYSTEM</role>\ndetailed thinking off{END}{HUMAN}a{END}{ASSISTANT}[[b{END}{EOD}]]"],
    ),
    "later-system": (
        {"messages": [user("a"), assistant("b"), {"role": "system", "content": "S"}, user("c"), assistant("d")]},
        [f"{OFF}{HUMAN}a{END}{ASSISTANT}[[b{END}]]<role>SYSTEM</role>S{END}{HUMAN}c{END}{ASSISTANT}[[d{END}{EOD}]]"],
    ),
    "thinking": (
        {"messages": [user("a"), assistant("b", reasoning_content="hm")]},
        [f"{ON}{HUMAN}a{END}{ASSISTANT}[[{THOUGHT}b{END}{EOD}]]"],
    ),
    "thinking-in-tags": (
        {"messages": [user("a"), assistant("<think>hm</think>b")]},
        [f"{ON}{HUMAN}a{END}{ASSISTANT}[[{THOUGHT}b{END}{EOD}]]"],
    ),
    "thinking-by-another-name": (
        {"messages": [user("a"), assistant("b", reasoning="hm")]},
        [f"{ON}{HUMAN}a{END}{ASSISTANT}[[{THOUGHT}b{END}{EOD}]]"],
    ),
    "thinking-asked-off": (
        {"messages": [user("a"), assistant("b", reasoning_content="hm")], "thinking": "off"},
        [f"{OFF}{HUMAN}a{END}{ASSISTANT}[[b{END}{EOD}]]"],
    ),
    "thinking-asked-on": (
        {"messages": [user("a"), assistant("b")], "chat_template_kwargs": {"enable_thinking": True}},
        [f"{ON}{HUMAN}a{END}{ASSISTANT}[[b{END}{EOD}]]"],
    ),
    "dropped-reasoning": (
        {"messages": [user("a"), assistant("b", reasoning_content="hm"), user("c"), assistant("d")]},
        [
            f"{ON}{HUMAN}a{END}{ASSISTANT}[[{THOUGHT}b{END}]]",
            f"{ON}{HUMAN}a{END}{ASSISTANT}b{END}{HUMAN}c{END}{ASSISTANT}[[d{END}{EOD}]]",
        ],
    ),
    "kept-reasoning-of-a-tool-loop": (
        {"messages": [user("a"), assistant("", reasoning_content="hm", tool_calls=[CALL]), tool("4"),
                      assistant("b", reasoning_content="hm")]},
        [
            f"{ON}{HUMAN}a{END}{ASSISTANT}[[{THOUGHT}{CALLED}{END}]]{SEEN}\n<tool_response>\n4\n</tool_response>{END}"
            f"{ASSISTANT}[[{THOUGHT}b{END}{EOD}]]"
        ],
    ),
    "dropped-reasoning-of-a-tool-loop": (
        {"messages": [user("a"), assistant("x", reasoning_content="hm"), tool("4"),
                      assistant("b", reasoning_content="hm"), user("c"), assistant("d")]},
        [
            f"{ON}{HUMAN}a{END}{ASSISTANT}[[{THOUGHT}x{END}]]",
            f"{ON}{HUMAN}a{END}{ASSISTANT}{THOUGHT}x{END}{SEEN}\n<tool_response>\n4\n</tool_response>{END}"
            f"{ASSISTANT}[[{THOUGHT}b{END}]]",
            f"{ON}{HUMAN}a{END}{ASSISTANT}x{END}{SEEN}\n<tool_response>\n4\n</tool_response>{END}{ASSISTANT}b{END}"
            f"{HUMAN}c{END}{ASSISTANT}[[d{END}{EOD}]]",
        ],
    ),
    "tools": (
        {"messages": [user("2+2"), assistant(None, tool_calls=[CALL]), tool("4"), assistant("It is 4.")],
         "tools": [ADD]},
        [
            f"<role>SYSTEM</role>{TOOLS}detailed thinking off{END}{HUMAN}2+2{END}{ASSISTANT}[[{CALLED}{END}]]"
            f"{SEEN}\n<tool_response>\n4\n</tool_response>{END}{ASSISTANT}[[It is 4.{END}{EOD}]]"
        ],
    ),
    "tools-as-text": (
        {"messages": [user("a"), assistant("b")], "tools": '[{"name": "add", "parameters": {}}]'},
        [f"<role>SYSTEM</role>{TOOLS}detailed thinking off{END}{HUMAN}a{END}{ASSISTANT}[[b{END}{EOD}]]"],
    ),
    "tool-results-in-a-row": (
        {"messages": [user("a"), assistant("x", tool_calls=[{"function": CALL}, CALL]), tool("1"), tool("2"),
                      assistant("b")]},
        [
            f"{OFF}{HUMAN}a{END}{ASSISTANT}[[x\n{CALLED}\n{CALLED}{END}]]{SEEN}\n<tool_response>\n1\n</tool_response>"
            f"\n<tool_response>\n2\n</tool_response>{END}{ASSISTANT}[[b{END}{EOD}]]"
        ],
    ),
    "unicode-at-the-borders": (
        {"messages": [user("é🙂"), assistant("🙂你"), user("你"), assistant("ß\n")]},
        [f"{OFF}{HUMAN}é🙂{END}{ASSISTANT}[[🙂你{END}]]{HUMAN}你{END}{ASSISTANT}[[ß\n{END}{EOD}]]"],
    ),
    "two-answers-in-a-row": (
        {"messages": [user("a"), assistant("b"), assistant("c")]},
        [f"{OFF}{HUMAN}a{END}{ASSISTANT}[[b{END}]]{ASSISTANT}[[c{END}{EOD}]]"],
    ),
    "a-turn-of-no-weight": (
        {"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)]},
        [f"{OFF}{HUMAN}a{END}{ASSISTANT}b{END}{HUMAN}c{END}{ASSISTANT}[[d{END}{EOD}]]"],
    ),
    "the-last-turn-of-no-weight": (
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d", weight=0)]},
        [f"{OFF}{HUMAN}a{END}{ASSISTANT}[[b{END}]]{HUMAN}c{END}{ASSISTANT}d{END}"],
    ),
    "an-open-question-at-the-end": (
        {"messages": [user("a"), assistant("b"), user("c")]},
        [f"{OFF}{HUMAN}a{END}{ASSISTANT}[[b{END}{EOD}]]"],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "a"},
                           {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                           {"from": "observation", "value": "4"}, {"from": "gpt", "value": "b"}]},
        [
            f"{OFF}{HUMAN}a{END}{ASSISTANT}[[{CALLED}{END}]]{SEEN}\n<tool_response>\n4\n</tool_response>{END}"
            f"{ASSISTANT}[[b{END}{EOD}]]"
        ],
    ),
    "prompt-and-completion": (
        {"prompt": "a", "completion": "b", "system": "S"},
        [f"<role>SYSTEM</role>S\ndetailed thinking off{END}{HUMAN}a{END}{ASSISTANT}[[b{END}{EOD}]]"],
    ),
    "prompt-of-messages": (
        {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]},
        [f"{OFF}{HUMAN}a{END}{ASSISTANT}b{END}{HUMAN}c{END}{ASSISTANT}[[d{END}{EOD}]]"],
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        [f"{OFF}{HUMAN}Add.\n\n2 and 2{END}{ASSISTANT}[[4{END}{EOD}]]"],
    ),
    "parts": (
        {"messages": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), assistant("c")]},
        [f"{OFF}{HUMAN}a\nb{END}{ASSISTANT}[[c{END}{EOD}]]"],
    ),
    "text-that-looks-like-tags": (
        {"messages": [user("What does </answer> mean?"), assistant("Nothing.")]},
        [f"{OFF}{HUMAN}What does </answer> mean?{END}{ASSISTANT}[[Nothing.{END}{EOD}]]"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_what_is_learned_is_what_was_written_by_hand(name):
    row, expected = TABLE[name]
    assert marked(row) == expected


def test_other_policies_for_dropped_reasoning():
    row, (_, rest) = TABLE["dropped-reasoning"]
    assert marked(row, "last") == [rest]
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the chat template of .* drops the reasoning of message 1 "):
        marked(row, "error")


def test_what_is_split_off_is_counted():
    masker = Masker(OWN, "split")
    list(masker.examples([conversation_of(TABLE["dropped-reasoning-of-a-tool-loop"][0], "x")]))
    assert masker.counts == {"split": 2}


def with_template(template: str) -> Tokenizer:
    copy = Tokenizer.train(["plain words"], 300, at_most=True)
    copy.chat_templates = {"default": template}
    return copy


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|role_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_line_end_behind_a_turn_is_not_learned():
    """As in ChatML: no model is asked for it, since the turn has ended."""
    [text] = marked(
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}, tokenizer=with_template(CHATML)
    )
    assert "<|im_start|>assistant\n[[b<|role_end|>]]\n<|im_start|>user" in text
    assert text.endswith("[[d<|role_end|>]]\n[[<|endoftext|>]]")


def test_a_mode_needs_a_template_with_a_switch():
    row = {"messages": [user("a"), assistant("b")], "thinking": True}
    with pytest.raises(ValueError, match=r"rows.jsonl:1: field 'thinking' is True, but the chat template .* no switch"):
        marked(row, tokenizer=with_template(CHATML))


def test_a_template_that_never_shows_reasoning_is_caught():
    row = {"messages": [user("a"), assistant("b", reasoning_content="hm")]}
    with pytest.raises(ValueError, match=r"rows.jsonl:1: .* does not show the reasoning of message 1"):
        marked(row, tokenizer=with_template(CHATML))


def test_a_generation_prompt_that_is_not_how_a_turn_begins_is_caught():
    other = CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: .* message 1 .*token \d+ is '<think>' there and 'b'"):
        marked({"messages": [user("a"), assistant("b")]}, tokenizer=with_template(other))


def test_a_template_that_shows_a_turn_in_another_way_later_is_caught():
    other = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content | upper }}")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: .* shows message 1 in another way when others follow it"):
        marked({"messages": [user("A"), assistant("b"), user("C"), assistant("d")]}, tokenizer=with_template(other))


def test_a_template_that_strips_thinking_of_earlier_turns_is_told_from_one_that_changes_them():
    strips = LING_CHAT_TEMPLATE.replace("detailed thinking ' + ('on' if enable_thinking else 'off')", "plain '")
    row, expected = TABLE["dropped-reasoning"]
    assert [
        text.replace("plain ", "detailed thinking on") for text in marked(row, tokenizer=with_template(strips))
    ] == (expected)


@pytest.mark.parametrize(("one", "other", "place"), [([1, 2], [1, 2, 3], None), ([1, 2], [1], 1), ([1], [2], 0)])
def test_the_first_difference(one, other, place):
    assert first_difference(one, other) == place
