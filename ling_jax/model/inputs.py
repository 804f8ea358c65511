"""Checks of a model's inputs, made where users call it.

Values are looked at only where they are known: inside a compiled program shapes and dtypes are all there is.

Legend: B rows, T tokens.
"""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from ling_jax.config import ModelConfig


def known(array: Any) -> bool:
    """Whether an array's values can be read on this process."""
    return not isinstance(array, Tracer) and getattr(array, "is_fully_addressable", True)


def is_whole(value: Any) -> bool:
    """Whether a value is an integer, Python's or an array's; a bool is none."""
    of_array = getattr(value, "ndim", None) == 0 and np.issubdtype(value.dtype, np.integer)
    return (isinstance(value, int) and not isinstance(value, bool)) or of_array


def check_names(name: str, values: Any) -> tuple[str, ...]:
    """`values` as a tuple of names; ValueError for a bare string, which would be one of letters."""
    names = () if isinstance(values, str) or not isinstance(values, Iterable) else tuple(values)
    if isinstance(values, str) or not isinstance(values, Iterable) or not all(isinstance(one, str) for one in names):
        raise ValueError(f"{name} = {values!r} must be a tuple of names, such as {name}=('hidden_states',)")
    return names


def token_ids(where: str, ids: Any, vocab: int) -> np.ndarray:
    """int32 [T] of a list or a 1-D array of token ids, perhaps none.

    Raises:
      ValueError: saying what `where` holds, for anything else, and for an id outside the vocabulary.
    """
    if isinstance(ids, str | bytes) or not hasattr(ids, "__len__") or isinstance(ids, dict | set):
        raise ValueError(f"{where} is {ids!r}; it must be a list of token ids, as a tokenizer's encode gives them")
    if not hasattr(ids, "dtype") and (wrong := [one for one in ids if not is_whole(one)]):
        raise ValueError(f"{where} holds {wrong[0]!r}, which is no token id: ids are integers")
    array = np.asarray(ids) if len(ids) else np.zeros(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{where} is an array of {array.dtype} of shape {array.shape}; token ids are 1-D integers")
    bad = array[(array < 0) | (array >= vocab)]
    if bad.size:
        raise ValueError(f"{where} holds token id {bad[0]}, outside the vocabulary of {vocab}: wrong tokenizer?")
    return array.astype(np.int32)


def checked_batch(
    config: ModelConfig, tokens_BT: Any, positions_BT: Any = None, segment_ids_BT: Any = None
) -> tuple[Any, Any, Any]:
    """The arguments of a model's call, lists turned into arrays.

    Raises:
      ValueError: for tokens that are no [B, T] of integers, empty, outside the vocabulary, or at more positions than
        the model has; for positions or segment ids of another shape or kind.
    """
    given = {"tokens_BT": tokens_BT, "positions_BT": positions_BT, "segment_ids_BT": segment_ids_BT}
    arrays = {name: _array(name, value) for name, value in given.items() if value is not None}
    tokens_BT = arrays["tokens_BT"]
    for name, array in arrays.items():
        if array.shape != tokens_BT.shape:
            raise ValueError(f"{name} is of shape {array.shape} and tokens_BT of {tokens_BT.shape}; give both [B, T]")
    if known(tokens_BT):
        token_ids("tokens_BT", jax.device_get(tokens_BT).reshape(-1), config.vocab_size)
    positions, segments = arrays.get("positions_BT"), arrays.get("segment_ids_BT")
    _check_positions(config.max_positions, tokens_BT.shape[1], positions, segments)
    return tokens_BT, positions, segments


def _array(name: str, value: Any) -> Any:
    if not hasattr(value, "dtype"):
        try:
            value = np.asarray(value)
        except (TypeError, ValueError) as error:  # rows of several lengths
            raise ValueError(f"{name} is no [B, T] array: {error}; pad its rows, with segment id 0") from None
    if value.ndim != 2 or 0 in value.shape:
        raise ValueError(f"{name} is of shape {value.shape}; it must be [B, T], with a row and a token at least")
    if not np.issubdtype(value.dtype, np.integer):
        raise ValueError(f"{name} is an array of {value.dtype}; it must be of integers")
    return value


def _check_positions(limit: int, length: int, positions_BT: Any, segment_ids_BT: Any) -> None:
    """Raises ValueError if a token stands at or beyond `limit`."""
    if positions_BT is not None:
        if not known(positions_BT):
            return
        first, last = int(jax.device_get(positions_BT).min()), int(jax.device_get(positions_BT).max())
        if first < 0:
            raise ValueError(f"positions_BT holds {first}: positions count from 0")
    elif segment_ids_BT is None:
        last = length - 1
    elif known(segment_ids_BT):
        last = _longest_run(jax.device_get(segment_ids_BT)) - 1
    else:
        return
    if last >= limit:
        raise ValueError(
            f"{last + 1} tokens in a row exceed the model's {limit} positions; shorten them, or set rope_scaling in "
            "its config"
        )


def _longest_run(segment_ids_BT: np.ndarray) -> int:
    """Tokens of the longest document; padding, which no token sees, may be longer."""
    edges_BT = np.diff(segment_ids_BT, axis=1) != 0
    longest = 0
    for row_T, edge_T in zip(segment_ids_BT, edges_BT, strict=True):
        starts = np.concatenate([[0], np.flatnonzero(edge_T) + 1])
        lengths = np.diff([*starts, row_T.size])
        longest = max(longest, lengths[row_T[starts] > 0].max(initial=0))
    return int(longest)
