"""Every byte of a checkpoint is accounted for: who reads a missing or changed file says so and gives no numbers."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

import sample
from ling_jax import evaluate, load_pretrained
from ling_jax.checkpoint import Checkpointer, DamagedCheckpoint, open_arrays, read_arrays, read_meta
from ling_jax.config import CheckpointConfig
from ling_jax.convert.survey import survey
from ling_jax.convert.to_hf import to_hf
from ling_jax.convert.to_jax import to_jax
from ling_jax.convert.verify import verify
from ling_jax.convert.weights import open_weights
from ling_jax.files.arrays import CHECKSUMS, StoredArray, chunk_of, merge_checksums, on_host, write_arrays
from tests.support.commands import call
from tests.support.marks import nightly
from tests.tiny_run import SPARSE, train_args

STEPS = dict(**SPARSE, train__steps=3, checkpoint__every=1, checkpoint__keep_last=3, train__eval_every=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a text corpus and the run `whole`, whose steps 1, 2 and 3 are saved."""
    folder = tmp_path_factory.mktemp("damage")
    call("train.py", *train_args(folder, "whole", **STEPS))
    return folder


@pytest.fixture
def copied(folder) -> Path:
    """A copy of the run, to be damaged."""
    target = folder / "runs" / "copied"
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(folder / "runs" / "whole", target)


def step_of(run_dir: Path, step: int = 3) -> Path:
    return run_dir / "checkpoints" / str(step)


def flip(file: Path, at: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[at if at >= 0 else len(data) // 2] ^= 1
    file.write_bytes(data)


def chunks_of(run_dir: Path, step: int, array: str) -> list[Path]:
    """The files of one array but its header, the largest first."""
    [place] = (step_of(run_dir, step) / "state").glob(array)
    return sorted((file for file in place.iterdir() if file.name != ".zarray"), key=lambda file: -file.stat().st_size)


def is_of_weights(file: Path) -> bool:
    return file.parent.name.split(".")[0] in ("params", "bias")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def read_weights(run_dir: Path) -> None:
    """As `load_pretrained`, conversions and `inspect` read them, without the seconds that making a model takes."""
    weights = open_weights(run_dir)
    for path, stack in weights.stacks.items():
        weights.read(path, tuple(slice(0, size) for size in stack.full_shape))


@pytest.mark.parametrize(
    ("damage", "every"),
    [
        (Path.unlink, 5),
        (flip, 7),
        (cut, 9),
        *(nightly(d, 1) for d in (Path.unlink, flip, cut)),
    ],
)
def test_each_file_of_an_array_in_turn(copied, damage, every):
    """Resume reads all arrays, `load_pretrained` those of the weights and no others."""
    state = step_of(copied) / "state"
    files = [file for file in state.rglob("*") if file.parent != state]
    assert len(files) > 60
    for file in files[::every]:
        good = file.read_bytes()
        damage(file)
        told = (
            rf"checkpoints/3 is damaged: {'/'.join(file.parent.name.split('.'))}: .*{re.escape(str(file))} .*step is 2"
        )
        with pytest.raises(DamagedCheckpoint, match=told):
            read_arrays(copied)
        if is_of_weights(file):
            with pytest.raises(DamagedCheckpoint, match=told):
                read_weights(copied)
        file.write_bytes(good)
    jax.tree.map(np.testing.assert_array_equal, read_arrays(copied), read_arrays(copied.parent / "whole"))


def rename_checksum(file: Path) -> None:
    text = file.read_text()
    assert '"xxh3_64":' in text
    file.write_text(text.replace('"xxh3_64":', '"xxh3_65":'))


@pytest.mark.parametrize("damage", [Path.unlink, flip, rename_checksum])
@pytest.mark.parametrize("name", ["state/checksums.json", "meta/meta.json"])
def test_what_describes_the_arrays(copied, damage, name):
    damage(step_of(copied) / name)
    for read in (read_arrays, load_pretrained, survey):
        with pytest.raises(DamagedCheckpoint, match=rf"checkpoints/3 is damaged: .*{name}.*the last good step is 2"):
            read(copied)


def test_any_other_file_of_a_step_is_needed_by_no_reader(copied):
    arrays = read_arrays(copied)
    others = [file for file in step_of(copied).rglob("*") if file.is_file() and not file.parent.parent.name == "state"]
    for file in others:
        if file.name not in (CHECKSUMS, "meta.json"):
            file.unlink()
    jax.tree.map(np.testing.assert_array_equal, read_arrays(copied), arrays)


def test_a_step_that_lost_its_arrays_or_its_metadata_is_never_passed_over_for_an_older_one(copied):
    shutil.rmtree(step_of(copied) / "meta")
    with pytest.raises(DamagedCheckpoint, match="meta.json is missing; the last good step is 2"):
        read_arrays(copied)
    shutil.rmtree(step_of(copied, 2) / "state")
    shutil.rmtree(step_of(copied, 1))
    with pytest.raises(DamagedCheckpoint, match="meta.json is missing; restore it from a copy"):
        read_arrays(copied)


def test_weights_alone_are_read_though_the_optimizers_arrays_are_damaged(copied):
    for file in chunks_of(copied, 3, "optimizer.*.mu.word_embeddings.weight"):
        flip(file)
    logits = [load_pretrained(path)(np.array([[1, 2, 3]])).logits_BTV for path in (copied, copied.parent / "whole")]
    np.testing.assert_array_equal(*logits)
    with pytest.raises(DamagedCheckpoint, match="optimizer/.*/mu/word_embeddings/weight"):
        read_arrays(copied)


def test_the_good_step_is_one_whose_every_byte_is_right(copied):
    flip(chunks_of(copied, 3, "params.word_embeddings.weight")[0])
    flip(chunks_of(copied, 2, "optimizer.*.nu.norm.weight")[0])
    with pytest.raises(DamagedCheckpoint, match="params/word_embeddings/weight.*the last good step is 1") as found:
        read_arrays(copied)
    assert found.value.good == 1
    with pytest.raises(DamagedCheckpoint, match="the last good step is 2"):  # as far as its weights go
        load_pretrained(copied)


def test_a_file_of_another_step_or_array_is_not_taken_for_this_one(copied):
    name = "params.word_embeddings.weight"
    shutil.copy(chunks_of(copied, 2, name)[0], chunks_of(copied, 3, name)[0])
    with pytest.raises(DamagedCheckpoint, match="params/word_embeddings/weight.*checksum"):
        load_pretrained(copied)


COMMANDS: dict[str, Callable[[Path, Path], object]] = {
    "sample": lambda run_dir, _: sample.main(["--checkpoint", str(run_dir), "--prompt", "a", "--max-new-tokens", "2"]),
    "evaluate": lambda run_dir, _: evaluate.evaluate(str(run_dir), "the model", 32, 2),
    "inspect": lambda run_dir, _: survey(str(run_dir)),
    "verify": lambda run_dir, _: verify(str(run_dir.parent / "whole"), str(run_dir), logits=False),
    "to-hf": lambda run_dir, target: to_hf(str(run_dir), str(target)),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_reads_weights(copied, tmp_path, name, capsys):
    file = chunks_of(copied, 3, "params.layers.*.experts.up_proj.weight")[0]
    flip(file)
    with pytest.raises(ValueError, match=f"mlp/experts/up_proj/weight: {re.escape(str(file))} does not have the check"):
        COMMANDS[name](copied, tmp_path / "x")
    assert capsys.readouterr().out == "" and not (tmp_path / "x").exists()


def test_a_resume_names_tensor_step_and_the_way_on_and_goes_on_there(folder, copied):
    flip(chunks_of(copied, 3, "optimizer.*.mu.word_embeddings.weight")[0])
    more = train_args(folder, "copied", **{**STEPS, "train__steps": 5})
    lines = (copied / "metrics.jsonl").read_bytes()
    _, log = call("train.py", *more, code=2)
    last = log.splitlines()[-1]
    assert re.match(
        r"error: .*/3 is damaged: optimizer/.*/mu/.*the last good step is 2.*same command with --from-step 2", last
    )
    assert (copied / "metrics.jsonl").read_bytes() == lines and sorted(os.listdir(copied / "checkpoints")) == list(
        "123"
    )
    _, log = call("train.py", *more, "--from-step", 7, code=2)
    assert "--from-step 7: " in log and "has the steps [1, 2, 3]" in log
    _, log = call("train.py", *more, "--from-step", 2)
    assert "resuming from step 2" in log and "moved step 3 to" in log
    [aside] = copied.glob("checkpoints.*")
    assert os.listdir(aside) == ["3"] and sorted(os.listdir(copied / "checkpoints")) == list("345")
    assert [json.loads(line)["step"] for line in (copied / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5]
    whole = read_arrays(copied.parent / "whole")
    jax.tree.map(np.testing.assert_array_equal, read_arrays(step_of(copied)), whole)


def test_true_zeros_have_files_and_checksums_like_other_numbers(tmp_path):
    checkpoints = Checkpointer(str(tmp_path), CheckpointConfig())
    checkpoints.save(1, {"zeros": np.zeros((64, 64), np.float32), "zero": np.int32(0)}, {})
    checkpoints.close()
    assert not read_arrays(tmp_path)["zeros"].any()
    (tmp_path / "1" / "state" / "zeros" / "0.0").unlink()
    with pytest.raises(DamagedCheckpoint, match="zeros: .*0.0 is missing"):
        read_arrays(tmp_path)


def save_as_before(folder: Path, state: dict, meta: dict) -> None:
    """One step as it was saved before there were checksums."""
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder / "state", args=ocp.args.PyTreeSave(state))
    (folder / "meta").mkdir()
    (folder / "meta" / "meta.json").write_text(json.dumps(meta))


def test_a_checkpoint_without_checksums_is_read_with_one_line(tmp_path, caplog):
    state = {"params": {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}, "zeros": np.zeros(3, np.int32)}
    save_as_before(tmp_path / "5", state, {"step": 5})
    for _ in range(2):
        jax.tree.map(np.testing.assert_array_equal, read_arrays(tmp_path), state)
    assert read_meta(tmp_path) == {"step": 5}
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1 and f"{tmp_path / '5'} has no checksums" in told[0]
    (tmp_path / "5" / "state" / "zeros" / "0").unlink()
    with pytest.raises(DamagedCheckpoint, match="zeros: .*/0 is missing"):
        read_arrays(tmp_path)


def test_zeros_that_the_converter_once_left_out_are_zeros(tmp_path):
    save_as_before(tmp_path / "5", {"params": {"w": np.zeros((3, 4), np.float32)}}, {"hf": {"kept": True}})
    (tmp_path / "5" / "state" / "params.w" / "0.0").unlink()
    assert not read_arrays(tmp_path)["params"]["w"].any()


def test_a_converted_checkpoint_has_checksums_of_what_was_written(folder, tmp_path):
    to_hf(str(folder / "runs" / "whole"), str(tmp_path / "hf"))
    to_jax(str(tmp_path / "hf"), str(tmp_path / "ours"))
    found = survey(str(tmp_path / "ours")).render()
    assert re.search(r"saved checksums +XXH3-64 of \d+ files, those of the weights compared, and right", found)
    [file] = (tmp_path / "ours" / "state" / "params.norm.weight").glob("0")
    flip(file)
    with pytest.raises(DamagedCheckpoint, match="params/norm/weight: .*/0 does not have the checksum"):
        to_hf(str(tmp_path / "ours"), str(tmp_path / "back"))


@pytest.mark.parametrize("chunk", [1 << 10, 1 << 14])
def test_every_part_of_an_array_is_read_and_checked(tmp_path, monkeypatch, chunk):
    """Parts that are whole chunks, cut chunks, or lie in many; of an array that eight devices hold in four shards."""
    monkeypatch.setattr("ling_jax.files.arrays.CHUNK_BYTES", chunk)
    values = np.random.default_rng(0).normal(size=(12, 16, 40)).astype(np.float32)
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    array = jax.device_put(values, jax.NamedSharding(mesh, jax.P(None, "a")))
    checkpoints = Checkpointer(str(tmp_path), CheckpointConfig())
    checkpoints.save(1, {"x": array, "host": values}, {})
    checkpoints.close()
    found = open_arrays(tmp_path)
    rng = np.random.default_rng(1)
    for path in (("x",), ("host",)):
        for _ in range(50):
            bounds = [np.sort(rng.choice(size + 1, 2, replace=False)) for size in values.shape]
            index = tuple(slice(int(a), int(b)) for a, b in bounds)
            np.testing.assert_array_equal(found.array(path).read(index), values[index])
        np.testing.assert_array_equal(found.array(path).read(), values)
    layout = found.layouts["x",]
    assert layout.shape == values.shape and layout.chunk[1] <= 4 and not any(map(int.__mod__, *layout[::2]))
    touched = next(file for file in (tmp_path / "1" / "state" / "x").glob("0.0.*"))
    flip(touched)
    fresh = open_arrays(tmp_path).array(("x",))
    with pytest.raises(DamagedCheckpoint):
        fresh.read(tuple(slice(0, 1) for _ in values.shape))
    if layout.chunk[0] < 12:  # a part that lies elsewhere is not touched by it
        np.testing.assert_array_equal(fresh.read((slice(11, 12), slice(0, 4), slice(0, 40))), values[11:, :4])
    assert isinstance(fresh, StoredArray)


def test_a_save_of_which_a_process_wrote_nothing_is_no_checkpoint(tmp_path):
    arrays = on_host({("x",): np.zeros((4, 6), np.float32)})
    write_arrays(epath.Path(tmp_path), {path: array._replace(parts=[]) for path, array in arrays.items()})
    with pytest.raises(ValueError, match="no process wrote 0.0 of x"):
        merge_checksums(epath.Path(tmp_path))
    assert not (tmp_path / CHECKSUMS).exists()


@pytest.mark.parametrize(
    ("shape", "limit", "chunk"),
    [
        ((), 100, ()),
        ((7,), 100, (7,)),
        ((1000,), 400, (125,)),
        ((6, 10, 100), 400, (1, 1, 100)),
        ((6, 10, 100), 8000, (2, 10, 100)),
        ((7, 10, 100), 8000, (1, 10, 100)),
        ((9, 10, 100), 24000, (3, 10, 100)),
        ((76, 10, 100), 64000, (19, 10, 100)),  # 16 would fit, and the next smaller is 4
        ((10007, 4), 160, (10007, 4)),  # a large prime: no smaller file divides it
    ],
)
def test_chunks_divide_an_array_and_lie_together(shape, limit, chunk):
    assert chunk_of(shape, 4, limit) == chunk
