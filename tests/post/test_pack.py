"""Packed conversations: every target once, and losses and gradients that do not depend on the packing or the mesh.

Legend: T tokens of a row, D examples.
"""

from functools import cache

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ling_jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, ScheduleConfig, TrainConfig
from ling_jax.data.packing import IGNORE, ROW, pad
from ling_jax.parallel.mesh import place_batch, rows_here
from ling_jax.post.pack import Packed, best_fit
from ling_jax.train.state import Trainer, make_trainer
from ling_jax.train.step import accumulate_gradients, counts_of
from tests.support.helpers import assert_close, assert_gradients_close, jit, random_weights, tiny

MODEL = tiny(vocab_size=64)
LENGTH, ROWS = 32, 16
MESHES = {"one": {}, "fsdp2-expert2": dict(fsdp=2, expert=2), "context2": dict(context=2), "tensor2": dict(tensor=2)}


def examples(lengths: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, turns and starts of random examples, the last token of each learned."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(2, 60, sum(lengths))
    starts = np.concatenate(([0], np.cumsum(lengths)))
    turns = draw.integers(0, 3, sum(lengths)).astype(np.uint8)
    turns[starts[1:] - 1] = 1
    return tokens, turns, starts


def packed_of(lengths: list[int], rows: list[list[int]], length: int = LENGTH) -> Packed:
    return Packed(*examples(lengths), rows, length)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90))
def test_every_example_is_in_one_row_that_has_room_for_it(places, length):
    rows = best_fit(places, length)
    assert sorted(i for row in rows for i in row) == list(range(len(places)))
    assert all(sum(places[i] for i in row) <= length for row in rows)


def test_rows_of_short_conversations_are_nearly_full():
    draw = np.random.default_rng(0)
    places = draw.integers(20, 120, 5000).tolist()
    rows = best_fit(places, 512)
    assert sum(places) / (len(rows) * 512) > 0.97


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(2, 33), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_no_target_is_lost_or_doubled_whatever_the_order(lengths, draw):
    order = list(range(len(lengths)))
    draw.shuffle(order)
    rows = [[order[i] for i in row] for row in best_fit([lengths[i] - 1 for i in order], LENGTH)]
    packed = packed_of(lengths, rows)
    tokens, turns, starts = examples(lengths)
    wanted = sorted(
        (int(tokens[place - 1]), int(tokens[place]), int(turns[place]), place - int(starts[example]) - 1)
        for example in range(len(lengths))
        for place in range(starts[example] + 1, starts[example + 1])
        if turns[place]
    )
    found = []
    for row in range(len(packed)):
        one = packed[row]
        for place in np.flatnonzero(one["targets"] != IGNORE):
            names = ("tokens", "targets", "turns", "positions")
            found.append(tuple(int(one[name][place]) for name in names))
            assert one["segment_ids"][place] > 0
        assert (one["segment_ids"] > 0).sum() == sum(lengths[i] - 1 for i in rows[row])
        assert (one["turns"] > 0).tolist() == (one["targets"] != IGNORE).tolist()
    assert sorted(found) == wanted


def test_what_is_too_long_is_cut():
    packed = packed_of([50], [[0]])
    tokens, turns, _ = examples([50])
    row = packed[0]
    np.testing.assert_array_equal(row["tokens"], tokens[:LENGTH])
    np.testing.assert_array_equal(row["targets"], np.where(turns[1 : LENGTH + 1] > 0, tokens[1 : LENGTH + 1], IGNORE))
    assert packed.fullness() == 1


LENGTHS = (33, 30, 20, 17, 15, 12, 12, 9, 8, 7, 6, 5, 4, 3, 2, 2)
HYBRID = tiny(vocab_size=64, num_hidden_layers=4, layer_group_size=3, group_norm_size=2, num_nextn_predict_layers=0)


def batch_of(lengths: tuple[int, ...], rows: list[list[int]]) -> dict[str, np.ndarray]:
    """The rows, filled up with padding."""
    packed = packed_of(list(lengths), rows)
    filled = [packed[i] for i in range(len(packed))]
    empty = {name: pad(np.empty(0, np.int32), LENGTH, name) for name in ROW}
    filled += [empty] * (ROWS - len(filled))
    return {name: np.stack([row[name] for row in filled]) for name in ROW}


@cache
def trainer_of(mesh: str, model: ModelConfig) -> Trainer:
    config = RunConfig(
        model=model,
        mesh=MeshConfig(**MESHES[mesh]),
        data=DataConfig(sequence_length=LENGTH, global_batch_size=ROWS),
        schedule=ScheduleConfig(warmup_steps=0),
        train=TrainConfig(remat="full"),
    )
    return make_trainer(config, jax.devices()[: int(np.prod(list(MESHES[mesh].values()), dtype=int))])


@cache
def program(mesh: str, model: ModelConfig):
    trainer = trainer_of(mesh, model)

    def run(params, bias, batch):
        return accumulate_gradients(trainer, params, bias, batch, counts_of(trainer, batch))

    return jit(run)


@cache
def weights(mesh: str, model: ModelConfig):
    _, params, bias = random_weights(model)
    state = trainer_of(mesh, model).new_state_from(params, bias)
    return state.params, state.bias


def outcome(mesh: str, lengths: tuple[int, ...], rows: list[list[int]], model: ModelConfig = MODEL):
    """(sums, gradients) of the rows on a mesh."""
    trainer = trainer_of(mesh, model)
    here = rows_here(trainer.compute.mesh, ROWS)
    batch = {name: values[here] for name, values in batch_of(lengths, rows).items()}
    placed = place_batch(trainer.compute.mesh, batch, trainer.objective.fields, here, ROWS)
    sums, grads = program(mesh, model)(*weights(mesh, model), placed)
    return jax.device_get(sums.objective), jax.device_get(grads)


def compare(mesh: str, lengths: tuple[int, ...], rows: list[list[int]], model: ModelConfig = MODEL) -> None:
    """The sums and gradients of packed rows on a mesh are those of each example in a row of its own on one device."""
    sums, grads = outcome(mesh, lengths, rows, model)
    want_sums, want_grads = outcome("one", lengths, [[i] for i in range(len(lengths))], model)
    for got, expected in zip(sums, want_sums, strict=True):
        assert_close(got, expected)
    assert_gradients_close(grads, want_grads)


@pytest.mark.parametrize("mesh", MESHES)
def test_packing_changes_neither_losses_nor_gradients_on_any_mesh(mesh):
    rows = best_fit([n - 1 for n in LENGTHS], LENGTH)
    assert len(rows) < ROWS // 2
    compare(mesh, LENGTHS, rows)


def test_no_recurrent_state_goes_from_one_conversation_into_the_next():
    compare("one", LENGTHS, best_fit([n - 1 for n in LENGTHS], LENGTH), HYBRID)


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    st.lists(st.integers(2, 33), min_size=1, max_size=ROWS - 1),
    st.randoms(use_true_random=False),
    st.sampled_from([*MESHES]),
)
def test_nor_does_the_order_of_any_conversations(lengths, draw, mesh):
    lengths = [9, *lengths]  # alone, one token that looks at none has attention's gradients as rounding only
    order = list(range(len(lengths)))
    draw.shuffle(order)
    rows = [[order[i] for i in row] for row in best_fit([lengths[i] - 1 for i in order], LENGTH)]
    draw.shuffle(rows)
    compare(mesh, tuple(lengths), rows)
