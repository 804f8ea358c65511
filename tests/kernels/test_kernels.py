"""The kernels equal plain formulas, forward and backward, whatever the shapes.

Legend: R rows, E groups, I inputs, O outputs, N tokens, D hidden, V vocabulary, B rows, T queries, S keys, H query
heads, G kv heads, C head_dim.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ling_jax.kernels import megablox
from ling_jax.kernels.attention import MASKED, attend, attend_bwd, attention, cached_attention
from ling_jax.kernels.cross_entropy import target_logprobs, target_logprobs_and_entropy
from ling_jax.kernels.grouped import block_rows, grouped_product, grouped_weight_gradient, padded_rows
from ling_jax.kernels.linear import linear
from tests.support.helpers import assert_close, assert_gradient_close, jit

# "auto" is "native" here; on CPU the last, a TPU's kernels, is interpreted. The GPU's have a file of their own, since
# they take blocks of 16 rows and more.
IMPLEMENTATIONS = ("auto", "blocked", "ragged", "megablox")


def normal(*shape: int, seed: int = 0, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def bf16(a: np.ndarray) -> np.ndarray:
    """`a` as bfloat16 holds it, in float32."""
    return np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32)


# linear


@pytest.mark.parametrize("rows", [(1,), (7,), (2, 3, 5)])
def test_linear_and_its_gradients_equal_the_matrix_product(rows):
    x, w, g = normal(*rows, 11), normal(5, 11), normal(*rows, 5)
    y, vjp = jit(lambda *args: jax.vjp(linear, *args))(x, w)
    dx, dw = vjp(g)
    flat_x, flat_g = x.reshape(-1, 11), g.reshape(-1, 5)
    assert_close(y, x @ w.T)
    assert_gradient_close(dx, g @ w)
    assert_gradient_close(dw, flat_g.T @ flat_x)


def test_a_bfloat16_product_keeps_float32_sums_in_its_weight_gradient():
    x, w, g = normal(4096, 3), normal(2, 3), normal(4096, 2)
    y, vjp = jit(lambda x, w: jax.vjp(linear, x, w))(jnp.asarray(x, jnp.bfloat16), w)
    dx, dw = vjp(jnp.asarray(g, jnp.bfloat16))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert_close(y, bf16(x) @ bf16(w).T, tolerance=2**-8)
    assert_gradient_close(dw, bf16(g).T @ bf16(x))


# grouped products


def by_hand(x, w, sizes, g):
    """A product per group in float64: y, dx, dw; zeros past the last group."""
    y, dx, dw = np.zeros((len(x), w.shape[1])), np.zeros(x.shape), np.zeros(w.shape)
    start = 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows] = x[rows].astype(np.float64) @ w[group].T
        dx[rows] = g[rows].astype(np.float64) @ w[group]
        dw[group] = g[rows].astype(np.float64).T @ x[rows]
        start += size
    return y, dx, dw


@partial(jit, static_argnums=(4, 5))
def run_grouped(x_RI, w_EOI, sizes_E, g_RO, block, implementation):
    y_RO = grouped_product(x_RI, w_EOI, sizes_E, block, 1, implementation)
    dx_RI = grouped_product(g_RO, w_EOI, sizes_E, block, 2, implementation)
    return y_RO, dx_RI, grouped_weight_gradient(g_RO, x_RI, sizes_E, block, implementation)


# Blocks of each of five groups; twelve blocks of rows, so that some lie past the last group.
LAYOUTS = {
    "even": (2, 2, 2, 2, 2),
    "empty groups": (0, 4, 0, 3, 0),
    "one hot group": (0, 0, 12, 0, 0),
    "the last group only": (0, 0, 0, 0, 5),
    "one block": (0, 1, 0, 0, 0),
    "full": (3, 1, 1, 6, 1),
    "nothing": (0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [1, 2, 8])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_grouped_products_and_their_weight_gradient_equal_a_loop_over_groups(implementation, block, layout):
    """Rows past the last group, here garbage, give zeros and add to no gradient."""
    sizes = np.array(LAYOUTS[layout], np.int32) * block
    x, w, g = normal(12 * block, 7), normal(5, 3, 7), normal(12 * block, 3)
    y, dx, dw = run_grouped(x, w, sizes, g, block, implementation)
    want_y, want_dx, want_dw = by_hand(x, w, sizes, g)
    assert_close(y, want_y)
    assert_gradient_close(dx, want_dx)
    assert_gradient_close(dw, want_dw)
    inside = sizes.sum()
    assert not np.asarray(y)[inside:].any() and not np.asarray(dx)[inside:].any()


TILED = {  # groups' sizes in blocks of 128, rows in blocks, inputs, outputs
    "tails in every dim but rows": ((1, 0, 1), 3, 1100, 300),
    "tiles of 512 rows that groups share": ((9, 31), 64, 8, 8),
    "nothing but an empty tail": ((0, 0, 0), 3, 1100, 300),
}


@pytest.mark.parametrize("case", TILED)
def test_the_tpu_kernels_equal_the_loop_where_there_are_many_tiles_and_nan_lies_past_the_groups(case):
    blocks, rows, inputs, outputs = TILED[case]
    sizes = np.array(blocks, np.int32) * 128
    x, w, g = normal(rows * 128, inputs), normal(len(sizes), outputs, inputs), normal(rows * 128, outputs)
    x[sizes.sum() :] = g[sizes.sum() :] = np.nan
    results, wants = run_grouped(x, w, sizes, g, 128, "megablox"), by_hand(x, w, sizes, g)
    for got, want in zip(results, wants, strict=True):
        assert_close(got, want, tolerance=1e-5)


@pytest.mark.parametrize("rows", [128, 2944, 65536, 526336, 2**20])
@pytest.mark.parametrize(("hidden", "ffn", "groups"), [(2048, 512, 32), (8192, 2048, 16), (5120, 1536, 16)])
def test_tiles_divide_what_they_can_and_fit_vmem(rows, hidden, ffn, groups):
    for inner, outputs in ((hidden, ffn), (ffn, hidden)):
        for itemsize in (2, 4):
            tm, tk, tn = megablox.tiles(rows, groups, inner, outputs, itemsize)
            assert rows % tm == inner % tk == outputs % tn == 0
            read = 2 * itemsize * (tm * tk + tk * tn)  # twice: the next step's arrive during this one's
            assert read + 2 * itemsize * tm * tn + 4 * tm * tn <= 12 * 2**20
            tm, tk, tn = megablox.weight_tiles(rows, groups, outputs, inner, itemsize)
            assert rows % tm == outputs % tk == inner % tn == 0
            assert 2 * itemsize * tm * (tk + tn) + 3 * 4 * tk * tn <= 12 * 2**20


@pytest.mark.parametrize("rows", [1, 200, 262144, 10**6])
def test_tiles_of_rows_are_never_more_than_the_kernels_count_exactly(rows):
    tile = megablox.tiles(rows, 256, 64, 64, 4)[0]
    assert tile % 128 == 0 and -(-rows // tile) <= megablox.MOST_TILES


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_grouped_products_of_a_single_row(implementation):
    sizes = np.array([0, 0, 1], np.int32)
    x, w, g = normal(1, 5), normal(3, 1, 5), normal(1, 1)
    for got, want in zip(run_grouped(x, w, sizes, g, 1, implementation), by_hand(x, w, sizes, g), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_bfloat16_grouped_product_keeps_float32_sums_in_its_weight_gradient(implementation):
    sizes = np.array([640, 0, 320], np.int32)
    x, w, g = normal(1024, 4), normal(3, 2, 4), normal(1024, 2)
    y, dx, dw = run_grouped(jnp.asarray(x, jnp.bfloat16), w, sizes, jnp.asarray(g, jnp.bfloat16), 64, implementation)
    want_y, want_dx, want_dw = by_hand(bf16(x), bf16(w), sizes, bf16(g))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert_close(y, want_y, tolerance=2**-8)
    assert_gradient_close(dx, want_dx, tolerance=2**-8)
    assert_gradient_close(dw, want_dw)


@pytest.mark.parametrize(
    ("rows", "groups"), [(1, 1), (1, 64), (8, 64), (200, 8), (5000, 64), (32768, 64), (32768, 256)]
)
def test_the_padded_rows_hold_the_worst_layout_in_whole_blocks(rows, groups):
    block = block_rows(rows, groups)
    capacity = padded_rows(rows, groups, block)
    filled = min(rows, groups)  # worst: as many groups as can be, each one row over a multiple of the block
    sizes = np.ones(filled, int)
    sizes[0] += (rows - filled) // block * block
    worst = (-(-sizes // block) * block).sum()
    assert capacity % block == 0 and worst <= capacity < 1.01 * (rows + filled * block)


# target_logprobs


@jit
def chunked(x, w, targets, g):
    logprobs, vjp = jax.vjp(lambda x, w: target_logprobs(x, w, lambda rows: rows, targets), x, w)
    return logprobs, *vjp(g)


@jit
def from_full_logits(x, w, targets, g):
    def logprobs(x, w):
        logits = jnp.matmul(x, w.T, precision="highest")
        picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], 1)[:, 0]
        return jnp.where(targets >= 0, picked, 0) - jax.nn.logsumexp(logits, axis=1)

    value, vjp = jax.vjp(logprobs, x, w)
    return value, *vjp(g)


VOCABULARIES = {"one chunk": 50, "whole chunks": 8192, "a tail of one": 9001, "unequal": 4099}


@pytest.mark.parametrize("vocab", VOCABULARIES.values(), ids=VOCABULARIES)
def test_chunked_log_probabilities_and_gradients_equal_those_of_full_logits(vocab):
    """The last id, the first, ids on both sides of a chunk's edge, and none at all."""
    x, w, g = normal(9, 6), normal(vocab, 6), normal(9)
    targets = np.array([0, vocab - 1, vocab // 2, vocab // 2 - 1, vocab // 3, vocab // 3 - 1, -100, 7, -1], np.int32)
    logprobs, dx, dw = chunked(x, w, targets, g)
    want, want_dx, want_dw = from_full_logits(x, w, targets, g)
    assert logprobs.dtype == jnp.float32
    assert_close(logprobs, want)
    assert_gradient_close(dx, want_dx)
    assert_gradient_close(dw, want_dw)


@pytest.mark.parametrize("vocab", VOCABULARIES.values(), ids=VOCABULARIES)
def test_chunked_entropies_and_their_gradients_equal_those_of_full_logits(vocab):
    """Beside the log-probabilities, whose values and gradients are the same with them; one token is as good as sure."""
    x, w, g = normal(9, 6), normal(vocab, 6), normal(2, 9)
    x[8] = 12 * w[3] / (w[3] @ w[3]) + x[8] * 1e-3
    targets = np.array([0, vocab - 1, vocab // 2, vocab // 2 - 1, vocab // 3, vocab // 3 - 1, -100, 7, 3], np.int32)

    @jit
    def both(x, w):
        found, vjp = jax.vjp(lambda x, w: target_logprobs_and_entropy(x, w, lambda rows: rows, targets), x, w)
        return *found, *vjp((g[0], g[1]))

    @jit
    def wanted(x, w):
        def entropy(x, w):
            logprobs = jax.nn.log_softmax(jnp.matmul(x, w.T, precision="highest"))
            return -(jnp.exp(logprobs) * logprobs).sum(1)

        value, vjp = jax.vjp(entropy, x, w)
        return value, *vjp(g[1])

    logprobs, entropy, dx, dw = both(x, w)
    want_logprobs, *want_of_logprobs = chunked(x, w, targets, g[0])
    want, *want_of_entropy = wanted(x, w)
    assert want[:8].min() > 1
    assert_close(logprobs, want_logprobs)
    assert_close(entropy, want)
    for got, one, other in zip((dx, dw), want_of_logprobs, want_of_entropy, strict=True):
        assert_gradient_close(got, one + other)


def test_tokens_whose_log_probability_nobody_uses_give_no_gradient():
    x, w, targets = normal(4, 6), normal(5000, 6), np.array([3, -100, 4999, -100], np.int32)
    _, dx, dw = chunked(x, w, targets, np.array([1, 0, 1, 0], np.float32))
    _, _, want_dw = chunked(x[::2], w, targets[::2], np.ones(2, np.float32))
    assert not np.asarray(dx)[1::2].any() and np.asarray(dx)[::2].all()
    assert_gradient_close(dw, want_dw)


def test_large_logits_do_not_overflow():
    x, w, g, targets = 100 * normal(9, 6), normal(5000, 6), normal(9), np.arange(9, dtype=np.int32)
    logprobs, dx, dw = chunked(x, w, targets, g)
    want, _, _ = from_full_logits(x, w, targets, g)
    assert np.abs(want).max() > 500
    assert_close(logprobs, want)
    assert np.isfinite(dx).all() and np.isfinite(dw).all()


def test_bfloat16_hidden_states_give_float32_log_probabilities():
    x, w, g, targets = normal(9, 6), normal(5000, 6), normal(9), np.arange(9, dtype=np.int32) * 600
    logprobs, dx, dw = chunked(jnp.asarray(x, jnp.bfloat16), w, targets, g)
    want, want_dx, want_dw = from_full_logits(bf16(x), bf16(w), targets, g)
    assert (logprobs.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert_close(logprobs, want)  # logits are never rounded to bfloat16
    assert_gradient_close(dx, want_dx, tolerance=2**-6)
    assert_gradient_close(dw, want_dw, tolerance=2**-6)


# attention


def plain_attention(q, k, v, *, q_slots, kv_slots, q_segments, kv_segments, scale):
    """All scores at once, keys and values repeated for every query head."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(a, repeats, axis=2) for a in (k, v))
    seen = (kv_slots[:, None] <= q_slots[:, :, None]) & (kv_segments[:, None] == q_segments[:, :, None])
    scores = jnp.einsum("bthc,bshc->bhts", q, k, precision="highest") * scale
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshc->bthc", weights, v, precision="highest")


def attention_inputs(f, queries: int, keys: int, heads: int = 4, groups: int = 2, seed: int = 0):
    """(q, k, v), places: documents of random lengths, padding at a row's end and inside another, and the queries
    being the last of the keys' slots; for a cache one document, and in the second row fewer slots in use."""
    rng = np.random.default_rng(seed)
    q, k, v = normal(2, queries, heads, 6), normal(2, keys, groups, 6), normal(2, keys, groups, 6, seed=1)
    segments = np.cumsum(rng.random((2, keys)) < 0.1, axis=1, dtype=np.int32) + 1
    segments[0, -keys // 5 :] = 0
    segments[1, keys // 3 : keys // 2] = 0
    slots = np.broadcast_to(np.arange(keys, dtype=np.int32), (2, keys))
    first = keys - queries
    if f is cached_attention:
        ones = np.ones_like(segments)
        return (q, k, v), (slots[:, first:] - [[0], [first // 2]], slots, ones[:, first:], ones)
    return (q, k, v), (slots[:, first:], slots, segments[:, first:], segments)


NAMES = ("q_slots", "kv_slots", "q_segments", "kv_segments")


@partial(jit, static_argnums=0)
def run_attention(f, qkv, places, g):
    """Output and gradients of `plain_attention`, with the slots alone of `cached_attention`, or with the segments alone
    of `attention`."""
    if f is plain_attention:
        g32, qkv = g.astype(jnp.float32), [a.astype(jnp.float32) for a in qkv]
        out, vjp = jax.vjp(lambda *qkv: f(*qkv, **dict(zip(NAMES, places, strict=True)), scale=0.4), *qkv)
        return out, *vjp(g32)
    more = (places[0], 0.4, "xla") if f is cached_attention else (places[2], 0.4)
    out, vjp = jax.vjp(lambda *qkv: f(*qkv, *more), *qkv)
    return out, *vjp(g)


def assert_attends_as_plainly(f, qkv, places, g):
    (out, *grads), (want, *want_grads) = (
        run_attention(f, qkv, places, g),
        run_attention(plain_attention, qkv, places, g),
    )
    assert_close(out, want)
    for got, expected in zip(grads, want_grads, strict=True):
        assert_gradient_close(got, expected)


@pytest.mark.parametrize("f", [attention, cached_attention])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
def test_attention_and_its_gradients_equal_the_plain_formula(heads, groups, f):
    qkv, places = attention_inputs(f, 23, 23, heads, groups)
    assert_attends_as_plainly(f, qkv, places, normal(2, 23, heads, 6))


@pytest.mark.parametrize(("queries", "f"), [(300, cached_attention), (300, attention), (1100, attention)])
def test_attention_in_chunks_of_queries_equals_one_piece(queries, f):
    """A chunk's weights are computed anew in the backward pass; keys after its end are left out."""
    qkv, places = attention_inputs(f, queries, queries, 2, 1)
    assert_attends_as_plainly(f, qkv, places, normal(2, queries, 2, 6))


@pytest.mark.parametrize("queries", [1, 5])
def test_attention_of_the_last_tokens_over_a_longer_cache_equals_the_plain_formula(queries):
    qkv, places = attention_inputs(cached_attention, queries, 37)
    assert_attends_as_plainly(cached_attention, qkv, places, normal(2, queries, 4, 6))


@pytest.mark.parametrize("f", [attention, cached_attention])
def test_bfloat16_attention_scores_are_float32(f):
    """Close to float32 attention over the same rounded inputs, though the scores reach hundreds."""
    (q, k, v), places = attention_inputs(f, 64, 64)
    q, k = 10 * q, 10 * k
    rounded = [jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)]
    g = jnp.asarray(normal(2, 64, 4, 6), jnp.bfloat16)
    out = run_attention(f, rounded, places, g)[0]
    want = run_attention(plain_attention, rounded, places, g)[0]
    assert out.dtype == jnp.bfloat16
    assert_close(out, want, tolerance=2**-7)


# attend: blocks of keys by either implementation

ATTENDS = ("xla", "splash", "triton")  # on CPU the TPU's and the GPU's kernels are interpreted


def piece_inputs(queries: int, keys: int, causal: bool, dtype=np.float32):
    """Documents that start inside blocks, padding, and (where not causal) documents that only one side has."""
    rng = np.random.default_rng(1)
    shapes = (2, queries, 4, 32), (2, keys, 2, 32), (2, keys, 2, 32), (2, queries, 4, 32)
    q, k, v, g = (jnp.asarray(normal(*shape, seed=i), dtype) for i, shape in enumerate(shapes))
    kv_segments = np.cumsum(rng.random((2, keys)) < 0.01, axis=1, dtype=np.int32) + 1
    kv_segments[0, -keys // 5 :] = 0
    if causal:
        return (q, k, v, kv_segments, kv_segments), g
    q_segments = np.cumsum(rng.random((2, queries)) < 0.01, axis=1, dtype=np.int32) + 2
    q_segments[1, -queries // 3 :] = 99  # sees no key
    return (q, k, v, q_segments, kv_segments), g


@partial(jit, static_argnums=(2, 3))
def run_attend(args, g, causal, implementation):
    """The pieces' answer; their part of the gradients of a softmax over them and a key of score 1 and value 0."""
    options = dict(scale=0.2, causal=causal, implementation=implementation)
    out, lse = attend(*args, **options)
    whole_lse = jnp.logaddexp(lse, 1.0)
    whole_out = (out * jnp.exp(lse - whole_lse)[..., None]).astype(args[0].dtype)
    return out, lse, whole_out, *attend_bwd(*args, whole_out, whole_lse, g, **options)


@jit
def run_plainly(args, g, seen_BTS):
    def whole(q, k, v):
        k, v = (jnp.repeat(a, 2, axis=2) for a in (k, v))
        scores = jnp.einsum("bthc,bshc->bths", q, k, precision="highest") * 0.2
        scores = jnp.where(seen_BTS[:, :, None], scores, -jnp.inf)
        weights = jnp.exp(scores - jnp.logaddexp(jax.nn.logsumexp(scores, -1, keepdims=True), 1.0))
        return jnp.einsum("bths,bshc->bthc", weights, v, precision="highest")

    out, vjp = jax.vjp(whole, *(a.astype(jnp.float32) for a in args[:3]))
    return out, *vjp(g.astype(jnp.float32))


PIECES = {"whole blocks": (256, 256, True), "a causal tail": (200, 200, True), "more keys": (128, 384, False),
          "tails": (150, 70, False), "more queries": (300, 128, False)}  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("implementation", ATTENDS)
def test_a_piece_of_attention_and_its_gradients_under_the_whole_softmax_equal_the_plain_formula(implementation, piece):
    queries, keys, causal = PIECES[piece]
    args, g = piece_inputs(queries, keys, causal)
    seen_BTS = args[3][:, :, None] == args[4][:, None]
    if causal:
        seen_BTS &= np.tri(queries, dtype=bool)
    out, lse, *results = run_attend(args, g, causal, implementation)
    (want, *want_results), (got, *got_results) = run_plainly(args, g, seen_BTS), results
    assert_close(got, want)
    for a, b in zip(got_results, want_results, strict=True):
        assert_gradient_close(a, b)
    lonely = ~seen_BTS.any(-1)
    assert lonely.any() != causal
    assert not np.asarray(out)[lonely].any() and (np.asarray(lse)[lonely] == np.float32(MASKED)).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("implementation", ATTENDS)
def test_in_bfloat16_a_piece_of_attention_is_as_close_as_its_rounding(implementation, causal):
    args, g = piece_inputs(256, 256, causal, jnp.bfloat16)
    exact = [a.astype(jnp.float32) for a in args[:3]]
    results = run_attend(args, g, causal, implementation)
    want = run_attend((*exact, *args[3:]), g.astype(jnp.float32), causal, "xla")
    assert all(np.isfinite(a.astype(jnp.float32)).all() for a in results)
    assert {a.dtype for a in (*results[:2], *results[3:])} == {jnp.dtype(jnp.float32)}
    for a, b in zip(results[2:], want[2:], strict=True):
        assert_gradient_close(a.astype(jnp.float32), b, tolerance=2**-6)


@pytest.mark.parametrize("implementation", ATTENDS)
def test_gradients_of_queries_that_see_no_key_are_zero(implementation):
    (q, k, v, _, kv_segments), g = piece_inputs(128, 128, False)
    lonely = np.full_like(kv_segments, 99)
    options = dict(scale=0.2, causal=False, implementation=implementation)
    run = jit(
        lambda q, k, v, g: attend_bwd(
            q, k, v, lonely, kv_segments, *attend(q, k, v, lonely, kv_segments, **options), g, **options
        )
    )
    assert not any(np.asarray(d).any() for d in run(q, k, v, g))
