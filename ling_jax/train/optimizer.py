"""AdamW and the learning-rate schedule, from optax."""

import math

import jax
import jax.numpy as jnp
import optax

from ling_jax.config import OptimizerConfig, ScheduleConfig
from ling_jax.train.adam8 import scale_by_adam_8bit


def learning_rate(config: ScheduleConfig, steps: int) -> optax.Schedule:
    """Linear warmup from 0, constant, then the decay over the last `decay_fraction` of `steps`.

    The value at step 0 is that of the first update, 1/warmup_steps of the peak (report, section 3.2.1; WSM
    runs have no decay, section 3.2.3).
    """
    peak, final = config.peak_lr, config.peak_lr * config.final_lr_fraction
    decay_steps = round(config.decay_fraction * steps)
    shapes = {
        "linear": lambda share: 1 - share,
        "cosine": lambda share: 0.5 * (1 + jnp.cos(math.pi * share)),
        "sqrt": lambda share: 1 - jnp.sqrt(share),
    }

    def schedule(count):
        count = jnp.asarray(count, jnp.float32) + 1
        warm = jnp.minimum(count / max(config.warmup_steps, 1), 1.0)
        if not decay_steps:  # the number of steps is then no part of the program: a longer run compiles nothing anew
            return warm * peak
        share = jnp.clip((count - (steps - decay_steps)) / max(decay_steps, 1), 0.0, 1.0)
        return warm * (final + (peak - final) * shapes[config.decay](share))

    return schedule


def decays(params: dict, axes: dict) -> dict:
    """Which parameters weight decay touches: matrices only (spec 4.2). A parameter's own dims are the axes
    it was made with, so a stack of norm vectors is no matrix."""
    return jax.tree.map(lambda _, names: len(names) >= 2, params, axes)


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, mask: dict, blocks: dict | None = None
) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW; `mask` is `decays` of the parameters, `blocks` are their `adam8.block_dims`,
    which 8-bit moments need."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.mu_dtype)
    if config.eight_bit:
        assert blocks is not None
        adam = scale_by_adam_8bit(config.b1, config.b2, config.eps, blocks)
    return _in_float32(
        optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            adam,
            optax.add_decayed_weights(config.weight_decay, mask),
            optax.scale_by_learning_rate(schedule),
        )
    )


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on float32 copies, so that its second moment is float32 whatever the parameters are (optax makes it in
    their dtype)."""

    def widen(tree):
        return jax.tree.map(lambda a: a.astype(jnp.float32), tree)

    def update(updates, state, params=None):
        return inner.update(widen(updates), state, widen(params))

    return optax.GradientTransformation(lambda params: inner.init(widen(params)), update)
