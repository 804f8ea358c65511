"""The profile finds a program's operations in a trace and sums them by scope."""

import json

from benchmarks import profile
from ling_jax.config import RunConfig
from tests.support.helpers import small


def test_a_profile_of_decoding_names_the_models_parts(monkeypatch, capsys):
    monkeypatch.setattr(profile, "named_config", lambda name: RunConfig(model=small()))
    monkeypatch.setattr(profile, "PROMPT", 8)
    monkeypatch.setattr(profile, "STEPS", 4)
    profile.main(["--batch", "2"])
    *table, last = capsys.readouterr().out.strip().splitlines()
    result = json.loads(last)
    assert {"attention", "experts", "dense_ffn"} <= set(result["shares"])
    assert abs(sum(result["shares"].values()) - 1) < 1e-6 and 0 < result["operations_ms"]
    assert table[0].split()[:1] == ["scope"] and len(table) == 1 + len(result["shares"])
