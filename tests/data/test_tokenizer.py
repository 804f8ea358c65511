"""Training, saving and reading byte-level BPE tokenizers."""

import json
import sys

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from ling_jax.data.chat import LING_CHAT_TEMPLATE
from ling_jax.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.support.tokenizers import OWN, TEXTS, write_tokenizer


def test_special_tokens_have_the_first_ids_in_order():
    assert OWN.encode("".join(SPECIAL_TOKENS), parse_special=True) == list(range(len(SPECIAL_TOKENS)))
    assert (OWN.bos_id, OWN.eod_id, OWN.role_end_id) == (0, 1, 4)


def test_training_gives_exactly_the_vocabulary_asked_for():
    assert OWN.vocab_size == 400


def test_training_twice_gives_the_same_bytes():
    assert Tokenizer.train(TEXTS, 400).to_json() == OWN.to_json()


@given(st.text())
def test_every_text_comes_back(text):
    assert OWN.decode(OWN.encode(text)) == text


def test_code_and_every_plane_of_unicode_come_back():
    text = "\tdef f(x):\r\n\n\n  return '\u00e9\u4e2d\u6587\U0001f600'\x00\ufeff\u2028 e\u0301 \ufffd" + TEXTS[0]
    assert OWN.decode(OWN.encode(text)) == text


def test_digits_are_single_tokens():
    trained = Tokenizer.train(["12345 12345 12345"] * 50 + TEXTS, 400)
    assert len(trained.encode("12345")) == 5


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_special_strings_in_a_document_stay_text(special):
    ids = OWN.encode(f"a{special}b")
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert OWN.decode(ids) == f"a{special}b"


def test_parsing_specials_does_not_stick():
    before = OWN.encode("<role>")
    assert OWN.encode("<role>", parse_special=True) == [5]
    assert OWN.encode("<role>") == before


def test_encode_batch_equals_encoding_one_by_one():
    assert OWN.encode_batch(TEXTS) == [OWN.encode(text) for text in TEXTS]


def test_a_saved_tokenizer_comes_back_whole(tmp_path):
    OWN.save(str(tmp_path / "saved"))
    for path in (tmp_path / "saved", tmp_path / "saved" / "tokenizer.json"):
        loaded = Tokenizer.load(str(path))
        assert loaded.to_json() == OWN.to_json()
        assert loaded.prefix_ids == [0] and loaded.scoring_prefix == [0]
        assert loaded.chat_template == LING_CHAT_TEMPLATE
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    special = json.loads((tmp_path / "saved" / "special_tokens_map.json").read_text())
    assert special["eos_token"] == "<|endoftext|>"


def test_hf_readers_of_the_file_get_the_bos(tmp_path):
    OWN.save(str(tmp_path))
    core = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert core.encode("a").ids == OWN.prefix_ids + OWN.encode("a")
    assert core.encode("a", "b").ids == OWN.prefix_ids + OWN.encode("a") + OWN.encode("b")


def test_a_chat_is_what_the_template_says_and_nothing_more():
    """No start token, though documents of this tokenizer have one: HF's clients add none either."""
    ids = OWN.encode_chat([{"role": "user", "content": "Hi"}])
    assert [i for i in ids if i < len(SPECIAL_TOKENS)] == [5, 6, 4, 5, 6, 4, 5, 6]
    assert OWN.decode(ids).endswith("<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>")


def test_a_template_that_writes_the_bos_gets_no_second_one(tmp_path):
    template = "{{ bos_token }}{{ messages[0].content }}"
    path = write_tokenizer(
        tmp_path, ["<s>", "<|endoftext|>"], add_bos_token=True, bos_token={"content": "<s>"}, chat_template=template
    )
    assert Tokenizer.load(path).encode_chat([{"role": "user", "content": "a"}]) == [1, 0]


def test_a_tokenizer_without_bos_scores_after_the_end_of_a_document(tmp_path):
    loaded = Tokenizer.load(write_tokenizer(tmp_path, ["<|endoftext|>"]))
    assert loaded.prefix_ids == [] and loaded.scoring_prefix == [loaded.eod_id]
    assert loaded.role_end_id is None and loaded.bos_id is None


def test_a_missing_end_of_document_token_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no token '<\|endoftext\|>'"):
        Tokenizer.load(write_tokenizer(tmp_path, ["</s>"]))


def test_a_missing_bos_token_is_named(tmp_path):
    with pytest.raises(ValueError, match="no token '<s>'"):
        Tokenizer.load(write_tokenizer(tmp_path, ["<|endoftext|>"], add_bos_token=True, bos_token="<s>"))


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer at"):
        Tokenizer.load(str(tmp_path / "none"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer.json"):
        Tokenizer.load(str(tmp_path))


def test_too_little_text_for_the_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="only .* entries, not 9000"):
        Tokenizer.train(["a few words"], 9000)
    with pytest.raises(ValueError, match="too small to train"):
        Tokenizer.train(TEXTS, 256)


def test_more_ids_than_the_model_has_rows_is_an_error():
    OWN.check_fits(400)
    with pytest.raises(ValueError, match="ids up to 399, but model.vocab_size is 399"):
        OWN.check_fits(399)


def test_a_stream_holds_back_unfinished_characters_and_loses_nothing():
    text = "caf\u00e9 \u4e2d\u6587 \U0001f600 end"
    stream = OWN.stream()
    pieces = [stream.push(token_id) for token_id in OWN.encode(text)]
    assert "".join(pieces) == text
    assert "" in pieces and not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, OWN.vocab_size - 1), max_size=40))
def test_a_stream_of_any_ids_is_a_prefix_of_the_whole_decoding(ids):
    stream = OWN.stream()
    assert OWN.decode(ids).startswith("".join(stream.push(i) for i in ids))


def test_python_sources_take_fewer_tokens_than_bytes():
    text = open(sys.modules["argparse"].__file__ or "", encoding="utf-8").read()
    assert len(OWN.encode(text)) < 0.6 * len(text.encode())


# Files beside tokenizer.json.

SAID = [{"role": "user", "content": "a"}]


def with_templates(folder, in_config=None, **files: str) -> Tokenizer:
    """A tokenizer whose templates lie in its config and, by name, in files."""
    config = {} if in_config is None else {"chat_template": in_config}
    path = write_tokenizer(folder, ["<|endoftext|>", "X", "Y"], **config)
    for name, text in files.items():
        file = folder / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return Tokenizer.load(path)


def said(tokenizer: Tokenizer, tools: list | None = None) -> str:
    return tokenizer.decode(tokenizer.encode_chat(SAID, tools))


def test_a_template_file_wins_over_the_configs(tmp_path):
    assert said(with_templates(tmp_path, "Y", default="X")) == "X"


def test_of_named_templates_the_default_is_used_and_another_for_tools(tmp_path):
    named = [{"name": "tool_use", "template": "Y"}, {"name": "default", "template": "X"}]
    tokenizer = with_templates(tmp_path, named)
    assert said(tokenizer) == "X" and said(tokenizer, [{"name": "f"}]) == "Y"
    assert said(with_templates(tmp_path / "alone", named[1:]), [{"name": "f"}]) == "X"


def test_files_of_named_templates_replace_the_configs_list(tmp_path):
    tokenizer = with_templates(tmp_path, [{"name": "rag", "template": "a"}], default="X", tool_use="Y")
    assert tokenizer.chat_templates == {"default": "X", "tool_use": "Y"}
    assert said(tokenizer, [{"name": "f"}]) == "Y"


def test_templates_with_names_only_need_a_choice(tmp_path):
    tokenizer = with_templates(tmp_path, [{"name": "rag", "template": "X"}, {"name": "tool_use", "template": "Y"}])
    with pytest.raises(ValueError, match=r"only rag, tool_use: put one into chat_template\.jinja"):
        said(tokenizer)
    assert said(tokenizer, [{"name": "f"}]) == "Y"


def test_a_config_without_a_template_takes_lings(tmp_path):
    for name, config in {"none": {}, "null": {"chat_template": None}}.items():
        loaded = Tokenizer.load(write_tokenizer(tmp_path / name, ["<|endoftext|>"], **config))
        assert loaded.chat_template == LING_CHAT_TEMPLATE


@pytest.mark.parametrize("templates", [{"default": "X"}, {"default": "X", "tool_use": "Y"}, {"rag": "X"}], ids=str)
def test_saved_templates_come_back_from_either_place(tmp_path, templates):
    """From the config alone, which older readers know, and from the folder as a whole."""
    tokenizer = with_templates(tmp_path / "first", [{"name": n, "template": t} for n, t in templates.items()])
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "chat_template.jinja").write_text("of an earlier tokenizer")
    tokenizer.save(str(tmp_path / "saved"))
    assert Tokenizer.load(str(tmp_path / "saved")).chat_templates == templates
    (tmp_path / "saved" / "chat_template.jinja").unlink(missing_ok=True)
    assert Tokenizer.load(str(tmp_path / "saved")).chat_templates == templates


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"chat_template": 3}, "chat_template in tokenizer_config.json must be a string"),
        ({"chat_template": ["X"]}, "chat_template in tokenizer_config.json must be .* or a list"),
        ({"chat_template": [{"name": "default"}]}, "chat_template in tokenizer_config.json must be"),
        ({"eos_token": 3}, "eos_token = 3 in tokenizer_config.json must be a string"),
        ({"bos_token": {"text": 3, "content": ["a"]}}, "bos_token = .* must be a string"),
    ],
)
def test_a_field_of_another_type_is_named(tmp_path, config, words):
    path = write_tokenizer(tmp_path, ["<|endoftext|>"], **config)
    with pytest.raises(ValueError, match=words) as error:
        Tokenizer.load(path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("text", ["[]", "{", "3"])
def test_a_config_that_is_no_object_is_named(tmp_path, text):
    path = write_tokenizer(tmp_path, ["<|endoftext|>"])
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer_config.json"):
        Tokenizer.load(path)


def test_the_end_of_a_turn_is_the_configs_or_the_maps(tmp_path):
    path = write_tokenizer(tmp_path, ["<|endoftext|>", "<|role_end|>"], eos_token={"content": "<|role_end|>"})
    assert Tokenizer.load(path).eos_id == Tokenizer.load(path).role_end_id != Tokenizer.load(path).eod_id
    path = write_tokenizer(tmp_path, ["<|endoftext|>", "<|role_end|>"])
    assert Tokenizer.load(path).eos_id == Tokenizer.load(path).eod_id
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|role_end|>"}')
    assert Tokenizer.load(path).eos_id == Tokenizer.load(path).role_end_id


def test_templates_are_given_the_tokens_that_the_config_names_and_no_others(tmp_path):
    template = "{{ bos_token }}{{ pad_token }}{{ 'Y' if eos_token is defined else '' }}"
    path = write_tokenizer(
        tmp_path, ["<s>", "<|endoftext|>", "Y"], bos_token="<s>", pad_token=None, chat_template=template
    )
    assert Tokenizer.load(path).decode(Tokenizer.load(path).encode_chat(SAID)) == "<s>"


@pytest.mark.parametrize("text", ["a\ud83d", "\udcff", 3, None])
def test_what_has_no_utf8_cannot_be_encoded(text):
    with pytest.raises(ValueError, match="half of a surrogate pair|only text can be encoded"):
        OWN.encode(text)


def test_an_id_outside_the_vocabulary_streams_as_nothing():
    stream = OWN.stream()
    assert [stream.push(OWN.vocab_size + 100), stream.push(OWN.encode("a")[0])] == ["", "a"]
