"""Byte-level BPE: trained on the run's own text, or read from a user's tokenizer.json.

Every text round-trips: the alphabet holds all 256 bytes and nothing is normalised.
"""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from etils import epath
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from ling_jax.data import chat
from ling_jax.files import hub
from ling_jax.files.paths import at, write_whole
from ling_jax.files.whole import checksum, read_json

BOS = "<|startoftext|>"
EOD = "<|endoftext|>"  # ends a document; also the padding of HF's files
ROLE_END = "<|role_end|>"
CONFIG_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
# What a chat template is given of tokenizer_config.json, where it is there (HF's list, and GLM's mask).
TOKEN_FIELDS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "gmask"))
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
      bos_id, eos_id, role_end_id: None where the vocabulary lacks the token.
      eod_id: the id that ends every document.
      chat_templates: jinja2 sources by name, "default" being the one without a name; Ling's where the files bring none.
    """

    def __init__(self, core: tokenizers.Tokenizer, config: Mapping[str, Any], name: str):
        """`config` is tokenizer_config.json's content; `name` is what errors call this tokenizer.

        Raises:
          ValueError: if a token that documents need is missing, or `config` names its chat templates in no known way.
        """
        self._core = core
        self._config = dict(config)
        self.name = name
        self.vocab_size = max(core.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_token = _token(config, "bos_token", name) or BOS
        self.bos_id = core.token_to_id(self.bos_token)
        self.eos_id = core.token_to_id(_token(config, "eos_token", name) or EOD)
        self.role_end_id = core.token_to_id(ROLE_END)
        self.chat_templates = _named_templates(config.get("chat_template"), name)
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
    def train(cls, texts: Iterable[str], vocab_size: int, at_most: bool = False) -> "Tokenizer":
        """Trains a byte-level BPE of exactly `vocab_size` entries; the same texts give the same tokenizer.

        Args:
          at_most: take fewer entries where the texts yield no more.
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
        if reached != vocab_size and not at_most:
            raise ValueError(
                f"the training text yields a vocabulary of only {reached} entries, not {vocab_size}; bring more "
                "text, or lower model.vocab_size"
            )
        # For readers of the saved file (HF adds the BOS through it); `encode` here never uses it.
        core.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
        )
        return cls(core, _trained_config(), "trained here")

    @classmethod
    def load(cls, path: str) -> "Tokenizer":
        """Reads a tokenizer.json, or that of a folder or hub id, and what lies beside it: tokenizer_config.json,
        special_tokens_map.json, chat_template.jinja and additional_chat_templates/*.jinja, which replace the templates
        of tokenizer_config.json as in transformers.

        Raises:
          ValueError: if there is no such file, one of them cannot be read, or it lacks a needed token.
        """
        file = at(hub.folder_of(path, hub.TOKENIZER) or path)
        if file.is_dir():
            file = file / "tokenizer.json"
        if not file.exists():
            raise ValueError(f"no tokenizer at {file}; give a tokenizer.json or the folder that holds one; {hub.HINT}")
        try:
            core = tokenizers.Tokenizer.from_str(file.read_text())
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{file} is not a tokenizer.json of the tokenizers library: {error}") from error
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", CONFIG_FILE):
            if (file.parent / name).exists():
                config |= read_json(file.parent / name)
        if templates := _template_files(file.parent):
            config["chat_template"] = templates
        return cls(core, config, str(file))

    @property
    def chat_template(self) -> str:
        """The template of a conversation without tools; ValueError where the files bring named ones only."""
        return self._template_for(None)

    def _template_for(self, tools: Any) -> str:
        """As transformers chooses: "tool_use" for a conversation with tools where there is one, else "default"."""
        for name in ("tool_use", "default") if tools else ("default",):
            if name in self.chat_templates:
                return self.chat_templates[name]
        names = ", ".join(sorted(self.chat_templates))
        raise ValueError(
            f"tokenizer {self.name} has no chat template without a name, only {names}: put one into "
            f"{TEMPLATE_FILE} beside it"
        )

    def save(self, folder: str) -> None:
        """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json, and the chat template in both places
        where readers look for it: transformers from 4.47 on in chat_template.jinja, others in tokenizer_config.json.
        Several templates are a list there, which all of them read, and no file."""
        target = at(folder)
        target.mkdir(parents=True, exist_ok=True)
        named = [{"name": name, "template": template} for name, template in self.chat_templates.items()]
        alone = list(self.chat_templates) == ["default"]
        config = self._config | {"chat_template": self.chat_template if alone else named}
        special = {name: config[name] for name in TOKEN_FIELDS if config.get(name)}
        _write_json(target / CONFIG_FILE, config)
        _write_json(target / "special_tokens_map.json", special)
        if alone:
            write_whole(target / TEMPLATE_FILE, self.chat_template)
        else:
            (target / TEMPLATE_FILE).unlink(missing_ok=True)  # of an earlier tokenizer: it would win over the list
        # Last and in one move: a folder with a tokenizer.json is complete.
        write_whole(target / "tokenizer.json", self.to_json())

    def to_json(self) -> str:
        return self._core.to_str(pretty=True)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Ids of a text, nothing added.

        By default "<|endoftext|>" in a text is thirteen characters like any other, so a document can't forge a
        boundary; chat-rendered text needs `parse_special`.
        """
        return self.encode_batch([text], parse_special)[0]

    def encode_batch(self, texts: Sequence[str], parse_special: bool = False) -> list[list[int]]:
        """`encode` of every text, on all cores. Not for several threads at once (it sets a library switch).

        Raises:
          ValueError: for what is no text, or holds half of a surrogate pair, which has no UTF-8.
        """
        self._core.encode_special_tokens = not parse_special
        try:
            return [e.ids for e in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]
        except (TypeError, UnicodeError):
            for text in texts:
                check_text(text)
            raise

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
        thinking: bool | None = None,
    ) -> list[int]:
        """Ids of a conversation: exactly what this tokenizer's chat template renders, nothing added. So does
        transformers' `apply_chat_template`: a template that wants the start token writes it (Ling's does not).

        Arguments and errors as in `chat_text`.
        """
        return self.encode(self.chat_text(messages, tools, add_generation_prompt, thinking), parse_special=True)

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
    ) -> str:
        """The text of a conversation, as this tokenizer's chat template renders it.

        Args:
          thinking: whether the model is to reason before it answers; None leaves it to the template.
          The rest as in `chat.render`.
        Raises:
          ValueError: as `chat.render` does, and where no template fits.
        """
        texts = {field: _token(self._config, field, self.name) for field in TOKEN_FIELDS}
        variables: dict[str, Any] = {field: text for field, text in texts.items() if text is not None}
        variables["enable_thinking"] = thinking
        return chat.render(messages, tools, add_generation_prompt, self._template_for(tools), variables)

    @functools.cached_property
    def switches_thinking(self) -> bool:
        """Whether the chat template can switch thinking on and off."""
        try:
            self.chat_text([{"role": "user", "content": "Hi"}], thinking=True)
        except ValueError as error:
            if chat.NO_SWITCH in str(error):
                return False
            raise
        return True

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        return self._core.decode(list(ids), skip_special_tokens=False)

    def stream(self) -> "TextStream":
        return TextStream(self._core)

    @property
    def prefix_ids(self) -> list[int]:
        """The ids that a document starts with in training: BOS, or nothing."""
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


def _token(config: Mapping[str, Any], field: str, name: str) -> str | None:
    """The text of a special token, which tokenizer_config.json spells as a string or as an object."""
    value = config.get(field)
    text = value.get("content") if isinstance(value, Mapping) else value
    if text is not None and not isinstance(text, str):
        raise ValueError(
            f"tokenizer {name}: {field} = {value!r} in {CONFIG_FILE} must be a string, or an object with its content"
        )
    return text


def _named_templates(value: Any, name: str) -> dict[str, str]:
    """Chat templates by name, from what tokenizer_config.json calls `chat_template`; Ling's if it has none."""
    if not value:
        return {"default": chat.LING_CHAT_TEMPLATE}
    named: Any = {"default": value} if isinstance(value, str) else value
    if isinstance(named, list) and all(isinstance(entry, Mapping) for entry in named):
        named = {entry.get("name"): entry.get("template") for entry in named}
    if not isinstance(named, Mapping) or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise ValueError(
            f'tokenizer {name}: chat_template in {CONFIG_FILE} must be a string, or a list of {{"name", "template"}}'
        )
    return dict(named)


def _template_files(folder: epath.Path) -> dict[str, str]:
    """The chat templates that lie in files of their own, by name."""
    files = {"default": folder / TEMPLATE_FILE}
    if (more := folder / "additional_chat_templates").is_dir():
        files |= {path.stem: path for path in sorted(more.glob("*.jinja"))}
    templates = {}
    for name, file in files.items():
        if file.exists():
            try:
                templates[name] = file.read_text()
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not UTF-8: {error}") from error
    return templates


def check_text(text: Any) -> None:
    """Raises ValueError for what no tokenizer can encode: something else than a string, or half a surrogate pair."""
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is a {type(text).__name__}, and only text can be encoded")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds {text[error.start]!a} at character {error.start}: half of a surrogate pair is no character"
        ) from None


def _write_json(path: epath.Path, value: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
