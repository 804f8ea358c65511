"""One device's numbers on every mesh: losses, all gradients, moments, expert counts and biases.

Legend: L MoE layers, E experts.
"""

import pytest

from ling_jax.config import MeshConfig
from tests.support.marks import nightly
from tests.support.meshes import GROWING, SPARSE, WHOLE, Run, compare, one_device

MESHES = {
    "fsdp8": dict(fsdp=8),
    "expert8": dict(expert=8),
    "data2-expert4": dict(data=2, expert=4),
    "fsdp2-expert4": dict(fsdp=2, expert=4),
    "fsdp2-expert2-tensor2": dict(fsdp=2, expert=2, tensor=2),
    "tensor4": dict(tensor=4),
    "context4-expert2": dict(context=4, expert=2),
}
GATHERED = {"dispatcher": "all_gather", "context_method": "all_gather"}


@pytest.mark.parametrize("name", [nightly("fsdp8"), "fsdp2-expert2-tensor2", nightly("context4-expert2")])
def test_a_mesh_gives_one_devices_numbers(name):
    compare(Run(WHOLE, MeshConfig(**MESHES[name])), one_device(WHOLE))


@pytest.mark.nightly
def test_gathered_rows_and_keys_give_one_devices_numbers():
    compare(Run(WHOLE, MeshConfig(**MESHES["context4-expert2"], **GATHERED)), one_device(WHOLE))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        nightly("expert8", {}),
        nightly("data2-expert4", {}),
        ("fsdp2-expert4", {}),
        nightly("fsdp2-expert4", {"dispatcher": "all_gather"}),
        ("tensor4", {}),
    ],
)
def test_a_mesh_gives_one_devices_numbers_of_sparse_layers(name, options):
    compare(Run(SPARSE, MeshConfig(**MESHES[name], **options)), one_device(SPARSE))


@pytest.mark.parametrize("name", ["fsdp2-expert4", nightly("context4-expert2")])
def test_hostile_routing_in_a_tight_buffer_gives_one_devices_numbers(name):
    compare(Run(SPARSE, MeshConfig(**MESHES[name], buffer_factor=0.5), hot=True), one_device(SPARSE, hot=True))


def test_microbatches_on_a_mesh_give_one_devices_numbers():
    train = dict(microbatches=2, remat="save_dispatch")
    compare(Run(SPARSE, MeshConfig(fsdp=2, expert=2), **train), one_device(SPARSE, **train))


def test_a_batch_that_has_not_grown_yet_gives_one_devices_numbers():
    """Every device stops after the same microbatch, though of the last row some hold only padding."""
    compare(Run(SPARSE, MeshConfig(fsdp=2, context=2), **GROWING), Run(SPARSE, MeshConfig(), **GROWING).outcome())
