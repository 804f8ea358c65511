"""Byte-level BPE: trained on the run's own text, or read from a user's tokenizer.json.

Every text round-trips: the alphabet holds all 256 bytes and nothing is normalised.
"""

import functools
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from etils import epath
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from ling_jax.data import chat
from ling_jax.files.whole import checksum

BOS = "<|startoftext|>"
EOD = "<|endoftext|>"  # ends a document; also the padding of HF's files
ROLE_END = "<|role_end|>"
# Ling's own, then the tags of its chat format. A trained tokenizer gives them the ids 0, 1, ... in this order.
SPECIAL_TOKENS = (
    BOS, EOD, "[CLS]", "[gMASK]", ROLE_END, "<role>", "</role>", "<think>", "</think>",
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # fmt: skip
# A word with the space before it, one digit, punctuation up to a line's end, or white space; merges stay inside.
PRE_TOKENIZER_PATTERN = "|".join(
    (
        r"(?i:'(?:[sdmt]|ll|ve|re))",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# Letters of several scripts, cases, digits, punctuation, white space of all kinds, a special token's text.
PROBE = (
    "Ling's 1234 TeXts,\tnaïve Straße 你好 привет\r\n\n"
    "  if x_1 != 'a':  return {\"k\": [0.5e-3]}  # 🙂 <|endoftext|> \u00a0end"
)


class Tokenizer:
    """Text to ids and back.

    Attributes:
      vocab_size: the largest id plus 1.
      bos_id, role_end_id: None where the vocabulary lacks the token.
      eod_id: the id that ends every document.
      chat_template: jinja2 source; Ling's where tokenizer_config.json brings none.
    """

    def __init__(self, core: tokenizers.Tokenizer, config: Mapping[str, Any], name: str):
        """`config` is tokenizer_config.json's content; `name` is what errors call this tokenizer.

        Raises:
          ValueError: if a token that documents need is missing.
        """
        self._core = core
        self._config = dict(config)
        self.name = name
        self.vocab_size = max(core.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_token = _token_text(config.get("bos_token")) or BOS
        self.bos_id = core.token_to_id(self.bos_token)
        self.role_end_id = core.token_to_id(ROLE_END)
        self.chat_template = config.get("chat_template") or chat.LING_CHAT_TEMPLATE
        eod_id = core.token_to_id(EOD)
        if eod_id is None:
            raise ValueError(
                f"tokenizer {name} has no token {EOD!r}, which ends every document; add it to the added_tokens "
                "of its tokenizer.json, or set data.tokenizer to None to train one"
            )
        self.eod_id: int = eod_id
        self.add_bos_token = bool(config.get("add_bos_token", False))
        if self.add_bos_token and self.bos_id is None:
            raise ValueError(f"tokenizer {name} has add_bos_token set, but no token {self.bos_token!r}")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Trains a byte-level BPE of exactly `vocab_size` entries; the same texts give the same tokenizer.

        Raises:
          ValueError: if `vocab_size` can't hold the bytes, or the texts are too few to reach it.
        """
        least = 256 + len(SPECIAL_TOKENS)
        if vocab_size < least:
            raise ValueError(
                f"a vocabulary of {vocab_size} is too small to train: 256 bytes and {len(SPECIAL_TOKENS)} special "
                f"tokens need {least}"
            )
        core = tokenizers.Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(PRE_TOKENIZER_PATTERN), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator(texts, trainer)
        reached = core.get_vocab_size()
        if reached != vocab_size:
            raise ValueError(
                f"the training text yields a vocabulary of only {reached} entries, not {vocab_size}; bring more "
                "text, or lower model.vocab_size"
            )
        # For readers of the saved file (HF adds the BOS through it); `encode` here never uses it.
        core.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
        )
        return cls(core, _trained_config(), "trained here")

    @classmethod
    def load(cls, path: str) -> "Tokenizer":
        """Reads a tokenizer.json, or the folder that holds one, and the tokenizer_config.json beside it if any.

        Raises:
          ValueError: if there is no such file, it is not a tokenizer, or it lacks a needed token.
        """
        file = epath.Path(path).expanduser()
        if file.is_dir():
            file = file / "tokenizer.json"
        if not file.exists():
            raise ValueError(f"no tokenizer at {file}; give a tokenizer.json or the folder that holds one")
        try:
            core = tokenizers.Tokenizer.from_str(file.read_text())
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{file} is not a tokenizer.json of the tokenizers library: {error}") from error
        config_file = file.parent / "tokenizer_config.json"
        try:
            config = json.loads(config_file.read_text()) if config_file.exists() else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{config_file} is not JSON: {error}") from error
        return cls(core, config, str(file))

    def save(self, folder: str) -> None:
        """Writes tokenizer.json, tokenizer_config.json (chat template included) and special_tokens_map.json."""
        target = epath.Path(folder).expanduser()
        target.mkdir(parents=True, exist_ok=True)
        config = self._config | {"chat_template": self.chat_template}
        names = ("bos_token", "eos_token", "pad_token", "cls_token", "gmask_token")
        special = {name: config[name] for name in names if config.get(name)}
        _write_json(target / "tokenizer_config.json", config)
        _write_json(target / "special_tokens_map.json", special)
        # Last and in one move: a folder with a tokenizer.json is complete.
        _write_text(target / "tokenizer.json", self.to_json())

    def to_json(self) -> str:
        return self._core.to_str(pretty=True)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Ids of a text, nothing added.

        By default "<|endoftext|>" in a text is thirteen characters like any other, so a document can't forge a
        boundary; chat-rendered text needs `parse_special`.
        """
        return self.encode_batch([text], parse_special)[0]

    def encode_batch(self, texts: Sequence[str], parse_special: bool = False) -> list[list[int]]:
        """`encode` of every text, on all cores. Not for several threads at once (it sets a library switch)."""
        self._core.encode_special_tokens = not parse_special
        return [e.ids for e in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def cuts_between(self, left: str, right: str) -> bool:
        """Whether no token of two texts in a row reaches from one into the other: the pre-tokenizer cuts there, and the
        ids are those of each."""
        split = self._core.pre_tokenizer
        if split is None:
            return False
        pieces, one, two = ([piece for piece, _ in split.pre_tokenize_str(t)] for t in (left + right, left, right))
        if pieces != one + two:
            return False
        ids, one, two = self.encode_batch([left + right, left, right])
        return ids == one + two

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        thinking: bool = False,
    ) -> list[int]:
        """Ids of a conversation under this tokenizer's chat template, `prefix_ids` first."""
        variables: dict[str, Any] = {"bos_token": self.bos_token, "enable_thinking": thinking}
        variables["eos_token"] = _token_text(self._config.get("eos_token")) or EOD
        text = chat.render(messages, tools, add_generation_prompt, self.chat_template, variables)
        ids = self.encode(text, parse_special=True)
        return ids if ids[:1] == [self.bos_id] else self.prefix_ids + ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        return self._core.decode(list(ids), skip_special_tokens=False)

    def stream(self) -> "TextStream":
        return TextStream(self._core)

    @property
    def prefix_ids(self) -> list[int]:
        """What a document starts with in training: BOS, or nothing."""
        return [self.bos_id] if self.add_bos_token and self.bos_id is not None else []

    @property
    def scoring_prefix(self) -> list[int]:
        """One token to score a text after, so that its first token is scored too."""
        return self.prefix_ids or [self.eod_id]

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that follow from what the tokenizer does: its ids, its merges, how it cuts a probe and
        what it puts before a document. The way in which a version of the library spells tokenizer.json is no part."""
        model = json.loads(self.to_json())["model"]
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or ()]
        facts = [sorted(self._core.get_vocab(with_added_tokens=True).items()), merges, self.encode(PROBE)]
        return checksum(json.dumps([*facts, self.prefix_ids, self.eod_id]).encode())

    def check_fits(self, vocab_size: int) -> None:
        """Raises ValueError if an id would lie outside a model's embedding of `vocab_size` rows."""
        if self.vocab_size > vocab_size:
            raise ValueError(
                f"tokenizer {self.name} has ids up to {self.vocab_size - 1}, but model.vocab_size is {vocab_size}; "
                f"set it to at least {self.vocab_size}"
            )


class TextStream:
    """Decodes ids one at a time for a terminal; text comes out only where its UTF-8 is complete."""

    def __init__(self, core: tokenizers.Tokenizer):
        self._core = core
        self._stream = decoders.DecodeStream(skip_special_tokens=False)

    def push(self, token_id: int) -> str:
        """The text that this id completes; "" while a character is still unfinished."""
        return self._stream.step(self._core, token_id) or ""


def _trained_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOD,
        "pad_token": EOD,
        "cls_token": "[CLS]",
        "gmask_token": "[gMASK]",
        "clean_up_tokenization_spaces": False,
        "chat_template": chat.LING_CHAT_TEMPLATE,
    }


def _token_text(value: Any) -> str | None:
    """tokenizer_config.json spells a token as a string or as a dict."""
    return value["content"] if isinstance(value, Mapping) else value


def _write_text(path: epath.Path, text: str) -> None:
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"  # hosts may write the same file at once
    temporary.write_text(text)
    temporary.replace(path)


def _write_json(path: epath.Path, value: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
