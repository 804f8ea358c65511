"""A session is handed batches, so that its caller can make them between its steps: a small loop of reinforcement
learning, on one device and on a mesh.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ling_jax.config import CheckpointConfig, DataConfig, MeshConfig, RunConfig, ScheduleConfig, TrainConfig
from ling_jax.generate.engine import Engine, Request, replay_ids
from ling_jax.generate.sampling import Sampling
from ling_jax.train.metrics import MetricsWriter, read_metrics
from ling_jax.train.session import Session, StopRequest
from ling_jax.train.state import Trainer, make_trainer
from tests.support.helpers import assert_close, documents, make_model, pack, random_weights, small
from tests.support.marks import nightly
from tests.support.objectives import PolicyGradient

MODEL = small(vocab_size=64, num_hidden_layers=3)
# Of sizes that FP8 takes.
WITH_MTP = dataclasses.replace(MODEL, num_nextn_predict_layers=1, hidden_size=128, num_attention_heads=8, head_dim=16)
LENGTH, PROMPT = 16, 4
PROMPTS = documents([PROMPT] * 8, seed=3)


class Saver:
    """Keeps the steps that were saved."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.waited = False

    def save(self, state: Any, fallen: Any) -> None:
        self.steps.append(int(state.step))

    def after_step(self, state: Any) -> None:
        pass

    def merged(self, state: Any) -> None:
        return None

    def wait(self) -> None:
        self.waited = True


def trainer_of(**mesh: int) -> Trainer:
    config = RunConfig(
        model=MODEL,
        mesh=MeshConfig(**mesh),
        data=DataConfig(sequence_length=LENGTH, global_batch_size=8),
        schedule=ScheduleConfig(peak_lr=0.003, warmup_steps=0),
        train=TrainConfig(steps=4, eval_every=0),
        checkpoint=CheckpointConfig(every=3),
    )
    devices = int(np.prod(list(mesh.values()), dtype=int))
    return make_trainer(config, jax.devices()[:devices], PolicyGradient(bonus=0.0))


def requests(seed: int) -> list[Request]:
    hot = Sampling(temperature=1.0)
    return [Request(prompt=p, max_new_tokens=8, sampling=hot, seed=100 * seed + i) for i, p in enumerate(PROMPTS)]


def batch_of(answers: list[Any]) -> tuple[dict[str, np.ndarray], float]:
    """A batch that rewards even tokens, and the share of them."""
    batch = pack([[[*prompt, *answer.ids]] for prompt, answer in zip(PROMPTS, answers, strict=True)], LENGTH)
    even_BT = np.array([answer.ids for answer in answers]) % 2 == 0
    drawn = slice(PROMPT - 1, PROMPT - 1 + even_BT.shape[1])
    batch |= {name: np.zeros((8, LENGTH), np.float32) for name in ("weights", "old")}
    batch["weights"][:, drawn] = np.where(even_BT, 1.0, -1.0)
    batch["old"][:, drawn] = [answer.model_logprobs for answer in answers]
    return {**batch, "routing_ids": replay_ids([[answer.routing] for answer in answers], LENGTH)}, even_BT.mean()


@pytest.mark.parametrize("mesh", [{}, nightly({"fsdp": 2, "expert": 2})], ids=str)
def test_a_caller_draws_answers_with_the_weights_of_now_between_steps(mesh, tmp_path):
    """From the second turn on nothing is compiled, though every turn has new weights."""
    trainer, saver, compiled, shares = trainer_of(**mesh), Saver(), [], []
    _, params, bias = random_weights(MODEL)
    state = trainer.new_state_from(params, bias)

    def note(event: str, seconds: float, fun_name: str = "", **_: Any) -> None:
        if event.endswith("/backend_compile_duration"):
            compiled.append((len(shares), fun_name))

    with (
        MetricsWriter(tmp_path, None) as writer,
        Session(trainer, state, {}, saver, writer, str(tmp_path), StopRequest()) as session,
    ):
        engine = Engine(trainer.compute.model(*session.weights), rows=8, slots=LENGTH, chunk=4, routing=True)
        jax.monitoring.register_event_duration_secs_listener(note)
        while session.goes_on():
            engine.load(trainer.compute.model(*session.weights))
            answers = dict(engine.run(requests(len(shares))))
            batch, share = batch_of([answers[i] for i in range(8)])
            shares.append(share)
            session.step(batch)
        jax.monitoring.unregister_event_duration_listener(note)
    assert [what for turn, what in compiled if turn >= 2] == []
    assert [what for turn, what in compiled if turn < 2]
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4] and saver.steps == [3, 4] and saver.waited
    assert_close(records[0]["train/loss"], -(2 * shares[0] - 1), 1e-3)  # of ratios that are 1
    assert shares[-1] > shares[0]


def test_a_batch_that_the_objective_does_not_take_is_refused_before_its_step(tmp_path):
    trainer, saver = trainer_of(), Saver()
    with pytest.raises(ValueError, match="the objective takes old, positions, routing_ids"):
        with Session(trainer, trainer.new_state(), {}, saver, None, str(tmp_path), StopRequest()) as session:
            session.step(pack([[[1, 2]]] * 8, LENGTH))
    assert saver.steps == [] and not saver.waited


# New weights in an engine.


@pytest.mark.parametrize(
    ("options", "mesh"), [({"drafts": 2}, {}), nightly({"fp8": True}, {}), nightly({}, {"expert": 2})], ids=str
)
def test_new_weights_give_a_fresh_engines_answers_whatever_the_old_ones_have_done(options, mesh):
    """Keys and values of the old weights, which prefixes are shared by, are gone; answers under way go on."""
    first, second = (make_model(WITH_MTP, seed=seed, mesh=MeshConfig(**mesh)) for seed in range(2))
    engine, fresh = (Engine(one, rows=2, slots=LENGTH, chunk=4, **options) for one in (first, second))
    old = dict(engine.run(requests(0)[:3]))
    tickets = {engine.submit(request): i for i, request in enumerate(requests(0)[:3])}
    under_way = {tickets[update.ticket]: list(update.answer.ids) for update in engine.step(2)}
    assert any(under_way.values())
    engine.load(second)
    answers: dict[int, Any] = {}
    while engine.busy:
        for update in engine.step():
            if update.answer.end is not None:
                answers[tickets[update.ticket]] = update.answer
    want = dict(fresh.run(requests(0)[:3]))
    assert [len(answers[i].ids) for i in range(3)] == [8, 8, 8]
    for i, ids in under_way.items():
        assert answers[i].ids[: len(ids)] == ids == old[i].ids[: len(ids)]
    assert answers[2].ids == want[2].ids != old[2].ids
    assert [dict(engine.run(requests(1)[:3]))[i].ids for i in range(3)] == [
        dict(fresh.run(requests(1)[:3]))[i].ids for i in range(3)
    ]


def test_weights_of_another_model_are_refused():
    engine = Engine(make_model(MODEL), rows=1, slots=8)
    with pytest.raises(ValueError, match="make a new Engine"):
        engine.load(make_model(small(vocab_size=64)))


def test_the_run_folder_is_only_read(tmp_path: Path):
    """A session without a writer leaves nothing in it."""
    trainer, saver = trainer_of(), Saver()
    with Session(trainer, trainer.new_state(), {}, saver, None, str(tmp_path), StopRequest()):
        pass
    assert list(tmp_path.iterdir()) == [] and saver.steps == [0]
