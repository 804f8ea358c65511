"""A mixer of tokens that this package does not have, a causal mean, put in by one line in each table.

Legend: B rows, T tokens, D hidden, F width of the mean, L layers of the kind, Z lengths whose states are kept.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

from ling_jax.config import MeshConfig, layers, parameters
from ling_jax.convert.load import load_pretrained
from ling_jax.convert.to_hf import to_hf
from ling_jax.convert.to_jax import to_jax
from ling_jax.generate import states
from ling_jax.generate.engine import Engine
from ling_jax.generate.requests import Request
from ling_jax.generate.sampling import Sampling
from ling_jax.model import block
from ling_jax.model.attention import MixerOutput
from ling_jax.model.linear import Linear
from ling_jax.model.model import split_model
from ling_jax.parallel.mesh import BATCH_AXES
from tests.support.answers import recomputed
from tests.support.helpers import assert_trees_equal, make_model, tiny
from tests.support.hf_folders import write_folder
from tests.support.marks import nightly
from tests.support.meshes import Run, compare

WIDTH = 24
CONFIG = tiny(vocab_size=64, num_hidden_layers=4)  # mean (dense), softmax, mean, softmax, and an MTP layer


class CausalMean(nnx.Module):
    """Each token is given the mean of what it and those before it in its document say."""

    def __init__(self, config, init):
        self.value = Linear(config.hidden_size, WIDTH, ("ffn", "hidden"), init)
        self.dense = Linear(WIDTH, config.hidden_size, ("hidden", "ffn"), init)

    def __call__(self, x_BTD, context, cache=None):
        v_BTF = self.value(x_BTD).astype(jnp.float32)
        segments_BT = context.segments_BT
        if cache is None:
            sees_BTT = jnp.tril(segments_BT[:, :, None] == segments_BT[:, None, :]).astype(jnp.float32)
            mean_BTF = sees_BTT @ v_BTF / sees_BTT.sum(-1, keepdims=True)
        else:
            mean_BTF, cache = cache.append(v_BTF, context.positions_BT, segments_BT > 0)
        return MixerOutput(self.dense(mean_BTF.astype(x_BTD.dtype)), cache)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SumsAndCounts(states.LayerStates):
    """The sum and count of a row's first n tokens, in place n % Z."""

    sums_LBZF: jax.Array
    counts_LBZ: jax.Array
    layer: jax.Array

    @classmethod
    def empty(cls, config, room):
        shape = (room.layers, room.rows, room.drafts + 2)
        return cls(jnp.zeros((*shape, WIDTH)), jnp.zeros(shape, jnp.int32), jnp.zeros((), jnp.int32))

    def append(self, v_BTF, positions_BT, valid_BT):
        rows, kept = jnp.arange(v_BTF.shape[0]), self.counts_LBZ.shape[2]
        end_B = positions_BT[:, -1] + 1
        before = (self.layer, rows, (end_B - valid_BT.sum(1)) % kept)
        sums_BTF = self.sums_LBZF[before][:, None] + jnp.cumsum(jnp.where(valid_BT[..., None], v_BTF, 0), 1)
        counts_BT = self.counts_LBZ[before][:, None] + jnp.cumsum(valid_BT, 1, dtype=jnp.int32)
        last_BT = valid_BT & (positions_BT + 1 > end_B[:, None] - kept)
        at = (self.layer, rows[:, None], jnp.where(last_BT, (positions_BT + 1) % kept, kept))
        new = dataclasses.replace(
            self,
            sums_LBZF=self.sums_LBZF.at[at].set(sums_BTF, mode="drop"),
            counts_LBZ=self.counts_LBZ.at[at].set(counts_BT, mode="drop"),
        )
        return sums_BTF / jnp.maximum(counts_BT, 1)[..., None], new

    def usable(self, common, held, prompt):
        return common if held - common <= 1 else 0  # of Z = drafts + 2 lengths, drafts may have been taken back

    def specs(self) -> Any:
        return SumsAndCounts(
            PartitionSpec(None, BATCH_AXES, None, "tensor"), PartitionSpec(None, BATCH_AXES), PartitionSpec()
        )


def table(config):
    return {
        ("value", "weight"): parameters.Parameter((WIDTH, config.hidden_size), ("ffn", "hidden")),
        ("dense", "weight"): parameters.Parameter((config.hidden_size, WIDTH), ("hidden", "ffn")),
    }


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(layers.LAYERS_WITH, "mean", lambda config, layer: layer % 2 == 0)
    monkeypatch.setitem(parameters.MIXERS, "mean", parameters.Mixer(table, flops=lambda config, length: WIDTH))
    monkeypatch.setitem(block.MIXERS, "mean", CausalMean)
    monkeypatch.setitem(states.STATES, "mean", SumsAndCounts.empty)


def test_its_layers_run_in_their_places():
    kinds = [kind.key for kind in layers.layer_kinds(CONFIG)]
    assert kinds == ["mean_dense", "softmax_moe", "mean_moe", "softmax_moe"]
    model = make_model(CONFIG)
    assert set(model.layers) == set(kinds)
    x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, CONFIG.hidden_size)), jnp.float32)
    mean = CausalMean(CONFIG, block.Init(nnx.Rngs(0), 1.0, jnp.dtype("float32")))
    context = block.Context(((), ()), jnp.arange(9)[None], jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 0, 0]]))
    got = mean(x_BTD, context).y_BTD[0, 6]
    want = mean.dense(mean.value(x_BTD)[0, 4:7].mean(0))
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.nightly
def test_on_a_mesh_it_has_one_devices_numbers():
    mesh = MeshConfig(fsdp=2, expert=2, tensor=2)
    compare(Run(CONFIG, mesh, remat="none"), Run(CONFIG, MeshConfig(), remat="none").outcome())


def test_rows_split_over_tokens_are_refused_with_one_sentence():
    with pytest.raises(ValueError, match=r"^mesh.context = 2: layers whose mixer is 'mean' need whole rows; set it"):
        Run(CONFIG, MeshConfig(context=2))


# Decoding.

LONG = [3, 1, 4, 1, 5, 9, 2, 6, 5]
PROMPTS = [LONG, [*LONG[:4], 7, 7], [3], LONG, [27, 18, 28], LONG[:4]]
LIKED = Sampling(logit_bias={3: 9.0, 7: 9.0, 20: 9.0})  # far better than other tokens: drafts stand now and then
REQUESTS = [
    Request(prompt=prompt, max_new_tokens=2 + 3 * i % 11, sampling=LIKED if i % 2 else Sampling())
    for i, prompt in enumerate(PROMPTS * 2)
]


@cache
def expected() -> list[list[int]]:
    return recomputed(make_model(CONFIG), REQUESTS, 24)


@pytest.mark.parametrize("drafts", [nightly(0), nightly(1), nightly(3)])
def test_answers_are_those_of_full_recomputation(drafts):
    """Rows that end and are given away, prompts in chunks, drafts that stand and fall, an answer taken up again."""
    engine = Engine(make_model(CONFIG), rows=2, slots=24, chunk=4, drafts=drafts)
    answers = dict(engine.run(REQUESTS, 3))
    assert [answers[i].ids for i in range(len(REQUESTS))] == expected()
    if drafts:
        drafted, accepted = (sum(getattr(a, name) for a in answers.values()) for name in ("drafted", "accepted"))
        assert 0 < accepted < drafted
    ticket = engine.submit(REQUESTS[8])
    engine.step(1)
    half = engine.withdraw(ticket)
    assert half.end is None
    engine.submit(REQUESTS[8], half)
    while engine.busy:
        (update,) = engine.step(4)
    assert update.answer.ids == expected()[8]


@pytest.mark.nightly
def test_answers_on_a_mesh_are_those_of_full_recomputation():
    model = make_model(CONFIG, mesh=MeshConfig(data=2, expert=2, tensor=2))
    answers = dict(Engine(model, rows=4, slots=24, chunk=4, drafts=2).run(REQUESTS, 3))
    assert [answers[i].ids for i in range(len(REQUESTS))] == expected()


def test_only_whole_rows_are_taken_over_and_they_are(monkeypatch):
    """The state of a beginning is gone; that of everything a row holds, a chat so far, is there."""
    engine, run = Engine(make_model(CONFIG), rows=2, slots=24), []
    place = Engine._put
    monkeypatch.setattr(Engine, "_put", lambda self, *args: (run.append(args[3]), place(self, *args)))
    (answer,) = dict(engine.run([Request(prompt=PROMPTS[0], max_new_tokens=3)])).values()
    chat = [*PROMPTS[0], *answer.ids, 8, 8]
    (answer,) = dict(engine.run([Request(prompt=chat, max_new_tokens=3)])).values()
    dict(engine.run([Request(prompt=PROMPTS[0][:6], max_new_tokens=1)]))
    assert run == [0, len(PROMPTS[0]) + 2, 0]
    (alone,) = dict(Engine(make_model(CONFIG), rows=2, slots=24).run([Request(prompt=chat, max_new_tokens=3)])).values()
    assert answer.ids == alone.ids


# Weights.


def test_weights_go_out_and_come_back(tmp_path):
    params, bias = write_folder(tmp_path / "hf", config=CONFIG)
    to_jax(str(tmp_path / "hf"), str(tmp_path / "ours"))
    to_hf(str(tmp_path / "ours"), str(tmp_path / "back"))
    for folder in ("hf", "ours", "back"):
        loaded = load_pretrained(tmp_path / folder)
        assert_trees_equal(split_model(loaded)[1:], (params, bias))
    (file,) = (tmp_path / "back").glob("*.safetensors")
    assert "model.layers.2.attention.value.weight" in load_file(file)
