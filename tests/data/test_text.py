"""Answers as text: whole characters, stop strings, files of prompts, conversations."""

import json
import os
import random
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ling_jax.commands.sample import SampleCommand, encode
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.generate.engine import Engine, Request
from ling_jax.generate.sampling import Sampling
from ling_jax.generate.text import Asker, Reply, Stats, converse, read_prompts
from tests.support.helpers import make_model, small
from tests.support.tokenizers import OWN

MODEL = small(
    num_hidden_layers=1, first_k_dense_replace=0, vocab_size=400, max_position_embeddings=64, eos_token_id=1,
    pad_token_id=1,
)  # fmt: skip


def streamed(ids: list[int], cuts: list[int], stop: list[str]) -> tuple[list[str], Reply]:
    """The pieces of an answer that comes in parts."""
    reply = Reply(OWN, stop)
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    pieces = [reply.push(ids[first:last]) for first, last in zip(edges, edges[1:], strict=False)]
    return [*pieces, reply.finish()], reply


@given(st.lists(st.integers(5, 399), max_size=40), st.lists(st.integers(0, 40), max_size=6))
def test_pieces_join_to_the_text_of_the_ids_whatever_the_bytes(ids, cuts):
    pieces, _ = streamed(ids, cuts, [])
    assert "".join(pieces) == OWN.decode(ids)
    assert not any(piece.endswith("\ufffd") for piece in pieces[:-1]) or "\ufffd" in OWN.decode(ids)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3), st.data())
def test_a_stop_string_and_what_follows_is_never_shown(text, stop, data):
    ids = [OWN.encode(letter)[0] for letter in text]
    pieces, reply = streamed(ids, data.draw(st.lists(st.integers(0, 30), max_size=6)), stop)
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    if not ends:
        assert "".join(pieces) == text and not reply.stopped
    else:  # the first to be complete, cut off where the earliest that then stands begins
        seen = text[: ends[0]]
        assert "".join(pieces) == seen[: min(seen.find(s) for s in stop if s in seen)] and reply.stopped


def test_characters_of_several_tokens_come_whole():
    ids = OWN.encode("a\U0001f600\u00e4b")
    pieces = [Reply(OWN).push([]), *streamed(ids, list(range(len(ids))), [])[0]]
    assert len(ids) > 4 and [piece for piece in pieces if piece] == ["a", "\U0001f600", "\u00e4", "b"]


@pytest.fixture(scope="module")
def asker():
    engine = Engine(make_model(MODEL), rows=2, slots=64)
    sampling = Sampling(temperature=1e6)  # any bytes
    return Asker(engine, OWN, Request(prompt=(), max_new_tokens=20, sampling=sampling), stop=["\n", "zz"])


def test_a_batch_and_a_stream_give_the_same_texts(asker):
    prompts = [OWN.encode(text) for text in ("one", "two words", "\u00e4")]
    found = {(i, sample): (text, answer) for i, sample, text, answer in asker.complete(prompts, 2)}
    assert sorted(found) == [(i, sample) for i in range(3) for sample in range(2)]
    for (i, sample), (text, answer) in found.items():
        stats = Stats()
        assert "".join(asker.stream(prompts[i], stats, sample)) == text
        assert answer.end in ("stop", "length") and not any(s in text for s in asker.stop)
        assert stats.prompt_tokens == len(prompts[i]) and "tokens/s" in str(stats)
    assert len({text for text, _ in found.values()}) == 6 and not asker.engine.busy


def test_lines_of_prompts_are_read_and_bad_ones_named(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "\u00e4", "id": 3}, {"messages": [{"role": "user", "content": "b"}]}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    assert read_prompts(str(file)) == lines
    for bad, words in [
        (b'{"prompt": "a"}\n{"prompt": "\xff"}', "line 2 is not JSON in UTF-8"),
        (b"{", "line 1 is not JSON"),
        (b'{"prompt": 3}', 'line 1 must be an object with a text "prompt"'),
        (b"\n", "holds no prompts"),
    ]:
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=words):
            read_prompts(str(file))


def test_a_conversation_remembers_and_ctrl_c_ends_an_answer_only(asker):
    said = iter(["first", "", KeyboardInterrupt, "second", "x" * 200, "third", EOFError])
    shown: list[str] = []
    asked: list[list[dict[str, str]]] = []
    stats: list[Stats] = []

    def read() -> str:
        text = next(said)
        if isinstance(text, str):
            return text
        raise text

    def write(piece: str) -> None:
        shown.append(piece)
        if len(asked) == 2 and len(shown) % 3 == 0:
            os.kill(os.getpid(), signal.SIGINT)

    def encode(messages: list[dict[str, str]]) -> list[int]:
        asked.append([dict(m) for m in messages])
        return OWN.encode(messages[-1]["content"])

    converse(asker, "be brief", encode, read, write, stats.append)
    roles = [[message["role"] for message in messages] for messages in asked]
    assert roles[0] == ["system", "user"] and roles[1] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in asked[-1] if m["role"] == "user"] == ["first", "second", "third"]
    assert any(piece.startswith("error: a prompt of") for piece in shown) and len(stats) == 3
    assert stats[1].answers[0].end is None and not asker.engine.busy


def test_random_text_through_a_batch_neither_hangs_nor_is_lost(asker):
    draw = random.Random(0)
    texts = ["".join(chr(draw.choice([97, 228, 8364, 128512])) for _ in range(draw.randint(1, 8))) for _ in range(60)]
    found = list(asker.complete([OWN.encode(text) for text in texts], 1))
    assert sorted(i for i, *_ in found) == list(range(60))
    assert all(text == text.encode("utf-8", "replace").decode() for _, _, text, _ in found)


ROLE = {"role": "user", "content": "b"}
LINES = {
    '{"messages": []}': "messages is empty",
    '{"messages": ["hi"]}': "message 0 is 'hi'",
    '{"messages": "hi"}': "messages is a str",
    '{"messages": [{"role": 3, "content": "a"}]}': "message 0 has role 3",
    '{"messages": [{"role": "user"}]}': "message 0 has content None",
    '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}': "message 0 has content with a part of type",
    '{"messages": [{"role": "user", "content": "\\ud83d"}]}': r"'messages': the text holds '\\ud83d'",
    '{"prompt": "\\ud83d"}': r"'prompt': the text holds '\\ud83d' at character 0",
    '{"prompt": "a", "id": ["\\udc00"]}': "'id': the text holds",
    '{"prompt": "a", "\\udc00": 1}': r"'\\udc00': the text holds",
    '{"messages": [{"role": "user", "content": "a"}], "tools": {}}': r"tools is \{\}",
}


@pytest.mark.parametrize(("line", "words"), LINES.items())
def test_a_wrong_line_names_its_number_and_field(tmp_path, line, words):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=rf"prompts\.jsonl line 3: {words}") as error:
        read_prompts(str(file))
    assert "\n" not in str(error.value).encode().decode()  # it can be printed, on one line


def test_every_wrong_line_is_named_and_the_first_are_explained(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + "{}\n{\n" * 4 + json.dumps({"messages": [ROLE]}) + "\n")

    def check(record):
        if "messages" in record:
            raise ValueError("too long")

    with pytest.raises(ValueError) as error:
        read_prompts(str(file), check)
    text = str(error.value)
    assert all(f"line {number} " in text for number in range(2, 7))
    assert text.endswith("; and 4 more, in lines 7, 8, 9, 10")
    file.write_text(json.dumps({"messages": [ROLE]}))
    with pytest.raises(ValueError, match="line 1: too long"):
        read_prompts(str(file), check)


def test_prompts_of_other_programs_are_read(tmp_path):
    """A byte-order mark, parts of text, nulls, tools."""
    parts = {"role": "user", "content": [{"type": "text", "text": "b"}]}
    records = [{"prompt": "a", "messages": None}, {"messages": [parts]}, {"messages": [ROLE], "tools": [{"name": "f"}]}]
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, records)).encode())
    assert read_prompts(str(file)) == records


def asked(tokenizer: Tokenizer, record: dict, **flags) -> str:
    return tokenizer.decode(encode(tokenizer, SampleCommand(**flags), record))


def test_a_record_is_asked_as_a_conversation_where_it_is_one():
    said = {"messages": [ROLE]}
    plain, chat = asked(OWN, {"prompt": "b", "messages": None}), asked(OWN, {"prompt": "b"}, chat=True)
    assert plain == "<|startoftext|>b" and chat == asked(OWN, said) and chat.startswith("<role>SYSTEM</role>detailed")
    assert "<role>SYSTEM</role>S\ndetailed thinking on" in asked(OWN, said, system="S", thinking="on")
    assert "<role>SYSTEM</role>\ndetailed" in asked(OWN, said, system="")
    assert "# Tools" in asked(OWN, {**said, "tools": [{"name": "f"}]})


@pytest.mark.parametrize("flags", [{"system": "S"}, {"thinking": "on"}, {"system": ""}])
def test_what_is_for_conversations_is_refused_without_one(flags):
    with pytest.raises(ValueError, match="--system and --thinking are for conversations: add --chat"):
        asked(OWN, {"prompt": "b"}, **flags)
