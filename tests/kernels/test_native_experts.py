"""Routed experts and AdamW in C++ equal their formulas, whatever the routing, and copy no weights.

Legend: N tokens, K choices, E experts, D hidden, F expert width, L layers.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ling_jax.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from ling_jax.kernels import native
from ling_jax.kernels.grouped import block_rows, padded_rows
from ling_jax.kernels.rows import plan_rows
from ling_jax.kernels.swiglu import routed_swiglu
from ling_jax.kernels.weight import Carrier, LayerWeight, PlainWeight
from ling_jax.train.state import make_trainer
from ling_jax.train.step import make_train_step
from tests.support.helpers import QUICK, assert_close, assert_gradient_close, assert_trees_equal, small, tiny

# (N, K, E, D, F): one of all; what no vector divides; more than one item of an expert; few rows each.
SHAPES = ((1, 1, 2, 5, 3), (37, 3, 8, 33, 21), (300, 2, 4, 64, 96), (40, 4, 30, 16, 40))
DTYPES = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16"))
KINDS = ("random", "some of none", "all to the first", "all of none")


@pytest.fixture(autouse=True)
def library():
    if not any(map(native.shutil.which, native.COMPILERS)):
        pytest.skip("this machine has no C++ compiler")
    assert native.available()


def routing(kind: str, shape, rng: np.random.Generator) -> np.ndarray:
    tokens, choices, experts = shape[:3]
    ids = np.stack([rng.permutation(experts)[:choices] for _ in range(tokens)])
    if kind == "some of none":
        ids[::3, 0] = experts
    if kind == "all to the first":
        ids = np.tile(np.arange(choices), (tokens, 1))
    if kind == "all of none":
        ids[:] = experts
    return ids.astype(np.int32)


def inputs(shape, dtypes, seed: int = 0):
    """((x, scales, weights), g)."""
    tokens, choices, experts, hidden, width = shape
    rng = np.random.default_rng([seed, *shape])
    x, g = (jnp.asarray(a, dtypes[0]) for a in rng.normal(size=(2, tokens, hidden)))
    scale = jnp.asarray(rng.uniform(0.1, 1, (tokens, choices)), jnp.float32)
    dims = (experts, width, hidden), (experts, width, hidden), (experts, hidden, width)
    return (x, scale, tuple(jnp.asarray(rng.normal(size=d) / 4, dtypes[1]) for d in dims)), g


def dense(ids, x, scale, weights) -> jax.Array:
    """Every expert for every token, in float32."""
    gate, up, down = (w.astype(x.dtype).astype(jnp.float32) for w in weights)
    x = x.astype(jnp.float32)
    inner = jax.nn.silu(jnp.einsum("nd,efd->nef", x, gate, precision="highest"))
    inner *= jnp.einsum("nd,efd->nef", x, up, precision="highest")
    y_NED = jnp.einsum("nef,edf->ned", inner, down, precision="highest")
    scale_NE = (jax.nn.one_hot(ids, len(gate)) * scale[..., None]).sum(1)
    return (y_NED * scale_NE[..., None]).sum(1)


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def both(f, ids, args, g):
    """f's result and its gradients."""
    y, vjp = jax.vjp(partial(f, ids), *args)
    return y, vjp(g.astype(y.dtype))


def routed(ids, x, scale, weights) -> jax.Array:
    experts = jax.tree.leaves(weights)[-1].shape[0]
    block = block_rows(ids.size, experts)
    return routed_swiglu(x, scale, weights, plan_rows(ids, experts, block), block)[0]


def check(shape, dtypes, ids) -> None:
    args, g = inputs(shape, dtypes)
    got, want = both(routed, ids, args, g), both(dense, ids, args, g)
    assert got[0].dtype == args[0].dtype and [d.dtype for d in got[1][2]] == [w.dtype for w in args[2]]
    tolerance = 2e-6 if dtypes == ("float32", "float32") else 2**-5
    assert_close(got[0], want[0], tolerance)
    for one, other in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        assert_gradient_close(one, other, tolerance)


def check_all(shapes=SHAPES, all_dtypes=DTYPES) -> None:
    rng = np.random.default_rng(0)
    for shape in shapes:
        for dtypes in all_dtypes:
            for kind in KINDS:
                check(shape, dtypes, routing(kind, shape, rng))


def test_every_hostile_routing_gives_what_all_experts_would():
    check_all()


@settings(max_examples=40, deadline=None)
@given(st.data())
def check_random(data) -> None:
    shape = data.draw(st.sampled_from(SHAPES[1:]))
    experts = data.draw(st.lists(st.integers(0, shape[2]), min_size=shape[0], max_size=shape[0]))
    ids = (np.array(experts)[:, None] + np.arange(shape[1])) % (shape[2] + 1)  # distinct, `none` among them
    check(shape, DTYPES[0], ids.astype(np.int32))


def test_random_routings_give_what_all_experts_would():
    check_random()


def test_one_tokens_nan_reaches_no_other_token():
    (x, scale, weights), g = inputs(SHAPES[1], DTYPES[0])
    ids = routing("random", SHAPES[1], np.random.default_rng(1))
    y, (dx, dscale, dweights) = both(routed, ids, (x.at[7].set(jnp.nan), scale, weights), g)
    others = np.arange(len(x)) != 7
    assert np.isnan(y[7]).all() and np.isfinite(np.asarray(y)[others]).all()
    assert np.isfinite(np.asarray(dx)[others]).all() and np.isfinite(np.asarray(dscale)[others]).all()
    untouched = [e for e in range(SHAPES[1][2]) if e not in ids[7]]
    assert np.isfinite(np.asarray(dweights[0])[untouched]).all() and np.isnan(dweights[0][ids[7, 0]]).any()


def test_gates_too_large_for_an_exponential():
    (x, scale, weights), g = inputs(SHAPES[1], DTYPES[0])
    ids = routing("random", SHAPES[1], np.random.default_rng(2))
    for sign in (1, -1):
        args = x, scale, (sign * 1e3 * jnp.abs(weights[0]), *weights[1:])
        got, want = (both(f, ids, (jnp.abs(x) + 1, *args[1:]), g) for f in (routed, dense))
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert_gradient_close(one, other, 1e-5)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_are_read_in_their_stack_and_each_layers_gradients_written_where_its_part_lies(dtype, keep):
    """And so is, if asked, what the backward pass is to know of gate and up."""
    (x, scale, weights), g = inputs(SHAPES[2], DTYPES[0])
    weights = tuple(w.astype(dtype) for w in weights)
    ids = routing("random", SHAPES[2], np.random.default_rng(3))
    stacks = tuple(jnp.stack([w + 1, w, w - 1]) for w in weights)
    plan = plan_rows(jnp.asarray(ids), SHAPES[2][2], 8)

    @jax.jit
    def run(x, scale, stacks, through, g, into):
        def f(x, scale, stacks, through):
            triples = zip(stacks, through, strict=True)
            return routed_swiglu(
                x, scale, tuple(LayerWeight(PlainWeight(s), jnp.int32(1), t) for s, t in triples), plan, 8
            )

        (y, after), pull = jax.vjp(f, x, scale, stacks, through)
        into = tuple(c._replace(stack_LEOI=i) for c, i in zip(after, into, strict=True))  # what was kept goes back
        return y, after, pull((g, into))

    rows = plan.pair_of_R.size
    kept = [jnp.full((3, rows, s.shape[2]), 5, x.dtype) if keep else None for s in stacks[:2]] + [None]
    marks = tuple(Carrier(jnp.full_like(s, 7), k) for s, k in zip(stacks, kept, strict=True))
    y, after, (dx, dscale, dstacks, dthrough) = run(x, scale, stacks, marks, g, tuple(s * 0 + 3 for s in stacks))
    want = both(routed, ids, (x, scale, weights), g)
    of_weights = [np.asarray(c.stack_LEOI) for c in dthrough]
    assert_trees_equal((y, dx, dscale, tuple(d[1] for d in of_weights)), (want[0], *want[1]))
    assert_trees_equal([c.stack_LEOI for c in after], [c.stack_LEOI for c in marks])
    assert all(np.all(d[[0, 2]] == 3) for d in of_weights) and not any(np.any(d) for d in dstacks)
    for carrier in after[:2] if keep else ():
        others, mine = np.asarray(carrier.kept_LRO)[[0, 2]], np.asarray(carrier.kept_LRO)[1, : ids.size]
        assert (others == 5).all() and (mine != 5).all()


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_layers_weights_are_saved_or_cut_out_of_their_stack(remat):
    model, data = tiny(num_nextn_predict_layers=0), DataConfig(sequence_length=16, global_batch_size=2)
    trainer = make_trainer(RunConfig(model=model, data=data, train=TrainConfig(steps=2, remat=remat)))
    state = jax.eval_shape(trainer.init)
    rows = {name: jax.ShapeDtypeStruct((2, 16), jnp.int32) for name in ("tokens", "positions", "segment_ids")}
    batch = rows | {"targets": rows["tokens"]}
    step = make_train_step(trainer).lower(state, batch).compile(QUICK)
    expert = state.params["layers"]["softmax_moe"]["mlp"]["experts"]["gate_proj"]["weight"].shape
    made = f"= f32[{','.join(map(str, expert))}]"
    lines = [line for line in (step.as_text() or "").splitlines() if f"f32[{','.join(map(str, expert[1:]))}]" in line]
    assert not [line for line in lines if " dynamic-slice(" in line]
    copying = (" dynamic-update-slice(", " copy(")
    assert not [
        line for line in (step.as_text() or "").splitlines() if made in line and any(c in line for c in copying)
    ]
    # What experts keep for the backward pass, of two rows of 16 tokens.
    rows = padded_rows(
        32 * model.num_experts_per_tok, model.num_experts, block_rows(32 * model.num_experts_per_tok, model.num_experts)
    )
    kept = f"= f32[{expert[0]},{rows},{expert[2]}]"
    text = step.as_text() or ""
    assert (kept in text) == (remat == "none")
    assert not [line for line in text.splitlines() if kept in line and any(c in line for c in copying)]


# AdamW.


def check_adamw() -> None:
    """Against the formulas in float64: less than a vector, and more than one part of the work with a rest."""
    rule, rng = dict(b1=0.9, b2=0.95, eps=1e-8, decay=0.1), np.random.default_rng(0)
    clip, rate, mean_correction, square_correction = 0.7, 1e-3, 0.5, 0.1
    for count in (5, 70_001):
        before = [np.float32(a) for a in (*rng.normal(size=(3, count)), rng.uniform(size=count))]
        weight, gradient, mean, square = np.float64(before)
        mean = 0.1 * clip * gradient + 0.9 * mean
        square = 0.05 * (clip * gradient) ** 2 + 0.95 * square
        step = mean / mean_correction / (np.sqrt(square / square_correction) + 1e-8) + 0.1 * weight
        for ok, want in ((1, (weight - rate * step, mean, square)), (0, (before[0], *before[2:]))):
            scalars = np.array([clip, rate, mean_correction, square_correction, ok], np.float32)
            got = jax.jit(partial(native.adamw, **rule))(*before, scalars)
            for one, other in zip(got, want, strict=True):
                assert_gradient_close(one, other, 1e-6)


def test_adamw_gives_its_formulas():
    check_adamw()


def updates(trainer, gradients, apply):
    """Parameters and the optimizer's state after steps with `gradients`, the third of which is not ok."""
    state = trainer.new_state()
    params, optimizer = state.params, state.optimizer
    for i, grads in enumerate(gradients):
        params, optimizer = jax.jit(apply)(params, optimizer, grads, optax.tree.norm(grads), jnp.bool_(i != 2))
    return params, optimizer


def run_config(**changes) -> RunConfig:
    schedule = ScheduleConfig(peak_lr=0.02, warmup_steps=3)
    return RunConfig(model=small(), schedule=schedule, train=TrainConfig(steps=9), **changes)


def test_adamw_equals_optax_clipped_or_not_and_a_step_that_is_not_ok_changes_nothing():
    trainer = make_trainer(run_config(), jax.devices()[:1])
    rng = np.random.default_rng(0)
    params = trainer.new_state().params
    sizes = (10.0, 1e-4, 1.0, 10.0, 1e-4)
    gradients = [jax.tree.map(lambda p, s=s: jnp.asarray(rng.normal(size=p.shape) * s, p.dtype), params) for s in sizes]
    (got, got_state), (want, want_state) = (
        updates(trainer, gradients, apply) for apply in (trainer.update, trainer.update.in_optax)
    )
    assert got_state[1].count == want_state[1].count == got_state[3].count == 4
    for one, other in zip(jax.tree.leaves((got, got_state)), jax.tree.leaves((want, want_state)), strict=True):
        assert_gradient_close(one, other, 1e-6)


@pytest.mark.parametrize(
    ("changes", "in_cpp"),
    [
        ({}, True),
        ({"optimizer": OptimizerConfig(eight_bit=True)}, False),
        ({"optimizer": OptimizerConfig(mu_dtype="bfloat16")}, False),
        ({"mesh": MeshConfig(data=2)}, False),
    ],
    ids=["plain", "8 bits", "bfloat16 moment", "two devices"],
)
def test_adamw_is_in_cpp_for_float32_on_one_device(changes, in_cpp):
    config = run_config(**changes)
    trainer = make_trainer(config, jax.devices()[: 1 + config.mesh.data - 1])
    state = jax.eval_shape(trainer.init)
    args = state.params, state.optimizer, state.params, jnp.float32(1), jnp.bool_(True)
    assert ("ling_adamw" in jax.jit(trainer.update).lower(*args).as_text()) == in_cpp
