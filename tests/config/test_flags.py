"""Flags of the rotary embedding: YaRN on, changed and off again, wherever the flags stand."""

import dataclasses
import random

import pytest

from ling_jax import cli
from ling_jax.cli import named_config, parse_train
from ling_jax.config import RopeScaling, RunConfig

FACTOR, ORIGINAL = "--model.rope-scaling.factor", "--model.rope-scaling.original-max-position-embeddings"
YARN = RopeScaling(factor=4.0, original_max_position_embeddings=32768)


def parsed(*flags: str) -> RunConfig:
    return parse_train(["ling_mini_2_0", *flags])[1].config


@pytest.fixture
def stretched(monkeypatch):
    """The same configuration with YaRN on."""
    run = named_config("ling_mini_2_0")
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, rope_scaling=YARN))
    monkeypatch.setattr(cli, "named_config", lambda name: run)


def refused(capsys, *flags: str) -> str:
    with pytest.raises((SystemExit, ValueError)) as raised:
        parsed(*flags)
    assert not isinstance(raised.value, SystemExit) or raised.value.code == 2
    told = f"{raised.value} {capsys.readouterr().err}"
    return "".join(told.replace("\u2502", " ").split())  # the frame breaks lines


def test_without_flags_nothing_changes():
    assert parsed() == named_config("ling_mini_2_0") and parsed().model.rope_scaling is None


def test_theta_and_positions_are_set():
    model = parsed("--model.rope-theta", "600000", "--model.max-position-embeddings", "32768").model
    assert (model.rope_theta, model.max_position_embeddings) == (6e5, 32768)


def test_the_flags_of_yarn_may_stand_in_any_order_among_others():
    pairs = [(FACTOR, "4"), (ORIGINAL, "32768"), ("--train.steps", "7"), ("--data.sequence-length", "131072"),
             ("--run", "x"), ("--model.rope-theta", "1e6")]  # fmt: skip
    draw = random.Random(0)
    for _ in range(5):
        draw.shuffle(pairs)
        config = parsed(*(word for pair in pairs for word in pair))
        assert config.model.rope_scaling == YARN and config.model.rope_theta == 1e6
        assert config.train.steps == 7 and config.data.sequence_length == 131072


def test_every_key_of_yarn_has_a_flag():
    flags = [FACTOR, "2", ORIGINAL, "4096"]
    flags += ["--model.rope-scaling.beta-fast", "16", "--model.rope-scaling.beta-slow", "2"]
    flags += ["--model.rope-scaling.mscale", "0.7", "--model.rope-scaling.mscale-all-dim", "0.5"]
    flags += ["--model.rope-scaling.attention-factor", "1.5", "--model.rope-scaling.no-truncate"]
    assert parsed(*flags).model.rope_scaling == RopeScaling(
        factor=2.0, original_max_position_embeddings=4096, beta_fast=16.0, beta_slow=2.0, mscale=0.7,
        mscale_all_dim=0.5, attention_factor=1.5, truncate=False,
    )  # fmt: skip


def test_a_configuration_with_yarn_keeps_it_changes_it_or_turns_it_off(stretched):
    assert parsed().model.rope_scaling == YARN
    changed = parsed("--train.steps", "7", FACTOR, "8", "--run", "x").model.rope_scaling
    assert changed == dataclasses.replace(YARN, factor=8.0)
    for flags in (["--model.rope-scaling", "none", "--run", "x"], ["--run", "x", "--model.rope-scaling", "None"]):
        assert parsed(*flags).model.rope_scaling is None
    assert parsed("--model.rope-scaling", "none", "--data.sequence-length", "32768").model.max_positions == 32768


def test_none_may_be_said_where_there_is_no_yarn():
    assert parsed("--model.rope-scaling", "none").model.rope_scaling is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([FACTOR, "4"], [ORIGINAL]),
        ([ORIGINAL, "32768"], [FACTOR]),
        (["--model.rope-scaling.beta-fast", "16"], [FACTOR, ORIGINAL]),
        ([FACTOR, "4", ORIGINAL, "32768", "--model.rope-scaling", "none"], ["none turns YaRN off", "leave out either"]),
        (["--model.rope-scaling", "yarn"], ["'yarn'", "only none", ".factor"]),
        ([FACTOR, "0.5", ORIGINAL, "32768"], ["factor = 0.5", "at least 1"]),
        ([FACTOR, "many", ORIGINAL, "32768"], ["many", FACTOR]),
        ([FACTOR, "2", ORIGINAL, "32768", "--data.sequence-length", "65537"], ["65537", "65536 positions"]),
    ],
)
def test_half_a_yarn_or_two_that_contradict_are_refused(capsys, flags: list[str], words: list[str]):
    text = refused(capsys, *flags)
    assert [word for word in words if word.replace(" ", "") not in text] == []


def test_help_lists_the_flags(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        parsed("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    shown = (FACTOR, ORIGINAL, "--model.rope-scaling none", "--model.rope-theta", "--init-mtp {same,new,drop}")
    assert [flag for flag in shown if flag not in text] == []
