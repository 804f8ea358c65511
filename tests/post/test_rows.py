"""Rows of files that are no conversations, and how they are refused; files of each format."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from ling_jax.post.rows import conversation_of, read_conversations

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

WRONG = {
    "no-object": ([], "a row must be an object, not list"),
    "no-shape": ({"text": "a", "id": 3}, "fields text, id are no conversation: a row has one of messages"),
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "fields prompt, chosen, rejected are no"),
    "empty": ({"messages": []}, "field 'messages' must be a list of messages, at least one"),
    "no-list": ({"messages": "a"}, "field 'messages' must be a list"),
    "no-message": ({"messages": [USER, "b"]}, "field 'messages': message 1 is 'b'; it must be an object"),
    "no-role": ({"messages": [{"content": "a"}]}, "message 0: role None is none of system"),
    "other-role": ({"messages": [USER, {"role": "critic", "content": "b"}]}, "message 1: role 'critic' is none of"),
    "no-content": ({"messages": [USER, {"role": "assistant"}]}, "message 1: it has no content"),
    "number": ({"messages": [USER, {"role": "assistant", "content": 4}]}, "message 1 has content 4"),
    "picture": ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "part of type 'image'"),
    "nothing-to-learn": ({"messages": [USER]}, "field 'messages' has no message of the assistant to learn from"),
    "no-weight": ({"messages": [USER, {**ANSWER, "weight": 0}]}, "no message of the assistant to learn from"),
    "half-weight": ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "weight 0.5 must be 0, which is not"),
    "tools": ({"messages": [USER, ANSWER], "tools": "{"}, "field 'tools' is not JSON"),
    "tools-of-text": ({"messages": [USER, ANSWER], "tools": ["add"]}, "field 'tools' is ['add']"),
    "thinking": ({"messages": [USER, ANSWER], "thinking": "maybe"}, "field 'thinking' is 'maybe'"),
    "calls": ({"messages": [USER, {"role": "assistant", "tool_calls": "x"}]}, "tool_calls is not JSON"),
    "half-a-pair": ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "half of a surrogate pair"),
    "pair": ({"prompt": "a", "completion": 4}, "field 'completion' is 4; it must be a string or a list of messages"),
    "input": ({"instruction": "a", "input": 3, "output": "b"}, "field 'input' is 3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_row_that_is_no_conversation_is_told_by_its_line_and_field(name):
    row, message = WRONG[name]
    with pytest.raises(ValueError) as error:
        conversation_of(row, "rows.jsonl:7")
    assert str(error.value).startswith("rows.jsonl:7: ") and message in str(error.value)


def test_nulls_are_absent():
    row = {
        "messages": [USER, {**ANSWER, "tool_calls": None, "reasoning_content": None}],
        "tools": None,
        "thinking": None,
    }
    conversation = conversation_of(row, "x")
    assert conversation.messages == [USER, ANSWER] and conversation.tools is None and conversation.thinking is None


def test_files_of_each_format_hold_the_same_conversations(tmp_path):
    rows = [{"messages": [USER, {**ANSWER, "content": str(i)}], "thinking": bool(i % 2)} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    read = [list(read_conversations(str(tmp_path / name), ())) for name in ("a.jsonl", "b.json", "c.parquet")]
    for found in read:
        assert [(c.messages, c.thinking) for c in found] == [(row["messages"], row["thinking"]) for row in rows]
    assert [c.where for c in read[0]][:2] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:2"]
    assert len(list(read_conversations(str(tmp_path), ()))) == 15


def test_a_folder_without_rows_is_refused_and_what_is_not_read_is_named(tmp_path, caplog):
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match="holds no rows: conversations are in .jsonl"):
        list(read_conversations(str(tmp_path), ()))
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [USER, ANSWER]}))
    assert len(list(read_conversations(str(tmp_path), ()))) == 1
    assert "not read: notes.txt" in caplog.text


def test_a_line_that_is_wrong_is_told_by_its_number(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [USER, ANSWER]}) + "\n\n" + '{"messages": 3}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:3: field 'messages' must be a list"):
        list(read_conversations(str(tmp_path / "a.jsonl"), ()))
