"""Parameters in bfloat16 learn as float32 ones do: vectors stay float32, matrices are rounded stochastically, and a
run's bits depend on its settings alone.

The long comparison is `python -m scripts.bf16_parameters`.
"""

import re
from contextlib import closing, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from ling_jax import load_pretrained
from ling_jax.checkpoint import Checkpointer, read_arrays, read_shapes
from ling_jax.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from ling_jax.convert.tensorfile import TensorFile
from ling_jax.convert.to_hf import to_hf
from ling_jax.kernels.rows import table_rows
from ling_jax.model.model import split_model
from ling_jax.parallel.mesh import make_mesh
from ling_jax.saver import RunSaver
from ling_jax.train.metrics import read_metrics
from ling_jax.train.rounding import apply_updates, random_bits, to_bfloat16
from ling_jax.train.state import Trainer, TrainState, make_trainer
from ling_jax.train.step import make_train_step
from scripts.bf16_parameters import rounded_to_nearest
from tests.support.adam8 import V, batches, placed
from tests.support.commands import call
from tests.support.helpers import (
    QUICK,
    assert_close,
    assert_gradients_close,
    assert_trees_equal,
    jit,
    random_weights,
    small,
    tiny,
)
from tests.support.meshes import SPARSE
from tests.support.meshes import Run as MeshRun
from tests.tiny_run import SPARSE as ONE_LAYER
from tests.tiny_run import numbers, train_args

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
PARAM_DTYPE = dict(train__param_dtype="bfloat16")


def neighbours(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bfloat16 values, as float64, on both sides of float32 values: towards zero, and away from it."""
    upper_half = x.view(np.uint32) & np.uint32(0xFFFF0000)
    toward, away = upper_half, upper_half + np.uint32(0x10000)
    return tuple(half.view(np.float32).astype(np.float64) for half in (toward, away))


# Rounding.


def test_the_mean_of_many_roundings_is_the_number():
    """Within five standard errors, for numbers of both signs over twenty powers of two."""
    draws = 4096
    rng = np.random.default_rng(0)
    x = (rng.normal(size=200) * 2.0 ** rng.integers(-10, 10, 200)).astype(np.float32)
    keys = jnp.arange(draws, dtype=jnp.uint32)
    rounded = jit(jax.vmap(lambda key: to_bfloat16(jnp.asarray(x), random_bits(x.shape, key))))(keys)
    rounded = np.asarray(rounded, np.float64)
    toward, away = neighbours(x)
    assert ((rounded == toward) | (rounded == away)).all()
    share = (x - toward) / (away - toward)
    error = (rounded.mean(0) - x) / (np.abs(away - toward) * np.sqrt(share * (1 - share) / draws) + 1e-30)
    assert np.abs(error).max() < 5


@pytest.mark.parametrize("bits", [0, 2**32 - 1, 2**16 - 1])
def test_what_bfloat16_holds_stays_as_it_is_whatever_the_bits(bits):
    exact = np.array([0.0, -0.0, 1.0, -1.0, 2.0**-126, 2.0**-130, 3.3895314e38, np.inf, -np.inf, np.nan], np.float32)
    got = jit(to_bfloat16)(exact, jnp.full(exact.shape, bits, jnp.uint32))
    np.testing.assert_array_equal(np.asarray(got, np.float32).view(np.uint32), exact.view(np.uint32))


def test_the_bits_of_all_places_and_keys_are_unlike_one_another():
    """Each bit is set half of the time, and no neighbour in a row, a column, a layer or the next key tells it."""
    make = jit(partial(random_bits, (4, 32, 512)))
    fields = np.stack([np.asarray(make(np.uint32(key))) for key in (7, 8)])
    upper = (fields >> 16).astype(np.float64) / 2**16 - 0.5  # what rounding uses
    assert np.unique(fields).size > 0.9999 * fields.size
    for bit in range(16, 32):
        assert abs(((fields >> bit) & 1).mean() - 0.5) < 0.01
    for axis in range(upper.ndim):
        size = upper.shape[axis]
        a, b = (np.take(upper, range(*ends), axis).ravel() for ends in ((0, size - 1), (1, size)))
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.03


def test_seed_count_and_path_choose_the_bits():
    """Nothing else does: the same call gives the same weights."""
    params = {"a": jnp.ones((8, 64), jnp.bfloat16), "b": jnp.ones((8, 64), jnp.bfloat16)}
    updates = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3, jnp.float32), params)
    apply = jit(apply_updates, static_argnums=2)
    first, again = (apply(params, updates, 3, jnp.int32(5)) for _ in range(2))
    assert_trees_equal(first, again)
    others = [first["b"], apply(params, updates, 4, jnp.int32(5))["a"], apply(params, updates, 3, jnp.int32(6))["a"]]
    for other in others:
        assert 0.2 < (np.asarray(first["a"]) != np.asarray(other)).mean() < 0.5  # 13% of 1e-3's steps go up: 22% differ


DIMS = {
    "experts": ((3, 4, 8, 16), (None, "expert", "tensor", "fsdp")),
    "head": ((64, 16), ("tensor", ("expert", "fsdp"))),
    "whole": ((8, 16), (None, None)),
}


def test_a_mesh_rounds_to_one_devices_bits_and_sends_nothing():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for name, (shape, _) in DIMS.items()}
    updates = {name: jnp.asarray(1e-3 * rng.normal(size=shape), jnp.float32) for name, (shape, _) in DIMS.items()}
    places = {name: NamedSharding(mesh, PartitionSpec(*spec)) for name, (_, spec) in DIMS.items()}
    here = NamedSharding(mesh, PartitionSpec())
    sharded = jit(
        lambda params, updates, count: apply_updates(params, updates, 0, count),
        in_shardings=(places, places, here),
        out_shardings=places,
    )
    program = sharded.lower(params, updates, jnp.int32(0)).compile().as_text()
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", program)
    for count in (0, 1):
        want = jit(lambda *args: apply_updates(*args[:2], 0, args[2]))(params, updates, jnp.int32(count))
        got = sharded(params, updates, jnp.int32(count))
        assert_trees_equal(jax.device_get(got), jax.device_get(want))


# States and steps.


def config_of(param_dtype: str = "bfloat16", eight_bit: bool = False, **train: Any) -> RunConfig:
    return RunConfig(
        model=tiny(vocab_size=V, hidden_size=64, moe_intermediate_size=64, num_hidden_layers=1,
                   first_k_dense_replace=0, num_nextn_predict_layers=0),
        data=DataConfig(sequence_length=32, global_batch_size=16),
        optimizer=OptimizerConfig(eight_bit=eight_bit),
        schedule=ScheduleConfig(peak_lr=1e-3, warmup_steps=10),
        train=TrainConfig(**{"remat": "none", "init_std": 0.3, "param_dtype": param_dtype, **train}),
    )  # fmt: skip


def dtypes_of(params: Any) -> tuple[set, set]:
    """(of vectors, of matrices), by the names of their modules."""
    flat = flatten_dict(params)
    vectors = {path for path in flat if "norm" in path[-2] or path[-1] == "bias"}
    assert vectors and len(vectors) < len(flat)
    return tuple({np.dtype(flat[path].dtype) for path in paths} for paths in (vectors, flat.keys() - vectors))


@pytest.mark.parametrize("source", ["new", "float32", "bfloat16"])
def test_vectors_are_float32_and_matrices_bfloat16_wherever_the_weights_come_from(source):
    model = small(use_bias=True, use_qkv_bias=True)
    trainer = make_trainer(RunConfig(model=model, train=TrainConfig(param_dtype="bfloat16")))
    if source == "new":
        state = jax.eval_shape(trainer.init)
    else:
        _, params, bias = random_weights(model, param_dtype=source)
        state = jax.eval_shape(trainer.new_state_from, params, bias)
    assert dtypes_of(state.params) == ({F32}, {BF16})
    assert {leaf.dtype for leaf in jax.tree.leaves(state.bias)} == {F32}
    assert {leaf.dtype for leaf in jax.tree.leaves((state.optimizer[1].mu, state.optimizer[1].nu))} == {F32}


@cache
def compiled(rounding: str, **options: Any) -> tuple[Trainer, Any]:
    """A trainer and its step; `rounding` is none (float32), stochastic, or nearest."""
    trainer = make_trainer(config_of("float32" if rounding == "none" else "bfloat16", **options))
    with rounded_to_nearest() if rounding == "nearest" else nullcontext():
        step = make_train_step(trainer).lower(placed(trainer), batches(0, 1)[0]).compile(compiler_options=QUICK)
    return trainer, step


@cache
def train(rounding: str, steps: int, **options: Any) -> tuple[TrainState, np.ndarray]:
    """The state after the steps, and each one's loss."""
    trainer, step = compiled(rounding, **options)
    state, losses = trainer.new_state(), []
    for batch in batches(0, steps):
        state, metrics = step(state, batch)
        losses.append(metrics["train/loss"])
    return state, np.asarray(jax.device_get(losses))


STEPS = 60


def test_sixty_steps_learn_as_in_float32_and_rounded_to_the_nearest_they_do_not():
    found = {rounding: train(rounding, STEPS) for rounding in ("none", "stochastic", "nearest")}
    first = found["none"][1][0]
    learnt = {name: first - losses[-10:].mean() for name, (_, losses) in found.items()}
    print({name: f"{value:.4f}" for name, value in learnt.items()})
    assert learnt["none"] > 0.5
    assert abs(learnt["stochastic"] / learnt["none"] - 1) < 0.02
    assert learnt["nearest"] < 0.9 * learnt["none"]


def test_norms_move_as_in_float32():
    exact, rounded = (flatten_dict(jax.device_get(train(how, STEPS)[0].params)) for how in ("none", "stochastic"))
    for path, want in exact.items():
        if "norm" in path[-2]:
            got = rounded[path]
            assert got.dtype == np.float32 and (got != 1).all()
            assert np.corrcoef((got - 1).ravel(), (want - 1).ravel())[0, 1] > 0.9, path


@pytest.mark.parametrize("microbatches", [1, 2])
def test_losses_and_norms_are_logged_in_float32(microbatches):
    trainer = make_trainer(config_of(microbatches=microbatches))
    metrics = jax.eval_shape(make_train_step(trainer), placed(trainer), batches(0, 1)[0])[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(metrics) if leaf.dtype.kind != "i"} == {F32}


@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(eight_bit):
    trainer = make_trainer(config_of(eight_bit=eight_bit))
    state = trainer.new_state()
    grads = jax.tree.map(lambda p: jnp.full(p.shape, jnp.nan, p.dtype), state.params)
    got = jit(trainer.update)(state.params, state.optimizer, grads, jnp.float32(jnp.nan), jnp.bool_(False))
    assert_trees_equal(jax.device_get(got), jax.device_get((state.params, state.optimizer)))


@pytest.mark.nightly
def test_eight_bit_moments_and_bfloat16_parameters_learn_together():
    """Four bytes a parameter."""
    losses = train("stochastic", STEPS, eight_bit=True)[1]
    want = train("none", STEPS)[1]
    assert abs((losses[0] - losses[-10:].mean()) / (want[0] - want[-10:].mean()) - 1) < 0.03


def test_the_gradient_of_a_table_is_summed_in_float32():
    """A token that is in the batch 4,000 times: in bfloat16 the sum would stand still at 256."""
    table = jnp.ones((3, 2), jnp.bfloat16)
    index = jnp.full(4000, 1)
    grads = jit(jax.grad(lambda t: table_rows(t, index, jnp.dtype(jnp.float32)).sum()))(table)
    assert grads.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(grads, np.float32), [[0, 0], [4000, 4000], [0, 0]])


@pytest.mark.nightly
def test_over_a_mesh_a_step_gives_one_devices_numbers_but_for_the_rounding_of_gradients():
    """The bits are the same, so that nearly equal sums are rounded to the same number, but for few. Where a gradient is
    nearly 0, Adam's first step may have the other sign."""
    bf16 = dict(param_dtype="bfloat16")
    (_, grads, want, want_metrics), (_, got_grads, got, metrics) = (
        MeshRun(SPARSE, MeshConfig(**mesh), **bf16).outcome() for mesh in ({}, dict(fsdp=2, expert=2, tensor=2))
    )
    assert_close(metrics["train/total_loss"], want_metrics["train/total_loss"])
    assert metrics["train/grad_norm"] == pytest.approx(want_metrics["train/grad_norm"], rel=1e-2)
    assert_gradients_close(got_grads, grads, 2.0**-6)
    twice = 2 * 0.01 / 4  # of the rate of the first of four warmup steps
    for path, value in flatten_dict(want.params).items():
        a, b = (np.asarray(tree, np.float32) for tree in (value, flatten_dict(got.params)[path]))
        assert np.abs(a - b).max() <= twice + 2.0**-7 * np.abs(a).max()
        assert (a == b).mean() > 0.9 or value.dtype == F32, path


# Checkpoints and commands.


@pytest.mark.nightly
def test_a_run_starts_and_resumes_with_the_bits_of_one_that_went_through(tmp_path):
    settings = dict(**ONE_LAYER, **PARAM_DTYPE, checkpoint__every=4, train__eval_every=4)
    call("train.py", *train_args(tmp_path, "whole", **settings, train__steps=8))
    call("train.py", *train_args(tmp_path, "halves", **settings, train__steps=4))
    _, log = call("train.py", *train_args(tmp_path, "halves", **settings, train__steps=8))
    assert "resuming from step 4" in log
    whole, halves = tmp_path / "runs" / "whole", tmp_path / "runs" / "halves"
    assert numbers(read_metrics(halves)) == numbers(read_metrics(whole))
    assert_trees_equal(read_arrays(halves), read_arrays(whole))
    assert dtypes_of(read_shapes(whole)["params"]) == ({F32}, {BF16})
    exported(whole, tmp_path / "hf")


def exported(source: Path, target: Path) -> None:
    """An export that keeps dtypes has those the run was trained in."""
    to_hf(str(source), str(target))
    tensors = TensorFile(target / "model.safetensors").tensors
    assert {t.dtype for name, t in tensors.items() if "norm" in name or "expert_bias" in name} == {"F32"}
    assert {t.dtype for name, t in tensors.items() if "norm" not in name and "expert_bias" not in name} == {"BF16"}
    found, saved = (split_model(load_pretrained(folder))[1:] for folder in (target, source))
    assert_trees_equal(found, saved)


def test_a_run_whose_norms_were_saved_in_bfloat16_goes_on(tmp_path):
    """As versions before this rounding saved them."""
    trainer = make_trainer(config_of())
    state = trainer.new_state()
    old = state._replace(params=jax.tree.map(lambda p: p.astype(jnp.bfloat16), state.params))
    with closing(Checkpointer(str(tmp_path), CheckpointConfig())) as checkpointer:
        saver = RunSaver(checkpointer, trainer.config)
        saver.save(old)
        saver.wait()
        assert_trees_equal(jax.device_get(saver.restore(trainer)), jax.device_get(state))
