"""Lightning attention in chunks, of XLA's operations and in C++, equals the recurrence, token by token in float64.

Legend: B rows, T tokens, H heads, C and D head_dim.
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
from ling_jax.kernels import lightning as room
from ling_jax.kernels import native
from ling_jax.kernels.lightning import lightning, slopes_of
from ling_jax.parallel.mesh import make_mesh, manual
from tests.support.helpers import assert_close, assert_gradient_close, jit

SLOPES = np.array([0.84, 0.3, 0.004])
SCALE = 0.35


@pytest.fixture
def library():
    if not any(map(native.shutil.which, native.COMPILERS)):
        pytest.skip("this machine has no C++ compiler")
    assert native.available()


def inputs(length: int, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """(q, k, v, state), segments, cotangents: documents that end anywhere, padding at both ends and in the middle of
    one, and a row that is nothing else."""
    rng = np.random.default_rng([seed, length])
    q, k, v, g = (rng.normal(size=(4, length, 3, 8)).astype(np.float32) for _ in range(4))
    state, dstate = (rng.normal(size=(4, 3, 8, 8)).astype(np.float32) for _ in range(2))
    segments = np.ones((4, length), np.int32)
    segments[0, length // 3 :] = 2
    segments[0, length - length // 5 :] = 0
    segments[1, : length // 4] = 0
    segments[1, length // 2 : length // 2 + 3] = 0
    segments[3] = 0
    return [q, k, v, state], segments, (g, dstate)


def by_token(q, k, v, state, segments, slopes, scale):
    """(out, state after), by a loop over tokens."""
    decay = jnp.exp(-slopes)[:, None, None]

    def step(carry, token):
        state, at = carry
        q, k, v, segment = token
        fresh = (at >= 0) & (segment != at)
        new = state * jnp.where(fresh, 0, decay) + k[:, :, None] * v[:, None, :]
        state = jnp.where(segment > 0, new, state)
        at = jnp.where(segment > 0, segment, at)
        return (state, at), jnp.where(segment > 0, scale * jnp.einsum("hc,hcd->hd", q, state), 0)

    def row(q, k, v, state, segments):
        (state, _), out = jax.lax.scan(step, (state, jnp.int32(-1)), (q, k, v, segments))
        return out, state

    return jax.vmap(row)(q, k, v, state, segments)


def in_float64(args, segments, cotangents, slopes=SLOPES):
    """(out, state after), (dq, dk, dv, dstate)."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) for a in (*args, *cotangents)]
        slopes = jnp.asarray(slopes, jnp.float64)
        f = partial(by_token, segments=jnp.asarray(segments), slopes=slopes, scale=SCALE)
        results, pull = jax.vjp(f, *wide[:4])
        return jax.tree.map(np.asarray, (results, pull(tuple(wide[4:]))))


@partial(jit, static_argnums=4)
def in_chunks(args, segments, slopes, cotangents, implementation):
    q, k, v, state = args
    results, pull = jax.vjp(
        lambda q, k, v, state: lightning(q, k, v, slopes, segments, state, SCALE, implementation), q, k, v, state
    )
    return results, pull(cotangents)


# Of chunks of 32 on CPU, 16 of them a block: one token, a tail, whole chunks, a block and a tail.
@pytest.mark.parametrize("length", [1, 7, 32, 65, 600])
def test_chunks_and_their_gradients_equal_the_recurrence(length, library):
    args, segments, cotangents = inputs(length)
    slopes = jnp.asarray(SLOPES, jnp.float32)
    want, want_gradients = in_float64(args, segments, cotangents)
    for name in ("native", "xla"):
        got, gradients = in_chunks(args, segments, slopes, cotangents, name)
        for a, b in zip(got, want, strict=True):
            assert_close(a, b)
        for a, b in zip(gradients, want_gradients, strict=True):
            assert_gradient_close(a, b)
        assert not np.asarray(got[0])[segments == 0].any()
        np.testing.assert_array_equal(got[1][3], args[3][3])  # a row of padding leaves its state as it was


def test_a_row_may_be_cut_anywhere():
    """The state after one piece is that before the next, whatever document a piece ends in."""
    args, segments, _ = inputs(90)
    slopes = jnp.asarray(SLOPES, jnp.float32)
    run = jit(lambda q, k, v, state, segments: lightning(q, k, v, slopes, segments, state, SCALE))
    want_out, want_state = run(*args, segments)
    state, outs = args[3], []
    for piece in (slice(0, 1), slice(1, 30), slice(30, 63), slice(63, 90)):
        q, k, v = (a[:, piece] for a in args[:3])
        before, mine = segments[:, : piece.start], segments[:, piece]
        for row in range(4):  # whoever cuts knows whether a document goes on
            last, first = (a[a > 0] for a in (before[row], mine[row]))
            if last.size and first.size and last[-1] != first[0]:
                state = state.at[row].set(0)
        out, state = run(q, k, v, state, mine)
        outs.append(out)
    assert_close(jnp.concatenate(outs, 1), want_out)
    assert_close(state, want_state)


@pytest.mark.parametrize(("implementation", "tolerance"), [("native", 1e-5), ("xla", 2**-6)])
def test_bfloat16_operands_have_float32_sums(implementation, tolerance, library):
    """C++ rounds the gradients alone; XLA's form scores, decayed keys and cotangents too."""
    args, segments, cotangents = inputs(200)
    rounded = [*(jnp.asarray(a, jnp.bfloat16) for a in args[:3]), args[3]]
    got, gradients = in_chunks(rounded, segments, jnp.asarray(SLOPES, jnp.float32), cotangents, implementation)
    want, want_gradients = in_float64([np.asarray(a, np.float32) for a in rounded], segments, cotangents)
    assert [a.dtype for a in got] == [np.float32] * 2 and [a.dtype for a in gradients[:3]] == [jnp.bfloat16] * 3
    for a, b in zip(got, want, strict=True):
        assert_gradient_close(a, b, tolerance=tolerance)
    for a, b in zip(gradients, want_gradients, strict=True):
        assert_gradient_close(a, b, tolerance=max(tolerance, 2**-8))


def test_no_state_between_chunks_is_kept_for_the_backward_pass():
    args, segments, _ = inputs(600)
    slopes = jnp.asarray(SLOPES, jnp.float32)
    _, pull = jax.vjp(lambda q, k, v, state: lightning(q, k, v, slopes, segments, state, SCALE), *args)
    kept = sum(a.size for a in jax.tree.leaves(pull) if hasattr(a, "size"))
    assert kept <= sum(a.size for a in args) + segments.size + slopes.size + 16


def test_the_last_layers_states_hardly_decay():
    """The three published ways: one counts layers from where it is, two from the one before."""
    first, last = (slopes_of(16, layer, 20) for layer in (0, 19))
    assert first[0] == pytest.approx(2**-0.5, rel=2e-5) and first[-1] == pytest.approx(2**-8, rel=2e-5)
    np.testing.assert_allclose(last, room.base_slopes(16) * 1e-5)
    np.testing.assert_allclose(slopes_of(16, 3, 20, "hf"), slopes_of(16, 2, 20))
    np.testing.assert_allclose(slopes_of(16, 0, 20, "mlx"), slopes_of(16, 1, 20, "mlx"))


# C++ alone.


class Shape(NamedTuple):
    rows: int
    length: int
    heads: int
    key_width: int
    value_width: int


def documents(rng: np.random.Generator, shape: Shape, mean: float) -> np.ndarray:
    """int32 [B, T]: documents of random lengths, some of one token; a tenth of the places are padding, wherever."""
    number = np.cumsum(rng.random((shape.rows, shape.length)) < 1 / mean, axis=1) + 1
    return np.where(rng.random(number.shape) < 0.1, 0, number).astype(np.int32)


def check(shape: Shape, dtype: str, mean: float, seed: int = 0) -> None:
    """Sums are float32 whatever the dtype of the operands; gradients are rounded to it."""
    rows, length, heads, *widths = shape
    rng = np.random.default_rng([seed, *shape])
    q, k, v, g = (rng.normal(size=(rows, length, heads, width)) for width in (*widths[:1] * 2, *widths[1:] * 2))
    state, dstate = rng.normal(size=(2, rows, heads, *widths))
    args = [*(np.asarray(jnp.asarray(a, dtype)) for a in (q, k, v)), state.astype(np.float32)]
    segments, cotangents = documents(rng, shape, mean), (g.astype(np.float32), dstate.astype(np.float32))
    slopes = rng.uniform(0, 0.9, heads).astype(np.float32)
    got, gradients = in_chunks(args, segments, slopes, cotangents, "native")
    want, want_gradients = in_float64([a.astype(np.float32) for a in args], segments, cotangents, slopes)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
    for a, b in zip(gradients, want_gradients, strict=True):
        # Of a few numbers the largest may be a difference of products that are much larger.
        largest = max(np.abs(b).max(), 0.1)
        assert_close(np.asarray(a, np.float32) / largest, b / largest, 1e-5 if a.dtype == np.float32 else 2**-8)
    assert not np.asarray(got[0])[segments == 0].any()
    assert not any(np.asarray(d, np.float32)[segments == 0].any() for d in gradients[:3])


def check_few() -> None:
    """Cases that differ with vectors' width: columns that no vector divides, pieces that are no whole number of tiles,
    a single token."""
    check(Shape(2, 75, 2, 12, 37), "float32", 30)
    check(Shape(1, 70, 2, 33, 32), "bfloat16", 1e9)
    check(Shape(1, 1, 3, 5, 3), "float32", 1)


WIDTHS = st.sampled_from((1, 5, 12, 32, 40, 128))


@settings(max_examples=10, deadline=None)
@given(
    st.builds(Shape, st.integers(1, 3), st.integers(1, 150), st.integers(1, 3), WIDTHS, WIDTHS),
    st.sampled_from(("float32", "bfloat16")), st.sampled_from((1, 3, 30, 1e9)), st.integers(0, 99),
)  # fmt: skip
def check_random_shapes(shape, dtype, mean, seed) -> None:
    check(shape, dtype, mean, seed)


def test_random_shapes_and_documents_give_sums_in_float64(library):
    check_random_shapes()


def test_heads_of_the_released_models_and_lengths_beyond_every_cache_are_right(library):
    check(Shape(1, 300, 2, 128, 128), "float32", 120)
    check(Shape(1, 5000, 1, 32, 32), "float32", 3000)


def test_nan_in_one_document_changes_no_bit_of_another(library):
    args, segments, (g, dstate) = inputs(150)
    segments = np.where(segments > 0, 1 + np.arange(150) // 40, 0).astype(np.int32)
    bad = (segments == 2)[..., None, None]
    slopes = jnp.asarray(SLOPES, jnp.float32)
    clean = in_chunks(args, segments, slopes, (g, dstate), "native")
    spoilt = [*(np.where(bad, np.nan, a) for a in args[:3]), args[3]]
    got = in_chunks(spoilt, segments, slopes, (np.where(bad, np.nan, g), dstate), "native")
    for a, b in zip((got[0][0], *got[1][:3]), (clean[0][0], *clean[1][:3]), strict=True):
        assert np.isnan(np.asarray(a)[bad[..., 0, 0]]).all()
        np.testing.assert_array_equal(np.asarray(a)[~bad[..., 0, 0]], np.asarray(b)[~bad[..., 0, 0]])
    np.testing.assert_array_equal(got[0][1], clean[0][1])
    np.testing.assert_array_equal(got[1][3], clean[1][3])


def test_eight_devices_at_once_have_the_gradients_that_each_would_have_alone(library):
    (q, k, v, state), segments, cotangents = (jax.tree.map(lambda a: np.concatenate([a, a]), x) for x in inputs(130))
    slopes = np.asarray(SLOPES, np.float32)

    def gradients(implementation, q, k, v, state, segments, cotangents):
        return in_chunks.__wrapped__((q, k, v, state), segments, slopes, cotangents, implementation)

    spec, mesh = jax.P("data"), make_mesh(MeshConfig(data=8), jax.devices())
    together = manual(partial(gradients, "native"), mesh, (spec,) * 6, spec)
    args = q, k, v, state, segments, cotangents
    got, want = jit(together)(*args), jit(partial(gradients, "xla"))(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_gradient_close(a, b)


def lowered(platform: str, dtype="float32") -> str:
    args, segments, cotangents = inputs(40)
    args = [*(jnp.asarray(a, dtype) for a in args[:3]), args[3]]
    # A function of its own: what `in_chunks` was traced to is kept.
    f = jax.jit(lambda *args: in_chunks.__wrapped__(args, segments, np.float32(SLOPES), cotangents, "auto"))
    return f.trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_what_is_lowered_for_other_platforms_builds_nothing(platform, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: pytest.fail("asked for the library"))
    assert "ling_lightning" not in lowered(platform)


def test_on_cpu_the_native_form_is_chosen_unless_the_environment_says_no(monkeypatch, library):
    assert "ling_lightning" in lowered("cpu") and "ling_lightning_gradient" in lowered("cpu")
    assert "ling_lightning" not in lowered("cpu", "float16")
    monkeypatch.setenv("LING_JAX_NATIVE", "0")
    assert "ling_lightning" not in lowered("cpu")


def test_without_the_library_it_is_xlas_form(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    args, segments, cotangents = inputs(40)
    run = partial(in_chunks.__wrapped__, args, segments, jnp.asarray(SLOPES, jnp.float32), cotangents)
    got, want = (jit(lambda name=name: run(name))() for name in ("native", "xla"))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
