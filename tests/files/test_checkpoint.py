"""Checkpoints: what is saved comes back, onto any mesh; a full disk, a failed write or SIGKILL loses nothing."""

import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ling_jax.checkpoint import Checkpointer, find_checkpoint, read_arrays, read_meta, read_shapes
from ling_jax.config import CheckpointConfig
from ling_jax.files import arrays
from tests.support.runs import mount_prefix
from tests.tiny_run import REPO

# After a failed read or write, tensorstore's other ones under way report to an event loop that orbax has closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(value: float = 1.0) -> dict:
    """All kinds of leaves that a run has: jax and numpy, bf16, integers, scalars, an empty optimizer part."""
    weights = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    return {
        "params": {"embed": jnp.asarray(weights) + value, "norm": jnp.full((8,), value, jnp.bfloat16)},
        "bias": {"router": np.full((2, 4), value, np.float32)},
        "opt": {"mu": {"embed": np.asarray(weights * 0.1, jnp.bfloat16)}, "count": np.int32(value), "none": {}},
        "rng": jax.random.key_data(jax.random.key(3)),
    }


def shapes_of(state: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), state)


def assert_same(got: dict, want: dict) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


def save_steps(folder: Path, steps: list[int], **config) -> Checkpointer:
    """A Checkpointer after saving `make_state(step)` for each step."""
    checkpoints = Checkpointer(str(folder), CheckpointConfig(**config))
    for step in steps:
        checkpoints.save(step, make_state(step), {"step": step})
    checkpoints.wait()
    return checkpoints


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_state_comes_back_bit_for_bit_with_its_metadata(tmp_path):
    state, meta = make_state(3), {"config": {"lr": 1e-3}, "data": {"next": 12}}
    checkpoints = Checkpointer(str(tmp_path / "run" / "checkpoints"), CheckpointConfig())
    assert checkpoints.latest_step() is None
    checkpoints.save(7, state, meta)
    checkpoints.wait()
    assert checkpoints.latest_step() == 7
    restored = checkpoints.restore(None, shapes_of(state))
    assert_same(restored, state)
    assert isinstance(restored["params"]["embed"], jax.Array)
    assert isinstance(restored["opt"]["mu"]["embed"], np.ndarray)
    assert checkpoints.read_meta(7) == meta
    checkpoints.close()


def test_a_state_restores_onto_another_mesh(tmp_path):
    mesh = jax.make_mesh((4, 2), ("expert", "fsdp"))
    value = np.arange(8 * 16, dtype=np.float32).reshape(8, 16)
    saved_as = jax.NamedSharding(mesh, jax.P("expert", "fsdp"))
    checkpoints = Checkpointer(str(tmp_path), CheckpointConfig())
    checkpoints.save(1, {"w": jax.device_put(value, saved_as)}, {})
    checkpoints.close()
    one = jax.sharding.SingleDeviceSharding(jax.devices()[5])
    for sharding in (one, jax.NamedSharding(mesh, jax.P(None, "expert")), jax.NamedSharding(mesh, jax.P())):
        like = {"w": jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)}
        restored = Checkpointer(str(tmp_path), CheckpointConfig()).restore(1, like)
        assert restored["w"].sharding == sharding
        np.testing.assert_array_equal(np.asarray(restored["w"]), value)


def test_a_state_donated_or_overwritten_after_save_is_saved_as_it_was(tmp_path):
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    mesh = jax.make_mesh((8,), ("fsdp",))
    state = {
        "one": jnp.ones((2048, 1024)),
        "sharded": jax.device_put(jnp.ones((2048, 1024)), jax.NamedSharding(mesh, jax.P("fsdp"))),
    }
    host = np.ones((2048, 1024), np.float32)
    meta = {"list": [1]}
    checkpoints = Checkpointer(str(tmp_path), CheckpointConfig())
    checkpoints.save(1, {**state, "host": host}, meta)
    for _ in range(3):
        state = step(state)
    host[:] = -1
    meta["list"].append(2)
    jax.block_until_ready(state)
    checkpoints.close()
    for name, array in read_arrays(tmp_path).items():
        assert (array == 1).all(), name
    assert read_meta(tmp_path) == {"list": [1]}


def test_arrays_are_stored_uncompressed_and_without_pickles(tmp_path):
    checkpoints = Checkpointer(str(tmp_path), CheckpointConfig())
    checkpoints.save(1, {"zeros": jnp.zeros((1024, 1024)), "host": np.zeros((1024, 512), jnp.bfloat16)}, {})
    checkpoints.close()
    size = sum(path.stat().st_size for path in files_of(tmp_path))
    assert 5 << 20 <= size < (5 << 20) + 20_000
    for path in files_of(tmp_path):
        if path.stat().st_size < 1 << 20:  # the rest are the arrays themselves
            text = path.read_text()
            assert path.name == "commit_success.txt" or json.loads(text) is not None, path


def test_an_array_is_cut_into_files_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 1 << 16)
    array = np.arange(1 << 18, dtype=np.float32).reshape(64, -1)
    checkpoints = Checkpointer(str(tmp_path), CheckpointConfig())
    checkpoints.save(1, {"host": array, "device": jnp.asarray(array)}, {})
    checkpoints.close()
    assert max(path.stat().st_size for path in files_of(tmp_path)) <= 1 << 16
    assert_same(read_arrays(tmp_path), {"host": array, "device": array})


def test_the_last_steps_and_every_mth_are_kept(tmp_path):
    checkpoints = save_steps(tmp_path, list(range(1, 12)), keep_last=2, keep_every=4)
    assert checkpoints.all_steps() == [4, 8, 10, 11]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "11", "4", "8"]  # and nothing else is left
    for step in checkpoints.all_steps():
        assert_same(checkpoints.restore(step, shapes_of(make_state(step))), make_state(step))
    checkpoints.close()


def test_a_part_is_read_without_the_bytes_of_the_rest_from_a_step_folder_alone(tmp_path):
    state = make_state(5)
    save_steps(tmp_path / "run" / "checkpoints", [5]).close()
    alone = tmp_path / "elsewhere" / "copied"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "5", alone)
    shutil.rmtree(tmp_path / "run")
    for path in (alone / "state").glob("opt.*"):
        for chunk in files_of(path):
            if chunk.name != ".zarray":
                chunk.unlink()
    part = {"params": state["params"], "bias": state["bias"]}
    assert_same(read_arrays(alone, shapes_of(part)), part)
    assert read_meta(alone) == {"step": 5}
    with pytest.raises(ValueError, match="opt"):  # an array without its bytes is no array of zeros
        read_arrays(alone)


def test_shapes_are_read_without_arrays(tmp_path):
    save_steps(tmp_path, [5]).close()
    shapes = read_shapes(tmp_path)
    assert shapes["params"]["norm"] == jax.ShapeDtypeStruct((8,), jnp.bfloat16)
    assert sorted(shapes) == ["bias", "opt", "params", "rng"]


def test_all_differences_are_listed_before_anything_is_read(tmp_path):
    checkpoints = save_steps(tmp_path, [5])
    for chunk in files_of(tmp_path / "5" / "state"):
        if re.fullmatch(r"[\d.]+", chunk.name):
            chunk.unlink()  # reading would fail
    like = shapes_of(make_state(5))
    like["params"]["embed"] = jax.ShapeDtypeStruct((16, 9), jnp.float32)
    like["params"]["norm"] = jax.ShapeDtypeStruct((8,), jnp.float32)
    like["params"]["head"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    del like["rng"]
    lines = [
        "params/embed: saved float32[16, 8], wanted float32[16, 9]",
        "params/head: saved nothing, wanted float32[3]",
        "params/norm: saved bfloat16[8], wanted float32[8]",
    ]
    extra = "rng: saved uint32[2], wanted nothing"
    with pytest.raises(ValueError) as error:
        checkpoints.restore(None, like)
    assert [line.strip() for line in str(error.value).split("\n")[1:]] == [*lines, extra]
    with pytest.raises(ValueError) as error:
        read_arrays(tmp_path, like)
    assert [line.strip() for line in str(error.value).split("\n")[1:]] == lines
    with pytest.raises(ValueError) as error:
        read_arrays(tmp_path, {f"w{i}": like["params"]["norm"] for i in range(500)})
    assert str(error.value).count("\n") <= 21 and "500" in str(error.value)
    checkpoints.close()


def test_a_checkpoint_is_found_from_run_folder_its_checkpoints_or_one_step(tmp_path):
    run = tmp_path / "run"
    save_steps(run / "checkpoints", [9, 10]).close()
    shutil.copytree(run / "checkpoints" / "10", run / "checkpoints" / "11.orbax-checkpoint-tmp")
    latest = run / "checkpoints" / "10"
    assert {str(find_checkpoint(path)) for path in (run, run / "checkpoints", latest)} == {str(latest)}
    assert str(find_checkpoint(str(run / "checkpoints" / "9"))) == str(run / "checkpoints" / "9")
    for path in (tmp_path, run / "nowhere", latest / "state", run / "checkpoints" / "11.orbax-checkpoint-tmp"):
        with pytest.raises(ValueError, match=f"no checkpoint in {re.escape(str(path))}"):
            find_checkpoint(path)


@pytest.mark.parametrize(
    ("step", "state", "meta", "message"),
    [
        (5, {"w": np.ones(2)}, {}, "step 5 is not after step 5"),
        (6, {"w": [np.ones(2)]}, {}, "'w',.*list"),
        (6, {"w": 1.0}, {}, "'w',.*float"),
        (6, {"w": np.ones((0, 2))}, {}, r"'w',.*\(0, 2\)"),
        (6, {"w": jax.random.key(0)}, {}, "key_data"),
        (6, {"a.b": np.ones(2)}, {}, "a.b"),
        (6, {3: np.ones(2)}, {}, "3"),
        (6, {"w": np.ones(2)}, {"x": np.ones(2)}, "metadata of step 6 is not plain JSON"),
        (6, {"w": np.ones(2)}, {"x": float("nan")}, "metadata of step 6 is not plain JSON"),
    ],
)
def test_what_cannot_come_back_is_refused(tmp_path, step, state, meta, message):
    checkpoints = save_steps(tmp_path, [5])
    with pytest.raises(ValueError, match=message):
        checkpoints.save(step, state, meta)
    assert checkpoints.all_steps() == [5]
    checkpoints.close()


def test_a_missing_step_is_an_error_that_lists_the_saved_ones(tmp_path):
    checkpoints = save_steps(tmp_path, [4, 5])
    with pytest.raises(ValueError, match=r"no step 3 .*\[4, 5\]"):
        checkpoints.restore(3, {})
    with pytest.raises(ValueError, match="no step .*none"):
        Checkpointer(str(tmp_path / "new"), CheckpointConfig()).read_meta(None)
    checkpoints.close()


def test_leftovers_of_crashed_runs_go_when_opening(tmp_path):
    save_steps(tmp_path, [5]).close()
    shutil.copytree(tmp_path / "5", tmp_path / "6.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "5", tmp_path / "deleting" / "4")
    (tmp_path / "notes").mkdir()
    assert Checkpointer(str(tmp_path), CheckpointConfig()).all_steps() == [5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "notes"]


def test_orbax_keeps_quiet(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save_steps(tmp_path, [1, 2, 3], keep_last=1).close()
    read_arrays(tmp_path)
    assert [record.getMessage() for record in caplog.records] == []


def test_a_failed_write_is_one_error_and_loses_nothing(tmp_path, capfd):
    folder = tmp_path / "checkpoints"
    checkpoints = save_steps(folder, [1], keep_last=1)
    large = {"small": np.full(9, 2, np.float32), "large": np.full((8, 1 << 15), 2, np.float32)}
    message = re.escape(f"saving step 2 in {folder} failed: ") + r".*saved steps \[1\] are intact.*large"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))  # larger files cannot be written
    try:
        checkpoints.save(2, large, {})
        with pytest.raises(ValueError, match=message):
            checkpoints.wait()
        assert [path.name for path in folder.iterdir()] == ["1"]
        checkpoints.wait()  # told once
        checkpoints.save(2, large, {})
        with pytest.raises(ValueError, match=message):
            checkpoints.save(3, make_state(3), {})
        assert [path.name for path in folder.iterdir()] == ["1"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert_same(checkpoints.restore(1, shapes_of(make_state(1))), make_state(1))
    checkpoints.save(3, make_state(3), {})
    checkpoints.close()
    assert [path.name for path in folder.iterdir()] == ["3"]  # the failure has not made it forget to remove step 1
    assert "orbax" not in capfd.readouterr().err


# The rest runs in processes of its own: on a small disk, or to be killed.

PRELUDE = """
import os, random, signal, sys, time
import numpy as np
from ling_jax.checkpoint import Checkpointer, read_arrays, read_meta
from ling_jax.config import CheckpointConfig

folder = sys.argv[1]

def make(step, size=1 << 12):
    params = {f"w{i}": np.full(size, step, np.float32) for i in range(6)}
    return {"params": params, "opt": np.full(size, step, np.int32)}

def check(steps):
    # Every step is whole: each array, and the metadata, hold its number.
    for step in steps:
        arrays = read_arrays(f"{folder}/{step}")
        values = {int(x) for a in [*arrays["params"].values(), arrays["opt"]] for x in np.unique(a)}
        assert values == {step} and len(arrays["params"]) == 6, (step, values)
        assert read_meta(f"{folder}/{step}") == {"step": step}
"""


def run_script(script: str, *args: str, prefix: tuple[str, ...] = ()) -> str:
    done = subprocess.run(
        [*prefix, sys.executable, "-c", PRELUDE + script, *args],
        cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_full_disk_is_one_error_that_loses_nothing_and_leaves_nothing(tmp_path):
    script = """
def fails(action):
    files = os.statvfs(folder).f_ffree
    try:
        action()
    except ValueError as error:
        assert os.listdir(folder) == ["1"] and os.statvfs(folder).f_ffree == files, os.listdir(folder)
        check([1])
        return print("ERROR", str(error).replace(chr(10), " "))
    raise AssertionError("no error")

def save(step, state):
    checkpoints.save(step, state, {"step": step})
    checkpoints.wait()

checkpoints = Checkpointer(folder, CheckpointConfig(keep_last=1))
save(1, make(1))
fails(lambda: save(2, make(2, 1 << 19)))  # more bytes than the disk has
taken = [f"{folder}/1/{i}" for i in range(os.statvfs(folder).f_ffree - 20)]
for name in taken:
    open(name, "w").close()
fails(lambda: save(3, make(3)))  # more files than the disk can still hold, noticed in the background
for name in taken:
    os.remove(name)
save(4, make(4))
assert os.listdir(folder) == ["4"], os.listdir(folder)
check([4])
"""
    out = run_script(script, str(tmp_path), prefix=mount_prefix(tmp_path, "size=12m,nr_inodes=120"))
    errors = [line for line in out.splitlines() if line.startswith("ERROR")]
    assert len(errors) == 2
    assert re.search(r"step 2 takes 14.7 MB .* has [\d.]+ MB free: make room .*\[1\] are intact", errors[0])
    assert re.search(r"saving step 3 .* has room.*\[1\] are intact.*No space left on device", errors[1])


def test_after_sigkill_at_any_moment_every_step_is_whole(tmp_path):
    # One process imports, and forks a saver before each kill: jax itself starts only in the savers.
    script = """
moments = random.Random(0)

def saver(pipe, committed):
    checkpoints = Checkpointer(folder, CheckpointConfig(keep_last=2, keep_every=10))
    check(checkpoints.all_steps())
    latest = checkpoints.latest_step() or 0
    assert latest >= committed, (latest, committed)
    os.write(pipe, b"ready\\n")
    for step in range(latest + 1, 10_000):
        checkpoints.save(step, make(step), {"step": step})
        checkpoints.wait()
        os.write(pipe, f"{step}\\n".encode())

committed = 0
for kill in range(9):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            saver(writer, committed) if kill < 8 else check(Checkpointer(folder, CheckpointConfig()).all_steps())
        except BaseException as error:
            print("FAILED", repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    os.close(writer)
    lines = os.fdopen(reader)
    if kill < 8:
        assert lines.readline() == "ready\\n", "the saver did not start"
        first = [lines.readline()] * (kill % 2)  # every second kill comes after a save, however slow the machine
        time.sleep(moments.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        steps = [int(line) for line in (*first, *lines.read().split())]
        committed = max(steps, default=committed)
    status = os.waitpid(child, 0)[1]
    assert status == (signal.SIGKILL if kill < 8 else 0), status
print("COMMITTED", committed, sorted(os.listdir(folder)))
"""
    out = run_script(script, str(tmp_path / "checkpoints"))
    assert int(out.split("COMMITTED ")[1].split()[0]) >= 4, out
    assert re.fullmatch(r"COMMITTED \d+ \[('\d+'(, )?)+\]\n", out), out
