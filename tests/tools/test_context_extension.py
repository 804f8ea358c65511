"""The trial of a longer context: its rows, its bars, and one seed of it."""

import numpy as np
import pytest

from scripts import context_extension as trial


def test_every_key_stands_twice_and_its_last_value_is_wanted():
    batch, depths = trial.rows(np.random.default_rng(0), 20, 100)
    text = 100 - trial.KEYS
    for tokens, targets, depth in zip(batch["tokens"], batch["targets"], depths, strict=True):
        assert (targets[:text] == trial.IGNORE).all()
        for place in range(trial.KEYS):
            key = tokens[text + place] - trial.QUERY
            stands = [at for at in range(text) if tokens[at] < trial.QUERY and tokens[at] // trial.VALUES == key]
            assert len(stands) == 2 and targets[text + place] == tokens[stands[-1]]
            assert depth[place] == stands[-1] / text
    assert sorted(batch["tokens"][0, text:]) == list(range(trial.QUERY, trial.QUERY + trial.KEYS))


MEANS = {
    (trial.AS_TRAINED, 512): 0.97, (trial.AS_TRAINED, 2048): 0.6, (trial.AS_TRAINED, 8192): 0.3,
    (trial.STEPS_ALONE, 2048): 0.88, (trial.EXTENSION, 512): 0.95, (trial.EXTENSION, 2048): 0.96,
    (trial.EXTENSION, 8192): 0.6, (trial.WITH_YARN, 8192): 0.93,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({(trial.AS_TRAINED, 512): 0.92}, ["512 is learnt: over 93%"]),
        ({(trial.AS_TRAINED, 2048): 0.8}, ["2,048 is not, before the stage: at most 75%"]),
        ({(trial.STEPS_ALONE, 2048): 0.97}, ["and above the steps alone"]),
        ({(trial.WITH_YARN, 8192): 0.7}, ["8,192 with YaRN: over 85%", "and 15 points above the same without"]),
        ({(trial.EXTENSION, 512): 0.8}, ["512 never below 88%"]),
    ],
)
def test_a_bar_that_does_not_hold_is_named(change, broken):
    assert [bar.told for bar in trial.BARS if not bar.holds(MEANS | change)] == broken


@pytest.mark.nightly
def test_one_seed_extends_its_context(tmp_path):
    assert trial.main(["--seeds", "0", "--figure", str(tmp_path / "figure.png")]) == 0
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
