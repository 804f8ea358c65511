"""Training, saving and reading byte-level BPE tokenizers."""

import json
import sys

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from ling_jax.data.chat import LING_CHAT_TEMPLATE
from ling_jax.data.tokenizer import SPECIAL_TOKENS, Tokenizer

TEXTS = [open(path, encoding="utf-8").read() for path in (json.__file__, pytest.__file__, json.decoder.__file__)]
OWN = Tokenizer.train(TEXTS, 400)


def write_tokenizer(folder, tokens: list[str], **config) -> str:
    core = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    core.add_special_tokens(tokens)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(core.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


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
    assert names == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    special = json.loads((tmp_path / "saved" / "special_tokens_map.json").read_text())
    assert special["eos_token"] == "<|endoftext|>"


def test_hf_readers_of_the_file_get_the_bos(tmp_path):
    OWN.save(str(tmp_path))
    core = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert core.encode("a").ids == OWN.prefix_ids + OWN.encode("a")


def test_a_chat_has_its_special_ids_and_one_bos():
    ids = OWN.encode_chat([{"role": "user", "content": "Hi"}])
    assert [i for i in ids if i < len(SPECIAL_TOKENS)] == [0, 5, 6, 4, 5, 6, 4, 5, 6]
    assert OWN.decode(ids[1:]).endswith("<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>")


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
