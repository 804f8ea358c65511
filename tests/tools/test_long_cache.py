"""The benchmark of long caches times whole steps and the softmax layers alone, of both models."""

import json

import numpy as np
import pytest

from benchmarks import long_cache
from tests.support.helpers import small
from tests.support.marks import nightly

ARGS = ("--batch", "2", "--context", "40", "--steps", "2", "--rounds", "3")


@pytest.mark.parametrize("group", [nightly(0), 2])
def test_both_models_are_timed_and_their_keys_and_values_counted(group, monkeypatch, capsys):
    model = small(num_hidden_layers=4, max_position_embeddings=128)
    monkeypatch.setattr(long_cache, "COPIED", 1000)
    monkeypatch.setattr(long_cache, "MODEL", model)
    long_cache.main([*ARGS, f"--model.layer-group-size={group}"])
    *table, last = capsys.readouterr().out.strip().splitlines()
    result = json.loads(last)
    layers = {"softmax": 4, "hybrid": 2} if group else {"softmax": 4}
    assert len(table) == 1 + len(result["seconds"]) == 2 + 2 * len(layers)
    assert ("speedup" in result) == bool(group)
    for name, count in layers.items():
        name = f"{name}: its softmax layers"
        read = 1e9 * result["gigabytes_per_second"][name] * np.median(result["seconds"][name])
        assert read == pytest.approx(count * 2 * 2 * 40 * model.num_key_value_heads * model.head_dim * 4)
