"""The weights of a merge: what the curves say, and that it ends where a decay does."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ling_jax.checkpoint import read_meta
from ling_jax.config import ScheduleConfig
from ling_jax.convert.merge import merge
from ling_jax.convert.merge_weights import CURVES, checkpoint_weights, update_weights, weights_of_updates
from ling_jax.train.optimizer import learning_rate
from tests.support.checkpoints import Arrays, result, weights_at, write_run

EPSILON = np.finfo(np.float32).eps


def test_linear_decay_is_the_uniform_mean_with_equal_gaps_however_many_tokens_were_seen():
    for count in (2, 8, 32):
        tokens = [19 * 10**12 + 7 * 10**9 * i for i in range(count)]
        w = update_weights("linear", tokens)
        np.testing.assert_array_equal(w, 1 - np.arange(1, count) / count)
        np.testing.assert_allclose(checkpoint_weights(w), 1 / count, rtol=1e-14)


@pytest.mark.parametrize("decay", CURVES)
def test_unequal_gaps_count_by_tokens(decay):
    """Checkpoints at 0, 10 and 40: the decay ends 20 later, at 60."""
    np.testing.assert_allclose(update_weights(decay, [5, 15, 45]), CURVES[decay](np.array([1 / 6, 2 / 3])), rtol=1e-15)
    assert not np.allclose(update_weights(decay, [5, 15, 45]), update_weights(decay, [5, 25, 45]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_weights_of_updates_and_of_checkpoints_are_two_ways_to_say_one_thing(values):
    w = np.sort(values)[::-1]
    c = checkpoint_weights(w)
    assert len(c) == len(w) + 1 and (c >= 0).all() and math.isclose(c.sum(), 1, rel_tol=1e-12)
    np.testing.assert_allclose(weights_of_updates(c), w, atol=1e-14)
    np.testing.assert_allclose(checkpoint_weights(weights_of_updates(c)), c, atol=1e-14)
    points = np.random.default_rng(0).normal(size=len(c))  # both sides of the equation
    assert math.isclose(points[0] + w @ np.diff(points), c @ points, abs_tol=1e-12)


def test_a_run_whose_batch_changed_is_weighted_by_the_tokens_it_has_seen(tmp_path):
    """Rows that were read count; an older checkpoint, which does not say how many, stands for its settings."""
    states = {step: weights_at(step) for step in (10, 20, 30)}
    write_run(tmp_path / "run", {10: states[10]}, data={"next_step": 10})
    write_run(tmp_path / "run", {20: states[20]})
    write_run(tmp_path / "run", {30: states[30]}, data={"next_step": 30, "next_row": 80 + 10 * 12})
    merge(str(tmp_path / "run"), str(tmp_path / "merged"), last=3)
    lineage = read_meta(tmp_path / "merged")["merge"]
    assert lineage["tokens"] == [32 * 40, 32 * 80, 32 * 200]
    done = [40 / 160 * 2 / 3, 2 / 3]
    np.testing.assert_allclose(lineage["weights"], [done[0], done[1] - done[0], 1 - done[1]], rtol=1e-12)


# What it stands for.


class Adam:
    """AdamW in numpy, float32."""

    def __init__(self, params: Arrays, decay: float = 0.0):
        self.params, self.decay, self.count = params, decay, 0
        self.mu, self.nu = ({path: np.zeros_like(p) for path, p in params.items()} for _ in range(2))

    def step(self, gradients: Arrays, rate: float) -> Arrays:
        """Takes a step; returns what was added."""
        self.count += 1
        updates = {}
        for path, g in gradients.items():
            self.mu[path] = np.float32(0.9) * self.mu[path] + np.float32(0.1) * g
            self.nu[path] = np.float32(0.95) * self.nu[path] + np.float32(0.05) * g * g
            mean = self.mu[path] / np.float32(1 - 0.9**self.count)
            square = self.nu[path] / np.float32(1 - 0.95**self.count)
            step = mean / (np.sqrt(square) + np.float32(1e-8)) + np.float32(self.decay) * self.params[path]
            updates[path] = np.float32(-rate) * step
        self.params = {path: p + updates[path] for path, p in self.params.items()}
        return updates


def normal(draw: np.random.Generator, like: Arrays) -> Arrays:
    return {path: draw.normal(size=a.shape).astype(np.float32) for path, a in like.items()}


def assert_within(got: Arrays, want: Arrays, steps: int) -> None:
    """Up to the rounding of this many steps."""
    for path in got:
        error = np.abs(got[path].astype(np.float64) - want[path]).max()
        assert error <= EPSILON * math.sqrt(steps) * np.abs(want[path]).max(), (path, error)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[Path, Arrays, list[Arrays]]:
    """A run of 400 steps of AdamW, saved after each fiftieth; where it began, the sums of the updates between."""
    draw, adam = np.random.default_rng(0), Adam(weights_at(0), decay=0.1)
    states, sums = {1: adam.params}, []
    for step in range(400):
        if step % 50 == 0:
            sums.append({path: np.zeros(a.shape) for path, a in adam.params.items()})
        for path, update in adam.step(normal(draw, adam.params), 1e-3).items():
            sums[-1][path] += update
        if step % 50 == 49:
            states[step + 2] = adam.params
    return write_run(tmp_path_factory.mktemp("recorded") / "run", states), states[1], sums


@pytest.mark.parametrize("decay", CURVES)
def test_it_is_the_oldest_checkpoint_and_its_weighted_updates(recorded, tmp_path, decay):
    source, first, sums = recorded
    merge(str(source), str(tmp_path / "merged"), last=9, decay=decay)
    w = CURVES[decay](np.arange(1, 9) / 9)
    want = {p: a + sum(weight * s[p] for weight, s in zip(w, sums, strict=True)) for p, a in first.items()}
    assert_within(result(tmp_path / "merged"), want, 400)


STEADY, K = 12, 7  # steps until the first checkpoint, and checkpoints after it


@pytest.fixture(scope="module")
def gradients() -> Arrays:
    return normal(np.random.default_rng(1), weights_at(0))


@pytest.fixture(scope="module")
def trunk(gradients, tmp_path_factory) -> tuple[Path, Arrays]:
    """A run with constant gradients and a constant rate, without weight decay or clipping; and where it ended."""
    adam, states = Adam(weights_at(0)), {}
    for step in range(1, STEADY + K + 1):
        adam.step(gradients, 1e-2)
        if step >= STEADY:
            states[step] = adam.params
    return write_run(tmp_path_factory.mktemp("trunk") / "run", states), adam.params


@pytest.mark.parametrize("decay", CURVES)
def test_with_constant_gradients_a_run_that_decays_ends_where_the_merge_does(gradients, trunk, tmp_path, decay):
    """The rates are those of our schedule, the last of which is 0."""
    total = STEADY + K + 1
    config = ScheduleConfig(peak_lr=1e-2, warmup_steps=1, decay_fraction=(K + 1) / total, decay=decay)
    rates, adam = learning_rate(config, total), Adam(weights_at(0))
    for step in range(total):
        adam.step(gradients, float(rates(step)))
    assert float(rates(STEADY - 1)) == np.float32(1e-2) > float(rates(STEADY)) and float(rates(total - 1)) == 0
    source, last = trunk
    merge(str(source), str(tmp_path / "merged"), last=K + 1, decay=decay)
    assert_within(result(tmp_path / "merged"), adam.params, total)
    assert max(np.abs(last[path] - a).max() for path, a in adam.params.items()) > 1e-2  # the two ended apart
