"""The tokenizer and generation settings that lie beside a checkpoint."""

from typing import Any

from etils import epath

from ling_jax.checkpoint import read_meta
from ling_jax.convert.weights import CHECKPOINTS, HF, TOKENIZER
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.files import hub
from ling_jax.files.whole import read_json

GENERATION = "generation_config.json"


def _beside(path: str, name: str) -> epath.Path | None:
    """The file `name` of a HF folder or hub id, of a converted checkpoint, or in the run that `path` (or a part of it)
    belongs to: its own, else one that came with the weights it began from."""
    start = run = epath.Path(hub.folder_of(path, hub.BESIDE) or path).expanduser()
    if CHECKPOINTS in (start.name, start.parent.name):
        run = start.parent if start.name == CHECKPOINTS else start.parent.parent
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
    trained_with = read_meta(path).get("tokenizer") if file.parent.name == TOKENIZER else None
    if trained_with and tokenizer.fingerprint != trained_with:
        raise ValueError(
            f"{file} is not the tokenizer that {path} was trained with (fingerprint {tokenizer.fingerprint}, in the "
            f"checkpoint {trained_with}): its ids mean other text. Put the run's own tokenizer.json back"
        )
    return tokenizer


def generation_config_of(path: str) -> dict[str, Any]:
    """The generation_config.json beside a checkpoint; empty without one."""
    file = _beside(path, GENERATION)
    return {} if file is None else read_json(file)
