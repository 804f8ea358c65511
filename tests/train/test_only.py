"""Training some modules: the others, their moments and the expert biases keep every bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ling_jax.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from ling_jax.train.state import make_trainer
from ling_jax.train.step import make_train_step
from tests.support.helpers import random_weights, tiny
from tests.support.marks import nightly
from tests.support.meshes import BATCH

HYBRID = tiny(vocab_size=64, num_hidden_layers=3, layer_group_size=3, group_norm_size=2)
PATTERNS = ("layers.linear_*.attention.query_key_value", "layers.linear_*.attention.*_layernorm")


def trainer_of(only, **changes):
    return make_trainer(
        RunConfig(
            model=HYBRID,
            data=DataConfig(sequence_length=16, global_batch_size=8),
            train=TrainConfig(only=only, bias_update_rate=0.1, remat="none"),
            **changes,
        )
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        nightly({"optimizer": OptimizerConfig(eight_bit=True)}),
        nightly({"mesh": MeshConfig(fsdp=2, expert=2, tensor=2)}),
    ],
    ids=str,
)
def test_only_what_matches_moves_even_with_moments_of_before(changes):
    """Without gradients, moments alone would move weights."""
    some = trainer_of(PATTERNS, **changes)
    _, params, bias = random_weights(HYBRID)
    state = some.new_state_from(params, bias)
    mu, nu = (jax.tree.map(lambda a: a + jnp.asarray(1, a.dtype), m) for m in state.optimizer[1][1:3])
    moved = state.optimizer[1]._replace(mu=mu, nu=nu)
    state = state._replace(optimizer=(state.optimizer[0], moved, *state.optimizer[2:]))
    before = jax.device_get(state)
    after, metrics = make_train_step(some)(state, BATCH)
    after = jax.device_get(after)
    for path, new in flatten_dict(after.params).items():
        name, same = ".".join(path), np.array_equal(new, flatten_dict(before.params)[path])
        trained = "linear_" in name and ("query_key_value" in name or "_layernorm" in name and "attention." in name)
        trained = trained and "input_layernorm" not in name and "post_attention" not in name
        assert same != trained, name
    jax.tree.map(np.testing.assert_array_equal, after.bias, before.bias)
    moments = [flatten_dict(tree) for tree in (after.optimizer[1].mu, before.optimizer[1].mu)]
    for path in moments[0]:
        pairs = zip(*(jax.tree.leaves(tree[path]) for tree in moments), strict=True)
        same = all(np.array_equal(a, b) for a, b in pairs)
        assert same != ("linear_" in path[1] and path[-2] in ("query_key_value", "query_layernorm", "key_layernorm"))
    assert metrics["train/grad_norm"] > 0


def test_a_pattern_that_matches_nothing_is_named():
    with pytest.raises(
        ValueError, match=r"^train.only: 'layers.quadratic_\*' matches none of layers.linear_dense.attention.dense, "
    ):
        trainer_of(("layers.quadratic_*",))
