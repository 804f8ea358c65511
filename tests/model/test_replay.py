"""Routings that an engine recorded replay: with an MTP layer and without, in packed and padded rows, on every mesh.

Where a model whose router would choose otherwise is told the recorded experts, its log-probabilities are the engine's.
Legend: L MoE layers, B rows, T tokens, K experts per token.
"""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ling_jax import token_logprobs
from ling_jax.config import MeshConfig, ModelConfig
from ling_jax.generate.engine import Answer, Engine, Request, replay_ids
from ling_jax.generate.sampling import Sampling
from ling_jax.model.model import Ling, param_specs, split_model
from ling_jax.model.router import replayed
from ling_jax.parallel.context import zigzag_order
from ling_jax.parallel.mesh import BATCH_AXES, make_mesh, manual
from tests.support.helpers import assert_close, documents, jit, make_model, random_weights, small
from tests.support.marks import nightly

PLAIN = small(num_hidden_layers=3, vocab_size=64)  # a dense layer and two of experts
WITH_MTP = dataclasses.replace(PLAIN, num_nextn_predict_layers=1)
CONFIGS = {"plain": PLAIN, "mtp": WITH_MTP}
PROMPTS = documents([5, 1, 7, 3], vocab=59)
SLOTS = 16


@cache
def recorded(name: str) -> tuple[list[list[int]], list[Answer]]:
    """Four documents, prompt and answer, and what the engine says of each."""
    engine = Engine(make_model(CONFIGS[name]), rows=2, slots=SLOTS, chunk=4, routing=True)
    hot = Sampling(temperature=2.0)
    requests = [Request(prompt=p, max_new_tokens=4 + i, sampling=hot, seed=i) for i, p in enumerate(PROMPTS)]
    found = dict(engine.run(requests))
    answers = [found[i] for i in range(len(requests))]
    return [prompt + answer.ids for prompt, answer in zip(PROMPTS, answers, strict=True)], answers


def contrary(config: ModelConfig, **options) -> Ling:
    """The model with biases that would choose other experts."""
    graph, params, bias = random_weights(config, **options)
    return nnx.merge(graph, params, jax.tree.map(lambda b: -3 * b, bias))


def packed(rows: list[list[int]], texts: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segment ids) of rows of documents, named by their numbers."""
    tokens, segments = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
    for row, numbers in enumerate(rows):
        text = [token for number in numbers for token in texts[number]]
        tokens[row, : len(text)] = text
        segments[row, : len(text)] = [i for i, number in enumerate(numbers, 1) for _ in texts[number]]
    return tokens, segments


@cache
def scorer() -> Any:
    """`token_logprobs`, compiled."""

    def run(graph, params, bias, tokens, segments, ids):
        return token_logprobs(nnx.merge(graph, params, bias), tokens, None, segments, routing_ids=ids)

    return jit(run, static_argnums=0)


def assert_engines(logprobs, rows: list[list[int]], texts, answers) -> None:
    """The log-probabilities of the answers' tokens are those that the engine gave."""
    for row, numbers in enumerate(rows):
        start = 0
        for number in numbers:
            first, end = start + len(PROMPTS[number]), start + len(texts[number])
            np.testing.assert_allclose(logprobs[row, first - 1 : end - 1], answers[number].model_logprobs, atol=1e-4)
            start = end


APART, TOGETHER = [[0], [1], [2], [3]], [[0, 1], [2], [], [3]]


@pytest.mark.parametrize("rows", [APART, TOGETHER], ids=["padded", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_engines_experts_give_the_engines_log_probabilities(name, rows):
    """Which the router's own, by other biases, do not give."""
    texts, answers = recorded(name)
    model, length = contrary(CONFIGS[name]), 18
    tokens, segments = packed(rows, texts, length)
    ids = replay_ids([[answers[i].routing for i in row] for row in rows], length)
    assert ids.shape == (2, 4, length, 3)
    got, own = (np.asarray(scorer()(*split_model(model), tokens, segments, x)) for x in (ids, np.full_like(ids, -1)))
    assert_engines(got, rows, texts, answers)
    assert np.abs(own - got).max() > 0.1


@pytest.mark.parametrize("cut", [0, 1], ids=["without the last token", "with it"])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_answers_routing_replays_as_it_is_but_for_the_order_of_its_axes(name, cut):
    """The last token, which was never run, may be given too."""
    texts, answers = recorded(name)
    tokens = np.array([texts[0]], np.int32)[:, : len(texts[0]) - 1 + cut]
    ids = answers[0].routing.transpose(1, 0, 2)[:, None]
    got = np.asarray(token_logprobs(contrary(CONFIGS[name]), tokens, routing_ids=ids))
    want = answers[0].model_logprobs[: None if cut else -1]
    np.testing.assert_allclose(got[0, len(PROMPTS[0]) - 1 :], want, atol=1e-4)
    for given in (jnp.asarray(ids), ids.astype(np.uint8), ids.tolist()):
        found = np.asarray(replayed(given, CONFIGS[name], tokens.shape, name == "mtp"))
        assert found.shape == (2 + (name == "mtp"), *tokens.shape, 3)
        np.testing.assert_array_equal(found[:2, :, : ids.shape[2]], ids)
        assert (found[2:] == -1).all() and (found[:, :, ids.shape[2] :] == -1).all()


def test_the_mtp_layer_routes_by_itself_where_only_the_trunks_layers_are_given():
    """And as it is told where its own are given too."""
    texts, answers = recorded("mtp")
    model, tokens = make_model(WITH_MTP), np.array([texts[0]], np.int32)
    own = model(tokens)
    trunk = model(tokens, routing_ids=answers[0].routing.transpose(1, 0, 2)[:, None])
    np.testing.assert_array_equal(trunk.routing.ids[:, :, :-1], own.routing.ids[:, :, :-1])
    assert_close(trunk.mtp_logits_BTV[:, :-2], own.mtp_logits_BTV[:, :-2])
    every = np.array(own.routing.ids)
    every[2] = (every[2] + 1) % 8
    told = model(tokens, routing_ids=every)
    np.testing.assert_array_equal(told.routing.ids, every)
    assert np.abs(told.mtp_logits_BTV - own.mtp_logits_BTV).max() > 0.1


MESHES = [nightly({"expert": 4, "data": 2}), {"expert": 2, "context": 2}, {"fsdp": 2, "tensor": 2, "expert": 2}]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_over_a_mesh_the_recorded_experts_replay(mesh):
    """On each device's shards, with experts elsewhere; and one device's record, since the engine's does not depend on
    the mesh."""
    texts, answers = recorded("mtp")
    config = MeshConfig(**mesh)
    devices, model = make_mesh(config), contrary(WITH_MTP, mesh=config)
    rows = [[0, 1], [2], [], [3], [1], [], [2], [0]]
    tokens, segments = packed(rows, texts, 20)
    ids = replay_ids([[answers[i].routing for i in row] for row in rows], 20)
    places = np.tile(np.arange(20, dtype=np.int32), (len(rows), 1))
    for row, numbers in enumerate(rows):
        starts = np.cumsum([0] + [len(texts[number]) for number in numbers])
        for start in starts:
            places[row, start:] = np.arange(20 - start)
    graph, params, bias = split_model(model)
    here = PartitionSpec(BATCH_AXES, "context")
    params = jax.device_put(params, jax.tree.map(partial(NamedSharding, devices), param_specs(model)))

    def logits(params, bias, tokens, places, segments, ids):
        model = nnx.merge(graph, params, bias)
        return model.logits(model.hidden(tokens, places, segments, routing_ids=ids).hidden_BTD)

    specs = (param_specs(model), jax.tree.map(lambda _: PartitionSpec(), bias), *[here] * 3, PartitionSpec(None, *here))
    order = zigzag_order(20, config.context)
    arrays = [a[:, order] for a in (tokens, places, segments)]
    logits_BTV = jit(manual(logits, devices, specs, here))(params, bias, *arrays, ids[:, :, order])
    logprobs_BTV = jax.nn.log_softmax(np.asarray(logits_BTV)[:, np.argsort(order)])
    got = np.take_along_axis(np.asarray(logprobs_BTV)[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    assert_engines(got, rows, texts, answers)
    if config.data > 1:  # and by the call that knows of no mesh, on the same shards
        whole = nnx.merge(graph, params, bias)(tokens, None, segments, routing_ids=ids).logits_BTV
        real = segments > 0
        assert_close(np.asarray(whole)[real], np.asarray(logits_BTV)[real])


def test_over_a_mesh_one_request_gets_the_answer_and_the_experts_of_one_device():
    """Most of whose parts have no token at all (one-token decoding leaves expert ranks empty)."""
    texts, answers = recorded("mtp")
    model = make_model(WITH_MTP, mesh=MeshConfig(expert=4))
    engine = Engine(model, rows=1, slots=SLOTS, chunk=4, routing=True)
    hot = Sampling(temperature=2.0)
    [(_, answer)] = engine.run([Request(prompt=PROMPTS[0], max_new_tokens=4, sampling=hot, seed=0)])
    assert answer.ids == answers[0].ids
    np.testing.assert_array_equal(answer.routing, answers[0].routing)


def test_gradients_go_through_the_experts_that_are_replayed():
    texts, answers = recorded("mtp")
    tokens = np.array([texts[2]], np.int32)
    ids = replay_ids([[answers[2].routing]], tokens.shape[1])
    graph, params, bias = split_model(make_model(WITH_MTP))

    def total(params, bias, ids):
        return token_logprobs(nnx.merge(graph, params, bias), tokens, routing_ids=ids).sum()

    grads = jit(jax.grad(total))
    own, replayed = grads(params, bias, ids), grads(params, jax.tree.map(lambda b: -3 * b, bias), ids)
    jax.tree.map(lambda a, b: assert_close(a, b), replayed, own)


ONE = np.zeros((2, 1, 4, 3), np.int32) + np.arange(3, dtype=np.int32)


def with_ids(place: tuple[int, ...], ids: list[int]) -> np.ndarray:
    changed = ONE.copy()
    changed[place] = ids
    return changed


WRONG = {
    "an expert twice": (with_ids((1, 0, 2), [5, 2, 5]), r"routing_ids\[1, 0, 2\] = \[5, 2, 5\]: give each token"),
    "an expert that is none": (with_ids((0, 0, 3), [0, 1, 8]), r"\[0, 1, 8\].*different experts from 0 to 7"),
    "a negative one": (with_ids((0, 0, 0), [-2, 0, 1]), r"\[-2, 0, 1\].*or -1 throughout"),
    "some of a token's": (with_ids((0, 0, 0), [-1, 0, 1]), r"\[-1, 0, 1\].*or -1 throughout"),
    "too few layers": (ONE[:1], r"shape \[1, 1, 4, 3\].*routes in 3 layers \(the last may be left out"),
    "another order of axes": (ONE.transpose(1, 2, 0, 3), r"not \[layers, rows, tokens, experts per token\]"),
    "too few tokens": (ONE[:, :, :2], "1 rows of 4 tokens"),
    "fewer experts": (ONE[..., :2], "3 experts per token"),
    "numbers that are no integers": (ONE.astype(np.float32), "float32: experts are integers"),
}


@pytest.mark.parametrize("ids", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_replayed_is_refused(wrong, ids):
    given, message = WRONG[wrong]
    model, tokens = make_model(WITH_MTP), np.array([[1, 2, 3, 4]], np.int32)
    for call in (model, model.hidden, partial(token_logprobs, model)):
        with pytest.raises(ValueError, match=message):
            call(tokens, routing_ids=ids(given))


def test_rows_that_are_too_short_and_answers_without_a_record_are_refused():
    routing = np.zeros((5, 2, 3), np.int32)
    assert replay_ids([[routing]], 5).shape == (2, 1, 5, 3)  # for a batch without the last token
    with pytest.raises(ValueError, match="row 1: its documents run over 11 tokens, which exceeds length = 10"):
        replay_ids([[routing], [routing, routing]], 10)
    for rows in ([[Answer().routing]], [[]]):
        with pytest.raises(ValueError, match="make the engine with routing=True"):
            replay_ids(rows, 8)
