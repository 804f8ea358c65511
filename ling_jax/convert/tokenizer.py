"""The tokenizer and generation settings that lie beside a checkpoint."""

import json
from typing import Any

from etils import epath

from ling_jax.checkpoint import read_meta
from ling_jax.convert.weights import CHECKPOINTS, HF, TOKENIZER, Weights, model_config_of
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.files import hub
from ling_jax.files.paths import at
from ling_jax.files.whole import read_json
from ling_jax.snapshots import SNAPSHOTS

GENERATION = "generation_config.json"


def _beside(path: str, name: str) -> epath.Path | None:
    """The file `name` of a HF folder or hub id, of a converted checkpoint, or in the run that `path` (or a part of it)
    belongs to: its own, else one that came with the weights it began from."""
    start = run = at(hub.folder_of(path, hub.BESIDE) or path)
    parts = {CHECKPOINTS, SNAPSHOTS}
    if parts & {start.name, start.parent.name}:
        run = start.parent if start.name in parts else start.parent.parent
    folders = (start, run / TOKENIZER, run / HF)
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def tokenizer_file(path: str) -> epath.Path | None:
    """The tokenizer.json of a HF folder, a run, its `checkpoints/` or one step of it; None if there is none."""
    return _beside(path, "tokenizer.json")


def tokenizer_of(path: str) -> Tokenizer:
    """The tokenizer of a HF folder or hub id, a run, its `checkpoints/` or one step of it.

    Raises:
      ValueError: if there is none, or a run's is not the one that its checkpoint was trained with.
    """
    file = tokenizer_file(path)
    if file is None:
        raise ValueError(f"no tokenizer.json in or beside {path}: copy the model's own there")
    tokenizer = Tokenizer.load(str(file))
    of_checkpoint = file.parent.name in (TOKENIZER, HF) and file.parent != at(path)
    trained_with = read_meta(path).get("tokenizer") if of_checkpoint else None
    if trained_with and tokenizer.fingerprint != trained_with:
        raise ValueError(
            f"{file} is not the tokenizer that {path} was trained with (fingerprint {tokenizer.fingerprint}, in the "
            f"checkpoint {trained_with}): its ids mean other text. Put the run's own tokenizer.json back"
        )
    return tokenizer


def trained_tokenizer(weights: Weights, path: str) -> Tokenizer | None:
    """The tokenizer beside weights in `path` that were trained here: it goes where they go. None for others, or where
    there is none. ValueError as `tokenizer_of`."""
    beside = [folder for folder in weights.companions() if (folder / "tokenizer.json").exists()]
    ours = any(weights.trained_with or folder.name == TOKENIZER for folder in beside)
    return tokenizer_of(path) if ours else None


def generation_config_of(path: str) -> dict[str, Any]:
    """The generation_config.json beside a checkpoint without its nulls; empty without one.

    Raises:
      ValueError: naming the file and the field, if a setting that is read here has another type than HF gives it.
    """
    file = _beside(path, GENERATION)
    saved = {} if file is None else {name: value for name, value in read_json(file).items() if value is not None}
    for name in ("temperature", "top_p", "repetition_penalty"):
        _check(_is_number(saved.get(name, 1)), file, name, saved, "a number")
    top_k = saved.get("top_k", 0)
    _check(_is_number(top_k) and float(top_k).is_integer(), file, "top_k", saved, "a whole number")
    _check(isinstance(saved.get("do_sample", True), bool), file, "do_sample", saved, "true or false")
    _ids(saved.get("eos_token_id"), file)
    return saved


def ends_of(path: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end an answer, by all that lies beside a checkpoint together: generation_config.json, config.json,
    the tokenizer's eos_token, its end of a document and of a turn."""
    config = model_config_of(path)
    ends = _ids(generation_config_of(path).get("eos_token_id"), GENERATION)
    ends += _ids(json.loads(config.hf_json or "{}").get("eos_token_id", config.eos_token_id), "config.json")
    own = (tokenizer.eod_id, tokenizer.eos_id, tokenizer.role_end_id)
    ends += [end for end in own if end is not None]
    return [end for end in dict.fromkeys(ends) if end < config.vocab_size]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ids(value: Any, file: Any) -> list[int]:
    """`eos_token_id`, which is an id, a list of them, or null."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    valid = all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids)
    _check(valid, file, "eos_token_id", {"eos_token_id": value}, "a token id, or a list of them")
    return list(ids)


def _check(condition: bool, file: Any, name: str, values: dict[str, Any], wanted: str) -> None:
    if not condition:
        raise ValueError(f"{file}: {name} = {values.get(name)!r} must be {wanted}")
