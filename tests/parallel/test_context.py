"""Rows cut over the context axis: order, successors, and attention equal to one device's.

Legend: B rows, T tokens, H query heads, G kv heads, C head_dim.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ling_jax.config import MeshConfig
from ling_jax.kernels.attention import attention
from ling_jax.parallel.context import context_attention, shift_left, zigzag_order
from ling_jax.parallel.mesh import make_mesh, manual
from tests.support.helpers import assert_close, assert_gradient_close, jit, output_and_gradients

T, SCALE = 32, 0.4
METHODS = ("ring", "all_gather")
SEGMENTS = np.zeros((2, T), np.int32)  # documents that cross pieces and ranks, and padding
for row, ends in enumerate([(5, 17, 18, 30), (32,)]):
    for number, (start, end) in enumerate(zip((0, *ends), ends, strict=False), 1):
        SEGMENTS[row, start:end] = number


ROW = P(None, "context")


def sharded(f, ranks, inputs=1):
    """`f` over `context` on arrays [B, T, ...] in natural order; the result is in natural order again."""
    mesh = make_mesh(MeshConfig(context=ranks), jax.devices()[:ranks])
    order = zigzag_order(T, ranks)
    run = manual(f, mesh, (ROW,) * inputs, ROW)
    return lambda *args: run(*(a[:, order] for a in args))[:, np.argsort(order)]


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(2, T, heads, 8) for heads in (6, 2, 2, 6)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]  # q, k, v and the cotangent


def one_device(q, k, v):
    return attention(q, k, v, SEGMENTS, SCALE, "xla")


def across(ranks, method, implementation="xla"):
    def run(q, k, v, segments):
        return context_attention(q, k, v, segments, SCALE, method, implementation)

    whole = sharded(run, ranks, 4)
    return lambda q, k, v: whole(q, k, v, jnp.asarray(SEGMENTS))


@pytest.mark.parametrize(
    ("ranks", "method", "implementation"),
    [(ranks, method, "xla") for ranks in (2, 4) for method in METHODS] + [(4, "ring", "splash")],
)
def test_attention_and_its_gradients_equal_one_devices(ranks, method, implementation):
    """Also by the TPU's kernels, interpreted."""
    *qkv, g = inputs()
    want, want_gradients = output_and_gradients(one_device, qkv, g)
    got, gradients = output_and_gradients(across(ranks, method, implementation), qkv, g)
    assert_close(got, want)
    for got_d, want_d in zip(gradients, want_gradients, strict=True):
        assert_gradient_close(got_d, want_d)


@pytest.mark.parametrize("method", METHODS)
def test_in_bfloat16_attention_is_as_close_as_its_rounding(method):
    *qkv, _ = inputs(jnp.bfloat16)
    want = one_device(*(x.astype(jnp.float32) for x in qkv))
    got = jit(across(4, method))(*qkv)
    assert got.dtype == jnp.bfloat16
    assert_close(got.astype(jnp.float32), want, 2e-2)


@pytest.mark.parametrize(
    ("method", "there", "not_there"), [("ring", "ppermute", "all_gather"), ("all_gather", "all_gather", "ppermute")]
)
def test_the_named_method_is_in_the_traced_program(method, there, not_there):
    *qkv, g = inputs()
    text = str(jax.make_jaxpr(lambda *qkv: jax.vjp(across(2, method), *qkv)[1](g))(*qkv))
    assert there in text and not_there not in text


def test_against_another_rank_two_products_of_pieces_are_made_not_four():
    """Each with its scores and its values: three at home, two in the loop over the others."""
    *qkv, _ = inputs()
    assert str(jax.make_jaxpr(across(4, "ring"))(*qkv)).count("dot_general[") == 2 * (3 + 2)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_every_shard_holds_an_early_and_a_late_piece(shards):
    order = zigzag_order(T, shards)
    assert sorted(order) == list(range(T))
    work = order.reshape(shards, -1).sum(1)  # keys seen by a shard's queries
    assert (work == work[0]).all()


def test_a_row_that_does_not_divide_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match=r"30 tokens .* 2 \* mesh.context = 8"):
        zigzag_order(30, 4)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_successors_are_exact_across_pieces_and_ranks(ranks):
    x = np.random.default_rng(0).integers(0, 99, (2, T)).astype(np.int32)
    got = sharded(lambda x: shift_left(x, -7), ranks)(jnp.asarray(x))
    np.testing.assert_array_equal(got, np.pad(x[:, 1:], ((0, 0), (0, 1)), constant_values=-7))
