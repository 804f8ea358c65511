"""Lightning attention in chunks equals the recurrence, token by token in float64.

Legend: B rows, T tokens, H heads, C and D head_dim.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ling_jax.kernels import lightning as room
from ling_jax.kernels.lightning import lightning, slopes_of
from tests.support.helpers import assert_close, assert_gradient_close, jit

SLOPES = np.array([0.84, 0.3, 0.004])
SCALE = 0.35


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


def in_float64(args, segments, cotangents):
    """(out, state after), (dq, dk, dv, dstate)."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) for a in (*args, *cotangents)]
        slopes = jnp.asarray(SLOPES, jnp.float64)
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
def test_chunks_and_their_gradients_equal_the_recurrence(length):
    args, segments, cotangents = inputs(length)
    slopes = jnp.asarray(SLOPES, jnp.float32)
    want, want_gradients = in_float64(args, segments, cotangents)
    for name in ("auto", "xla"):
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


def test_bfloat16_operands_have_float32_sums():
    args, segments, cotangents = inputs(200)
    rounded = [*(jnp.asarray(a, jnp.bfloat16) for a in args[:3]), args[3]]
    got, gradients = in_chunks(rounded, segments, jnp.asarray(SLOPES, jnp.float32), cotangents, "auto")
    want, _ = in_float64([np.asarray(a, np.float32) for a in rounded], segments, cotangents)
    assert [a.dtype for a in got] == [np.float32] * 2 and [a.dtype for a in gradients[:3]] == [jnp.bfloat16] * 3
    for a, b in zip(got, want, strict=True):
        assert_gradient_close(a, b, tolerance=2**-7)


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
