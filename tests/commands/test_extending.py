"""The pages of docs/extending.md that no other test follows: an implementation of a kernel, its cost, a router."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec

from ling_jax.kernels import grouped, work
from ling_jax.kernels.choose import Kernel, pallas
from ling_jax.model import router
from ling_jax.model.router import Routing
from ling_jax.plan.count import count_step
from tests.support.helpers import assert_close, jit, make_model, small

# A kernel.


def double(x_ref, out_ref):
    out_ref[...] = 2 * x_ref[...]


def doubled(x: jax.Array, interpret: bool) -> jax.Array:
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(double, out_shape=shape, interpret=interpret, name="toy_double")(x)


DOUBLE = Kernel(
    tpu=partial(doubled, interpret=False), rest=lambda x: x + x, named={"pallas": pallas(doubled), "xla": jnp.add}
)


def test_an_implementation_is_chosen_by_its_name():
    x = jnp.arange(8.0)
    for implementation in ("auto", "pallas"):
        assert_close(jit(partial(DOUBLE, implementation=implementation))(x), 2 * np.arange(8.0))
    with pytest.raises(ValueError, match="implementation = 'mine' must be one of pallas, xla or auto"):
        DOUBLE(x, implementation="mine")


def test_one_more_platform_is_one_more_entry():
    def mine(x_RI, w_EOI, group_sizes_E, block, out_dim):
        return jax.lax.tan(grouped._ragged(x_RI, w_EOI, group_sizes_E, block, out_dim))

    product = dataclasses.replace(grouped._PRODUCT, cuda=mine)
    args = jnp.ones((8, 4)), jnp.ones((2, 4, 4)), jnp.array([4, 4], jnp.int32)
    traced = jax.jit(partial(product, block=4, out_dim=1)).trace(*args)
    found = [traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda")]
    assert ["stablehlo.tan " in text for text in found] == [False, True]


def test_a_kernel_without_a_formula_cannot_be_planned_and_with_one_is_counted(monkeypatch):
    monkeypatch.setattr(work, "_FORMULAS", [])
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    step = jax.shard_map(DOUBLE, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    traced = jax.jit(step).trace(jnp.ones((16, 128)))
    count = partial(count_step, traced, [8192.0], [8192.0], {"data": 1}, 1, "tpu")
    with pytest.raises(ValueError, match="no formula for the work of the kernel .*toy_double"):
        count()
    work.register("toy_double", lambda call: work.Cost({"float32": float(call.operands[0].size)}))
    total = count().total()
    assert total.flops == {"float32": 16 * 128.0} and total.hbm_bytes == 2 * 8192


# A router.


def softmax_route(logits_NE, bias_E, valid_N, config, ids_NK=None) -> Routing:
    """The best K by softmax, with their probabilities: Mixtral's."""
    weights_NK, own_NK = jax.lax.top_k(jax.nn.softmax(logits_NE), config.num_experts_per_tok)
    chosen_NE = (own_NK[:, :, None] == jnp.arange(config.num_experts)).any(1) & valid_N[:, None]
    zero = jnp.zeros((), jnp.int32)
    return Routing(own_NK, weights_NK, chosen_NE.sum(0, dtype=jnp.int32), jnp.zeros(()), zero)


def test_a_router_is_a_function_of_logits(monkeypatch):
    monkeypatch.setattr(router, "route", softmax_route)
    config = small(first_k_dense_replace=0, num_hidden_layers=1)
    out = make_model(config)(np.array([[3, 1, 4, 1, 5]], np.int32), capture=("router_logits",))
    logits_TE = np.asarray(out.captured["router_logits"][0, 0], np.float64)
    chances = np.exp(logits_TE) / np.exp(logits_TE).sum(-1, keepdims=True)
    best = np.argsort(-chances, axis=-1)[:, : config.num_experts_per_tok]
    assert np.array_equal(out.routing.ids[0, 0], best)
    assert_close(out.routing.weights[0, 0], np.take_along_axis(chances, best, -1))
