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
    assert table[0].split()[:1] == ["scope"] and len(table) == 1 + len(result["shares"]) + 1
    assert table[-1].startswith("a step takes ") and 0 < result["read_share"] and 0 < result["product_share"]


def test_what_decoding_must_read_is_counted_by_hand(monkeypatch, capsys):
    """Matrices once, the cache of both rows, and of the experts those that any row chose."""
    model = small()
    monkeypatch.setattr(profile, "named_config", lambda name: RunConfig(model=model))
    monkeypatch.setattr(profile, "PROMPT", 8)
    monkeypatch.setattr(profile, "STEPS", 4)
    dense, moe = model.first_k_dense_replace, model.num_hidden_layers - model.first_k_dense_replace
    heads, groups = (n * model.head_dim for n in (model.num_attention_heads, model.num_key_value_heads))
    hidden, expert = model.hidden_size, 3 * model.hidden_size * model.moe_intermediate_size
    for rows, width, flags in ((1, 4, ()), (2, 2, ("--dtype", "bfloat16"))):
        _, result = figures(capsys, "--batch", str(rows), *flags)
        read = {name: need["bytes"] for name, need in result["needs"].items()}
        assert read["head"] == model.vocab_size * hidden * width
        assert read["router"] == moe * model.num_experts * hidden * width
        assert read["dense_ffn"] == dense * 3 * hidden * model.intermediate_size * width
        projections = model.num_hidden_layers * hidden * (2 * heads + 2 * groups)
        cached = read["attention"] / width - projections
        assert (
            cached % (2 * model.num_hidden_layers * rows * groups) == 0
            and 8 <= cached / (2 * model.num_hidden_layers * rows * groups) <= 8 + 4 * 4
        )
        least = model.num_experts_per_tok
        assert moe * least * expert * width <= read["experts"] <= moe * rows * least * expert * width
        if rows == 1:
            assert read["experts"] == moe * least * expert * width


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
    need = {"attention": profile.Need(flops=9 * 2 * 700.0**3 / 2), "experts": profile.Need(flops=2 * 700.0**3 / 2)}
    run = profile.Run(text, lambda: jax.block_until_ready(program(x)), 2, lambda: need)
    monkeypatch.setattr(profile, "decoding", lambda command: run)
    jax.block_until_ready(program(x))
    table, result = figures(capsys)
    shares = result["shares"]
    assert shares["attention"] > 3 * shares["experts"] > 0
    assert 0 < result["operations_ms"] and result["shares"].keys() >= {"attention", "experts"}
    assert table[1].split()[0] == "attention"
    name, ms, _, flops, speed, share = table[1].split()
    assert (
        float(flops) == 3.1 and abs(float(speed) - 3.087 / float(ms) * 1e3) < 0.01 * float(speed) and share[-1] == "%"
    )
