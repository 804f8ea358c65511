"""The objective of a step is an argument: two objectives of the tests' own, on one device and on meshes.

Their values, and gradients with respect to log-probabilities, are those of numpy in float64; the parameters' gradients
on every mesh are one device's; an engine's answers, replayed, have the engine's log-probabilities.

Legend: B rows, T tokens, S documents of a row.
"""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ling_jax import token_logprobs
from ling_jax.config import DataConfig, MeshConfig, RunConfig, ScheduleConfig, TrainConfig
from ling_jax.generate.engine import Engine, Request, replay_ids
from ling_jax.generate.sampling import Sampling
from ling_jax.parallel.mesh import BATCH_AXES, place_batch, rows_here
from ling_jax.train.loss import IGNORE, NextToken
from ling_jax.train.objective import MODEL_FIELDS, Batch, Objective, check_batch, check_fields, step_counts
from ling_jax.train.state import Trainer, make_trainer
from ling_jax.train.step import accumulate_gradients, make_train_step
from tests.support.helpers import (
    assert_close,
    assert_gradients_close,
    documents,
    jit,
    make_model,
    pack,
    random_weights,
    tiny,
)
from tests.support.marks import nightly
from tests.support.objectives import PolicyGradient, Preference
from tests.tiny_run import REPO

MODEL = tiny(vocab_size=64)
LENGTH, ROWS = 16, 8
MESHES = {
    "fsdp2-expert2": dict(fsdp=2, expert=2),
    "context2": dict(context=2),
    "tensor2": dict(tensor=2),
}
ALL = {"one": {}, **MESHES}


@cache
def trainer_of(objective: Objective, mesh: str, microbatches: int = 1) -> Trainer:
    config = RunConfig(
        model=MODEL,
        mesh=MeshConfig(**ALL[mesh]),
        data=DataConfig(sequence_length=LENGTH, global_batch_size=ROWS),
        schedule=ScheduleConfig(peak_lr=0.01, warmup_steps=0),
        train=TrainConfig(remat="full", microbatches=microbatches),
    )
    devices = int(np.prod(list(ALL[mesh].values()), dtype=int))
    return make_trainer(config, jax.devices()[:devices], objective)


def placed(trainer: Trainer, batch: dict[str, np.ndarray]) -> Batch:
    fields, mesh = trainer.objective.fields, trainer.compute.mesh
    check_batch(batch, fields, ROWS)
    return place_batch(mesh, batch, fields, rows_here(mesh, ROWS), ROWS)


class Outcome(NamedTuple):
    sums: Any
    loss: jax.Array
    grads: dict


@cache
def outcome(objective: Objective, mesh: str, microbatches: int = 1) -> Outcome:
    """The sums, loss and gradients of the objective's batch on a mesh."""
    trainer = trainer_of(objective, mesh, microbatches)

    def run(state, batch):
        counts = step_counts(objective, batch)
        sums, grads = accumulate_gradients(trainer, state.params, state.bias, batch, counts)
        return sums.objective, objective.loss(sums.objective, counts.objective), grads

    return Outcome(*jax.device_get(jit(run)(state_of(trainer), placed(trainer, BATCHES[type(objective)]()))))


def state_of(trainer: Trainer):
    _, params, bias = random_weights(MODEL)
    return trainer.new_state_from(params, bias)


def values_of(objective: Objective, mesh: str, batch: dict[str, np.ndarray], seed: int = 0, biased: float = 1) -> Any:
    """The model's values that an objective sums: whole arrays, rows and tokens in their order.

    A model that is `biased` otherwise than 1 would choose other experts.
    """
    trainer = trainer_of(objective, mesh)
    compute, of_rows = trainer.compute, PartitionSpec(BATCH_AXES)
    f, out_specs = {
        Preference: (lambda model, rows: objective.answers(model, rows)[0], of_rows),
        PolicyGradient: (lambda model, rows: objective.values(model, rows)[:2], PartitionSpec(BATCH_AXES, "context")),
    }[type(objective)]
    run = compute.on_shards(lambda p, b, rows: f(compute.model(p, b), rows), objective.fields, out_specs)
    _, params, bias = random_weights(MODEL, seed)
    bias = jax.tree.map(lambda b: biased * b, bias)
    found = jax.device_get(jit(run)(params, bias, placed(trainer, batch)))
    if mesh == "context2" and isinstance(objective, PolicyGradient):  # 4 pieces, of which the first rank has 0 and 3
        back = np.argsort(np.arange(LENGTH).reshape(4, -1)[[0, 3, 1, 2]].reshape(-1))
        found = jax.tree.map(lambda a: a[:, back], found)
    return found


# Pairs.


@cache
def pairs() -> dict[str, np.ndarray]:
    """Seven pairs and a row of padding, with what a model of other weights thinks of them."""
    lengths = [(5, 9), (2, 14), (8, 8), (6, 3), (3, 3), (12, 4), (7, 6)]
    batch = pack([documents(both, seed=i) for i, both in enumerate(lengths)] + [[]], LENGTH)
    batch["reference"] = np.zeros((ROWS, 2), np.float32)
    reference = values_of(Preference(), "one", batch, seed=1)
    return {**batch, "reference": np.array(reference)}


def test_a_preference_is_what_numpy_makes_of_the_answers_log_probabilities():
    objective, batch = Preference(beta=0.3), pairs()
    answers_BS = np.float64(values_of(objective, "one", batch))
    margin_B = 0.3 * ((answers_BS - batch["reference"]) @ [1, -1])[:7]
    assert 0 < (margin_B > 0).sum() < 7
    sums = outcome(objective, "one").sums
    assert_close(sums.loss, np.log1p(np.exp(-margin_B)).sum())
    assert sums.right == (margin_B > 0).sum()
    assert_close(outcome(objective, "one").loss, np.log1p(np.exp(-margin_B)).mean())
    grads = jax.grad(lambda a: objective.of_answers(a, batch["reference"], np.arange(ROWS) < 7).loss)(
        jnp.asarray(answers_BS, jnp.float32)
    )
    want_B = np.append(-0.3 / (1 + np.exp(margin_B)), 0)
    assert_gradients_close({"answers": grads}, {"answers": want_B[:, None] * [1, -1]})


def test_a_documents_log_probability_is_whole_wherever_its_tokens_are():
    want = values_of(Preference(), "one", pairs())
    for mesh in MESHES:
        assert_close(values_of(Preference(), mesh, pairs()), want)


# A policy's gradient, of answers that an engine drew.


@cache
def drawn() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(a batch of the engine's answers, packed; the engine's log-probability of the token that each place predicts)."""
    prompts = documents([3, 2, 4, 1, 5, 2, 3, 4, 2, 6], seed=5)
    engine = Engine(make_model(MODEL), rows=4, slots=LENGTH, chunk=4, routing=True)
    requests = [
        Request(prompt=p, max_new_tokens=3 + i % 4, sampling=Sampling(temperature=1.0), seed=i)
        for i, p in enumerate(prompts)
    ]
    answers = dict(engine.run(requests))
    rows = [[0, 1], [2], [3, 4], [5], [6], [7], [8], [9]]
    batch = pack([[[*prompts[i], *answers[i].ids] for i in row] for row in rows], LENGTH)
    batch |= {name: np.zeros((ROWS, LENGTH), np.float32) for name in ("weights", "old")}
    draw = np.random.default_rng(0)
    for number, row in enumerate(rows):
        start = 0
        for i in row:
            first, end = start + len(prompts[i]) - 1, start + len(prompts[i]) + len(answers[i].ids) - 1
            batch["old"][number, first:end] = answers[i].model_logprobs
            batch["weights"][number, first:end] = draw.normal() + 0.2 * draw.normal(size=end - first)
            start = end + 1
    batch["routing_ids"] = replay_ids([[answers[i].routing for i in row] for row in rows], LENGTH)
    engines, batch["old"] = batch["old"], batch["old"] + np.float32(0.3) * draw.normal(size=batch["old"].shape)
    return batch | {"old": batch["old"].astype(np.float32)}, engines


BATCHES = {Preference: pairs, PolicyGradient: lambda: drawn()[0], NextToken: lambda: next_tokens()}


def next_tokens() -> dict[str, np.ndarray]:
    return {name: drawn()[0][name] for name in (*MODEL_FIELDS, "targets")}


@pytest.mark.parametrize(
    ("mesh", "mtp"),
    [("fsdp2-expert2", True), ("context2", False), *(nightly(mesh, mtp) for mesh in ALL for mtp in (False, True))],
)
def test_answers_replayed_have_the_engines_log_probabilities(mesh, mtp):
    batch, engines_BT = drawn()
    logprobs_BT, entropy_BT = values_of(PolicyGradient(mtp=mtp), mesh, batch, biased=-3)
    there_BT = batch["weights"] != 0
    assert there_BT.sum() > 40 and (batch["targets"][there_BT] != IGNORE).all()
    np.testing.assert_allclose(logprobs_BT[there_BT], engines_BT[there_BT], atol=1e-4)
    assert (entropy_BT > 0).all() and (entropy_BT < np.log(64)).all()


def test_a_policys_gradient_is_what_numpy_makes_of_its_log_probabilities_and_entropies():
    objective, (batch, _) = PolicyGradient(), drawn()
    logprobs_BT, entropy_BT = (np.float64(x) for x in values_of(objective, "one", batch))
    weights_BT = np.float64(batch["weights"])
    there_BT, ratio_BT = weights_BT != 0, np.exp(logprobs_BT - batch["old"])
    clipped_BT = np.clip(ratio_BT, 0.8, 1.2)
    policy_BT = np.where(there_BT, np.minimum(ratio_BT * weights_BT, clipped_BT * weights_BT), 0)
    free_BT = there_BT & (ratio_BT * weights_BT <= clipped_BT * weights_BT)
    assert 5 < free_BT.sum() < there_BT.sum() - 5
    sums, loss, _ = outcome(objective, "one")
    assert_close(sums.policy, policy_BT.sum())
    assert_close(sums.entropy, entropy_BT[there_BT].sum())
    assert_close(loss, -(policy_BT + 0.01 * np.where(there_BT, entropy_BT, 0)).sum() / there_BT.sum())

    def of(values):
        found = objective.of_values(*values, batch["old"], batch["weights"])
        return objective.loss(found, objective.counts(batch))

    grads = jax.grad(of)(tuple(jnp.asarray(x, jnp.float32) for x in (logprobs_BT, entropy_BT)))
    want = np.where(free_BT, -ratio_BT * weights_BT, 0) / there_BT.sum(), -0.01 * there_BT / there_BT.sum()
    assert_gradients_close(dict(zip("ab", grads, strict=True)), dict(zip("ab", want, strict=True)))


# Meshes and microbatches.

OBJECTIVES = {"preference": Preference(beta=0.3), "policy": PolicyGradient()}


@pytest.mark.parametrize("mesh", ["fsdp2-expert2", nightly("context2"), nightly("tensor2")])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_mesh_gives_one_devices_gradients(name, mesh):
    got, want = outcome(OBJECTIVES[name], mesh), outcome(OBJECTIVES[name], "one")
    for one, other in zip((*got.sums, got.loss), (*want.sums, want.loss), strict=True):
        assert_close(one, other)
    assert_gradients_close(got.grads, want.grads)


@pytest.mark.parametrize("name", [nightly("preference"), nightly("policy")])
def test_microbatches_change_no_gradient(name):
    got, want = outcome(OBJECTIVES[name], "fsdp2-expert2", 2), outcome(OBJECTIVES[name], "one")
    assert_close(got.loss, want.loss)
    assert_gradients_close(got.grads, want.grads)


def test_a_step_logs_what_its_objective_tells_and_leaves_a_layer_that_did_not_run_as_it_was():
    trainer = trainer_of(OBJECTIVES["preference"], "one")
    before = state_of(trainer)
    bias = jax.device_get(before.bias)
    after, metrics = make_train_step(trainer)(before, placed(trainer, pairs()))
    assert_close(metrics["train/loss"], outcome(OBJECTIVES["preference"], "one").loss)
    assert 0 < metrics["train/right"] < 1 and metrics["train/tokens"] == (pairs()["segment_ids"] > 0).sum()
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), jax.device_get(after.bias), bias)
    assert moved["layers"]["softmax_moe"]["mlp"]["gate"]["expert_bias"]
    assert not moved["mtp"]["block"]["mlp"]["gate"]["expert_bias"]
    loads = metrics["moe/load_max_over_mean_per_layer"]
    assert loads.shape == (3,) and (loads[:2] > 0).all() and loads[2] == 0


def test_the_pages_objective_is_the_weighted_mean_that_it_says(monkeypatch):
    """The first block of docs/extending.md, run as it stands."""
    page = (REPO / "docs" / "extending.md").read_text()
    names: dict[str, Any] = {"__name__": __name__}
    exec(page.split("```python\n")[1].split("```")[0], names)
    objective, batch = names["WeightedRows"](), next_tokens()
    batch["weight"] = np.arange(ROWS, dtype=np.float32)
    monkeypatch.setitem(BATCHES, type(objective), lambda: batch)
    inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
    nll_BT = -np.asarray(token_logprobs(make_model(MODEL), *inputs), np.float64)
    weights_BT = (batch["targets"][:, :-1] >= 0) * batch["weight"][:, None]
    assert_close(outcome(objective, "context2").loss, (nll_BT * weights_BT).sum() / weights_BT.sum())


# What is refused.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**MODEL_FIELDS, "temperature": ""}, "field 'temperature' has the dims ''"),
        ({**MODEL_FIELDS, "pairs": "BB"}, "field 'pairs' has the dims 'BB'"),
        ({"tokens": "BT", "segment_ids": "BT"}, "fields lack positions"),
        ({**MODEL_FIELDS, "tokens": "TB"}, "fields lack tokens"),
    ],
)
def test_fields_without_rows_or_a_models_arrays_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        check_fields(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": np.zeros(8)}, r"reference has the shape \[8\]; its dims are BS, with B = 8 rows here"),
        ({"targets": np.zeros((4, 16))}, r"targets has the shape \[4, 16\]"),
        (
            {"weights": np.zeros((8, 16))},
            "a batch has positions, reference, segment_ids, targets, tokens, weights, the",
        ),
    ],
)
def test_a_batch_of_other_arrays_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        check_batch({**pairs(), **change}, Preference().fields, ROWS)
