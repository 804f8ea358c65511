"""The table of parameters is what the modules make: every shape, every dim's name, and what it all adds up to."""

import math

import jax
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from ling_jax.config import MeshConfig, count_params
from ling_jax.config.layers import layer_runs
from ling_jax.config.mesh import MESH_AXES, split_of
from ling_jax.config.parameters import parameters, quantised
from ling_jax.model.attention import Context
from ling_jax.model.model import abstract_model, segment_positions, split_model
from ling_jax.model.rope import rope_tables
from ling_jax.train.balance import balance_biases, in_layer_order
from tests.support.helpers import assert_close, documents, make_model, pack, small, tiny

CONFIGS = {
    "tiny": tiny(),
    "biases, tied": tiny(use_bias=True, use_qkv_bias=True, tie_word_embeddings=True),
    "no norms, no shared expert": tiny(use_qk_norm=False, num_shared_experts=0),
    "no dense layer, no MTP layer": tiny(first_k_dense_replace=0, num_nextn_predict_layers=0),
    "dense": small(first_k_dense_replace=2),
    "two shared experts": tiny(num_shared_experts=2),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_table_has_the_modules_shapes_and_dims_and_no_others(config):
    model, table = abstract_model(config), parameters(config)
    made = {path: var for path, var in nnx.state(model).flat_state()}
    assert made.keys() == table.keys()
    for path, variable in made.items():
        assert variable.get_value().shape == table[path].full_shape, path
        assert variable.get_metadata()["axes"] == table[path].dims, path
    in_fp8 = ("query_key_value", "dense", "gate_proj", "up_proj", "down_proj")  # spec 3.2
    assert quantised(config) == {path for path in table if path[-2] in in_fp8 and path[-1] == "weight"}
    _, params, bias = split_model(model)
    assert count_params(config).total == sum(math.prod(a.shape) for a in jax.tree.leaves((params, bias)))


def test_a_hybrids_biases_are_put_in_layer_order():
    """Kinds come in the order of their names in a tree, and alternate in the model."""
    config = tiny(
        num_hidden_layers=7, layer_group_size=3, first_k_dense_replace=1, num_experts=4, n_group=1, topk_group=1
    )
    table = {path: entry for path, entry in parameters(config).items() if path[-1] == "expert_bias"}
    counts = np.zeros((7, 4), np.int32)
    counts[np.arange(7), np.arange(7) % 4] = 4  # the busiest expert tells the layer
    bias: dict = {}
    for path, entry in table.items():
        inner = bias
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = np.zeros(entry.full_shape, np.float32)
    after = balance_biases(bias, counts, 1.0, config)
    assert list(flatten_dict(after)) == list(flatten_dict(bias)) and len(after["layers"]) == 2
    assert np.asarray(in_layer_order(after, config)).argmin(-1).tolist() == [0, 1, 2, 3, 0, 1, 2]


def test_any_parts_of_the_layers_in_turn_are_the_whole():
    config = tiny(num_hidden_layers=4, first_k_dense_replace=2)
    model, batch = make_model(config), pack([documents([9, 5])], 15)
    want = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], capture=("hidden_states",))
    positions = segment_positions(batch["segment_ids"])
    context = Context(rope_tables(config, positions, model.dtype), positions, batch["segment_ids"])
    for cut in range(5):
        x, first, _ = model.run(layer_runs(config, 0, cut), model.embed(batch["tokens"]), context)
        assert_close(x, want.captured["hidden_states"][cut])
        y, rest, _ = model.run(layer_runs(config, cut), x, context)
        assert_close(y, want.captured["hidden_states"][4])
        assert len(first) == cut and len(rest) == 4 - cut


MESHES = st.builds(MeshConfig, **{axis: st.sampled_from([1, 2, 3, 4, 5, 8]) for axis in MESH_AXES if axis != "stage"})


@settings(max_examples=400, deadline=None)
@given(mesh=MESHES, config=st.sampled_from(list(CONFIGS.values())))
def test_a_mesh_is_accepted_if_and_only_if_every_parameter_can_be_split_over_it(mesh, config):
    def split(stored: bool) -> None:
        for entry in parameters(config).values():
            split_of(entry.shape, entry.dims, mesh, stored)

    try:
        mesh.check(config)
    except ValueError:
        heads = config.num_attention_heads, config.num_key_value_heads
        if all(mesh.tensor % n == 0 or n % mesh.tensor == 0 for n in heads) and heads[0] % mesh.tensor == 0:
            with pytest.raises(ValueError, match="must be a multiple of"):
                split(stored=True)
    else:
        split(stored=True)
        split(stored=False)
