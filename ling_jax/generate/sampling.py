"""How the next token is drawn from its logits.

Legend: B rows, V vocabulary, S slots, E end tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The distribution that a token is drawn from is made in this order: logits, `logit_bias` added, penalties,
    division by the temperature, then the smallest part that passes `top_k`, `top_p` and `min_p`, each taken of what the
    one before it left."""

    temperature: float = 0.0  # 0 takes the best token
    top_p: float = 1.0  # the fewest best tokens that hold this much probability; 1 keeps all
    top_k: int = 0  # the best so many; 0 keeps all
    min_p: float = 0.0  # those at least this share as likely as the best; 0 keeps all
    repetition_penalty: float = 1.0  # logits of tokens seen so far: divided by it above 0, else multiplied (HF's rule)
    presence_penalty: float = 0.0  # taken from logits of tokens of the answer so far
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to a token's logit

    def __post_init__(self):
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"):
            value, kind = getattr(self, name), Integral if name == "top_k" else Real
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ValueError(f"{name} = {value!r} must be a {'whole ' if kind is Integral else ''}number")
        if not isinstance(self.logit_bias, Mapping) or not all(isinstance(b, Real) for b in self.logit_bias.values()):
            raise ValueError(f"logit_bias = {self.logit_bias!r} must be numbers by token id, such as {{5: -1.0}}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature = {self.temperature} must be a number from 0 on; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be above 0 and at most 1; 1 keeps every token")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k} must not be negative; 0 keeps every token")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p = {self.min_p} must be from 0 to 1; 0 keeps every token")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty = {self.repetition_penalty} must be above 0; 1 changes nothing")
        if not math.isfinite(self.presence_penalty):
            raise ValueError(f"presence_penalty = {self.presence_penalty} must be a finite number; 0 changes nothing")
        for token, bias in self.logit_bias.items():
            if math.isnan(bias) or bias == math.inf:
                raise ValueError(f"logit_bias of token {token} = {bias} must be a number, or -inf to forbid the token")


Array = jax.Array | np.ndarray


class Options(NamedTuple):
    """The rows' `Sampling`s, an entry each, and their random numbers."""

    temperature_B: Array
    top_p_B: Array
    top_k_B: Array
    min_p_B: Array
    repetition_B: Array
    presence_B: Array
    seed_B: Array  # uint32
    bias_BV: Array  # [B, 0] while no row has a bias


class Kinds(NamedTuple):
    """The options that any row uses: what none uses is not in the program."""

    sampled: bool = False
    filtered: bool = False
    penalized: bool = False

    @classmethod
    def of(cls, rows: list[Sampling]) -> "Kinds":
        sampled = [s for s in rows if s.temperature > 0]
        return cls(
            sampled=bool(sampled),
            filtered=any(s.top_p < 1 or s.top_k > 0 or s.min_p > 0 for s in sampled),
            penalized=any(s.repetition_penalty != 1 or s.presence_penalty != 0 for s in rows),
        )


def empty_options(batch: int) -> Options:
    """Host arrays: every row greedy."""
    zeros, ones = np.zeros(batch, np.float32), np.ones(batch, np.float32)
    top_k, seeds = np.zeros(batch, np.int32), np.zeros(batch, np.uint32)
    return Options(zeros, ones, top_k, zeros, ones, zeros, seeds, np.zeros((batch, 0), np.float32))


def with_option(options: Options, row: int, sampling: Sampling, seed: int, vocab: int) -> Options:
    """Host arrays with one row set."""
    s, bias_BV = sampling, options.bias_BV
    if s.logit_bias and not bias_BV.shape[1]:
        bias_BV = np.zeros((len(bias_BV), vocab), np.float32)
    bias_V = np.zeros(bias_BV.shape[1], np.float32)
    for token, bias in s.logit_bias.items():
        bias_V[token] = bias
    values = (s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty, s.presence_penalty, seed, bias_V)
    changed = [np.array(array) for array in (*options[:-1], bias_BV)]
    for array, value in zip(changed, values, strict=True):
        array[row] = value
    return Options(*changed)


def penalize(
    logits_BV: jax.Array, tokens_BS: jax.Array, known_B: jax.Array, prompt_B: jax.Array, options: Options
) -> jax.Array:
    """Penalties for tokens at positions below `known`; presence counts from position `prompt` on."""
    slots_S = jnp.arange(tokens_BS.shape[1])
    rows_B1 = jnp.arange(tokens_BS.shape[0])[:, None]
    seen_BS, new_BS = slots_S < known_B[:, None], slots_S >= prompt_B[:, None]
    none = jnp.zeros(logits_BV.shape, bool)
    seen_BV = none.at[rows_B1, tokens_BS].max(seen_BS)
    said_BV = none.at[rows_B1, tokens_BS].max(seen_BS & new_BS)
    penalty_B1 = options.repetition_B[:, None]
    repeated_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, repeated_BV, logits_BV) - jnp.where(said_BV, options.presence_B[:, None], 0)


def _filter(logits_BV: jax.Array, options: Options) -> jax.Array:
    """-inf outside what top-k, top-p and min-p keep; tokens as good as the last one kept stay too."""
    ordered_BV = -jnp.sort(-logits_BV, axis=-1)
    place_V = jnp.arange(logits_BV.shape[-1])
    top_k_B1 = jnp.where(options.top_k_B > 0, options.top_k_B, logits_BV.shape[-1])[:, None]
    kept_BV = jnp.where(place_V < top_k_B1, ordered_BV, -jnp.inf)
    probs_BV = jax.nn.softmax(kept_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    best_B1 = probs_BV[:, :1]
    top_p_B1 = options.top_p_B[:, None]
    inside_BV = (before_BV < top_p_B1) | (top_p_B1 >= 1) | (place_V == 0)
    inside_BV &= probs_BV >= options.min_p_B[:, None] * best_B1
    least_B1 = jnp.where(inside_BV & (place_V < top_k_B1), ordered_BV, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def log_distribution(logits_BV: jax.Array, options: Options, kinds: Kinds) -> jax.Array:
    """float32 [B, V]: log-probabilities of what is drawn, from logits after bias and penalties. A greedy row is sure
    of its best token."""
    best_BV = jax.nn.one_hot(logits_BV.argmax(-1), logits_BV.shape[-1], dtype=bool)
    greedy_BV = jnp.where(best_BV, jnp.float32(0), -jnp.inf)
    if not kinds.sampled:
        return greedy_BV
    temperature_B1 = options.temperature_B[:, None]
    scaled_BV = logits_BV / jnp.where(temperature_B1 > 0, temperature_B1, 1)
    if kinds.filtered:
        scaled_BV = _filter(scaled_BV, options)
    return jnp.where(temperature_B1 > 0, jax.nn.log_softmax(scaled_BV, axis=-1), greedy_BV)


def keys_at(options: Options, position_B: jax.Array, purpose: int = 0) -> jax.Array:
    """[B] keys of the draws for these positions: they depend on a row's seed and nothing else."""

    def key(seed, position):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), purpose)

    return jax.vmap(key)(options.seed_B, position_B)


def draw(logprobs_BV: jax.Array, keys_B: jax.Array | None, kinds: Kinds) -> jax.Array:
    """int32 [B]: one token of each row."""
    if not kinds.sampled:
        return logprobs_BV.argmax(-1).astype(jnp.int32)
    assert keys_B is not None
    return jax.vmap(jax.random.categorical)(keys_B, logprobs_BV).astype(jnp.int32)


def logprob_of(logprobs_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=-1)[:, 0]


def verify(
    target_BV: jax.Array,
    draft_BV: jax.Array,
    drafted_B: jax.Array,
    options: Options,
    position_B: jax.Array,
    kinds: Kinds,
) -> tuple[jax.Array, jax.Array]:
    """Whether drafted tokens stand, and the tokens that do or take their place; distributed as `target` is.

    Rejection sampling (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1): a token drawn from `draft` is kept with
    probability min(1, target / draft), else another is drawn from what `target` has more than `draft`.

    Args:
      target_BV, draft_BV: log-probabilities.  drafted_B: int32, drawn from `draft`.  position_B: the tokens' positions.
    Returns:
      (bool [B], int32 [B])
    """
    if not kinds.sampled:
        best_B = draw(target_BV, None, kinds)
        return best_B == drafted_B, best_B
    chance_B = jnp.exp(logprob_of(target_BV, drafted_B) - logprob_of(draft_BV, drafted_B))
    uniform_B = jax.vmap(jax.random.uniform)(keys_at(options, position_B, 1))
    kept_B = uniform_B < chance_B
    rest_BV = jnp.log(jnp.maximum(jnp.exp(target_BV) - jnp.exp(draft_BV), 0))
    rest_BV = jnp.where(jnp.isfinite(rest_BV).any(-1, keepdims=True), rest_BV, target_BV)  # equal but for rounding
    other_B = jax.vmap(jax.random.categorical)(keys_at(options, position_B), rest_BV).astype(jnp.int32)
    return kept_B, jnp.where(kept_B, drafted_B, other_B)
