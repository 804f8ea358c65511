"""Checkpoints in buckets: complete steps only, old ones removed, damage and absence told apart."""

import numpy as np
import pytest

from ling_jax import checkpoint
from ling_jax.checkpoint import Checkpointer, DamagedCheckpoint, find_checkpoint, read_arrays, read_meta, saved_steps
from ling_jax.config import CheckpointConfig
from ling_jax.files import buckets, one_writer
from ling_jax.files.one_writer import OneWriter
from ling_jax.files.paths import at
from tests.support.buckets import delete, every_day, get, names, put

STATE = {
    "params": {"a": np.arange(24.0, dtype=np.float32).reshape(4, 6), "b": np.float32(3)},
    "moments": {"a": np.ones(5)},
}


def _save(folder, steps, **settings):
    saver = Checkpointer(folder, CheckpointConfig(**settings))
    for step in steps:
        saver.save(step, STATE, {"step": step})
    saver.close()


@every_day("gs", "s3")
def test_a_step_is_read_as_it_was_saved(bucket):
    _save(f"{bucket}/run/checkpoints", [3])
    for path in (f"{bucket}/run", f"{bucket}/run/checkpoints", f"{bucket}/run/checkpoints/3"):
        assert str(find_checkpoint(path)) == f"{bucket}/run/checkpoints/3"
    found = read_arrays(f"{bucket}/run")
    np.testing.assert_array_equal(found["params"]["a"], STATE["params"]["a"])
    assert found["params"]["b"] == 3 and found["moments"]["a"].sum() == 5
    assert read_meta(f"{bucket}/run") == {"step": 3}


def test_old_steps_go(bucket):
    folder = f"{bucket}/run/checkpoints"
    _save(folder, range(1, 9), keep_last=2, keep_every=4)
    assert saved_steps(at(folder)) == [4, 7, 8]
    assert {name.split("/")[2] for name in names(bucket)} == {"4", "7", "8"}


def test_what_a_kill_leaves_is_no_step_and_is_removed(bucket):
    folder = f"{bucket}/run/checkpoints"
    _save(folder, [1, 2])
    whole = [name for name in names(bucket) if name.startswith("run/checkpoints/2/")]
    last = "run/checkpoints/2/commit_success.txt"
    assert last in whole
    for name in whole:  # a save that was killed before its last object
        if name != last:
            put(f"{bucket}/{name.replace('checkpoints/2/', 'checkpoints/3/')}", get(f"{bucket}/{name}"))
    assert saved_steps(at(folder)) == [1, 2]
    assert str(find_checkpoint(f"{bucket}/run")) == f"{folder}/2"
    with pytest.raises(ValueError, match="no checkpoint in"):
        find_checkpoint(f"{folder}/3")
    delete(f"{bucket}/run/checkpoints/1/commit_success.txt")  # a removal that was killed after its first object
    _save(folder, [])
    assert {name.split("/")[2] for name in names(bucket)} == {"2"}


@pytest.mark.parametrize(
    "file", ["state/params.a/0.0", "state/params.a/.zarray", "state/checksums.json", "meta/meta.json"]
)
def test_a_lost_and_a_changed_object_are_damage(file, bucket):
    _save(f"{bucket}/run/checkpoints", [1, 2])
    place = f"{bucket}/run/checkpoints/2/{file}"
    data = get(place)
    put(place, data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(DamagedCheckpoint, match="is damaged.*the last good step is 1"):
        read_arrays(f"{bucket}/run")
        read_meta(f"{bucket}/run")
    delete(place)
    with pytest.raises(DamagedCheckpoint, match="missing.*the last good step is 1"):
        read_arrays(f"{bucket}/run")
        read_meta(f"{bucket}/run")


def test_a_bucket_out_of_reach_is_not_damage(bucket, monkeypatch):
    _save(f"{bucket}/run/checkpoints", [1])
    opened = checkpoint.open_arrays(f"{bucket}/run")
    opened.array(("params", "a"))

    def reading():
        raise ValueError("UNAVAILABLE: no answer [http_response_code='503']")

    array = opened.array(("params", "a"))
    monkeypatch.setattr(array, "_start", lambda cell, bounds: (tuple(slice(0, n) for n in (4, 6)), reading))
    with pytest.raises(ValueError, match="cannot be reached, after 7 attempts") as error:
        array.read()
    assert not isinstance(error.value, DamagedCheckpoint)
    assert buckets.is_out_of_reach(ValueError("PERMISSION_DENIED: no"))


def test_one_process_writes_to_a_folder_in_a_bucket(bucket, monkeypatch):
    monkeypatch.setattr(one_writer, "SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(one_writer, "BEAT_SECONDS", 0.1)
    folder = at(f"{bucket}/run")
    with OneWriter(folder):
        assert names(bucket) == ["run/writer.json"]
        with pytest.raises(ValueError, match=f"{bucket}/run is in use: process"), OneWriter(folder):
            pass
    assert names(bucket) == []
    with OneWriter(folder) as writer:
        put(f"{bucket}/run/config.json", b"{}")
        writer.move(at(f"{bucket}/aside"))
    assert names(bucket) == ["aside/config.json"]
