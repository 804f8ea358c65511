"""Merging takes no more memory than it may, and opens no file of a moment."""

import json

import pytest
from etils import epath

from benchmarks import merge_memory
from ling_jax.checkpoint import DamagedCheckpoint, open_arrays
from tests.support.helpers import small


def test_eight_checkpoints_of_300_mb_are_merged_in_little_memory(tmp_path, capfd):
    assert merge_memory.main(["--gigabytes", "0.3", "--folder", str(tmp_path)]) == 0
    *_, table, last = capfd.readouterr().out.strip().splitlines()
    figures = json.loads(last)
    assert table.split()[0] == "8" and 2e8 < figures["bytes"] < 4e8
    assert 100 < figures["rss_anon_mb"] < 1200 and figures["error"] < 1e-6


def test_whoever_opens_a_moment_gets_an_error(tmp_path):
    merge_memory.write_step(epath.Path(tmp_path / "1"), small(), 0)
    arrays = open_arrays(tmp_path / "1")
    arrays.array(("params", "lm_head", "weight")).check()
    with pytest.raises(DamagedCheckpoint, match="optimizer/mu/params/lm_head/weight.* is missing"):
        arrays.array(("optimizer", "mu", "params", "lm_head", "weight"))
