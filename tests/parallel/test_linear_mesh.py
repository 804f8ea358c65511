"""A hybrid of linear and softmax layers, with an MTP layer, trains on every mesh as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ling_jax.config import MeshConfig
from ling_jax.kernels.lightning import lightning
from ling_jax.parallel.context import context_lightning, zigzag_order
from ling_jax.parallel.mesh import make_mesh, manual
from tests.support.helpers import assert_close, assert_gradients_close, output_and_gradients, tiny
from tests.support.marks import nightly
from tests.support.meshes import Run, compare, one_device

HYBRID = tiny(vocab_size=64, num_hidden_layers=4, layer_group_size=3, group_norm_size=2, linear_silu=True)


@pytest.mark.parametrize(
    "mesh",
    [
        nightly(MeshConfig(context=4)),
        MeshConfig(context=2, tensor=2, expert=2),
        nightly(MeshConfig(context=2, tensor=2, expert=2, context_method="all_gather")),
        nightly(MeshConfig(fsdp=2, expert=2, tensor=2)),
        nightly(MeshConfig(data=2, fsdp=4)),
    ],
    ids=lambda mesh: str(mesh.shape),
)
def test_a_hybrid_on_a_mesh_has_one_devices_numbers(mesh):
    compare(Run(HYBRID, mesh), one_device(HYBRID))


@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_cut_over_context_have_the_states_of_whole_ones(ranks):
    """Documents that begin and end in any piece, several in one, one over all, padding in the middle, empty rows."""
    rng, length, heads = np.random.default_rng(0), 48, 4
    segments = np.array(
        [
            np.repeat([1, 2, 3], [30, 1, 17]),
            np.full(48, 5),
            np.repeat([1, 0, 1, 2, 0], [4, 20, 3, 11, 10]),
            np.repeat([0, 1, 0], [13, 30, 5]),
            np.arange(48) // 2 + 1,
            np.zeros(48, int),
        ],
        np.int32,
    )
    q, k, v = (jnp.asarray(rng.normal(size=(len(segments), length, heads, 8)), jnp.float32) for _ in range(3))
    slopes = jnp.asarray([0.7, 0.2, 0.05, 0.004], jnp.float32)
    g = jnp.asarray(rng.normal(size=q.shape), jnp.float32) * (segments > 0)[..., None, None]
    nothing = jnp.zeros((len(segments), heads, 8, 8), jnp.float32)

    def whole(q, k, v):
        return lightning(q, k, v, slopes, jnp.asarray(segments), nothing, 0.3)[0]

    mesh, order = make_mesh(MeshConfig(context=ranks), jax.devices()[:ranks]), zigzag_order(length, ranks)
    tokens, nowhere = PartitionSpec(None, "context"), PartitionSpec()

    def in_pieces(q, k, v):
        def run(q, k, v, segments, slopes):
            return context_lightning(q, k, v, slopes, segments, 0.3)

        run = manual(run, mesh, (tokens, tokens, tokens, tokens, nowhere), tokens)
        return run(*(x[:, order] for x in (q, k, v, segments)), slopes)[:, np.argsort(order)]

    want, want_grads = output_and_gradients(whole, (q, k, v), g)
    got, grads = output_and_gradients(in_pieces, (q, k, v), g)
    assert_close(got, want)
    assert_gradients_close(dict(zip("qkv", grads, strict=True)), dict(zip("qkv", want_grads, strict=True)))


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (
            MeshConfig(context=8),
            r"model.num_attention_heads = 4 must be a multiple of mesh.tensor \* mesh.context = 1 \* 8",
        ),
        (MeshConfig(tensor=4), "model.group_norm_size = 2 must be a multiple of mesh.tensor = 4"),
    ],
)
def test_a_mesh_that_cannot_cut_linear_layers_is_refused(mesh, message):
    with pytest.raises(ValueError, match=message):
        mesh.check(HYBRID)
