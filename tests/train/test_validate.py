"""Held-out text scored by position: each bucket has the same tokens at every row length, and its own share of nats."""

from collections.abc import Sequence

import jax
import numpy as np
import pytest

from ling_jax.config import MeshConfig, TrainConfig
from ling_jax.train import validate as scoring
from ling_jax.train.compute import make_compute
from ling_jax.train.loss import token_logprobs
from ling_jax.train.validate import make_scorer, prepare_held_out, score_metrics
from tests.support.helpers import VALUES, make_model, random_weights, small
from tests.support.tokenizers import OWN, TEXTS

TEXT = TEXTS[0]


@pytest.fixture(autouse=True)
def buckets_of_four_and_more(monkeypatch):
    monkeypatch.setattr(scoring, "FIRST_BUCKET", 4)


def documents_of(sizes: Sequence[int]) -> list[str]:
    """Texts of just so many tokens."""
    found = []
    for size in sizes:
        end = next(end for end in range(size, len(TEXT)) if len(OWN.encode(TEXT[:end])) == size)
        found.append(TEXT[:end])
    return found


@pytest.mark.parametrize("length", [8, 13, 64])
def test_a_bucket_has_the_same_tokens_of_long_enough_documents_at_every_row_length(length):
    sizes = [3, 4, 7, 8, 20, 31, 32, 40, 70]
    part = prepare_held_out(OWN, documents_of(sizes), length, longest=32)
    for number, (begin, end) in enumerate([(0, 4), (4, 8), (8, 16), (16, 32)]):
        wanted = [i for ids in map(OWN.encode, documents_of(sizes)) if len(ids) >= end for i in ids[begin:end]]
        mine = (part.rows["bucket"] == number) & (part.rows["targets"] >= 0)
        assert sorted(part.rows["targets"][mine]) == sorted(wanted) and len(wanted) == part.bucket_tokens()[number]
    assert not part.bucket_tokens()[4:].any()  # beyond the longest row nothing is told apart
    assert part.tokens == sum(sizes)


def test_the_nats_of_a_bucket_are_those_of_its_tokens_also_where_a_mesh_cuts_rows():
    config = small(vocab_size=OWN.vocab_size, num_hidden_layers=1, first_k_dense_replace=1)
    _, params, bias = random_weights(config)
    texts = documents_of([3, 9, 15, 8])
    compute = make_compute(config, TrainConfig(remat="none"), MeshConfig(context=2), jax.devices()[:2])
    score = scoring.score_held_out(make_scorer(compute), params, bias, prepare_held_out(OWN, texts, 32, 32), 2)
    model, nats, tokens = make_model(config), np.zeros(2), np.zeros(2)
    for ids in map(OWN.encode, texts):
        found = -token_logprobs(model, np.array([[*OWN.scoring_prefix, *ids]]))[0]
        for number, (begin, end) in enumerate([(0, 4), (4, 8)]):
            if len(ids) >= end:
                nats[number] += found[begin:end].sum()
                tokens[number] += end - begin
    np.testing.assert_allclose(score.buckets[:2], np.stack([nats, tokens], 1), rtol=VALUES)
    assert not score.buckets[2:].any()
    metrics = score_metrics({"a": score, "b": score})  # the same twice: no mean changes
    told = {name.rpartition("_")[2]: value for name, value in metrics.items() if "/position_" in name}
    assert told == pytest.approx({"0-4": nats[0] / 12, "4-8": nats[1] / 12}, rel=VALUES)
    assert metrics["eval/a/nats_per_token"] == pytest.approx(score.nats / 35)
