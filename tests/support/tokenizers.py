"""Tokenizers small enough for a test."""

import json

import pytest
import tokenizers
from tokenizers import models

from ling_jax.data.tokenizer import Tokenizer

TEXTS = [open(path, encoding="utf-8").read() for path in (json.__file__, pytest.__file__, json.decoder.__file__)]
OWN = Tokenizer.train(TEXTS, 400)


def write_tokenizer(folder, tokens: list[str], **config) -> str:
    core = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    core.add_special_tokens(tokens)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(core.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)
