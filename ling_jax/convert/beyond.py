"""Tensors of a HF folder that its config has no place for, and that can only mean one thing: they are left out."""

import dataclasses
import re
from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from ling_jax.config import ModelConfig
from ling_jax.convert.mapping import SCALE, layout
from ling_jax.convert.tensorfile import TensorFile

ROWS = 4096  # of two tensors that are compared at a time
EMBEDDING, HEAD = "model.word_embeddings.weight", "lm_head.weight"


def one_reading(config: ModelConfig, extra: Set[str], file_of: Mapping[str, TensorFile]) -> dict[str, str]:
    """Finds the `extra` tensors that have one right reading; gives the reason why each is left out.

    They are: a head that is equal to the embedding it is tied to, the buffers of a rotary embedding, which follow from
    the config, the value head of reinforcement learning, and an MTP layer where the config has none.

    Raises:
      ValueError: for a head that is said to be tied to the embedding and is not equal to it.
    """
    mtp = _mtp_layer(config, extra)
    reasons: dict[str, str] = {}
    for name in sorted(extra):
        if name == HEAD and config.tie_word_embeddings and EMBEDDING in file_of:
            _check_equal(file_of)
            reasons[name] = "equal to the embedding it is tied to"
        elif re.search(r"(^|\.)rotary_emb\.inv_freq$", name):
            reasons[name] = "follows from the config"
        elif name.startswith("v_head."):
            reasons[name] = "a value head, which a language model does not use"
        elif name in mtp:
            reasons[name] = "of an MTP layer, and num_nextn_predict_layers is 0"
    return reasons


def _mtp_layer(config: ModelConfig, extra: Set[str]) -> Set[str]:
    """The `extra` tensors that are the MTP layer's, if all of it is there: a trunk layer that the config does not count
    has no `eh_proj`, and is nobody's to leave out."""
    if config.num_nextn_predict_layers:
        return set()
    stacks = layout(dataclasses.replace(config, num_nextn_predict_layers=1))
    names = {str(name) for path, stack in stacks.items() if path[1] == "mtp" for name in stack.names.flat}
    return {name for name in extra if name.removesuffix(SCALE) in names} if names <= extra else set()


def _check_equal(file_of: Mapping[str, TensorFile]) -> None:
    """ValueError unless the head's numbers are the embedding's."""
    shape = file_of[HEAD].tensors[HEAD].shape
    same = shape == file_of[EMBEDDING].tensors[EMBEDDING].shape
    for row in range(0, shape[0], ROWS) if same else ():
        rows = (slice(row, min(row + ROWS, shape[0])),)
        head, embedding = (file_of[name].start(name, rows) for name in (HEAD, EMBEDDING))
        same = same and np.array_equal(_numbers(head()), _numbers(embedding()))
    if not same:
        raise ValueError(
            f"{file_of[HEAD].path}: {HEAD} differs from {EMBEDDING}, and config.json has tie_word_embeddings true: set "
            "it to false to use both, or remove the head"
        )


def _numbers(rows: np.ndarray) -> Any:
    """Comparable whatever the dtypes, NaN equal to NaN of the same bits."""
    return np.ascontiguousarray(rows, np.float32).view(np.uint32)


def left_out(beyond: Mapping[str, str]) -> str:
    """One line: how many tensors, which, and why."""
    groups: dict[str, list[str]] = {}
    for name, reason in beyond.items():
        groups.setdefault(reason, []).append(name)
    told = (f"{n[0]}{f' and {len(n) - 1} more' if n[1:] else ''} ({reason})" for reason, n in groups.items())
    return f"{len(beyond)} tensor(s) that the model does not use are left out: {'; '.join(told)}"
