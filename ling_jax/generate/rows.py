"""The rows that are being decoded, as device state, and the programs that advance them.

Legend: B rows, R some of them, S slots, T tokens run at once, V vocabulary, E end tokens, D hidden, P drafted tokens,
L MoE layers, K experts per token.

A row knows its tokens up to `known`; its cache holds the first `length` of them. Whatever is known and not in the cache
is run (a prompt in chunks, else one token), and a row with nothing left to run draws its next token.

With drafts (MTP self-speculation, spec 2.6), the MTP layer's cache goes with the trunk's; after each draw it predicts
the P tokens to come, which the next step runs with the token before them and keeps as far as they stand.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ling_jax.config import ModelConfig, routed_layers
from ling_jax.generate.cache import Cache, empty_cache
from ling_jax.generate.sampling import Kinds, Options, draw, keys_at, log_distribution, logprob_of, penalize, verify
from ling_jax.generate.serving import Program, row_specs
from ling_jax.model.model import Ling
from ling_jax.parallel.mesh import BATCH_AXES, axis_index, manual, pmax


class DecodingRows(NamedTuple):
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
    drafts_BP: jax.Array  # int32
    draft_logprobs_BPV: jax.Array  # float32, what each was drawn from
    drafted_B: jax.Array  # int32 drafts that were run
    accepted_B: jax.Array  # int32 of them that stood

    def of(self, rows_R: jax.Array) -> "DecodingRows":
        """Some rows, as rows of their own; B is none, an inactive one."""
        others = jax.tree.map(lambda a: a[rows_R], self._replace(cache=None))
        active_R = others.active_B & (rows_R < self.active_B.size)
        return others._replace(cache=self.cache.rows(rows_R), active_B=active_R)

    def with_rows(self, rows_R: jax.Array, some: "DecodingRows") -> "DecodingRows":
        """The inverse of `of`."""
        mine, theirs = self._replace(cache=None), some._replace(cache=None)
        merged = jax.tree.map(lambda a, b: a.at[rows_R].set(b, mode="drop"), mine, theirs)
        return merged._replace(cache=self.cache.with_rows(rows_R, some.cache))


def _distribution(rows: DecodingRows, logits_BV: jax.Array, kinds: Kinds) -> jax.Array:
    """Log-probabilities [B, V] of the token at position `known`."""
    if rows.options.bias_BV.shape[1]:
        logits_BV = logits_BV + rows.options.bias_BV
    if kinds.penalized:
        logits_BV = penalize(logits_BV, rows.tokens_BS, rows.known_B, rows.prompt_B, rows.options)
    return log_distribution(logits_BV, rows.options, kinds)


def _tokens_at(rows: DecodingRows, slots_BT: jax.Array) -> jax.Array:
    last_slot = rows.tokens_BS.shape[1] - 1
    return jnp.take_along_axis(rows.tokens_BS, jnp.minimum(slots_BT, last_slot), axis=1)


def _write(array_BS: jax.Array, slot_B: jax.Array, where_B: jax.Array, value_B: jax.Array) -> jax.Array:
    at = (jnp.arange(slot_B.size), jnp.where(where_B, slot_B, array_BS.shape[1]))
    return array_BS.at[at].set(value_B, mode="drop")


def _run(model: Ling, rows: DecodingRows, slots_BT: jax.Array, valid_BT: jax.Array) -> tuple[DecodingRows, jax.Array]:
    """Runs the tokens of these slots through the trunk; returns its output too."""
    out = model.hidden(_tokens_at(rows, slots_BT), segment_ids_BT=valid_BT.astype(jnp.int32), cache=rows.cache)
    routing_BSLK = rows.routing_BSLK
    if routing_BSLK is not None:
        assert out.routing is not None
        at = (jnp.arange(rows.known_B.size)[:, None], jnp.where(valid_BT, slots_BT, routing_BSLK.shape[1]))
        routing_BSLK = routing_BSLK.at[at].set(out.routing.ids.transpose(1, 2, 0, 3), mode="drop")
    return rows._replace(cache=out.cache, routing_BSLK=routing_BSLK), out.hidden_BTD


def _draw(
    rows: DecodingRows, token_B: jax.Array, drawn_BV: jax.Array, logits_BV: jax.Array, where_B: jax.Array
) -> DecodingRows:
    """Writes this token at position `known` of some rows, which may end them."""
    known_B = rows.known_B + where_B
    model_B = logprob_of(jax.nn.log_softmax(logits_BV, axis=-1), token_B)
    ended_B = (token_B[:, None] == rows.stops_BE).any(1) | (known_B >= rows.limit_B)
    return rows._replace(
        tokens_BS=_write(rows.tokens_BS, rows.known_B, where_B, token_B),
        logprobs_BS=_write(rows.logprobs_BS, rows.known_B, where_B, logprob_of(drawn_BV, token_B)),
        model_logprobs_BS=_write(rows.model_logprobs_BS, rows.known_B, where_B, model_B),
        known_B=known_B,
        active_B=rows.active_B & ~(where_B & ended_B),
    )


def _predict(
    model: Ling, rows: DecodingRows, hidden_BTD: jax.Array, slots_BT: jax.Array, valid_BT: jax.Array, kinds: Kinds
) -> DecodingRows:
    """Runs the MTP layer where the next token is known by now, and drafts P tokens from position `known` on."""
    valid_BT &= slots_BT + 1 < rows.known_B[:, None]
    here_BTD, cache = model.draft(_tokens_at(rows, slots_BT + 1), hidden_BTD, slots_BT, valid_BT, rows.cache)
    last_B11 = jnp.maximum(valid_BT.sum(1) - 1, 0)[:, None, None]
    here_B1D = jnp.take_along_axis(here_BTD, last_B11, axis=1)
    drafts, logprobs = [], []
    for i in range(rows.drafts_BP.shape[1]):
        if i:
            slot_B1 = (rows.known_B + i - 2)[:, None]
            inside_B1 = rows.active_B[:, None] & (slot_B1 < rows.limit_B[:, None])
            here_B1D, cache = model.draft(drafts[-1][:, None], here_B1D, slot_B1, inside_B1, cache)
        logits_BV = model.logits(here_B1D[:, 0])
        logprobs.append(_distribution(rows, logits_BV, kinds._replace(penalized=False)))
        drafts.append(draw(logprobs[-1], keys_at(rows.options, rows.known_B + i, 2), kinds))
    return rows._replace(
        cache=cache, drafts_BP=jnp.stack(drafts, axis=1), draft_logprobs_BPV=jnp.stack(logprobs, axis=1)
    )


def advance(model: Ling, rows: DecodingRows, count: int, kinds: Kinds) -> DecodingRows:
    """Runs up to `count` tokens of each active row; rows that have none left draw one."""
    slots_BT = rows.cache.length_B[:, None] + jnp.arange(count)
    valid_BT = (slots_BT < rows.known_B[:, None]) & rows.active_B[:, None]
    rows, hidden_BTD = _run(model, rows, slots_BT, valid_BT)
    last_B11 = jnp.maximum(valid_BT.sum(1) - 1, 0)[:, None, None]
    logits_BV = model.logits(jnp.take_along_axis(hidden_BTD, last_B11, axis=1)[:, 0])
    drawn_BV = _distribution(rows, logits_BV, kinds)
    token_B = draw(drawn_BV, keys_at(rows.options, rows.known_B), kinds)
    rows = _draw(rows, token_B, drawn_BV, logits_BV, rows.active_B & (rows.cache.length_B == rows.known_B))
    if rows.drafts_BP.shape[1]:
        rows = _predict(model, rows, hidden_BTD, slots_BT, valid_BT, kinds)
    return rows


def speculate(model: Ling, rows: DecodingRows, kinds: Kinds) -> DecodingRows:
    """Runs the last token and the drafts of each active row; draws one token more than drafts stand."""
    before, count = rows, rows.drafts_BP.shape[1]
    for i in range(count):
        drafted_B = rows.drafts_BP[:, i]
        rows = rows._replace(tokens_BS=_write(rows.tokens_BS, rows.known_B + i, rows.active_B, drafted_B))
    slots_BT = rows.cache.length_B[:, None] + jnp.arange(count + 1)
    valid_BT = rows.active_B[:, None] & (slots_BT < rows.limit_B[:, None])
    rows, hidden_BTD = _run(model, rows, slots_BT, valid_BT)
    logits_BTV = model.logits(hidden_BTD)
    goes_on_B = rows.active_B
    for i in range(count + 1):
        drawn_BV = _distribution(rows, logits_BTV[:, i], kinds)
        if i < count:
            draft = rows.draft_logprobs_BPV[:, i], rows.drafts_BP[:, i]
            stands_B, token_B = verify(drawn_BV, *draft, rows.options, rows.known_B, kinds)
            rows = rows._replace(
                drafted_B=rows.drafted_B + goes_on_B, accepted_B=rows.accepted_B + (goes_on_B & stands_B)
            )
        else:
            stands_B, token_B = goes_on_B, draw(drawn_BV, keys_at(rows.options, rows.known_B), kinds)
        rows = _draw(rows, token_B, drawn_BV, logits_BTV[:, i], goes_on_B)
        goes_on_B &= stands_B & rows.active_B
    length_B = jnp.where(before.active_B, rows.known_B - 1, before.cache.length_B)
    rows = rows._replace(cache=rows.cache.of_length(length_B))
    return _predict(model, rows, hidden_BTD, slots_BT, valid_BT, kinds)


@partial(jax.jit, static_argnums=(0, 5, 6), donate_argnums=(3,))
def prefill(
    program: Program, params, bias, rows: DecodingRows, rows_R: jax.Array, count: int, kinds: Kinds
) -> DecodingRows:
    """Runs up to `count` tokens of some rows; on a mesh, each part of `rows_R` names rows of that part."""

    def run(model: Ling, rows: DecodingRows, rows_R: jax.Array) -> DecodingRows:
        return rows.with_rows(rows_R, advance(model, rows.of(rows_R), count, kinds))

    return program(run, params, bias, rows, rows_R, specs=(PartitionSpec(BATCH_AXES),))


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=(3,))
def decode(
    program: Program, params, bias, rows: DecodingRows, kinds: Kinds, steps: jax.Array, until_one_ends: jax.Array
) -> DecodingRows:
    """Makes up to `steps` steps of every active row, in a loop on the device; ends early once no row is active, or if
    asked once one has ended, whose place another can take."""

    def run(model: Ling, rows: DecodingRows, steps: jax.Array, until_one_ends: jax.Array) -> DecodingRows:
        first_B = rows.active_B

        def goes_on(carry):
            step, rows = carry
            active, ended = pmax((rows.active_B.any(), (rows.active_B != first_B).any()), *BATCH_AXES)
            return (step < steps) & active & ~(until_one_ends & ended)

        def body(carry):
            step, rows = carry
            return step + 1, one_step(model, rows, kinds)

        return jax.lax.while_loop(goes_on, body, (jnp.zeros((), jnp.int32), rows))[1]

    return program(run, params, bias, rows, steps, until_one_ends, specs=(PartitionSpec(), PartitionSpec()))


def one_step(model: Ling, rows: DecodingRows, kinds: Kinds) -> DecodingRows:
    """A step of decoding, with drafts or without."""
    return speculate(model, rows, kinds) if rows.drafts_BP.shape[1] else advance(model, rows, 1, kinds)


Scalar = int | jax.Array


class Place(NamedTuple):
    """The request that a row is given, as arrays."""

    row: Scalar  # of all
    source: Scalar  # a row of the same part of the mesh, whose first tokens' keys and values it takes over
    shared: Scalar  # so many
    tokens_S: np.ndarray  # int32 prompt, and answer so far
    known: Scalar
    prompt: Scalar
    limit: Scalar
    stops_E: np.ndarray  # int32


@partial(jax.jit, static_argnums=(0,), donate_argnums=(1,))
def place(mesh: Mesh | None, rows: DecodingRows, new: Place, options: Options) -> DecodingRows:
    """Gives a row to a request; `options` are all rows'."""

    def run(rows: DecodingRows, new: Place, options: Options) -> DecodingRows:
        here, first = rows.known_B.size, axis_index(*BATCH_AXES) * rows.known_B.size
        row = jnp.where((new.row >= first) & (new.row < first + here), new.row - first, here)
        source = jnp.clip(new.source - first, 0, here - 1)

        def put(array: jax.Array, value: Any) -> jax.Array:
            return array.at[row].set(value, mode="drop")

        routing = rows.routing_BSLK
        return rows._replace(
            cache=rows.cache.copied(source, row, new.shared),
            tokens_BS=put(rows.tokens_BS, new.tokens_S),
            routing_BSLK=None if routing is None else put(routing, routing[source]),
            known_B=put(rows.known_B, new.known),
            prompt_B=put(rows.prompt_B, new.prompt),
            limit_B=put(rows.limit_B, new.limit),
            active_B=put(rows.active_B, True),
            stops_BE=put(rows.stops_BE, new.stops_E),
            options=options,
            drafted_B=put(rows.drafted_B, 0),
            accepted_B=put(rows.accepted_B, 0),
        )

    if mesh is None:
        return run(rows, new, options)
    of_rows, nowhere = row_specs(rows), jax.tree.map(lambda _: PartitionSpec(), new)
    of_options = jax.tree.map(lambda _: PartitionSpec(BATCH_AXES), options)
    return manual(run, mesh, (of_rows, nowhere, of_options), of_rows)(rows, new, options)


def empty_rows(
    options: Options,
    *,
    config: ModelConfig,
    batch: int,
    slots: int,
    stops: int,
    drafts: int,
    dtype: jnp.dtype,
    routing: bool,
    tensor: int = 1,
) -> DecodingRows:
    """`batch` rows of up to `slots` tokens, none of them active; `tensor` as in `empty_cache`."""
    routed = (batch, slots, routed_layers(config, mtp=False), config.num_experts_per_tok)
    return DecodingRows(
        cache=empty_cache(config, batch, slots, dtype, drafts=drafts, tensor=tensor),
        tokens_BS=jnp.zeros((batch, slots), jnp.int32),
        logprobs_BS=jnp.zeros((batch, slots), jnp.float32),
        model_logprobs_BS=jnp.zeros((batch, slots), jnp.float32),
        routing_BSLK=jnp.zeros(routed, jnp.int32) if routing else None,
        known_B=jnp.zeros(batch, jnp.int32),
        prompt_B=jnp.zeros(batch, jnp.int32),
        limit_B=jnp.zeros(batch, jnp.int32),
        active_B=jnp.zeros(batch, bool),
        stops_BE=jnp.full((batch, stops), -1, jnp.int32),
        options=options,
        drafts_BP=jnp.zeros((batch, drafts), jnp.int32),
        draft_logprobs_BPV=jnp.zeros((batch, drafts, config.vocab_size), jnp.float32),
        drafted_B=jnp.zeros(batch, jnp.int32),
        accepted_B=jnp.zeros(batch, jnp.int32),
    )
