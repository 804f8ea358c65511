"""AdamW and the learning rate are what the report says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ling_jax.config import OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from ling_jax.train.optimizer import decays, learning_rate, make_optimizer
from ling_jax.train.state import make_trainer
from tests.support.helpers import assert_close, assert_gradient_close, jit, random_weights, tiny

SHAPES = {"matrix": (5, 3), "stacked norms": (4, 6), "experts": (2, 3, 4), "vector": (7,)}
AXES = {"matrix": ("out", "in"), "stacked norms": ("hidden",), "experts": ("expert", "out", "in"), "vector": ("out",)}
CONFIG = OptimizerConfig(weight_decay=0.1, clip_norm=1.0, eps=1e-6)
RATE = learning_rate(ScheduleConfig(peak_lr=0.05, warmup_steps=3), 100)


def noise(seed: int, size: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (size * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


def adamw_by_hand(params, gradients):
    """(parameters, first and second moments) after steps with these gradients, in float64."""
    params = {name: p.astype(np.float64) for name, p in params.items()}
    first, second = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    for step, grads in enumerate(gradients, 1):
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
        for name, p in params.items():
            g = grads[name] * min(1, 1.0 / norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            update = first[name] / (1 - 0.9**step) / (np.sqrt(second[name] / (1 - 0.95**step)) + 1e-6)
            if name in ("matrix", "experts"):
                update += 0.1 * p
            params[name] = p - 0.05 * min(1, step / 3) * update
    return params, first, second


def test_steps_equal_adamw_by_hand_with_clipping_and_decay_of_matrices_only():
    """The second gradient is below the clipping norm, the others above."""
    params, gradients = noise(0, 1), [noise(1, 2), noise(2, 0.01), noise(3, 5), noise(4, 1)]
    optimizer = make_optimizer(CONFIG, RATE, decays(params, AXES))

    @jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    want, first, second = adamw_by_hand(params, gradients)
    state = optimizer.init(params)
    for grads in gradients:
        params, state = step(params, state, grads)
    for name in SHAPES:
        assert_close(params[name], want[name])
        assert_gradient_close(state[1].mu[name], first[name])
        assert_gradient_close(state[1].nu[name], second[name])


def test_stacks_of_vectors_are_no_matrices():
    assert decays(noise(0, 1), AXES) == {"matrix": True, "stacked norms": False, "experts": True, "vector": False}


def test_of_a_model_weight_decay_touches_every_matrix_and_nothing_else():
    """Where gradients are 0, the update is the decay alone."""
    config = tiny(use_bias=True, use_qkv_bias=True)
    schedule = ScheduleConfig(peak_lr=0.5, warmup_steps=0)
    trainer = make_trainer(RunConfig(model=config, schedule=schedule))
    _, params, _ = random_weights(config)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jit(lambda g, p: trainer.optimizer.update(g, trainer.optimizer.init(p), p))(zeros, params)
    updates, params = flatten_dict(updates), flatten_dict(params)
    vectors = {path for path in params if "norm" in path[-2] or path[-1] == "bias"}
    assert len(vectors) == 6 + 6 + 9 + 1  # dense stack, MoE stack, MTP layer, final norm
    for path, update in updates.items():
        assert_close(update, 0 * params[path] if path in vectors else -0.5 * 0.1 * params[path])


def test_moments_are_float32_for_bfloat16_parameters():
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), noise(0, 1))
    state = make_optimizer(CONFIG, RATE, decays(params, AXES)).init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves((state[1].mu, state[1].nu))} == {jnp.dtype(jnp.float32)}


# The schedule.


def rates(schedule: ScheduleConfig, steps: int) -> np.ndarray:
    return np.asarray(learning_rate(schedule, steps)(jnp.arange(steps)))


def test_warmup_is_linear_from_its_first_update_and_then_constant():
    got = rates(ScheduleConfig(peak_lr=0.2, warmup_steps=4), 10)
    np.testing.assert_allclose(got, [0.05, 0.1, 0.15] + [0.2] * 7, rtol=1e-6)


def test_without_warmup_the_first_update_has_the_peak():
    np.testing.assert_allclose(rates(ScheduleConfig(peak_lr=0.2, warmup_steps=0), 3), [0.2] * 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("decay", "shares"),
    [
        ("linear", [0.75, 0.5, 0.25, 0]),
        ("cosine", [0.5 + 0.5 * np.cos(np.pi / 4), 0.5, 0.5 - 0.5 * np.cos(np.pi / 4), 0]),
        ("sqrt", [0.5, 1 - np.sqrt(0.5), 1 - np.sqrt(0.75), 0]),
    ],
)
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_the_decay_takes_the_last_part_of_the_run_down_to_the_final_rate(decay, shares, final):
    schedule = ScheduleConfig(peak_lr=2.0, warmup_steps=1, decay_fraction=0.4, decay=decay, final_lr_fraction=final)
    want = [2.0] * 6 + [2 * (final + (1 - final) * share) for share in shares]
    np.testing.assert_allclose(rates(schedule, 10), want, rtol=1e-5, atol=1e-6)


def test_without_a_decay_fraction_the_rate_stays_at_the_peak_to_the_end():
    assert (rates(ScheduleConfig(peak_lr=0.2, warmup_steps=0, final_lr_fraction=0.1), 8) == np.float32(0.2)).all()


def test_the_published_optimizer_is_the_default():
    assert (OptimizerConfig().b1, OptimizerConfig().b2) == (0.9, 0.95)
    assert (OptimizerConfig().weight_decay, OptimizerConfig().clip_norm) == (0.1, 1.0)
    assert TrainConfig().init_std == 0.006 and TrainConfig().bias_update_rate == 1e-3
