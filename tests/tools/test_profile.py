"""The profile sums a trace's operations by the model's parts: what takes longer has the larger share."""

import json

import jax
import jax.numpy as jnp

from benchmarks import profile
from ling_jax.config import RunConfig
from tests.support.helpers import small


def figures(capsys, *args: str) -> tuple[list[str], dict]:
    """The lines of the table, and the result."""
    profile.main(args)
    *table, last = capsys.readouterr().out.strip().splitlines()
    return table, json.loads(last)


def test_a_profile_of_decoding_names_the_models_parts(monkeypatch, capsys):
    monkeypatch.setattr(profile, "named_config", lambda name: RunConfig(model=small()))
    monkeypatch.setattr(profile, "PROMPT", 8)
    monkeypatch.setattr(profile, "STEPS", 4)
    table, result = figures(capsys, "--batch", "2")
    assert {"attention", "experts", "dense_ffn"} <= set(result["shares"])
    assert 0 < result["operations_ms"]
    assert table[0].split()[:1] == ["scope"] and len(table) == 1 + len(result["shares"])


def test_shares_are_of_the_time_that_each_scope_takes(monkeypatch, capsys):
    """Nine products under one scope, one under another."""

    @jax.jit
    def program(x):
        for scope, count in (("attention", 9), ("experts", 1)):
            with jax.named_scope(scope):
                for _ in range(count):
                    x = jnp.tanh(x @ x)
        return x

    x = jnp.eye(700)
    text = program.lower(x).compile().as_text() or ""
    monkeypatch.setattr(profile, "decoding", lambda command: (text, lambda: jax.block_until_ready(program(x)), 2))
    jax.block_until_ready(program(x))
    table, result = figures(capsys)
    shares = result["shares"]
    assert shares["attention"] > 3 * shares["experts"] > 0
    assert 0 < result["operations_ms"] and result["shares"].keys() >= {"attention", "experts"}
    assert table[1].split()[0] == "attention"
