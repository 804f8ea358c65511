"""AdamW and the learning-rate schedule, from optax; and how an update is applied, on CPU in one pass over memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from ling_jax.config import OptimizerConfig, ScheduleConfig
from ling_jax.kernels import native
from ling_jax.kernels.choose import by_platform
from ling_jax.train.adam8 import Coded, scale_by_adam_8bit
from ling_jax.train.fp8 import module_of
from ling_jax.train.rounding import apply_updates


def learning_rate(config: ScheduleConfig, steps: int) -> optax.Schedule:
    """Linear warmup from 0 from `first_step` on, constant, then the decay over the last `decay_fraction` of `steps`.

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
        if config.first_step:
            warm = jnp.clip((count - config.first_step) / config.warmup_steps, 0.0, 1.0) if config.warmup_steps else 1.0
        if not decay_steps:  # the number of steps is then no part of the program: a longer run compiles nothing anew
            return warm * peak
        share = jnp.clip((count - (steps - decay_steps)) / max(decay_steps, 1), 0.0, 1.0)
        return warm * (final + (peak - final) * shapes[config.decay](share))

    return schedule


def decays(params: dict, axes: dict) -> dict:
    """Which parameters weight decay touches: matrices only (spec 4.2). A parameter's own dims are the axes
    it was made with, so a stack of norm vectors is no matrix."""
    return jax.tree.map(lambda _, names: len(names) >= 2, params, axes)


def trained_modules(shapes: dict, patterns: Sequence[str]) -> dict | None:
    """Which parameters `train.only` leaves to be trained, a bool for each; None for all of them.

    Raises:
      ValueError: for a pattern that matches no module, with the modules' names.
    """
    if not patterns:
        return None
    names = {path: module_of(path) for path in flatten_dict(shapes)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names.values()):
            raise ValueError(f"train.only: {pattern!r} matches none of {', '.join(dict.fromkeys(names.values()))}")
    return unflatten_dict({path: any(fnmatchcase(n, pattern) for pattern in patterns) for path, n in names.items()})


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


@dataclass(frozen=True, eq=False)
class OptimizerUpdate:
    """Applies an optimizer's update; where a step is not `ok`, everything stays as it was."""

    optimizer: optax.GradientTransformation
    config: OptimizerConfig
    schedule: optax.Schedule
    mask: dict  # as `make_optimizer` has it
    one_device: bool
    seed: int  # of the rounding of bfloat16 parameters
    trained: dict | None = None  # as `trained_modules` has it: the others stay as they are, their moments too

    def __call__(self, params: dict, state: Any, grads: dict, norm: jax.Array, ok: jax.Array) -> tuple[dict, Any]:
        """Parameters and the optimizer's state after a step with `grads`, whose global norm is `norm`."""
        args = params, state, grads, norm, ok
        if not self._for_cpp(params, state):
            return self.in_optax(*args)
        return by_platform(*args, cpu=partial(_on_cpu, update=self), rest=self.in_optax)

    def _for_cpp(self, params: dict, state: Any) -> bool:
        """XLA makes three passes of an update, with copies of both moments. XLA cannot split our call over a mesh."""
        floats = [a.dtype for a in jax.tree.leaves((params, state)) if jnp.issubdtype(a.dtype, jnp.floating)]
        return self.one_device and not self.config.eight_bit and all(dtype == jnp.float32 for dtype in floats)

    def in_optax(self, params: dict, state: Any, grads: dict, norm: jax.Array, ok: jax.Array) -> tuple[dict, Any]:
        updates, new_state = self.optimizer.update(grads, state, params)
        new = apply_updates(params, updates, self.seed, state[-1].count), new_state
        new = jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, (params, state))
        if self.trained is None:
            return new
        is_coded = dict(transform_non_params=lambda _: True, is_leaf=lambda x: isinstance(x, Coded))
        of_state = optax.tree_utils.tree_map_params(self.optimizer, lambda _, t: t, state, self.trained, **is_coded)
        return jax.tree.map(lambda t, new, old: new if t else old, (self.trained, of_state), new, (params, state))

    def in_cpp(self, params: dict, state: Any, grads: dict, norm: jax.Array, ok: jax.Array) -> tuple[dict, Any]:
        """Kingma and Ba's Adam, algorithm 1 (arXiv 1412.6980), with decoupled weight decay (arXiv 1711.05101)."""
        config, (clip, adam, decay, rate) = self.config, state
        count = adam.count + 1
        scalars = (
            jnp.where(norm < config.clip_norm, 1.0, config.clip_norm / norm),
            self.schedule(rate.count),
            1 - config.b1**count,
            1 - config.b2**count,
            ok,
        )
        scalars = jnp.stack([jnp.asarray(s, jnp.float32) for s in scalars])

        def leaf(weight, gradient, mean, square, decays, trained):
            if not trained:
                return weight, mean, square
            gradient, strength = gradient.astype(jnp.float32), config.weight_decay if decays else 0.0
            rule = dict(b1=config.b1, b2=config.b2, eps=config.eps, decay=strength)
            return native.adamw(weight, gradient, mean, square, scalars, **rule)

        trained = jax.tree.map(lambda _: True, self.mask) if self.trained is None else self.trained
        done = jax.tree.map(leaf, params, grads, adam.mu, adam.nu, self.mask, trained)
        params, mu, nu = (jax.tree.map(lambda _, new, i=i: new[i], params, done) for i in range(3))
        one = ok.astype(jnp.int32)
        state = (
            clip,
            adam._replace(count=adam.count + one, mu=mu, nu=nu),
            decay,
            rate._replace(count=rate.count + one),
        )
        return params, state


def _in_cpp(*args: Any, update: OptimizerUpdate) -> tuple[dict, Any]:
    return update.in_cpp(*args)


def _in_optax(*args: Any, update: OptimizerUpdate) -> tuple[dict, Any]:
    return update.in_optax(*args)


_on_cpu = native.or_else("adamw", _in_cpp, _in_optax)
