"""Log-probabilities of continuations, many at a time: what an evaluation of multiple choices asks of a model.

Requests lie in rows one after another, as documents that do not see each other, so that little is padding and few
programs are compiled. Only the scored tokens go through the head.

Legend: B rows, T tokens, N = B*T, M scored tokens, D hidden.
"""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from ling_jax.config import ModelConfig
from ling_jax.generate.engine import on_host
from ling_jax.kernels.cross_entropy import target_scores
from ling_jax.kernels.precision import under_own_switches
from ling_jax.model.inputs import token_ids
from ling_jax.model.model import Ling, split_model

ROW = 512  # tokens of a row that requests share; a longer request has rows of its own length, a power of two
SHORTEST = 32  # tokens of a row, at least
CALL_TOKENS = 4096  # tokens of a call, unless a request is longer
SCORED = 8  # one token in so many is scored, at most, or else the program for all of them is run


class _Request(NamedTuple):
    place: int  # among the pairs
    ids: np.ndarray  # int32, context and continuation
    first: int  # place of the continuation's first token

    @property
    def tokens(self) -> int:
        """Tokens that are run: the last is only predicted."""
        return len(self.ids) - 1


Row = list[_Request]


class _Call(NamedTuple):
    tokens_BT: np.ndarray
    segments_BT: np.ndarray
    at_M: np.ndarray  # places of N whose next tokens are scored
    targets_M: np.ndarray


@under_own_switches
def score(model: Ling, pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
    """How likely each continuation is after its context.

    Args:
      model: also one that was loaded onto a mesh.
      pairs: (context, continuation), token ids as lists or 1-D arrays, of any lengths.
    Returns:
      For each pair the sum of the log-probabilities of the continuation's tokens, in nats, and whether each of them is
      the likeliest (then it is what greedy decoding gives).
    Raises:
      ValueError: for an empty context or continuation, an id outside the vocabulary, or more tokens than positions.
    """
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise ValueError(f"pairs = {pairs!r} must be a list of (context, continuation)")
    requests = [_request(model.config, place, pair) for place, pair in enumerate(pairs)]
    graph, params, bias = split_model(model)
    calls = [(rows, _scores(graph, params, bias, *_call(rows, length))) for length, rows in _calls(requests)]
    found = [(0.0, True)] * len(requests)
    for rows, (logprobs, best) in calls:
        logprobs_M, best_M = on_host([logprobs, best])
        start = 0
        for request in (request for row in rows for request in row):
            mine = slice(start, start := start + len(request.ids) - request.first)
            found[request.place] = float(logprobs_M[mine].sum(dtype=np.float64)), bool(best_M[mine].all())
    return found


@partial(jax.jit, static_argnums=0)
def _scores(graph, params, bias, tokens_BT, segments_BT, at_M, targets_M) -> tuple[jax.Array, jax.Array]:
    model: Ling = nnx.merge(graph, params, bias)
    hidden_BTD = model.hidden(tokens_BT, segment_ids_BT=segments_BT, mtp=False).hidden_BTD
    hidden_MD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[at_M]
    return target_scores(hidden_MD, *model.head(hidden_MD.dtype), targets_M)


def _request(config: ModelConfig, place: int, pair: Any) -> _Request:
    if isinstance(pair, str) or not hasattr(pair, "__len__") or len(pair) != 2:
        raise ValueError(f"pair {place} is {pair!r}; it must be (context, continuation), both lists of token ids")
    names = f"the context of pair {place}", f"the continuation of pair {place}"
    context, continuation = (token_ids(name, ids, config.vocab_size) for name, ids in zip(names, pair, strict=True))
    if not len(context):
        raise ValueError(f"{names[0]} is empty: give a token to begin with, such as a tokenizer's scoring_prefix")
    if not len(continuation):
        raise ValueError(f"{names[1]} is empty: there is nothing to score")
    request = _Request(place, np.concatenate([context, continuation]), len(context))
    if request.tokens > config.max_positions:
        raise ValueError(
            f"pair {place} has {len(request.ids)} tokens, of which all but the last are run, and the model has "
            f"{config.max_positions} positions; cut the context's beginning off"
        )
    return request


def _row_length(tokens: int) -> int:
    return 1 << (max(tokens, SHORTEST) - 1).bit_length()


def _calls(requests: Sequence[_Request]) -> Iterator[tuple[int, list[Row]]]:
    """(length of the rows, rows) of each call; every request is in one of them."""
    by_length: dict[int, list[_Request]] = {}
    for request in sorted(requests, key=lambda request: -request.tokens):
        by_length.setdefault(max(_row_length(request.tokens), ROW), []).append(request)
    for some in by_length.values():
        length = _row_length(some[0].tokens)
        rows, together = _packed(some, length), max(CALL_TOKENS // length, 1)
        yield from ((length, rows[start : start + together]) for start in range(0, len(rows), together))


def _packed(requests: Sequence[_Request], length: int) -> list[Row]:
    """Rows of at most `length` tokens; each request goes where it leaves the least room, the longest first."""
    rows: list[Row] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for request in requests:
        best = bisect.bisect_left(rooms, (request.tokens, 0))
        room, row = rooms.pop(best) if best < len(rooms) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(request)
        bisect.insort(rooms, (room - request.tokens, row))
    return rows


def _call(rows: Sequence[Row], length: int) -> _Call:
    """A call's arrays: a power of two of rows, and room for one or all of SCORED tokens, so that few shapes are."""
    batch = 1 << (len(rows) - 1).bit_length()
    tokens_BT, segments_BT = np.zeros((2, batch, length), np.int32)
    at: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for number, row in enumerate(rows):
        start = 0
        for segment, request in enumerate(row, 1):
            span = slice(start, start := start + request.tokens)
            tokens_BT[number, span], segments_BT[number, span] = request.ids[:-1], segment
            last = number * length + start  # the place after the request's last
            at.append(np.arange(last - (len(request.ids) - request.first), last))
            targets.append(request.ids[request.first :])
    whole = tokens_BT.size
    count = sum(map(len, at))
    room = whole // SCORED if count <= whole // SCORED else whole
    at_M, targets_M = (np.pad(np.concatenate(parts), (0, room - count)).astype(np.int32) for parts in (at, targets))
    return _Call(tokens_BT, segments_BT, at_M, targets_M)
