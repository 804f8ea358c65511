"""Prefill and a decode loop that stays on the device.

Legend: B rows, T prompt tokens, V vocabulary, M new tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ling_jax.generate.cache import Cache, empty_cache
from ling_jax.model.model import Ling, split_model


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: greedily at temperature 0, else from the top-k and top-p part of
    softmax(logits / temperature); top_k 0 and top_p 1 leave it whole."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature} must be a number from 0 on; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be above 0 and at most 1; 1 keeps every token")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k} must not be negative; 0 keeps every token")


class Decoding(NamedTuple):
    """Where a batch of answers stands."""

    cache: Cache
    logits_BV: jax.Array  # float32, of the next token
    new_BM: jax.Array  # int32 ids so far, -1 where none
    count: jax.Array  # int32 [] columns of new_BM that are filled
    done_B: jax.Array  # bool: an end token was drawn
    key: jax.Array


def sample_token(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """int32 [B]: one draw per row."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if sampling.top_p < 1:
        ordered_BV = -jnp.sort(-logits_BV, axis=-1)
        probs_BV = jax.nn.softmax(ordered_BV, axis=-1)
        inside_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV < sampling.top_p  # the first one always is
        least_B1 = jnp.where(inside_BV, ordered_BV, jnp.inf).min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)


@partial(jax.jit, static_argnums=(0, 5))
def _prefill(graph, params, bias, tokens_BT, segment_ids_BT, max_new, seed) -> Decoding:
    model: Ling = nnx.merge(graph, params, bias)
    batch, length = tokens_BT.shape
    cache = empty_cache(model.config, batch, length + max_new, model.dtype)
    out = model.hidden(tokens_BT, segment_ids_BT=segment_ids_BT, cache=cache)
    return Decoding(
        cache=out.cache,
        logits_BV=model.logits(out.hidden_BTD[:, -1]),
        new_BM=jnp.full((batch, max_new), -1, jnp.int32),
        count=jnp.zeros((), jnp.int32),
        done_B=jnp.zeros(batch, bool),
        key=jax.random.key(seed),
    )


@partial(jax.jit, static_argnums=(0, 4, 5), donate_argnums=(3,))
def _decode(graph, params, bias, state: Decoding, sampling, eos_ids, until) -> Decoding:
    """Decodes until `until` columns are filled or every row has ended."""
    model: Ling = nnx.merge(graph, params, bias)

    def step(state: Decoding) -> Decoding:
        token_B = sample_token(state.logits_BV, jax.random.fold_in(state.key, state.count), sampling)
        column_B = jnp.where(state.done_B, -1, token_B)
        ended_B = (token_B[:, None] == jnp.array(eos_ids, jnp.int32)).any(1)
        out = model.hidden(token_B[:, None], cache=state.cache)
        return Decoding(
            cache=out.cache,
            logits_BV=model.logits(out.hidden_BTD[:, -1]),
            new_BM=jax.lax.dynamic_update_slice(state.new_BM, column_B[:, None], (0, state.count)),
            count=state.count + 1,
            done_B=state.done_B | ended_B,
            key=state.key,
        )

    return jax.lax.while_loop(lambda s: (s.count < until) & ~s.done_B.all(), step, state)


def _pad_prompts(model: Ling, prompts: Sequence[Sequence[int]], max_new: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segment ids) [B, T], padded on the left to a power of two, so that few shapes compile."""
    vocab, limit = model.config.vocab_size, model.config.max_positions
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("an empty prompt: give at least one token (a tokenizer's start token will do)")
    if max_new < 1:
        raise ValueError(f"max_new_tokens = {max_new} must be at least 1")
    longest = max(len(prompt) for prompt in prompts)
    for row, prompt in enumerate(prompts):
        bad = [t for t in prompt if not 0 <= t < vocab]
        if bad:
            raise ValueError(
                f"prompt {row} holds token id {bad[0]}, outside the vocabulary of {vocab}: wrong tokenizer?"
            )
    if longest + max_new > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens = {max_new} exceed the model's {limit} positions; "
            "shorten either, or set rope_scaling in its config"
        )
    length = 1 << (longest - 1).bit_length()
    tokens = np.zeros((len(prompts), length), np.int32)
    segments = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segments[row, length - len(prompt) :] = 1
    return tokens, segments


def stream(
    model: Ling,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
    every: int = 1,
) -> Iterator[list[list[int]]]:
    """Yields the new ids of every row, `every` tokens at a time; arguments and errors as in `generate`."""
    padded = _pad_prompts(model, prompts, max_new_tokens)
    if every < 1:
        raise ValueError(f"every = {every} must be at least 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed = {seed} must be from 0 to {2**32 - 1}")
    return _stream(model, padded, max_new_tokens, sampling, seed, tuple(eos_ids), every)


def _stream(model, padded, max_new_tokens, sampling, seed, eos_ids, every) -> Iterator[list[list[int]]]:
    tokens_BT, segment_ids_BT = padded
    graph, params, bias = split_model(model)
    state = _prefill(graph, params, bias, tokens_BT, segment_ids_BT, max_new_tokens, seed)
    shown = 0
    while shown < max_new_tokens:
        until = min(shown + every, max_new_tokens)
        state = _decode(graph, params, bias, state, sampling, eos_ids, until)
        new_BM, count, done_B = jax.device_get((state.new_BM, state.count, state.done_B))
        yield [[int(t) for t in row[shown:count] if t >= 0] for row in new_BM]
        shown = int(count)
        if done_B.all():
            return


def generate(
    model: Ling,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
) -> list[list[int]]:
    """Continues each prompt.

    Args:
      prompts: token ids, of any lengths.
      temperature: 0 is greedy.  top_p, top_k: the part of the distribution to draw from.
      seed: same seed, same answers.
      eos_ids: ids that end a row; the end token is returned as its last.
    Returns:
      The new ids of each prompt, the prompt excluded.
    Raises:
      ValueError: for ids outside the vocabulary, or more tokens than the model has positions.
    """
    sampling = Sampling(temperature, top_p, top_k)
    chunks = stream(model, prompts, max_new_tokens, sampling, seed=seed, eos_ids=eos_ids, every=max_new_tokens)
    return next(chunks)
