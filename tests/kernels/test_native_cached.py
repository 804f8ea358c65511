"""Attention over a cache in C++ equals sums in float64 and XLA's form, and reads no slot after a row's last one.

Legend: L layers, B rows, T queries, S slots, H query heads, G kv heads, C head_dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ling_jax.kernels import native
from ling_jax.kernels.attention import cached_attention
from tests.support.helpers import QUICK, assert_close

LAYERS, LAYER = 3, 1
PIECE = 512  # slots of a part, see native_cached.h


@pytest.fixture
def library():
    if not any(map(native.shutil.which, native.COMPILERS)):
        pytest.skip("this machine has no C++ compiler")
    assert native.available()


class Shape(NamedTuple):
    queries: int
    slots: int
    groups: int
    heads_per_group: int
    width: int


def attend(q, k, v, slots, layer, implementation: str) -> jax.Array:
    return cached_attention(q, k, v, slots, q.shape[-1] ** -0.5, implementation, layer=layer)


run = jax.jit(attend, static_argnums=(5,), compiler_options=QUICK)


def arrays(shape: Shape, rows: int, dtype="float32", spread: float = 1, seed: int = 0):
    """q [B, T, H, C], k and v [L, B, S, G, C]; with a `spread` of 30 most weights are 0 or 1."""
    rng = np.random.default_rng([seed, *shape])
    q = spread * rng.normal(size=(rows, shape.queries, shape.groups * shape.heads_per_group, shape.width))
    k, v = rng.normal(size=(2, LAYERS, rows, shape.slots, shape.groups, shape.width))
    return tuple(jnp.asarray(a, dtype) for a in (q, k, v))


def slots_of(shape: Shape, held: list[int], valid: list[int]) -> np.ndarray:
    """int32 [B, T], as a model numbers new tokens of rows that held so many: padding shares the last token's slot, and
    slot 0 where a row has none at all."""
    numbers = np.minimum(np.arange(shape.queries) + 1, np.array(valid)[:, None])
    return np.maximum(np.array(held)[:, None] + numbers - 1, 0).astype(np.int32)


def by_hand(q, k, v, slots) -> np.ndarray:
    q, k, v = np.asarray(q, np.float64), *(np.asarray(a[LAYER], np.float64) for a in (k, v))
    k, v = (np.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
    scores = np.einsum("bthc,bshc->bths", q, k) * q.shape[-1] ** -0.5
    scores = np.where((np.arange(k.shape[1]) <= slots[..., None])[:, :, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bths,bshc->bthc", weights / weights.sum(-1, keepdims=True), v)


def check(shape: Shape, held: list[int], valid: list[int], dtype="float32", spread: float = 1, seed: int = 0) -> None:
    """Sums are float32 whatever the arrays' dtype, and slots that no query sees are NaN, as other layers are."""
    q, k, v = arrays(shape, len(held), dtype, spread, seed)
    slots = slots_of(shape, held, valid)
    unused = (np.arange(shape.slots) > slots.max(1)[:, None]) | (np.arange(LAYERS) != LAYER)[:, None, None]
    hostile = [jnp.where(unused[..., None, None], jnp.nan, a) for a in (k, v)]
    got = run(q, hostile[0], hostile[1], slots, np.int32(LAYER), "native")
    want = by_hand(q, k, v, slots)
    assert got.dtype == dtype
    assert_close(np.asarray(got, np.float32), want, 2**-8 if dtype == "bfloat16" else 2e-5 * max(1, spread / 4))


FEW = Shape(1, 2 * PIECE + 30, 2, 4, 32)


def check_few() -> None:
    """Cases that differ with vectors' width."""
    check(FEW, [0, 700, 2 * PIECE + 20], [1, 1, 1])
    check(Shape(5, 700, 3, 2, 12), [600, 0], [5, 2], "bfloat16")
    check(Shape(17, 130, 1, 3, 40), [100, 3], [17, 9])


@st.composite
def cases(draw):
    queries, slots = draw(st.integers(1, 17)), draw(st.sampled_from((1, 63, 64, 65, 511, 512, 513, 1024, 1025, 1500)))
    groups, heads_per_group = draw(st.sampled_from(((1, 1), (1, 8), (2, 1), (4, 1), (2, 4), (3, 3))))
    width = draw(st.sampled_from((1, 8, 12, 32, 40, 72, 128)))
    shape = Shape(min(queries, slots), slots, groups, heads_per_group, width)
    rows = draw(st.integers(1, 3))
    valid = draw(st.lists(st.integers(0, shape.queries), min_size=rows, max_size=rows))
    return shape, [draw(st.integers(0, slots - count)) for count in valid], valid


@settings(max_examples=25, deadline=None)
@given(cases(), st.sampled_from(("float32", "bfloat16")), st.integers(0, 99))
def check_random_shapes(case, dtype, seed) -> None:
    check(*case, dtype, seed=seed)


def test_random_shapes_and_rows_give_sums_in_float64(library):
    check_random_shapes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("last", [PIECE - 2, PIECE - 1, PIECE, 2 * PIECE - 1, 2 * PIECE, 2 * PIECE + 1])
def test_rows_that_end_around_a_pieces_end_give_sums_in_float64(last, dtype, library):
    check(FEW, [last, 0, 1], [1, 1, 1], dtype)
    check(FEW._replace(queries=4), [last - 3, 0, last], [4, 0, 2], dtype)


PROMPTS = (Shape(300, 700, 2, 4, 32), Shape(64, 2100, 1, 1, 40), Shape(20, 90, 1, 300, 8))


@pytest.mark.parametrize("shape", PROMPTS, ids=["blocks of queries", "longer pieces", "more heads than a block has"])
def test_pieces_of_prompts_give_sums_in_float64(shape, library):
    check(shape, [0, shape.slots - shape.queries], [shape.queries, shape.queries - 7])


def test_scores_of_hundreds_give_the_softmax_of_the_float32_scores(library):
    check(FEW, [900, 2 * PIECE], [1, 1], spread=30)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_numbers_give_what_xla_gives(dtype, library):
    shape = FEW._replace(queries=3)
    q, k, v = arrays(shape, 3, dtype)
    slots = slots_of(shape, [0, 5, 1000], [0, 2, 3])
    slots[2, 2] = shape.slots + 7  # a slot beyond the cache counts as its last
    got, want = (run(q, k, v, slots, np.int32(LAYER), name) for name in ("native", "xla"))
    alone = jax.jit(cached_attention, static_argnums=4)(q, k[LAYER], v[LAYER], slots, shape.width**-0.5)
    assert got.dtype == want.dtype == dtype
    assert_close(got.astype("float32"), want.astype("float32"), 2e-6 if dtype == "float32" else 2**-8)
    np.testing.assert_array_equal(got, alone)


def test_a_rows_answer_depends_on_no_other_row(library):
    q, k, v = arrays(FEW, 3)
    slots, layer = slots_of(FEW, [1000, 3, 700], [1, 1, 1]), np.int32(LAYER)
    clean = np.asarray(run(q, k, v, slots, layer, "native"))
    bad = q.at[1].set(jnp.nan), k.at[:, 1].set(jnp.nan), v.at[:, 1].set(jnp.nan)
    spoilt = run(*bad, slots, layer, "native")
    assert np.isnan(np.asarray(spoilt)[1]).all()
    np.testing.assert_array_equal(np.asarray(spoilt)[[0, 2]], clean[[0, 2]])
    alone = run(q[:1], k[:, :1], v[:, :1], slots[:1], layer, "native")
    np.testing.assert_array_equal(alone[0], clean[0])


def lowered(platform: str, dtype="float32") -> str:
    q, k, v = arrays(Shape(1, 64, 1, 1, 128), 1, dtype)
    # A function of its own: what `run` was traced to is kept.
    f = jax.jit(lambda *args: cached_attention(*args, 1.0, layer=jnp.int32(LAYER)))
    return f.trace(q, k, v, np.array([[3]], np.int32)).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_what_is_lowered_for_other_platforms_builds_nothing(platform, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: pytest.fail("asked for the library"))
    assert "ling_cached_attention" not in lowered(platform)


def test_on_cpu_the_native_form_is_chosen_unless_the_environment_says_no(monkeypatch, library):
    assert "ling_cached_attention" in lowered("cpu")
    monkeypatch.setenv("LING_JAX_NATIVE", "0")
    assert "ling_cached_attention" not in lowered("cpu")


def test_without_the_library_and_for_other_dtypes_it_is_xlas(monkeypatch):
    assert "ling_cached_attention" not in lowered("cpu", "float16")
    monkeypatch.setattr(native, "available", lambda: False)
    shape = Shape(2, 20, 2, 2, 8)
    args = (*arrays(shape, 1), slots_of(shape, [11], [2]), np.int32(LAYER))
    anew = jax.jit(lambda *args: [attend(*args, implementation=name) for name in ("native", "xla")])
    np.testing.assert_array_equal(*anew(*args))
