"""The chat format of Ling 2.0's instruct models."""

import pytest

from ling_jax.data.chat import render

OFF = "detailed thinking off<|role_end|>"
SYSTEM = f"<role>SYSTEM</role>{OFF}"


def turn(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def body(*messages: dict) -> str:
    """What follows the default SYSTEM turn, without a generation prompt."""
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
    assert "<tool_call>" in system.split("</tools>")[1]
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
