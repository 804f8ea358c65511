"""Attention in C++ equals formulas in float64 and XLA's form, keeps documents apart, and gives the same bits however
many threads work on it.

Legend: B rows, T queries, S keys, H query heads, G kv heads, C head_dim.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ling_jax.config import MeshConfig
from ling_jax.files.cache import cache_folder
from ling_jax.kernels import native
from ling_jax.kernels.attention import MASKED, attend, attend_bwd, attention
from ling_jax.parallel.mesh import make_mesh, manual
from tests.support.helpers import QUICK, assert_close, assert_gradient_close
from tests.support.native import finish, start

EXTRA = 1.0  # the score of one more key, of value 0, in the whole softmax of which these keys are a part


@pytest.fixture
def library():
    if not any(map(native.shutil.which, native.COMPILERS)):
        pytest.skip("this machine has no C++ compiler")
    assert native.available()


class Shape(NamedTuple):
    rows: int
    queries: int
    keys: int
    groups: int
    heads_per_group: int
    width: int


class Results(NamedTuple):
    """The pieces' answer, the whole softmax's that it is a part of, and its gradients."""

    out: jax.Array
    lse: jax.Array
    whole_out: jax.Array
    whole_lse: jax.Array
    dq: jax.Array
    dk: jax.Array
    dv: jax.Array


def attend_both_ways(args, g, scale: float, causal: bool, implementation: str) -> Results:
    options = dict(scale=scale, causal=causal, implementation=implementation)
    out, lse = attend(*args, **options)
    whole_lse = jnp.logaddexp(lse, EXTRA)
    whole_out = (out * jnp.exp(lse - whole_lse)[..., None]).astype(args[0].dtype)
    dq, dk, dv = partial(attend_bwd, *args)(whole_out, whole_lse, g, **options)
    return Results(out, lse, whole_out, whole_lse, dq, dk, dv)


run = jax.jit(attend_both_ways, static_argnums=(2, 3, 4), compiler_options=QUICK)


def by_hand(args, g, got: Results, scale: float, causal: bool) -> dict[str, np.ndarray]:
    """out, lse, dq, dk and dv in float64, the gradients from the whole answer as it was rounded."""
    rows, keys, groups, width = args[1].shape
    repeats = args[0].shape[2] // groups

    def heads_first(a) -> np.ndarray:
        return np.asarray(a, np.float64).swapaxes(1, 2)

    q, g, whole_out = (heads_first(a) for a in (args[0], g, got.whole_out))
    k, v = (np.repeat(heads_first(a), repeats, axis=1) for a in args[1:3])
    seen = args[3][:, :, None] == args[4][:, None]
    if causal:
        seen &= np.tri(seen.shape[1], dtype=bool)
    scores = np.where(seen[:, None], q @ k.swapaxes(2, 3) * scale, -np.inf)
    lse = np.logaddexp.reduce(scores, axis=-1, initial=-np.inf)
    out = np.exp(scores - np.where(np.isinf(lse), 0, lse)[..., None]) @ v
    weights = np.exp(scores - heads_first(got.whole_lse)[..., None])
    dscores = weights * (g @ v.swapaxes(2, 3) - (g * whole_out).sum(-1, keepdims=True)) * scale
    dk, dv = (
        (a.swapaxes(2, 3) @ b).reshape(rows, groups, repeats, keys, width).sum(2)
        for a, b in ((dscores, q), (weights, g))
    )
    lse = np.where(np.isinf(lse), np.float32(MASKED), lse)
    results = dict(out=out, lse=lse, dq=dscores @ k, dk=dk, dv=dv)
    return {name: a.swapaxes(1, 2) for name, a in results.items()}


def arrays(shape: Shape, dtype="float32", spread: float = 1, seed: int = 0):
    """q, k, v and g; with a `spread` of 30 most weights are 0 or 1."""
    rng = np.random.default_rng([seed, *shape])
    q, g = rng.normal(size=(2, shape.rows, shape.queries, shape.groups * shape.heads_per_group, shape.width))
    k, v = rng.normal(size=(2, shape.rows, shape.keys, shape.groups, shape.width))
    return tuple(jnp.asarray(a, dtype) for a in (spread * q, k, v, g))


def documents(rng: np.random.Generator, rows: int, tokens: int, mean: float) -> np.ndarray:
    """int32 [B, T]: documents of random lengths; padding, 0, at the end and now and then between."""
    starts = rng.random((rows, tokens)) < 1 / mean
    number = np.cumsum(starts, axis=1) + 1
    padding = (rng.random((rows, number.max() + 1)) < 0.1)[np.arange(rows)[:, None], number]
    padding |= np.arange(tokens) >= rng.integers(tokens // 2, tokens + 1, (rows, 1))
    return np.where(padding, 0, number).astype(np.int32)


def check(shape: Shape, dtype: str, causal: bool, mean: float, spread: float = 1, seed: int = 0) -> Results:
    """Sums are float32 whatever the arrays' dtype. A score is off by its own rounding, and its weight as much."""
    q, k, v, g = arrays(shape, dtype, spread, seed)
    rng = np.random.default_rng(seed)
    kv_segments = documents(rng, shape.rows, shape.keys, mean)
    q_segments = kv_segments if causal else documents(rng, shape.rows, shape.queries, mean)
    args, scale = (q, k, v, q_segments, kv_segments), shape.width**-0.5
    got = run(args, g, scale, causal, "native")
    want = by_hand(args, g, got, scale, causal)
    lonely = want["lse"] < MASKED / 2
    assert (np.asarray(got.lse)[lonely] == np.float32(MASKED)).all()
    assert not np.asarray(got.out)[lonely].any() and not np.asarray(got.dq)[lonely].any()
    assert_close(got.out, want["out"], 2e-5 * max(1, spread / 4))
    assert_close(np.where(lonely, 0, got.lse), np.where(lonely, 0, want["lse"]), 1e-6)
    for name in ("dq", "dk", "dv"):
        # Of a few numbers the largest may be a difference of products that are much larger.
        largest = max(np.abs(want[name]).max(initial=0), 0.1)
        assert_close(getattr(got, name) / largest, want[name] / largest, 1e-5 * max(1, spread / 2))
    return got


def check_few() -> None:
    """Cases that differ with vectors' width."""
    for causal in (True, False):
        check(Shape(2, 150, 150, 2, 2, 40), "bfloat16", causal, 40)
        check(Shape(1, 70, 70, 1, 3, 12), "float32", causal, 40)


LENGTHS = st.one_of(st.sampled_from((1, 2, 17, 64, 65, 128, 129, 200)), st.integers(1, 200))


@st.composite
def shapes(draw) -> tuple[Shape, bool]:
    causal, queries = draw(st.booleans()), draw(LENGTHS)
    keys = queries if causal else draw(LENGTHS)
    groups, heads_per_group = draw(st.sampled_from(((1, 1), (2, 1), (1, 2), (2, 4), (3, 3))))
    width = draw(st.sampled_from((8, 12, 32, 40, 128)))
    return Shape(draw(st.integers(1, 3)), queries, keys, groups, heads_per_group, width), causal


@settings(max_examples=20, deadline=None)
@given(shapes(), st.sampled_from(("float32", "bfloat16")), st.sampled_from((1, 3, 30, 1e9)), st.integers(0, 99))
def check_random_shapes(shape, dtype, mean, seed) -> None:
    check(shape[0], dtype, shape[1], mean, seed=seed)


def test_random_shapes_and_documents_give_sums_in_float64(library):
    check_random_shapes()


@pytest.mark.parametrize("causal", [True, False])
def test_scores_of_hundreds_give_the_softmax_of_the_float32_scores(causal, library):
    got = check(Shape(2, 150, 150, 2, 2, 32), "float32", causal, 60, spread=30)
    assert np.abs(got.lse[got.lse > MASKED / 2]).max() > 60


BLOCKS = (Shape(2, 512, 512, 2, 4, 32), Shape(1, 700, 700, 1, 1, 40), Shape(1, 40, 40, 1, 300, 8))


@pytest.mark.parametrize("shape", BLOCKS, ids=["whole blocks", "tails", "more heads than a block has queries"])
@pytest.mark.parametrize("causal", [True, False])
def test_many_blocks_give_sums_in_float64(shape, causal, library):
    check(shape, "float32", causal, 250)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("causal", [True, False])
def test_random_numbers_give_what_xla_gives(dtype, causal, library):
    q, k, v, g = arrays(Shape(2, 300, 300, 2, 2, 32), dtype)
    segments = documents(np.random.default_rng(0), 2, 300, 60)
    got, want = (run((q, k, v, segments, segments), g, 0.2, causal, name) for name in ("native", "xla"))
    assert [a.dtype for a in got] == [a.dtype for a in want]
    exact = dtype == "float32"
    assert_close(got.out, want.out, 2e-5 if exact else 2**-8)  # XLA rounds weights to bfloat16
    assert_close(got.lse, want.lse, 1e-6)
    for a, b in zip(got[4:], want[4:], strict=True):
        assert_gradient_close(a, b, 1e-5 if exact else 2**-6)


def test_gradients_of_queries_that_see_no_key_are_zero(library):
    q, k, v, g = arrays(Shape(2, 70, 150, 2, 2, 32))
    kv_segments = documents(np.random.default_rng(0), 2, 150, 9)
    got = run((q, k, v, np.full((2, 70), 99, np.int32), kv_segments), g, 1, False, "native")
    assert not np.asarray(got.out).any() and (np.asarray(got.lse) == np.float32(MASKED)).all()
    assert not any(np.asarray(d).any() for d in (got.dq, got.dk, got.dv))


@pytest.mark.parametrize("causal", [True, False])
def test_nan_in_one_document_changes_no_bit_of_another(causal, library):
    q, k, v, g = arrays(Shape(2, 250, 250, 2, 2, 32))
    segments = documents(np.random.default_rng(3), 2, 250, 20)
    bad = segments == 3
    assert 0 < bad.sum() < 200
    spoilt = [jnp.where(bad[..., None, None], jnp.nan, a) for a in (q, k, v, g)]
    clean = run((q, k, v, segments, segments), g, 0.2, causal, "native")
    got = run((*spoilt[:3], segments, segments), spoilt[3], 0.2, causal, "native")
    for a, b in zip(got, clean, strict=True):
        assert np.isnan(np.asarray(a, np.float32)[bad]).all()
        np.testing.assert_array_equal(np.asarray(a)[~bad], np.asarray(b)[~bad])


def results_of_threads() -> list[np.ndarray]:
    """Results for too few groups for eight threads, which then take blocks of queries and keys apart; and for
    enough."""
    results = []
    for shape in (Shape(1, 600, 600, 1, 4, 40), Shape(4, 200, 130, 2, 2, 32)):
        q, k, v, g = arrays(shape)
        rng = np.random.default_rng(0)
        segments = [documents(rng, shape.rows, tokens, 200) for tokens in (shape.queries, shape.keys)]
        results += run((q, k, v, *segments), g, 0.2, False, "native")
    return [np.asarray(a) for a in results]


def test_one_thread_and_eight_give_the_same_bits(tmp_path, library):
    """XLA's pool has as many as there are devices here, and NPROC in a process with one device."""
    code = "import numpy as np\nfrom tests.kernels.test_native_attention import results_of_threads\n"
    code += f"np.savez({str(tmp_path / 'alone.npz')!r}, *results_of_threads())"
    finish(start(code, cache_folder().parent, NPROC="1"))
    with np.load(tmp_path / "alone.npz") as alone:
        for a, b in zip(alone.values(), results_of_threads(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_eight_devices_at_once_in_a_loop_of_checkpoints(library):
    """Each has the gradients that it would have alone."""
    q, k, v, _ = arrays(Shape(8, 130, 130, 2, 2, 32))
    segments = documents(np.random.default_rng(0), 8, 130, 40)

    def loss(q, k, v, segments, implementation):
        def layer(x, _):
            return jnp.tanh(attention(x, k, v, segments, 0.2, implementation)), None

        return (jax.lax.scan(jax.checkpoint(layer), q, length=3)[0] ** 2).sum()

    def gradients(implementation, *args):
        return jax.grad(partial(loss, implementation=implementation), argnums=(0, 1, 2))(*args)

    spec, mesh = jax.P("data"), make_mesh(MeshConfig(data=8), jax.devices())
    together = manual(partial(gradients, "native"), mesh, (spec,) * 4, (spec,) * 3)
    want = jax.jit(partial(gradients, "xla"), compiler_options=QUICK)(q, k, v, segments)
    for a, b in zip(jax.jit(together, compiler_options=QUICK)(q, k, v, segments), want, strict=True):
        assert_gradient_close(a, b)


def lowered(platform: str, dtype="float32") -> str:
    q, k, v, g = arrays(Shape(1, 128, 128, 1, 1, 128), dtype)
    segments = np.ones((1, 128), np.int32)
    # A function of its own: what `run` was traced to is kept.
    f = jax.jit(lambda *args: attend_both_ways((*args[:3], segments, segments), args[3], 1.0, True, "auto"))
    return f.trace(q, k, v, g).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_what_is_lowered_for_other_platforms_builds_nothing(platform, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: pytest.fail("asked for the library"))
    assert "ling_attention" not in lowered(platform)


def test_on_cpu_native_attention_is_chosen_unless_the_environment_says_no(monkeypatch, library):
    assert "ling_attention" in lowered("cpu") and "ling_attention_gradient" in lowered("cpu")
    monkeypatch.setenv("LING_JAX_NATIVE", "0")
    assert "ling_attention" not in lowered("cpu")


def test_without_the_library_and_for_other_dtypes_attention_is_xlas(monkeypatch):
    assert "ling_attention" not in lowered("cpu", "float16")
    monkeypatch.setattr(native, "available", lambda: False)
    q, k, v, g = arrays(Shape(2, 20, 20, 2, 2, 8))
    args = (q, k, v, *(documents(np.random.default_rng(0), 2, 20, 9),) * 2)
    for a, b in zip(*(run(args, g, 0.5, True, name) for name in ("native", "xla")), strict=True):
        np.testing.assert_array_equal(a, b)
