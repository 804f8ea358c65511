"""The rows that are being decoded, as device state, and the programs that advance them.

Legend: B rows, R some of them, S slots, T tokens run at once, V vocabulary, E end tokens, D hidden.

A row knows its tokens up to `known`; its cache holds the first `length` of them. Whatever is known and not in the cache
is run (a prompt in chunks, else one token), and a row with nothing left to run draws its next token.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ling_jax.config import ModelConfig, layer_kinds
from ling_jax.generate.cache import Cache, empty_cache
from ling_jax.generate.sampling import Kinds, Options, draw, keys_at, log_distribution, logprob_of, penalize
from ling_jax.model.model import Ling


class Rows(NamedTuple):
    """Where every row stands."""

    cache: Cache
    tokens_BS: jax.Array  # int32: prompt and answer; what lies beyond `known` has no meaning
    logprobs_BS: jax.Array  # float32, of the answer's tokens under what they were drawn from
    model_logprobs_BS: jax.Array  # float32, under softmax(logits)
    routing_BSLK: jax.Array | None  # int32 experts of each token run, where they are recorded
    known_B: jax.Array  # int32
    prompt_B: jax.Array  # int32
    limit_B: jax.Array  # int32: a row that knows so many tokens is done
    active_B: jax.Array  # bool
    stops_BE: jax.Array  # int32 tokens that end a row, -1 where none
    options: Options

    def of(self, rows_R: jax.Array) -> "Rows":
        """Some rows, as rows of their own."""
        others = jax.tree.map(lambda a: a[rows_R], self._replace(cache=None))
        return others._replace(cache=self.cache.rows(rows_R))

    def with_rows(self, rows_R: jax.Array, some: "Rows") -> "Rows":
        """The inverse of `of`."""
        mine, theirs = self._replace(cache=None), some._replace(cache=None)
        merged = jax.tree.map(lambda a, b: a.at[rows_R].set(b), mine, theirs)
        return merged._replace(cache=self.cache.with_rows(rows_R, some.cache))


def _next_token(rows: Rows, logits_BV: jax.Array, kinds: Kinds) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(token, its log-probability as drawn and under the model), each [B], from the logits of the last known token."""
    model_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    if rows.options.bias_BV.shape[1]:
        logits_BV = logits_BV + rows.options.bias_BV
    if kinds.penalized:
        logits_BV = penalize(logits_BV, rows.tokens_BS, rows.known_B, rows.prompt_B, rows.options)
    drawn_BV = log_distribution(logits_BV, rows.options, kinds)
    token_B = draw(drawn_BV, keys_at(rows.options, rows.known_B), kinds)
    return token_B, logprob_of(drawn_BV, token_B), logprob_of(model_BV, token_B)


def advance(model: Ling, rows: Rows, count: int, kinds: Kinds) -> Rows:
    """Runs up to `count` tokens of each active row; rows that have none left draw one."""
    last_slot, index_B1 = rows.tokens_BS.shape[1] - 1, jnp.arange(rows.known_B.size)[:, None]
    slots_BT = rows.cache.length_B[:, None] + jnp.arange(count)
    valid_BT = (slots_BT < rows.known_B[:, None]) & rows.active_B[:, None]
    tokens_BT = rows.tokens_BS[index_B1, jnp.minimum(slots_BT, last_slot)]
    out = model.hidden(tokens_BT, segment_ids_BT=valid_BT.astype(jnp.int32), cache=rows.cache)
    routing_BSLK = rows.routing_BSLK
    if routing_BSLK is not None:
        assert out.routing is not None
        at = (index_B1, jnp.where(valid_BT, slots_BT, last_slot + 1))
        routing_BSLK = routing_BSLK.at[at].set(out.routing.ids.transpose(1, 2, 0, 3), mode="drop")
    last_B1 = jnp.maximum(valid_BT.sum(1, keepdims=True) - 1, 0)
    logits_BV = model.logits(out.hidden_BTD[index_B1, last_B1][:, 0])
    token_B, logprob_B, model_logprob_B = _next_token(rows, logits_BV, kinds)
    draws_B = rows.active_B & (out.cache.length_B == rows.known_B)
    known_B = rows.known_B + draws_B
    ended_B = (token_B[:, None] == rows.stops_BE).any(1) | (known_B >= rows.limit_B)
    at = (index_B1[:, 0], jnp.where(draws_B, rows.known_B, last_slot + 1))
    return rows._replace(
        cache=out.cache,
        tokens_BS=rows.tokens_BS.at[at].set(token_B, mode="drop"),
        logprobs_BS=rows.logprobs_BS.at[at].set(logprob_B, mode="drop"),
        model_logprobs_BS=rows.model_logprobs_BS.at[at].set(model_logprob_B, mode="drop"),
        routing_BSLK=routing_BSLK,
        known_B=known_B,
        active_B=rows.active_B & ~(draws_B & ended_B),
    )


@partial(jax.jit, static_argnums=(0, 5, 6), donate_argnums=(3,))
def prefill(graph, params, bias, rows: Rows, rows_R: jax.Array, count: int, kinds: Kinds) -> Rows:
    """Runs up to `count` tokens of some rows."""
    model: Ling = nnx.merge(graph, params, bias)
    return rows.with_rows(rows_R, advance(model, rows.of(rows_R), count, kinds))


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=(3,))
def decode(graph, params, bias, rows: Rows, kinds: Kinds, steps: jax.Array, until_one_ends: jax.Array) -> Rows:
    """Draws up to `steps` tokens for every active row, in a loop on the device; ends early once no row is active, or if
    asked once one has ended, whose place another can take."""
    model: Ling = nnx.merge(graph, params, bias)
    first_B = rows.active_B

    def goes_on(carry):
        step, rows = carry
        one_ended = until_one_ends & (rows.active_B != first_B).any()
        return (step < steps) & rows.active_B.any() & ~one_ended

    def body(carry):
        step, rows = carry
        return step + 1, advance(model, rows, 1, kinds)

    return jax.lax.while_loop(goes_on, body, (jnp.zeros((), jnp.int32), rows))[1]


@partial(jax.jit, donate_argnums=(0,))
def place(rows: Rows, row: jax.Array, source: jax.Array, shared: jax.Array, tokens_S: jax.Array, settings) -> Rows:
    """Puts a request into `row`: its first `shared` tokens' keys and values are those of row `source`."""
    known, prompt, limit, stops_E, options = settings
    cache = rows.cache.copied(source, row, shared)
    routing = rows.routing_BSLK
    return Rows(
        cache=cache,
        tokens_BS=rows.tokens_BS.at[row].set(tokens_S),
        logprobs_BS=rows.logprobs_BS,
        model_logprobs_BS=rows.model_logprobs_BS,
        routing_BSLK=None if routing is None else routing.at[row].set(routing[source]),
        known_B=rows.known_B.at[row].set(known),
        prompt_B=rows.prompt_B.at[row].set(prompt),
        limit_B=rows.limit_B.at[row].set(limit),
        active_B=rows.active_B.at[row].set(True),
        stops_BE=rows.stops_BE.at[row].set(stops_E),
        options=options,
    )


def empty_rows(
    config: ModelConfig, batch: int, slots: int, stops: int, options: Options, dtype: jnp.dtype, routing: bool
) -> Rows:
    """`batch` rows of up to `slots` tokens, none of them active."""
    layers = sum(kind.endswith("_moe") for kind in layer_kinds(config))
    shape = (batch, slots, layers, config.num_experts_per_tok)
    zeros_B, zeros_BS = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, slots), jnp.float32)
    return Rows(
        cache=empty_cache(config, batch, slots, dtype),
        tokens_BS=zeros_BS.astype(jnp.int32),
        logprobs_BS=zeros_BS,
        model_logprobs_BS=jnp.zeros_like(zeros_BS),
        routing_BSLK=jnp.zeros(shape, jnp.int32) if routing else None,
        known_B=zeros_B,
        prompt_B=jnp.zeros_like(zeros_B),
        limit_B=jnp.zeros_like(zeros_B),
        active_B=jnp.zeros(batch, bool),
        stops_BE=jnp.full((batch, stops), -1, jnp.int32),
        options=options,
    )
