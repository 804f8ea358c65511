"""The policy objective: in float64 as a function of log-probabilities, and through the model on meshes.

Legend: B rows, T tokens, U units of a row.
"""

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ling_jax.config import DataConfig, MeshConfig, RunConfig, ScheduleConfig, TrainConfig
from ling_jax.parallel.mesh import place_batch, rows_here
from ling_jax.post.advantage import advantages, token_weights
from ling_jax.post.objective import PolicyObjective, k3, unit_means
from ling_jax.post.units import unit_ids
from ling_jax.train.state import Trainer, make_trainer
from ling_jax.train.step import accumulate_gradients, counts_of
from tests.support.helpers import assert_close, assert_gradients_close, documents, jit, pack, random_weights, tiny
from tests.support.tokenizers import OWN

LOW, HIGH = 0.2, 0.28
EXACT = 1e-12  # relative, in float64


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def batch_of(seed: int, rows: int = 3, tokens: int = 20, equal_weights: bool = False) -> dict[str, np.ndarray]:
    """Random units, in runs, with places outside of them; ratios on both sides of the bounds."""
    draw = np.random.default_rng(seed)
    cuts = np.sort(draw.integers(1, tokens, (rows, 4)), 1)
    units = (np.arange(tokens) >= cuts[:, :, None]).sum(1).astype(np.int32)  # 0 for the prompt
    weights = np.ones((rows, tokens)) if equal_weights else draw.uniform(0, 2, (rows, tokens))
    weights *= 1 if equal_weights else draw.random((rows, tokens)) < 0.8
    answers = np.broadcast_to(draw.normal(size=(rows, 1)), (rows, tokens)).copy()
    logs = {name: draw.normal(-1, 0.5, (rows, tokens)) for name in ("new", "old", "reference")}
    return {"units": units, "weights": np.where(units > 0, weights, 0), "advantages": answers, **logs}


def value_and_gradient(objective: PolicyObjective, batch: dict[str, np.ndarray]) -> tuple[float, np.ndarray]:
    rest = {name: jnp.asarray(values) for name, values in batch.items()}

    def loss(new):
        return objective.loss(objective.of_values(new, jnp.zeros_like(new), rest), jnp.ones(()))

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(batch["new"]))
    assert value.dtype == jnp.float64
    return float(value), np.asarray(gradient)


def by_numpy(batch: dict[str, np.ndarray], low: float, high: float) -> tuple[float, np.ndarray]:
    """The loss and its gradient with respect to the log-probabilities, unit by unit."""
    value, gradient = 0.0, np.zeros_like(batch["new"])
    for row in range(len(batch["units"])):
        for unit in range(1, batch["units"][row].max(initial=0) + 1):
            inside = batch["units"][row] == unit
            if not inside.any():
                continue
            ratio = math.exp((batch["new"] - batch["old"])[row, inside].mean())
            weight, gain = batch["weights"][row, inside], batch["advantages"][row, inside]
            clipped = min(max(ratio, 1 - low), 1 + high)
            value -= (weight * np.minimum(ratio * gain, clipped * gain)).sum()
            active = np.where(gain > 0, ratio <= 1 + high, ratio >= 1 - low)
            gradient[row, inside] = -weight * ratio * gain * active
    return value, gradient


def agree(found: Any, expected: Any) -> None:
    scale = np.abs(expected).max() + 1e-300
    np.testing.assert_allclose(found, expected, rtol=EXACT, atol=EXACT * scale)


@pytest.mark.parametrize("seed", range(5))
def test_value_and_gradient_are_numpys_for_any_units_masks_and_clips(float64, seed):
    batch = batch_of(seed)
    for low, high in ((LOW, HIGH), (0.03, 0.03), (math.inf, math.inf)):
        value, gradient = value_and_gradient(PolicyObjective(low, high), batch)
        want_value, want_gradient = by_numpy(batch, low, high)
        agree(value, want_value)
        agree(gradient, want_gradient)
    assert (by_numpy(batch, 0.03, 0.03)[1] == 0).sum() > (by_numpy(batch, math.inf, math.inf)[1] == 0).sum()


def test_units_of_one_token_are_token_ppo(float64):
    batch = batch_of(1)
    batch["units"] = np.where(batch["units"] > 0, np.arange(1, 21), 0).astype(np.int32)

    def ppo(new):
        ratio = jnp.exp(new - batch["old"])
        gain = batch["advantages"]
        terms = jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - LOW, 1 + HIGH) * gain)
        return -(batch["weights"] * terms).sum()

    found = value_and_gradient(PolicyObjective(LOW, HIGH), batch)
    for got, expected in zip(found, jax.value_and_grad(ppo)(jnp.asarray(batch["new"])), strict=True):
        agree(got, np.asarray(expected))


def test_one_unit_is_gspo(float64):
    batch = batch_of(2, equal_weights=True)
    batch["units"] = (batch["units"] > 0).astype(np.int32)
    drawn = batch["units"]

    def gspo(new):
        ratio = jnp.exp(((new - batch["old"]) * drawn).sum(1) / drawn.sum(1))
        gain = batch["advantages"][:, 0]
        terms = jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - LOW, 1 + HIGH) * gain)
        return -(drawn.sum(1) * terms).sum()

    found = value_and_gradient(PolicyObjective(LOW, HIGH), batch)
    for got, expected in zip(found, jax.value_and_grad(gspo)(jnp.asarray(batch["new"])), strict=True):
        agree(got, np.asarray(expected))


def test_on_the_old_policy_it_is_reinforce(float64):
    batch = batch_of(3)
    batch["old"] = batch["new"].copy()
    _, gradient = value_and_gradient(PolicyObjective(LOW, HIGH), batch)
    agree(gradient, -batch["weights"] * batch["advantages"])


def test_a_token_that_is_left_out_gets_no_gradient_from_its_unit(float64):
    batch = batch_of(4)
    out = (batch["units"] > 0) & (batch["weights"] == 0)
    _, gradient = value_and_gradient(PolicyObjective(math.inf, math.inf), batch)
    assert out.sum() > 3 and (gradient[out] == 0).all()
    assert (gradient[batch["weights"] > 0] != 0).all()


def test_the_kl_to_the_reference_is_k3(float64):
    batch = batch_of(5)
    value, gradient = value_and_gradient(PolicyObjective(LOW, HIGH, kl=0.3), batch)
    without = value_and_gradient(PolicyObjective(LOW, HIGH), batch)
    logs = batch["reference"] - batch["new"]
    agree(value - without[0], 0.3 * (batch["weights"] * (np.exp(logs) - logs - 1)).sum())
    agree(gradient - without[1], 0.3 * batch["weights"] * (1 - np.exp(logs)))
    assert (np.asarray(k3(batch["new"], batch["reference"])) >= 0).all()


def test_clipped_tokens_are_counted(float64):
    batch = batch_of(6)
    sums = PolicyObjective(0.03, 0.03).of_values(jnp.asarray(batch["new"]), jnp.zeros((3, 20)), batch)
    stopped = (by_numpy(batch, 0.03, 0.03)[1] == 0) & (batch["weights"] > 0)
    assert sums.clipped_low + sums.clipped_high == stopped.sum() > 0
    assert sums.clipped_high == (stopped & (batch["advantages"] > 0)).sum()


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_unit_means_are_numpys(seed):
    draw = np.random.default_rng(seed)
    values, units = draw.normal(size=(2, 9)).astype(np.float32), draw.integers(0, 4, (2, 9)).astype(np.int32)
    found = np.asarray(unit_means(jnp.asarray(values), jnp.asarray(units)))
    for row in range(2):
        for place in range(9):
            inside = units[row] == units[row, place]
            expected = values[row, inside].mean() if units[row, place] else 0
            assert found[row, place] == pytest.approx(expected, abs=1e-5)


# Through the model.

MODEL = tiny(vocab_size=64, num_nextn_predict_layers=0)
LENGTH, ROWS = 16, 8
OBJECTIVE = PolicyObjective(LOW, HIGH, kl=0.1)
MESHES = {"one": {}, "fsdp2-expert2": dict(fsdp=2, expert=2), "context2": dict(context=2), "tensor2": dict(tensor=2),
          "data2": dict(data=2)}  # fmt: skip
ANSWERS = documents([14, 9, 6, 3, 13, 5, 11, 7], seed=3)  # each may lie in a row of its own


def rows_of(rows: list[list[int]]) -> dict[str, np.ndarray]:
    """A batch of answers, the first two tokens of each being its prompt."""
    batch = pack([[ANSWERS[i] for i in row] for row in rows] + [[]] * (ROWS - len(rows)), LENGTH)
    batch |= {name: np.zeros((ROWS, LENGTH), np.float32) for name in ("weights", "advantages", "old", "reference")}
    batch["units"] = np.zeros((ROWS, LENGTH), np.int32)
    for number, row in enumerate(rows):
        start = unit = 0
        for i in row:
            draw = np.random.default_rng(i)
            place = slice(start + 1, start + len(ANSWERS[i]) - 1)
            count = len(ANSWERS[i]) - 2
            batch["weights"][number, place] = draw.uniform(0.5, 1, count) / 50
            batch["advantages"][number, place] = draw.normal()
            batch["old"][number, place] = draw.normal(-4, 0.3, count)
            batch["reference"][number, place] = draw.normal(-4, 0.3, count)
            batch["units"][number, place] = unit + 1 + np.arange(count) // 3
            start, unit = start + len(ANSWERS[i]), unit + 1 + (count - 1) // 3
    return batch


@cache
def trainer_of(mesh: str, microbatches: int) -> Trainer:
    config = RunConfig(
        model=MODEL,
        mesh=MeshConfig(**MESHES[mesh]),
        data=DataConfig(sequence_length=LENGTH, global_batch_size=ROWS),
        schedule=ScheduleConfig(warmup_steps=0),
        train=TrainConfig(remat="full", microbatches=microbatches),
    )
    return make_trainer(config, jax.devices()[: int(np.prod(list(MESHES[mesh].values()), dtype=int))], OBJECTIVE)


@cache
def outcome(mesh: str, microbatches: int, packed: bool) -> tuple[Any, dict]:
    """(sums, gradients) on a mesh."""
    trainer = trainer_of(mesh, microbatches)
    rows = rows_of([[i] for i in range(8)] if not packed else [[0], [1, 2], [4, 3], [5, 6], [7]])
    here = rows_here(trainer.compute.mesh, ROWS)
    placed = place_batch(
        trainer.compute.mesh, {name: v[here] for name, v in rows.items()}, OBJECTIVE.fields, here, ROWS
    )
    _, params, bias = random_weights(MODEL)
    state = trainer.new_state_from(params, bias)

    def run(params, bias, batch):
        return accumulate_gradients(trainer, params, bias, batch, counts_of(trainer, batch))

    sums, grads = jit(run)(state.params, state.bias, placed)
    return jax.device_get(sums.objective), jax.device_get(grads)


CASES = [("one", 2, False), ("one", 4, True), *((mesh, 1, True) for mesh in MESHES)]


@pytest.mark.parametrize(("mesh", "microbatches", "packed"), CASES)
def test_neither_mesh_nor_microbatches_nor_packing_change_it(mesh, microbatches, packed):
    (sums, grads), (want_sums, want_grads) = outcome(mesh, microbatches, packed), outcome("one", 1, False)
    assert sums.clipped_low + sums.clipped_high > 0
    for got, expected in zip(sums, want_sums, strict=True):
        assert_close(got, expected)
    assert_gradients_close(grads, want_grads)


# Units, advantages, weights.


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("17+8=25. 25+40=65.", ["17+8=25.", " 25+40=65."]),
        ("It is 3.14! Yes", ["It is 3.14!", " Yes"]),
        ("One\nTwo", ["One\n", "Two"]),
        ("v1.2.3; ok?", ["v1.2.3;", " ok?"]),
        ("End 3.", ["End 3."]),
        ("Well... no?! Yes.", ["Well...", " no?!", " Yes."]),
        ("你好。再见！", ["你好。", "再见！"]),
        ("\n<think>\na.\n</think>\n\nb", ["\n", "<think>\n", "a.\n", "</think>\n\n", "b"]),
        ("", []),
    ],
)
def test_sentences_end_where_a_reader_pauses(text, sentences):
    ids = OWN.encode(text, parse_special=True)
    units = unit_ids(ids, "sentence", OWN)
    found = [OWN.decode([t for t, u in zip(ids, units, strict=True) if u == n]) for n in dict.fromkeys(units.tolist())]
    assert found == sentences
    assert units.tolist() == sorted(units.tolist()) and (not len(units) or units[0] == 1)


def test_tokens_and_answers_are_units_too():
    ids = OWN.encode("a b c. d")
    assert unit_ids(ids, "token", OWN).tolist() == list(range(1, len(ids) + 1))
    assert unit_ids(ids, "response", OWN).tolist() == [1] * len(ids)


@pytest.mark.parametrize(
    ("rewards", "baseline", "spread", "expected"),
    [
        ([1, 0, 0, 0], "group", "none", [0.75, -0.25, -0.25, -0.25]),
        ([1, 0, 0, 0], "group", "sample", [1.5, -0.5, -0.5, -0.5]),
        ([1, 0], "group", "population", [1, -1]),
        ([1, 0, 0.5], "leave_one_out", "none", [0.75, -0.75, 0]),
        ([1, 0], "none", "none", [1, 0]),
        ([1, 1, 1], "group", "sample", [0, 0, 0]),
        ([1], "group", "sample", [0]),
    ],
)
def test_advantages(rewards, baseline, spread, expected):
    np.testing.assert_allclose(advantages(rewards, baseline, spread), expected, atol=1e-12)


def test_weights_are_what_the_means_divide_by():
    lengths = [[2, 6], [4, 4]]
    assert token_weights(lengths, "batch") == [[1 / 16] * 2] * 2
    assert token_weights(lengths, "group") == [[1 / 16, 1 / 16], [1 / 16, 1 / 16]]
    assert token_weights(lengths, "response") == [[1 / 8, 1 / 24], [1 / 16, 1 / 16]]
    assert token_weights(lengths, "constant", 10) == [[1 / 40] * 2] * 2
    assert token_weights([[1, 3], [8, 8]], "group") == [[1 / 8] * 2, [1 / 32] * 2]
