"""Requests to the engine, and the checks that refuse what cannot be run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ling_jax.config import ModelConfig
from ling_jax.generate.sampling import Sampling
from ling_jax.model.inputs import is_whole, token_ids

MOST_DRAFTS = 8  # tokens that the MTP layer predicts at a step


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to go on with it."""

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    seed: int = 0  # the same request gives the same answer, whatever runs beside it
    stop_ids: Sequence[int] = ()  # tokens that end the answer, and are its last


def check_drafts(config: ModelConfig, drafts: int) -> None:
    """Raises ValueError for drafts that no MTP layer makes, or more than can pay: each is a pass of that layer in the
    program of a step, and stands only if all before it do."""
    if not config.num_nextn_predict_layers and drafts != 0:
        raise ValueError(f"drafts = {drafts} must be 0 for a model without an MTP layer")
    if not is_whole(drafts) or not 0 <= drafts <= MOST_DRAFTS:
        raise ValueError(f"drafts = {drafts!r} must be from 0 to {MOST_DRAFTS}; later ones hardly ever stand, try 1")


def check_request(config: ModelConfig, request: Request, slots: int, stops: int) -> None:
    """Raises ValueError for what can't be run."""
    tokens, limit = token_ids("the prompt", request.prompt, config.vocab_size), config.max_positions
    if not len(tokens):
        raise ValueError("an empty prompt: give at least one token (a tokenizer's start token will do)")
    for name in ("max_new_tokens", "seed"):
        if not is_whole(value := getattr(request, name)):
            raise ValueError(f"{name} = {value!r} must be a whole number")
    if request.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {request.max_new_tokens} must be at least 1")
    token_ids("logit_bias", list(request.sampling.logit_bias), config.vocab_size)
    whole = f"a prompt of {len(tokens)} tokens and max_new_tokens = {request.max_new_tokens} exceed"
    if len(tokens) + request.max_new_tokens > limit:
        raise ValueError(f"{whole} the model's {limit} positions; shorten either, or set rope_scaling in its config")
    if len(tokens) + request.max_new_tokens > slots:
        raise ValueError(f"{whole} the cache's {slots} slots a row; shorten either, or make the cache longer")
    checked_ends("stop_ids", request.stop_ids)
    if len(request.stop_ids) > stops:
        raise ValueError(f"{len(request.stop_ids)} stop_ids are more than the {stops} that a row has room for")
    if not 0 <= request.seed < 2**32:
        raise ValueError(f"seed = {request.seed} must be from 0 to {2**32 - 1}")


def checked_ends(name: str, ids: Any) -> tuple[int, ...]:
    """Tokens that end an answer, as a tuple; some may be of no vocabulary, and then never come."""
    ends: Any = tuple(ids) if isinstance(ids, Iterable) and not isinstance(ids, str) else (None,)
    if not all(is_whole(end) and end >= 0 for end in ends):
        raise ValueError(f"{name} = {ids!r} must be a list of token ids, such as [1]")
    return tuple(map(int, ends))


def checked_prompts(prompts: Any) -> list[Any]:
    """The prompts one by one; ValueError for text, one flat prompt, or none."""
    if isinstance(prompts, str) or not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 1) == 0:
        raise ValueError(f"prompts = {prompts!r} must be lists of token ids; text is encoded first (Tokenizer.encode)")
    rows = [np.asarray(row) if hasattr(row, "dtype") else row for row in prompts]
    if not rows:
        raise ValueError("an empty prompt: give at least one token (a tokenizer's start token will do)")
    if is_whole(rows[0]):
        raise ValueError(f"prompts is one flat list; give a list of prompts, such as [[{rows[0]}, ...]]")
    return rows


def lengths_of(max_new_tokens: Any, rows: int) -> list[Any]:
    """`max_new_tokens` of each row, from one for all or a list."""
    if isinstance(max_new_tokens, str) or not hasattr(max_new_tokens, "__len__") or np.ndim(max_new_tokens) == 0:
        return [max_new_tokens] * rows
    if len(max_new_tokens) != rows:
        raise ValueError(f"max_new_tokens holds {len(max_new_tokens)} numbers for {rows} prompts; give one for each")
    return list(max_new_tokens)
