"""Lightning attention: linear attention whose state decays at a constant rate per head (Ring-linear; spec 2.8).

    S_t = exp(-slope) S_{t-1} + k_t v_t^T        out_t = scale q_t S_t

Tokens are taken in chunks: inside one as attention whose weights decay with distance, between chunks through the state.
All chunks of a block are done at once, since a loop over single chunks has too little work in each turn; a loop over
blocks carries the state. Its gradients are the same computation with its operands in other places, so that nothing of
the states between chunks is kept. On CPU both ways are C++ (native_lightning.h).

A state belongs to one document: it is zero before a document's first token. Padding adds nothing and does not decay, so
it may lie anywhere.

Legend: B rows, T tokens, H heads, C head_dim (C and D of a state: of keys and of values), n chunks of a block, t and s
tokens of a chunk.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ling_jax.kernels import native
from ling_jax.kernels.attention import keep
from ling_jax.kernels.choose import Implementation, Kernel
from ling_jax.kernels.precision import precision_of

Slopes = Literal["sglang", "hf", "mlx"]
CHUNKS = 16  # of a block


def base_slopes(heads: int) -> np.ndarray:
    """float64 [heads]: a geometric series down to 2^-8; of a number of heads that is no power of two, that of the next
    smaller one and every second of the next larger one's."""
    if heads & (heads - 1):
        whole = 1 << (heads.bit_length() - 1)
        return np.concatenate([base_slopes(whole), base_slopes(2 * whole)[::2][: heads - whole]])
    return 2.0 ** (-8.0 / heads * np.arange(1, heads + 1))


def slopes_of(heads: int, layer: int, layers: int, convention: Slopes = "sglang") -> np.ndarray:
    """float64 [heads]: the rates at which a layer's states decay.

    Args:
      layer: its index among all `layers`, softmax ones too.
      convention: which of the published codes computes them: SGLang, vLLM and the trainers ("sglang"), the code beside
        the released weights ("hf"), MLX ("mlx"). They differ by a layer's shift.
    """
    depth = {"sglang": layer, "hf": layer - 1, "mlx": max(0, layer - 1)}[convention]
    return base_slopes(heads) * (1 - depth / max(layers - 1, 1) + 1e-5)


def _product(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(form, a, b, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)


class Places(NamedTuple):
    """Where the tokens of each chunk stand. Ranks count the tokens of a row that are no padding, from 1."""

    segments: jax.Array  # int32 [..., B, t], 0 for padding
    ranks: jax.Array  # int32 [..., B, t]
    before: jax.Array  # int32 [..., B]: the rank of the last token before the chunk, 0 if there is none
    end: jax.Array  # int32 [..., B]: of its own last token, or `before`
    state_before: jax.Array  # int32 [..., B]: the segment that the state belongs to before the chunk
    state_end: jax.Array  # int32 [..., B]: and after it

    @classmethod
    def of(cls, segments_BT: jax.Array, chunk: int) -> "Places":
        """[B, chunks, ...]; the state before a row is that of its first token's segment."""
        batch, length = segments_BT.shape
        valid_BT, places = segments_BT > 0, jnp.arange(length, dtype=jnp.int32)
        ranks_BT = jnp.cumsum(valid_BT, 1, dtype=jnp.int32)
        last_BT = jax.lax.cummax(jnp.where(valid_BT, places, -1), 1)  # the last token up to each place
        first_B1 = jnp.take_along_axis(segments_BT, jnp.argmax(valid_BT, 1)[:, None], 1)
        owner_BT = jnp.where(last_BT < 0, first_B1, jnp.take_along_axis(segments_BT, jnp.maximum(last_BT, 0), 1))
        ends_Bn, owner_Bn = ranks_BT[:, chunk - 1 :: chunk], owner_BT[:, chunk - 1 :: chunk]
        before_Bn = jnp.concatenate([jnp.zeros_like(ends_Bn[:, :1]), ends_Bn[:, :-1]], 1)
        owner_before_Bn = jnp.concatenate([first_B1, owner_Bn[:, :-1]], 1)
        cut = (batch, -1, chunk)
        return cls(segments_BT.reshape(cut), ranks_BT.reshape(cut), before_Bn, ends_Bn, owner_before_Bn, owner_Bn)


def _decayed(slopes_H: jax.Array, steps: jax.Array, where: jax.Array) -> jax.Array:
    """float32 [..., H]: exp(-slope steps), 0 where not `where`."""
    weights = jnp.exp(-slopes_H * jnp.maximum(steps, 0)[..., None])
    return jnp.where(where[..., None], weights, 0)


def _inside(q_BntHC: jax.Array, k_BntHC: jax.Array, v_BntHC: jax.Array, slopes_H: jax.Array, at: Places) -> jax.Array:
    """float32 [B, n, t, H, D]: what tokens get from those of their own chunk."""
    steps = at.ranks[..., :, None] - at.ranks[..., None, :]
    seen = (at.segments[..., :, None] == at.segments[..., None, :]) & (steps >= 0) & (at.segments[..., None, :] > 0)
    weights_BntsH = _decayed(slopes_H, steps, seen)
    scores_BnHts = _product("bnthc,bnshc->bnhts", q_BntHC, k_BntHC) * jnp.moveaxis(weights_BntsH, -1, 2)
    return _product("bnhts,bnshd->bnthd", scores_BnHts.astype(v_BntHC.dtype), v_BntHC)


def _states(added_BnHCD: jax.Array, state_BHCD: jax.Array, slopes_H: jax.Array, at: Places) -> jax.Array:
    """float32 [B, n + 1, H, C, D]: the state before each chunk of a block and after the last, of what each one adds to
    its own end's and of the state before the block."""
    added = jnp.concatenate([state_BHCD[:, None], added_BnHCD], 1)
    owners = jnp.concatenate([at.state_before[:, :1], at.state_end], 1)
    ranks = jnp.concatenate([at.before[:, :1], at.end], 1)
    order = jnp.arange(owners.shape[1])
    mine = (owners[:, :, None] == owners[:, None, :]) & (order[:, None] >= order[None, :])
    weights_BnmH = _decayed(slopes_H, ranks[:, :, None] - ranks[:, None, :], mine)
    return jnp.einsum("bnmh,bmhcd->bnhcd", weights_BnmH, added, precision=jax.lax.Precision.HIGHEST)


def _block(operands: Any, slopes_H: jax.Array, state_BHCD: jax.Array, at: Places) -> tuple[jax.Array, jax.Array]:
    """(out [B, n, t, H, D], the state after) of a block of chunks; `operands`: q, k and v, each [B, n, t, H, C]."""
    q, k, v = operands
    left = _decayed(slopes_H, at.end[..., None] - at.ranks, at.segments == at.state_end[..., None])
    decayed_k = (k * left[..., None]).astype(k.dtype)
    states = _states(_product("bnthc,bnthd->bnhcd", decayed_k, v), state_BHCD, slopes_H, at)
    mine = (at.segments == at.state_before[..., None]) & (at.segments > 0)
    since = _decayed(slopes_H, at.ranks - at.before[..., None], mine)
    from_state = _product("bnthc,bnhcd->bnthd", q.astype(jnp.float32) * since[..., None], states[:, :-1])
    return _inside(q, k, v, slopes_H, at) + from_state, states[:, -1]


def _forward(
    q_BTHC: jax.Array,
    k_BTHC: jax.Array,
    v_BTHD: jax.Array,
    slopes_H: jax.Array,
    segments_BT: jax.Array,
    state_BHCD: jax.Array,
    *,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """float32 (out [B, T, H, D], the state after the last token)."""
    batch, length, heads, _ = q_BTHC.shape
    chunk = min(chunk, length)
    many = -(-length // chunk)
    blocks = -(-many // CHUNKS)
    room = blocks * -(-many // blocks) * chunk
    fill = [(0, 0), (0, room - length)]
    q, k, v = (jnp.pad(x, [*fill, (0, 0), (0, 0)]) for x in (q_BTHC, k_BTHC, v_BTHD))
    segments = jnp.pad(segments_BT, fill)
    k = jnp.where((segments > 0)[..., None, None], k, 0)
    operands = tuple(x.reshape(batch, -1, chunk, *x.shape[2:]) for x in (q, k, v))
    places = Places.of(segments, chunk)

    def of_block(a: jax.Array) -> jax.Array:
        return a.reshape(batch, blocks, -1, *a.shape[2:]).swapaxes(0, 1)

    def step(state: jax.Array, part: Any) -> tuple[jax.Array, jax.Array]:
        out, state = _block(part[0], slopes_H, state, part[1])
        return state, out

    if blocks == 1:
        out, state = _block(operands, slopes_H, state_BHCD, places)
    else:
        state, out = jax.lax.scan(step, state_BHCD, jax.tree.map(of_block, (operands, places)))
        out = out.swapaxes(0, 1)
    return out.reshape(batch, room, heads, -1)[:, :length], state


def _in_chunks(
    q_BTHC: jax.Array, k_BTHC: jax.Array, v_BTHD: jax.Array, *args: jax.Array, scale: float, chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """`lightning` of XLA's operations; for CPU without a `chunk`, where a small one takes half the time."""
    chunk = chunk or (32 if q_BTHC.shape[1] < 1024 else 64)
    return _forward(q_BTHC * scale, k_BTHC, v_BTHD, *args, chunk=chunk)


def _in_chunks_bwd(
    q_BTHC: jax.Array,
    k_BTHC: jax.Array,
    v_BTHD: jax.Array,
    slopes_H: jax.Array,
    segments_BT: jax.Array,
    state_BHCD: jax.Array,
    g_BTHD: jax.Array,
    dstate_BHCD: jax.Array,
    *,
    scale: float,
    chunk: int | None = None,
) -> tuple[jax.Array, ...]:
    """Gradients of q, k, v and the state, from the cotangents of both results. dq is attention of the cotangents over
    values whose values are keys; dk and dv go through the row from its end, their states beginning with that of the
    cotangent."""
    run = partial(_in_chunks, scale=1, chunk=chunk)
    g = jnp.where((segments_BT > 0)[..., None, None], g_BTHD, 0).astype(q_BTHC.dtype)
    dq, _ = run(g, v_BTHD, k_BTHC, slopes_H, segments_BT, state_BHCD.swapaxes(2, 3))
    turned_q, turned_k, turned_v, turned_g = (x[:, ::-1] for x in (q_BTHC * scale, k_BTHC, v_BTHD, g))
    backwards = segments_BT[:, ::-1]
    once = jnp.exp(slopes_H)[:, None, None]  # the last token's part of a state has not decayed
    first = dstate_BHCD * once
    dv, before = run(turned_k, turned_q, turned_g, slopes_H, backwards, first)
    dk, _ = run(turned_v, turned_g, turned_q, slopes_H, backwards, first.swapaxes(2, 3))
    dk, dv = (x[:, ::-1] for x in (dk, dv))
    return (dq * scale).astype(q_BTHC.dtype), dk.astype(k_BTHC.dtype), dv.astype(v_BTHD.dtype), before / once


_native = native.or_else("lightning", native.lightning, _in_chunks)
_native_bwd = native.or_else("lightning_gradients", native.lightning_gradients, _in_chunks_bwd)


def _in_cpp(*args: jax.Array, **static: Any) -> tuple[jax.Array, jax.Array]:
    return (_native if _known(*args) else _in_chunks)(*args, **static)


def _in_cpp_bwd(*args: jax.Array, **static: Any) -> tuple[jax.Array, ...]:
    return (_native_bwd if _known(*args) else _in_chunks_bwd)(*args, **static)


def _known(q: jax.Array, k: jax.Array, v: jax.Array, *others: jax.Array) -> bool:
    return all(x.dtype in native.DTYPES for x in (q, k, v))


def _kernel(cpp: Implementation, xla: Implementation) -> Kernel:
    rest = partial(xla, chunk=128)
    return Kernel(cpu=cpp, rest=rest, named={"native": Kernel(cpu=cpp, rest=rest), "xla": Kernel(cpu=xla, rest=rest)})


_FORWARD = _kernel(_in_cpp, _in_chunks)
_BACKWARD = _kernel(_in_cpp_bwd, _in_chunks_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def lightning(
    q_BTHC: jax.Array,
    k_BTHC: jax.Array,
    v_BTHD: jax.Array,
    slopes_H: jax.Array,
    segments_BT: jax.Array,
    state_BHCD: jax.Array,
    scale: float,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Lightning attention of each token over its own segment up to itself, differentiable but for the slopes.

    Args:
      slopes_H: float32, at which each head's states decay, see `slopes_of`.
      segments_BT: int32 document of each token, 0 for padding.
      state_BHCD: float32 before the first token, of that token's document.
      implementation: "native" (C++, for CPU; "xla" where it cannot be built), "xla" (for the rest) or "auto".
    Returns:
      float32 (out [B, T, H, D], 0 at padding; the state after the last token, of its document).
    """
    args = q_BTHC, k_BTHC, v_BTHD, slopes_H, segments_BT, state_BHCD
    return _FORWARD(*args, implementation=implementation, scale=scale)


def _fwd(
    q: jax.Array, k: jax.Array, v: jax.Array, slopes_H: jax.Array, segments_BT: jax.Array, state: jax.Array,
    scale: float, implementation: str,
) -> tuple[Any, Any]:  # fmt: skip
    out = keep(*lightning(q, k, v, slopes_H, segments_BT, state, scale, implementation))
    return out, (q, k, v, slopes_H, segments_BT, state)


def _bwd(scale: float, implementation: str, saved: Any, cotangents: tuple[jax.Array, jax.Array]):
    dq, dk, dv, dstate = _BACKWARD(*saved, *cotangents, implementation=implementation, scale=scale)
    return dq, dk, dv, None, None, dstate


lightning.defvjp(_fwd, _bwd)


def added_state(k_BTHC: jax.Array, v_BTHD: jax.Array, slopes_H: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """float32 [B, H, C, D]: the state after a piece of a row, of the document that its last token belongs to, when it
    was zero before the piece. Differentiable but for the slopes."""
    at = jax.tree.map(lambda a: a[:, 0], Places.of(segments_BT, segments_BT.shape[1]))
    mine = (at.segments == at.state_end[:, None]) & (at.segments > 0)
    left_BTH = _decayed(slopes_H, at.end[:, None] - at.ranks, mine)
    return _product("bthc,bthd->bhcd", (k_BTHC * left_BTH[..., None]).astype(k_BTHC.dtype), v_BTHD)
