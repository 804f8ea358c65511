"""The chat format of Ling 2.0's instruct models."""

import json
from pathlib import Path

import pytest

from ling_jax.data.chat import render
from ling_jax.data.tokenizer import SPECIAL_TOKENS, Tokenizer

OFF = "detailed thinking off<|role_end|>"
SYSTEM = f"<role>SYSTEM</role>{OFF}"


def turn(role: str, content: object, **more) -> dict:
    return {"role": role, "content": content, **more}


def body(*messages: dict) -> str:
    """The text after the default SYSTEM turn, without a generation prompt."""
    text = render(messages, add_generation_prompt=False)
    assert text.startswith(SYSTEM)
    return text.removeprefix(SYSTEM)


def test_a_user_message_becomes_a_system_turn_a_human_turn_and_an_open_assistant_turn():
    assert render([turn("user", "Hi")]) == f"{SYSTEM}<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>"


def test_the_system_turn_is_there_without_any_message():
    assert render([], add_generation_prompt=False) == SYSTEM


def test_a_first_system_message_stands_before_the_thinking_line():
    text = render([turn("system", "Be brief."), turn("user", "Hi")], add_generation_prompt=False)
    assert text == f"<role>SYSTEM</role>Be brief.\n{OFF}<role>HUMAN</role>Hi<|role_end|>"


def test_an_empty_system_message_still_gives_its_newline():
    assert render([turn("system", "")], add_generation_prompt=False) == f"<role>SYSTEM</role>\n{OFF}"


def test_later_system_messages_are_turns_without_a_thinking_line():
    assert body(turn("user", "a"), turn("system", "b")) == (
        "<role>HUMAN</role>a<|role_end|><role>SYSTEM</role>b<|role_end|>"
    )


def test_tools_are_listed_one_json_line_each_between_system_text_and_thinking_line():
    tools = [{"name": "add", "parameters": {"a": "<int>"}}, {"name": "groß"}]
    text = render([turn("system", "S"), turn("user", "Hi")], tools)
    system = text.split("<|role_end|>")[0]
    assert system.startswith("<role>SYSTEM</role>S\n")
    assert '\n<tools>\n{"name": "add", "parameters": {"a": "<int>"}}\n{"name": "groß"}\n</tools>\n' in system
    assert "<tool_call>" in system.split("\n</tools>")[1]
    assert system.endswith("\ndetailed thinking off")


@pytest.mark.parametrize(
    "message",
    [
        turn("assistant", "4", reasoning_content="two and two"),
        turn("assistant", "<think>\ntwo and two\n</think>\n\n4"),
        turn("assistant", "<think>two and two</think>4"),
    ],
)
def test_reasoning_is_shown_after_the_last_query_and_dropped_before_it(message):
    shown = "<role>ASSISTANT</role>\n<think>\ntwo and two\n</think>\n\n4<|role_end|>"
    assert body(turn("user", "2+2"), message) == f"<role>HUMAN</role>2+2<|role_end|>{shown}"
    earlier = body(turn("user", "2+2"), message, turn("user", "thanks"))
    assert "<role>ASSISTANT</role>4<|role_end|>" in earlier and "two and two" not in earlier


def test_a_user_message_that_is_a_tool_response_is_no_query():
    thought = turn("assistant", "4", reasoning_content="hm")
    response = turn("user", "<tool_response>\n4\n</tool_response>")
    assert "<think>\nhm\n</think>" in body(turn("user", "2+2"), thought, response)


def test_an_answer_without_reasoning_gets_no_think_block():
    assert body(turn("user", "a"), turn("assistant", "b")).endswith("<role>ASSISTANT</role>b<|role_end|>")


def test_tool_calls_follow_the_answer_on_lines_of_their_own():
    calls = [{"name": "f", "arguments": {"x": "é"}}, {"function": {"name": "g", "arguments": '{"y": 1}'}}]
    rendered = (
        '<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {"y": 1}}\n</tool_call><|role_end|>'
    )
    assert body(turn("assistant", "Let me see.", tool_calls=calls)) == f"<role>ASSISTANT</role>Let me see.\n{rendered}"
    silent = {"role": "assistant", "content": None, "tool_calls": calls}
    assert body(silent) == f"<role>ASSISTANT</role>{rendered}"


def test_tool_results_in_a_row_share_one_observation_turn():
    one = "\n<tool_response>\n1\n</tool_response>"
    two = "\n<tool_response>\n2\n</tool_response>"
    observed = f"<role>OBSERVATION</role>{one}{two}<|role_end|>"
    assert body(turn("tool", "1"), turn("tool", "2")) == observed
    apart = body(turn("tool", "1"), turn("assistant", "a"), turn("tool", "2"))
    assert apart.count("<role>OBSERVATION</role>") == 2


def test_an_unknown_role_is_named():
    with pytest.raises(ValueError, match="unknown role robot in message 1"):
        render([turn("user", "a"), turn("robot", "b")])


@pytest.mark.parametrize("content", [None, 3, ["parts"]])
def test_content_must_be_text(content):
    with pytest.raises(ValueError, match="message 0 has content"):
        render([{"role": "user", "content": content}])


def test_a_foreign_template_is_rendered_as_hf_does():
    template = (
        "{%- for m in messages %}\n    {% if loop.first %}{% continue %}{% endif %}\n{{ m | tojson }}{% endfor %}"
    )
    text = render([turn("user", "a"), turn("user", "<b>")], template=template)
    assert text.strip() == '{"role": "user", "content": "<b>"}'


def test_a_template_can_not_reach_into_python():
    with pytest.raises(ValueError, match="chat template"):
        render([turn("user", "a")], template="{{ messages.__class__.__mro__ }}")


# Templates of others.

USER = [turn("user", "2+2?")]
# Four ways in which templates are told to think; the second and third write it out, as Ling's own do.
SWITCHED = {
    "variable": ("{{ 'think' if enable_thinking else 'hurry' }}", "think", "hurry"),
    "other-variable": ("{% if thinking %}think{% else %}hurry{% endif %}", "think", "hurry"),
    "written-out": ("{{ 'S detailed thinking off<|role_end|>' }}", "S detailed thinking on<|role_end|>", None),
    "text": ("S detailed thinking off{{ '' }}", "S detailed thinking on", "S detailed thinking off"),
    "option": (
        "{%- set thinking_option = \"off\" -%}\n{{ 'detailed thinking ' + thinking_option + '.' }}",
        "detailed thinking on.",
        "detailed thinking off.",
    ),
    "always-on": ("{% set thinking_option = 'on' %}{{ 'detailed thinking ' ~ thinking_option }}",
        "detailed thinking on", "detailed thinking off"),
    "opened": ("A{% if add_generation_prompt and enable_thinking is false %}<think></think>{% endif %}",
        "A", "A<think></think>"),
}  # fmt: skip


@pytest.mark.parametrize("name", SWITCHED)
def test_thinking_is_switched_whatever_the_template_calls_it(name):
    template, on, off = SWITCHED[name]
    assert render(USER, template=template, variables={"enable_thinking": True}) == on
    off = template.split("'")[1] if off is None else off
    assert render(USER, template=template, variables={"enable_thinking": False}) == off


def test_a_switch_that_shows_in_the_generation_prompt_alone_is_one():
    template = SWITCHED["opened"][0]
    assert render(USER, add_generation_prompt=False, template=template, variables={"enable_thinking": False}) == "A"


@pytest.mark.parametrize("thinking", [True, False])
def test_a_template_that_does_not_change_with_the_switch_is_refused(thinking):
    template = "{% set tone = 'off' %}{{ messages[0].content }} {{ tone }}"
    with pytest.raises(ValueError, match="no switch for thinking"):
        render([turn("user", "detailed thinking off")], template=template, variables={"enable_thinking": thinking})
    assert render(USER, template=template) == "2+2? off"


def test_what_a_user_says_of_thinking_is_left_alone():
    said = [turn("user", "detailed thinking off")]
    template = SWITCHED["option"][0] + "{{ messages[0].content }}"
    text = render(said, template=template, variables={"enable_thinking": True})
    assert text == "detailed thinking on.detailed thinking off"
    assert render(said, variables={"enable_thinking": True}).count("detailed thinking on") == 1


def test_blocks_that_mark_what_is_trained_on_are_rendered_as_they_stand():
    """As transformers does: what is set inside is not seen outside."""
    template = (
        "{%- set kept = 1 %}{%- for m in messages %}{%- if m.role == 'assistant' %}\n"
        "{% generation %}\n{% set kept = 2 %}{{ m.content }}|{% endgeneration %}{{ kept }}\n{%- else %}-{% endif %}"
        "{%- endfor %}"
    )
    said = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    assert render(said, template=template) == "-b|1-d|1"


ATTACKS = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "formatted": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "changed": "{{ messages.clear() }}",
    "long-range": "{% for i in range(1000000000) %}{% endfor %}",
    "long-text": "{{ 'a' * 10000000000 }}",
    "large-power": "{{ 9 ** 9 ** 9 }}",
    "endless": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "file": "{% include '/etc/passwd' %}",
    "division": "{{ 1 / 0 }}",
    "undefined": "{{ nothing.at.all }}",
    "types": "{{ 'a' + 1 }}",
    "syntax": "{% if %}",
}


@pytest.mark.parametrize("template", ATTACKS.values(), ids=ATTACKS.keys())
def test_a_template_that_breaks_out_or_down_is_one_error_in_one_line(template):
    with pytest.raises(ValueError, match="the chat template can't render these messages: .") as error:
        render(USER, template=template)
    assert "\n" not in str(error.value)


def test_a_small_product_is_no_attack():
    assert render(USER, template="{{ '-' * 3 }}{{ 2 * 3 }}{{ 2 ** 10 }}{{ [1] * 2 }}") == "---61024[1, 1]"


# Contents and roles.


def test_parts_of_text_are_a_text_of_as_many_lines():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render([turn("user", parts)]) == render([turn("user", "one\ntwo")])
    assert render([turn("user", parts[:1])]) == render([turn("user", "one")])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hi", "messages is a str"),
        (["hi"], "message 0 is 'hi'; it must be an object"),
        ([{"content": "a"}], "message 0 has role None"),
        ([turn("user", "a"), {"role": "user"}], "message 1 has content None"),
        ([{"role": "user", "content": []}], r"message 0 has content \[\]"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 0 has content with a part of type 'image"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "a part of type 'text'"),
        ([{"role": "assistant", "content": None}], "message 0 has content None"),
    ],
)
def test_messages_that_are_none_are_named(messages, words):
    with pytest.raises(ValueError, match=words):
        render(messages)


def test_reasoning_that_is_given_apart_leaves_the_content_as_it_is():
    answer = turn("assistant", "\n<think>x</think>4", reasoning_content="two and two")
    shown = "<role>ASSISTANT</role>\n<think>\ntwo and two\n</think>\n\n<think>x</think>4<|role_end|>"
    assert body(turn("user", "2+2"), answer) == f"<role>HUMAN</role>2+2<|role_end|>{shown}"


def test_without_a_query_no_reasoning_is_shown():
    assert "<think>" not in body(turn("assistant", "4", reasoning_content="two and two"))


# The ids that transformers' apply_chat_template gives with the official template and a tokenizer of bytes
# (scripts/chat_ids.py); nothing is added to them, a start token neither.
CASES = json.loads((Path(__file__).parent / "chat_ids.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_conversations_have_the_ids_that_transformers_gives_them_with_the_official_template(case):
    tokenizer = Tokenizer.train(["-"], 256 + len(SPECIAL_TOKENS))
    ids = tokenizer.encode_chat(case["messages"], case["tools"], add_generation_prompt=case["add_generation_prompt"])
    assert tokenizer.decode(ids) == tokenizer.decode(case["ids"])
    assert ids == case["ids"]
