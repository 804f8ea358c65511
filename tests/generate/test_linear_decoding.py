"""Decoding with linear layers: states, pending tokens, drafts taken back, prefixes that are shared."""

import sys
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ling_jax.config import MeshConfig
from ling_jax.generate import rows as decoding
from ling_jax.generate.cache import cache_bytes, empty_cache
from ling_jax.generate.engine import Engine
from ling_jax.generate.requests import Request
from ling_jax.generate.sampling import Sampling
from ling_jax.generate.states import LinearStates, Room
from ling_jax.kernels.lightning import lightning
from tests.support.answers import recomputed
from tests.support.helpers import assert_close, make_model, tiny
from tests.support.marks import nightly

HYBRID = tiny(vocab_size=64, num_hidden_layers=4, layer_group_size=3, group_norm_size=2)
LONG = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
PROMPTS = [LONG, [*LONG[:9], 7, 7], [3], LONG, [27, 18, 28], LONG[:4], LONG[:9], [*LONG, 4]]
LIKED = Sampling(logit_bias={3: 9.0, 7: 9.0, 20: 9.0})  # far better than other tokens: drafts stand now and then
REQUESTS = [
    Request(prompt=prompt, max_new_tokens=2 + 3 * i % 11, sampling=LIKED if i % 2 else Sampling())
    for i, prompt in enumerate(PROMPTS)
]


@cache
def expected() -> list[list[int]]:
    return recomputed(make_model(HYBRID), REQUESTS, 32)


@pytest.mark.parametrize(("drafts", "chunk"), [nightly(0, 4), (3, 16), nightly(1, 4), nightly(0, 1), nightly(8, 8)])
def test_answers_are_those_of_full_recomputation(drafts, chunk):
    """Rows that end and are given away, prompts in pieces, drafts that stand and fall, an answer taken up again."""
    engine = Engine(make_model(HYBRID), rows=2, slots=32, chunk=chunk, drafts=drafts)
    answers = dict(engine.run(REQUESTS, 3))
    assert [answers[i].ids for i in range(len(REQUESTS))] == expected()
    if drafts:
        drafted, accepted = (sum(getattr(a, name) for a in answers.values()) for name in ("drafted", "accepted"))
        assert 0 < accepted < drafted
    place = max(range(len(REQUESTS)), key=lambda i: REQUESTS[i].max_new_tokens)
    ticket = engine.submit(REQUESTS[place])
    engine.step(2)
    half = engine.withdraw(ticket)
    assert half.end is None and half.ids
    engine.submit(REQUESTS[0])
    engine.submit(REQUESTS[place], half)
    ends = [update.answer for _ in range(20) for update in engine.step(3) if update.answer.end is not None]
    assert sorted(a.ids for a in ends) == sorted([expected()[0], expected()[place]])


@pytest.mark.parametrize("drafts", [nightly(0), 2])
def test_a_prompt_is_run_once_for_all_its_samples(drafts, monkeypatch):
    """A row that has answered has its prompt's state beside its own, from which other samples of the prompt start; a
    chat goes on where it ended; another prompt that only begins the same is run."""
    ran = []
    prefill = decoding.prefill

    def noted(program, params, bias, rows, rows_R, count, kinds):
        before = np.asarray(rows.cache.length_B)
        rows = prefill(program, params, bias, rows, rows_R, count, kinds)
        ran.extend((np.asarray(rows.cache.length_B) - before)[np.asarray(rows_R)[:1]].tolist())
        return rows

    monkeypatch.setattr(sys.modules[Engine.__module__], "prefill", noted)
    engine = Engine(make_model(HYBRID), rows=1, slots=32, chunk=32, drafts=drafts)

    def answer(prompt: list[int], new: int = 5) -> list[int]:
        ran.clear()
        return next(engine.run([Request(prompt=prompt, max_new_tokens=new, sampling=Sampling())]))[1].ids

    first = answer(LONG)
    assert sum(ran) == len(LONG)
    assert answer(LONG) == first and sum(ran) == 1 + drafts  # what the kept state does not have
    chat = [*LONG, *first, 11, 12]
    assert answer(chat) and sum(ran) <= 3 + drafts
    assert answer([*LONG[:9], 7]) and sum(ran) == 10


def random_pieces(rng: np.random.Generator, total: int) -> list[int]:
    pieces = []
    while sum(pieces) < total:
        pieces.append(int(rng.integers(1, total - sum(pieces) + 1)))
    return pieces


@pytest.mark.parametrize("drafts", [0, 1, 4])
def test_any_pieces_with_drafts_taken_back_are_one_row(drafts):
    """Rows of unequal lengths in one batch, padding before tokens and after them, up to `drafts` tokens of each piece
    taken back and run again as others."""
    rng, heads, width, total = np.random.default_rng(drafts), 3, 8, 23
    config = tiny(num_attention_heads=heads, num_key_value_heads=1, head_dim=width, layer_group_size=3)
    slopes = jnp.asarray([0.6, 0.1, 0.01], jnp.float32)
    q, k, v = (jnp.asarray(rng.normal(size=(2, total, heads, width)), jnp.float32) for _ in range(3))
    whole = jnp.ones((2, total), jnp.int32)
    nothing = jnp.zeros((2, heads, width, width), jnp.float32)
    want, _ = lightning(q, k, v, slopes, whole, nothing, 0.5)
    states = LinearStates.empty(config, Room(2, 2, 64, drafts, 1, jnp.dtype(jnp.float32)))
    states = LinearStates(**{**vars(states), "layer": jnp.asarray(1)})
    at, got = np.zeros(2, int), np.zeros(want.shape)
    run = jax.jit(lambda states, *args: states.attend(*args[:3], slopes, *args[3:], 0.5))
    while (at < total).any():
        counts = np.array([rng.integers(0, min(9, total - done) + 1) for done in at])
        wrong = np.array([rng.integers(0, drafts + 1) if count else 0 for count in counts])  # drafts that will fall
        room = max(1, int((counts + wrong).max()))
        valid = np.zeros((2, room), bool)
        piece = [np.array(rng.normal(size=(2, room, heads, width)), np.float32) for _ in range(3)]
        for row, (count, extra) in enumerate(zip(counts, wrong, strict=True)):
            places = np.sort(rng.permutation(room)[: count + extra])
            valid[row, places] = True
            for new, real in zip(piece, (q, k, v), strict=True):
                new[row, places[:count]] = real[row, at[row] : at[row] + count]
        positions = np.maximum(at[:, None] + np.cumsum(valid, 1) - 1, 0).astype(np.int32)
        out, states = run(states, *map(jnp.asarray, piece), jnp.asarray(positions), jnp.asarray(valid))
        for row, count in enumerate(counts):
            got[row, at[row] : at[row] + count] = np.asarray(out)[row][valid[row]][:count]
        at += counts
    assert_close(got, want)


def test_a_rows_states_are_as_large_as_their_formula_says():
    linear, softmax, heads, width = 2, 2, HYBRID.num_attention_heads, HYBRID.head_dim
    states = 2 * linear * (heads * width * width * 4 + 4)  # that of the row and that of its prompt; how many tokens
    pending = 2 * linear * heads * width * 4  # one token's keys and values
    keys = 2 * softmax * 48 * HYBRID.num_key_value_heads * width * 4
    assert cache_bytes(HYBRID, 5, 48, jnp.dtype("float32")) == 5 * (states + pending + keys)
    drafted = jax.eval_shape(lambda: empty_cache(HYBRID, 5, 48, jnp.dtype("bfloat16"), drafts=3))
    assert drafted.kinds["linear_moe"].k_LBPHC.shape == (1, 5, 4, heads, width)
    assert drafted.kinds["linear_moe"].state_LBHCC.dtype == jnp.float32


@pytest.mark.parametrize(
    "mesh", [nightly(MeshConfig(fsdp=2, expert=2, tensor=2)), nightly(MeshConfig(data=4, tensor=2))]
)
def test_a_mesh_answers_as_one_device(mesh):
    answers = dict(Engine(make_model(HYBRID, mesh=mesh), rows=8, slots=32, chunk=8, drafts=2).run(REQUESTS, 4))
    assert [answers[i].ids for i in range(len(REQUESTS))] == expected()
