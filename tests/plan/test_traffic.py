"""A plan's figures of storage are what is written and read; no checkpoint has too many objects, or too large ones."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore as ts
from flax.serialization import to_state_dict
from flax.traverse_util import flatten_dict

from ling_jax.checkpoint import Checkpointer
from ling_jax.config import CheckpointConfig, DataConfig, MeshConfig, RunConfig
from ling_jax.convert.tensorfile import TensorFile
from ling_jax.convert.to_hf import to_hf
from ling_jax.convert.to_jax import to_jax
from ling_jax.files.arrays import CHUNK_BYTES, Layout
from ling_jax.plan import traffic
from ling_jax.plan.plan import topology_devices
from ling_jax.plan.report import traffic_rows
from ling_jax.plan.traffic import PlannedDevice, Traffic, planned_devices, read_in_parts, traffic_of
from ling_jax.train.state import make_trainer
from scripts.plan_tables import FP8, RUNS, commands, traffic_of_command
from tests.support.helpers import tiny

SAVE, RESUME, START, TO_JAX, TO_HF = range(5)
FLOAT32 = np.dtype(np.float32)


def config(**mesh: int) -> RunConfig:
    return RunConfig(model=tiny(), mesh=MeshConfig(**mesh), data=DataConfig(sequence_length=16, global_batch_size=16))


def works(found: dict[str, Traffic]) -> list[Traffic]:
    return list(found.values())


@pytest.mark.parametrize("name", [*RUNS, *(f"{name}-fp8" for name in FP8)])
def test_checkpoints_of_the_documented_plans_have_neither_tiny_nor_huge_objects(name):
    """No host writes much more than the others, and no object has more than a host writes. Every slice reads all."""
    save, resume, _, converted, exported = works(traffic_of_command(commands()[name]))
    assert 0 < save.objects < 200_000 and converted.objects < 200_000
    assert save.largest <= min(2 * CHUNK_BYTES, save.of_host) and converted.largest <= CHUNK_BYTES
    assert save.of_host <= 1.2 * save.written / save.hosts
    slices = 2 if "two-slices" in name else 1
    assert slices * save.written <= resume.read <= 1.01 * slices * save.written
    assert exported.written == converted.written == converted.read  # bfloat16, there and back
    assert exported.largest <= traffic.SHARD_BYTES


def test_ling_1t_on_1024_chips():
    """12 bytes for each of 1,012.9 G parameters; 256 hosts."""
    save, resume, *_ = works(traffic_of_command(commands()["1t-v5p-8x8x16"]))
    assert save.hosts == resume.hosts == 256
    assert save.written == pytest.approx(12 * 1_012_927_913_472, rel=1e-4)
    assert resume.of_host == pytest.approx(save.written / 256, rel=1e-3)
    assert 100_000 < save.objects < 110_000


def bytes_read() -> int:
    [metric] = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return int(metric["values"][0]["value"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(plan, folder of a step, what was saved) of a run on eight devices."""
    folder, run = tmp_path_factory.mktemp("run"), config(data=2, fsdp=2, expert=2)
    trainer = make_trainer(run, jax.devices())
    state = to_state_dict(trainer.new_state())
    checkpoints = Checkpointer(str(folder), CheckpointConfig())
    checkpoints.save(1, state, {"config": dataclasses.asdict(run)})
    checkpoints.close()
    return works(traffic_of(trainer)), folder / "1", state


def sizes_of_chunks(folder: Path) -> list[int]:
    return [file.stat().st_size for file in folder.glob("state/*/*") if file.name != ".zarray"]


def test_a_checkpoint_is_what_was_planned(saved):
    plan, folder, _ = saved
    files = list(folder.glob("state/*/*"))
    sizes = sizes_of_chunks(folder)
    assert len(files) == plan[SAVE].objects and sum(sizes) == plan[SAVE].written and max(sizes) == plan[SAVE].largest
    assert plan[SAVE].hosts == 1 and plan[SAVE].of_host == plan[SAVE].written


def test_shards_are_where_jax_puts_them(saved):
    *_, state = saved
    for array in flatten_dict(state).values():
        found = traffic._shards(array.sharding, array.shape)
        real = {shard.device: shard for shard in array.addressable_shards}
        for device, starts, replica in zip(array.sharding.mesh.devices.flat, found.starts, found.replicas, strict=True):
            shard = real[device]
            first = [part.indices(size)[0] for part, size in zip(shard.index, array.shape, strict=True)]
            assert (list(starts), replica, found.shape) == (first, shard.replica_id, shard.data.shape)


def test_a_start_reads_what_was_planned(saved):
    """The headers, of some hundred bytes, are read besides."""
    plan, folder, state = saved
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    checkpoints, before = Checkpointer(str(folder.parent), CheckpointConfig()), bytes_read()
    checkpoints.restore(1, like)
    assert plan[RESUME].read <= bytes_read() - before <= plan[RESUME].read + 500 * len(flatten_dict(state))
    assert plan[RESUME].read == plan[SAVE].written  # equal shards are read once


def test_conversions_write_what_was_planned(saved, tmp_path):
    plan, folder, _ = saved
    to_hf(str(folder), str(tmp_path / "hf"), "bf16")
    [file] = (tmp_path / "hf").glob("*.safetensors")
    assert plan[TO_HF].objects == 1
    assert plan[TO_HF].written == plan[TO_HF].largest == sum(t.nbytes for t in TensorFile(file).tensors.values())
    to_jax(str(tmp_path / "hf"), str(tmp_path / "jax"))
    sizes, headers = sizes_of_chunks(tmp_path / "jax"), len([*(tmp_path / "jax").glob("state/*/.zarray")])
    assert len(sizes) + headers == plan[TO_JAX].objects and max(sizes) == plan[TO_JAX].largest
    assert sum(sizes) == plan[TO_JAX].written == plan[TO_JAX].read == plan[TO_HF].written


def test_hosts_share_what_they_hold_alike():
    """Two hosts of two devices with the whole state each: both read all of it, and each writes half."""
    devices = [PlannedDevice(i, i // 2) for i in range(4)]
    save, resume, *_ = works(traffic_of(make_trainer(config(data=2, fsdp=2), devices)))
    one, *_ = works(traffic_of(make_trainer(config(), devices[:1])))
    assert save.written == one.written and resume.read == 2 * one.written
    assert resume.of_host == one.written and save.of_host == pytest.approx(one.written / 2, rel=0.05)


def test_parts_of_chunks():
    """An array of 4 x 4 x 4 chunks of 2 x 4 x 8 float32 numbers, 256 bytes each."""
    stored = Layout((8, 16, 32), FLOAT32, (2, 4, 8))
    whole = (0, 8), (0, 16), (0, 32)
    assert read_in_parts(stored, [whole]) == (64 * 256, 64)
    assert read_in_parts(stored, [((0, 1), (0, 4), (0, 8))]) == (256, 1)  # whole, for the checksum
    assert read_in_parts(stored, [((0, 1), (0, 4), (0, 8)), ((1, 2), (0, 4), (0, 8))]) == (256 + 128, 2)
    assert read_in_parts(stored, [whole, ((1, 2), (2, 3), (3, 5))]) == (64 * 256 + 8, 65)  # two numbers of one row
    assert read_in_parts(stored, [whole, ((1, 2), (2, 4), (3, 5))]) == (64 * 256 + 256, 65)  # of two rows: not together
    assert read_in_parts(stored, [whole, ((1, 3), (0, 4), (0, 8))]) == (64 * 256 + 2 * 128, 66)
    assert read_in_parts(Layout((), FLOAT32, ()), [()]) == (4, 1)


@pytest.mark.parametrize(("topology", "slices"), [("v5p:4x4x4", 2), ("v6e:16x16", 1), ("tpu7x:4x4x4", 1)])
def test_planned_devices_are_on_the_hosts_of_the_topology(topology, slices):
    real, planned = topology_devices(topology, slices), planned_devices(topology, slices)
    assert [device.process_index for device in planned] == [device.process_index for device in real]


def test_times_are_the_slower_of_bytes_and_requests():
    [head, *rows] = traffic_rows(
        {"a": Traffic(2, 0, 0, 16 * 10**9, 3000, 10**8, 8 * 10**9), "b": Traffic(1, 40 * 10**9, 5, 0, 0, 0, 40 * 10**9)}
    )
    assert rows[0] == ("a", "2", "-", "16.00 GB", "3,000", "0.10 GB", "8.00 GB", "3", "requests")
    assert rows[1] == ("b", "1", "40.00 GB", "-", "-", "-", "40.00 GB", "10", "bytes") and len(head) == 9
