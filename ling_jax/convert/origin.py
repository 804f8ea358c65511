"""The settings and files that a new run takes from the weights it starts from: `train.py --init-from`."""

import dataclasses
import logging
from typing import Literal

from ling_jax.checkpoint import read_meta
from ling_jax.config import ModelConfig, architecture_diff, model_settings_diff
from ling_jax.convert.merge_weights import Lineage
from ling_jax.convert.tokenizer import tokenizer_file, tokenizer_of
from ling_jax.convert.weights import LINEAGE, Weights, checkpoint_of, model_config_of
from ling_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Mtp = Literal["same", "new", "drop"]  # what becomes of the MTP layer


def check_origin(path: str, wanted: ModelConfig, mtp: Mtp) -> None:
    """Says which settings of the model in `path` change in a run whose model is `wanted`.

    Raises:
      ValueError: if its weights do not fit, but for an MTP layer that `mtp` says what to do about.
    """
    source, layers = model_config_of(path), wanted.num_nextn_predict_layers
    if (mtp == "new" and not layers) or (mtp == "drop" and layers):
        raise ValueError(
            f"--init-mtp {mtp}, but the run's model has model.num_nextn_predict_layers = {layers}: set it to "
            f"{1 - layers}, or leave --init-mtp out"
        )
    there = source if mtp == "same" else dataclasses.replace(source, num_nextn_predict_layers=layers)
    if diff := architecture_diff(there, wanted):
        hint = ""
        if there.num_nextn_predict_layers != layers:
            hint = "new starts the layer from random weights" if layers else "drop leaves the layer behind"
            hint = f". As to the MTP layer: --init-mtp {hint}"
        raise ValueError(f"--init-from {path} is another architecture (there -> here): {'; '.join(diff)}{hint}")
    if changed := model_settings_diff(source, wanted):
        log.info("settings of the model that change from those of %s (there -> here): %s", path, "; ".join(changed))


def origin_tokenizer(origin: Weights, wanted: str | None) -> str:
    """Where the tokenizer is that the weights of `origin` were trained with: `wanted`, if it is that one or they have
    none beside them, else their own.

    Raises:
      ValueError: if `wanted` is another one than theirs, or there is neither.
    """
    path = str(origin.folder)
    own = tokenizer_file(path)
    if own is None and wanted is None:
        raise ValueError(
            f"--init-from {path} has no tokenizer.json, and a new tokenizer's ids would mean other text to its "
            "weights: name the one they were trained with by --data.tokenizer"
        )
    theirs = origin.trained_with if own is None else tokenizer_of(path).fingerprint
    if wanted is not None and theirs is not None and (found := Tokenizer.load(wanted).fingerprint) != theirs:
        raise ValueError(
            f"data.tokenizer = {wanted!r} (fingerprint {found}) is not the tokenizer that the weights in {path} were "
            f"trained with ({own or 'their checkpoint says'}: {theirs}): its ids mean other text to them. Leave "
            "data.tokenizer unset to use theirs"
        )
    log.info("tokenizer of the weights in %s: %s", path, wanted or own)
    return str(wanted or own)


def described(path: str) -> str:
    """One line on weights that a run starts from: their checkpoint, HF folder or hub id, and the lineage of an
    average."""
    folder = checkpoint_of(path)
    lineage = None if folder is None else read_meta(folder).get(LINEAGE)
    where = path if folder is None else str(folder)
    return where if lineage is None else f"{where}, the average of {Lineage.from_json(lineage).render()}"
