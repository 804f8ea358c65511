"""Tokens reach their experts on other devices and come back: dropless in bounded buffers, whatever the router does.

Legend: N tokens of all devices, n of one, D hidden, K experts per token, E experts, P ranks, R rows.
"""

import re
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from ling_jax.config import MeshConfig
from ling_jax.kernels.grouped import block_rows
from ling_jax.kernels.rows import plan_rows
from ling_jax.kernels.swiglu import routed_swiglu
from ling_jax.parallel.dispatch import dispatch, dispatcher_of
from ling_jax.parallel.mesh import make_mesh, manual, psum
from ling_jax.parallel.ragged import Routes, ragged_all_to_all
from tests.support.helpers import assert_close, assert_gradient_close, jit, output_and_gradients
from tests.support.marks import nightly

D, F, E, K = 16, 12, 8, 3
DISPATCHERS = ("ragged_all_to_all", "all_gather")
RANK_SLICES = "ragged_all_to_all, a slice for each rank"
QUEUES = (*DISPATCHERS, RANK_SLICES)


@pytest.fixture
def dispatcher(request, monkeypatch) -> str:
    """The dispatcher of a test's parameter; programs for GPUs send a slice for each rank, here too if asked."""
    if request.param == RANK_SLICES:
        monkeypatch.setattr("ling_jax.parallel.dispatch.for_nvidia", lambda: True)
        return "ragged_all_to_all"
    return request.param


def routing(kind: str, tokens: int) -> np.ndarray:
    """int32 [N, K] distinct experts of each token."""
    rng = np.random.default_rng(1)
    ids = np.stack([rng.permutation(E)[:K] for _ in range(tokens)])
    if kind == "one hot expert":
        ids = np.stack([[5, *rng.permutation([e for e in range(E) if e != 5])[: K - 1]] for _ in range(tokens)])
    if kind == "one hot rank":
        ids = np.tile([6, 7, 5], (tokens, 1))
    if kind == "empty experts":
        ids = np.stack([rng.permutation([0, 3, 4])[:K] for _ in range(tokens)])
    return ids.astype(np.int32)


def inputs(tokens: int):
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, tokens, D)).astype(np.float32)
    scale = rng.uniform(0.1, 1, (tokens, K)).astype(np.float32)
    weights = tuple(rng.normal(size=(E, *shape)).astype(np.float32) / 4 for shape in ((F, D), (F, D), (D, F)))
    return (x, scale, weights), g


def one_device(ids, x, scale, weights):
    block = block_rows(ids.size, E)
    return routed_swiglu(x, scale, weights, plan_rows(ids, E, block), block)[0]


def spread(mesh: MeshConfig):
    """(ids, x, scale, weights) -> (y, dropped) over the expert axis."""
    devices = make_mesh(mesh, jax.devices()[: mesh.expert * mesh.data])

    def run(ids, x, scale, weights):
        y, dropped = dispatch(x, ids, scale, weights, E, mesh)
        return y, psum(dropped, "data", "expert")

    rows = P(("data", "expert"))
    return manual(run, devices, (rows, rows, rows, P("expert")), (rows, P()))


def with_gradients(f):
    """(ids, args, cotangent) -> f(ids, *args) and the leaves of its arguments' gradients; one program for all ids."""

    @jit
    def run(ids, args, cotangent):
        output, vjp = jax.vjp(partial(f, ids), *args)
        return output, jax.tree.leaves(vjp(cotangent))

    return run


def check(mesh: MeshConfig, *routings: np.ndarray):
    args, g = inputs(len(routings[0]))
    wanted, found = with_gradients(one_device), with_gradients(spread(mesh))
    for ids in routings:
        want, want_gradients = wanted(ids, args, g)
        (got, dropped), gradients = found(ids, args, (g, np.zeros((), jax.dtypes.float0)))
        assert dropped == 0
        assert_close(got, want)
        for got_d, want_d in zip(gradients, want_gradients, strict=True):
            assert_gradient_close(got_d, want_d)


@pytest.mark.parametrize("dispatcher", QUEUES, indirect=True)
@pytest.mark.parametrize("factor", [0.3, nightly(1.0), 2.0, nightly(4.0)])
def test_nothing_is_dropped_whatever_the_routing_and_the_buffer(factor, dispatcher):
    kinds = ("random", "one hot expert", "one hot rank", "empty experts")
    mesh = MeshConfig(data=2, expert=4, buffer_factor=factor, dispatcher=dispatcher)
    check(mesh, *(routing(kind, 48) for kind in kinds))


@pytest.mark.parametrize("dispatcher", QUEUES, indirect=True)
def test_one_token_a_device(dispatcher):
    check(MeshConfig(expert=8, dispatcher=dispatcher), routing("one hot rank", 8))


def test_one_expert_a_device():
    check(MeshConfig(expert=8, buffer_factor=1.0), routing("random", 32))


@pytest.mark.parametrize("dispatcher", QUEUES, indirect=True)
def test_dropping_is_counted_and_leaves_out_whole_pairs(dispatcher):
    """All 3 * 48 pairs go to two of four ranks (one gets 2/3 of them), of which each takes 36."""
    mesh = MeshConfig(expert=4, buffer_factor=1.0, overflow="drop", dispatcher=dispatcher)
    ids, (args, _) = routing("one hot rank", 48), inputs(48)
    got, dropped = jit(spread(mesh))(ids, *args)
    assert dropped == 2 * 48 - 36 + 48 - 36
    whole = jit(one_device)(ids, *args)
    assert np.isfinite(got).all() and not np.allclose(got, whole)


@pytest.mark.parametrize(("factor", "loops"), [(2.0, True), (4.0, False)])
def test_further_rounds_are_in_the_program_only_where_a_buffer_can_overflow(factor, loops):
    ids, (args, _) = routing("random", 16), inputs(16)
    jaxpr = str(jax.make_jaxpr(spread(MeshConfig(expert=4, buffer_factor=factor)))(ids, *args))
    assert ("while[" in jaxpr) == loops


@pytest.mark.parametrize("name", DISPATCHERS)
def test_the_named_dispatcher_is_in_the_traced_program(name):
    """The native collective and not an emulation, once lowered for a TPU."""
    ids, (args, g) = routing("random", 16), inputs(16)
    run = partial(spread(MeshConfig(expert=4, dispatcher=name)), ids)

    def backward(*args):
        return jax.vjp(run, *args, has_aux=True)[1](g)

    for f in (run, backward):
        text = jax.jit(f).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
        assert ("ragged_all_to_all" in text) == (name == "ragged_all_to_all")


@pytest.mark.parametrize(("gpu", "ranks", "name"), [
    (True, 4, "all_gather"), (True, 8, "ragged_all_to_all"), (False, 4, "ragged_all_to_all"),
])  # fmt: skip
def test_on_gpus_the_dispatcher_moves_the_fewer_bytes(gpu, ranks, name, monkeypatch):
    """The rows of 8 choices a token, or the tokens of all ranks."""
    monkeypatch.setattr("ling_jax.parallel.dispatch.for_nvidia", lambda: gpu)
    assert dispatcher_of(MeshConfig(), ranks, choices=8) == name
    assert {dispatcher_of(MeshConfig(dispatcher=other), ranks, choices=8) for other in DISPATCHERS} == {*DISPATCHERS}


def test_a_slice_for_each_rank_is_all_that_is_sent(monkeypatch):
    ids, (args, _) = routing("random", 16), inputs(16)

    def sizes() -> set[str]:
        """The shapes of the offsets and sizes of the exchanges in a program for GPUs, 2 experts a rank."""
        text = (
            jax.jit(partial(spread(MeshConfig(expert=4, dispatcher="ragged_all_to_all")), ids))
            .trace(*args)
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )
        return set(re.findall(r"ragged_all_to_all.*?tensor<(\d+x?)i(?:32|64)>", text))

    assert sizes() == {"8x"}
    monkeypatch.setattr("ling_jax.parallel.dispatch.for_nvidia", lambda: True)
    assert sizes() == {"4x"}


def test_gradients_are_taken_inside_an_outer_stage_region():
    """As a pipeline runs it: a region over `stage`, and the dispatch in one over the other axes."""
    names, ids = ("stage", "expert"), routing("one hot rank", 16)
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), names, auto, devices=jax.devices())
    config = MeshConfig(expert=4, buffer_factor=1.0)
    args, g = inputs(16)

    def stage(ids, g, x, scale, weights):
        def run(ids, g, x, scale, weights):
            y, vjp = jax.vjp(lambda *a: dispatch(a[0], ids, a[1], a[2], E, config)[0], x, scale, weights)
            return y, vjp(g)

        rows, experts = P("expert"), P("expert")
        out = (rows, (rows, rows, experts))
        inner = jax.shard_map(
            run, in_specs=(rows, rows, rows, rows, experts), out_specs=out, axis_names={"expert"}, check_vma=False
        )
        return jax.tree.map(lambda a: a[None], inner(ids, g, x, scale, weights))

    outer = jax.shard_map(stage, mesh=mesh, in_specs=P(), out_specs=P("stage"), axis_names={"stage"}, check_vma=False)
    with jax.set_mesh(mesh):
        y, grads = jit(outer)(ids, g, *args)
    want, want_gradients = output_and_gradients(partial(one_device, ids), args, g)
    for rank in range(2):
        assert_close(y[rank], want)
        for got_d, want_d in zip(jax.tree.leaves(grads), want_gradients, strict=True):
            assert_gradient_close(got_d[rank], want_d)


# The ragged all-to-all and its emulation.

ROWS = 60


@jit
def exchange(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, g):
    mesh = make_mesh(MeshConfig(expert=4), jax.devices()[:4])

    def run(operand, output, routes, g):
        routes = Routes(*(r[0] for r in routes))
        f = partial(ragged_all_to_all, routes=routes, axis="expert")
        got, vjp = jax.vjp(f, operand[0], output[0])
        return jax.tree.map(lambda a: a[None], (got, vjp(g[0])))

    routes = (input_offsets, send_sizes, output_offsets, recv_sizes)
    return manual(run, mesh, P("expert"), P("expert"))(operand, output, routes, g)


@settings(max_examples=20, deadline=None)
@given(st.data(), st.integers(0, 3))
@pytest.mark.parametrize("slices", [1, 3])
def test_the_emulated_ragged_all_to_all_and_its_gradients_equal_numpy(slices, data, unsent):
    """`unsent` rows lie between two slices; a rank's output has those of its first slices first."""
    sizes = st.lists(st.integers(0, 6 // slices), min_size=16 * slices, max_size=16 * slices)
    size_PPs = np.array(data.draw(sizes)).reshape(4, 4, slices)  # source, target
    sent_PPs = (np.cumsum(size_PPs.reshape(4, -1) + unsent, 1) - size_PPs.reshape(4, -1)).reshape(size_PPs.shape)
    order_PsP = size_PPs.transpose(1, 2, 0)  # as a target has them
    got_PsP = (np.cumsum(order_PsP.reshape(4, -1), 1) - order_PsP.reshape(4, -1)).reshape(order_PsP.shape)
    rng = np.random.default_rng(0)
    operand, output, g = rng.normal(size=(3, 4, ROWS, 3)).astype(np.float32)
    want, doperand, doutput = output.copy(), np.zeros_like(operand), g.copy()
    for source, target, part in np.ndindex(4, 4, slices):
        count, first = size_PPs[source, target, part], got_PsP[target, part, source]
        there = np.s_[target, first : first + count]
        here = np.s_[source, sent_PPs[source, target, part] : sent_PPs[source, target, part] + count]
        want[there] = operand[here]
        doperand[here] = g[there]
        doutput[there] = 0
    arrays = (sent_PPs, size_PPs, got_PsP.transpose(2, 0, 1), size_PPs.transpose(1, 0, 2))
    routes = [a.reshape(4, -1).astype(np.int32) for a in arrays]
    got, (got_doperand, got_doutput) = exchange(operand, output, *routes, g)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got_doperand, doperand)
    np.testing.assert_array_equal(got_doutput, doutput)
