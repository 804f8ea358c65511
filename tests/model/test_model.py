"""The whole network: equal to the specification written in numpy, however its layers are run and rows packed.

Legend: B rows, T tokens, D hidden, K experts per token, L MoE layers.
"""

import importlib
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from ling_jax.config import RopeScaling, count_params, layer_kinds
from ling_jax.convert.mapping import hf_names
from ling_jax.model.model import CAPTURES, abstract_model, segment_positions, split_model
from ling_jax.model.norm import rms_norm
from ling_jax.model.rope import apply_rope, frequencies, rope_tables
from tests.support.helpers import (
    Oracle,
    assert_close,
    assert_gradients_close,
    cotangent_of,
    documents,
    jit,
    loss_and_grads,
    make_model,
    pack,
    probe,
    small,
    tiny,
    total,
)
from tests.support.marks import nightly

# Options of a config.json, a few at a time; each changes which tensors there are or what is done with them.
VARIANTS = {
    "released": tiny(),
    "biases, tied embeddings, 2 shared experts, no QK-norm": small(
        use_bias=True, use_qkv_bias=True, tie_word_embeddings=True, num_shared_experts=2, use_qk_norm=False
    ),
    "no dense layer, no shared expert, top-1, whole-head RoPE": small(
        first_k_dense_replace=0, num_shared_experts=0, num_experts_per_tok=1, partial_rotary_factor=1.0
    ),
    "YaRN, rotary_dim, unnormalised weights, one group": small(
        rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=16),
        partial_rotary_factor=None,
        rotary_dim=4,
        norm_topk_prob=False,
        n_group=1,
        topk_group=1,
    ),
    "dense layers only": small(first_k_dense_replace=2),
    "dense layers and MTP, one kv head": small(
        first_k_dense_replace=2, num_nextn_predict_layers=1, num_key_value_heads=1
    ),
}
PADDING_ID = 60
DOCUMENTS = documents([7, 4, 3, 9, 2])
DOCUMENTS[0][2] = DOCUMENTS[3][5] = PADDING_ID  # ordinary tokens too: the id of padding also ends documents
PLACES = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]  # row and segment of each document in PACKED
PACKED = pack([DOCUMENTS[:3], DOCUMENTS[3:], [], [], [], []], 15)  # some padding, and rows of nothing else
APART = pack([*([document] for document in DOCUMENTS), []], 15)


@pytest.fixture(scope="module")
def model():
    return make_model(tiny())


@pytest.fixture(scope="module")
def packed(model):
    """(loss, sums, gradients) of the packed rows, layers scanned, nothing recomputed."""
    return loss_and_grads(model, PACKED)


@pytest.fixture(scope="module")
def probes():
    """variant -> (model, its `Probe` on PACKED), each made once."""

    @cache
    def made(variant):
        model = make_model(VARIANTS[variant])
        return model, probe(model, PACKED)

    return made


def of_document(array: np.ndarray, index: int) -> np.ndarray:
    """The part of a [B, T, ...] array over PACKED that is a document's."""
    row, segment = PLACES[index]
    return array[row, PACKED["segment_ids"][row] == segment]


# What a config may ask for.


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_specification(variant, probes):
    model, got = probes(variant)
    oracle = Oracle(model.config, *split_model(model)[1:])
    for i, document in enumerate(DOCUMENTS):
        assert_close(of_document(got.logits_BTV, i), oracle.logits(oracle.hidden(document)))
        if model.mtp is not None:
            mtp, scored = of_document(got.out.mtp_hidden_BTD, i), len(document) - 1
            assert_close(mtp[:scored], oracle.mtp_hidden(document)[:scored])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_a_finite_gradient_that_is_not_zero(variant, probes):
    sizes = {name: np.abs(leaf).max() for name, leaf in flatten_dict(probes(variant)[1].grads, sep="/").items()}
    assert [name for name, size in sizes.items() if not (np.isfinite(size) and size > 0)] == []


@pytest.mark.parametrize("variant", ["released", "biases, tied embeddings, 2 shared experts, no QK-norm"])
def test_looking_up_the_padding_id_passes_no_gradient_but_a_tied_head_does(variant, probes):
    model, got = probes(variant)
    row = got.grads["word_embeddings"]["weight"][PADDING_ID]
    cotangent_BT = cotangent_of(PACKED, model.config.vocab_size)[..., PADDING_ID]
    from_head = np.einsum("bt,btd->d", cotangent_BT, got.out.hidden_BTD)
    assert np.abs(from_head).max() > 1
    assert_close(row, from_head if model.config.tie_word_embeddings else 0 * from_head)


OPTIONS = {
    "use_bias": True, "use_qkv_bias": True, "use_qk_norm": False, "tie_word_embeddings": True, "num_shared_experts": 2,
    "num_experts_per_tok": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0, "num_key_value_heads": 4,
}  # fmt: skip
FULL_SIZE = ["ling_mini_2_0", "ling_flash_base_2_0", "ling_1t_base", "bench_moe", "ling_tiny"]


def structures():
    yield from (pytest.param(config, id=name) for name, config in VARIANTS.items())
    yield from (pytest.param(tiny(**{name: value}), id=f"{name}={value}") for name, value in OPTIONS.items())
    yield pytest.param(tiny(num_shared_experts=0), id="num_shared_experts=0")
    yield pytest.param(tiny(first_k_dense_replace=3), id="first_k_dense_replace=all")
    for name in FULL_SIZE:
        yield pytest.param(importlib.import_module(f"configs.{name}").config().model, id=name)


@pytest.mark.parametrize("config", list(structures()))
def test_parameters_add_up_to_the_count_and_have_one_name_each_in_hf_files(config):
    _, params, bias = split_model(abstract_model(config))
    leaves = flatten_dict(params) | flatten_dict(bias)
    assert sum(leaf.size for leaf in leaves.values()) == count_params(config).total
    seen = set()
    for path, leaf in leaves.items():
        names = hf_names(config, path)
        assert names.shape == leaf.shape[: names.ndim]
        seen.update(names.reshape(-1).tolist())
    tensors = sum(hf_names(config, path).size for path in leaves)
    assert len(seen) == tensors, "two of our parameters have the same name"
    assert all(name.startswith(("model.", "lm_head.")) for name in seen)


# How the layers are run.


@pytest.mark.parametrize(
    "options",
    [{"unroll": True}, *(nightly({"remat": p}) for p in ("save_attention", "full", "minimal", "offload"))],
    ids=str,
)
def test_layers_unrolled_or_recomputed_give_the_scanned_loss_and_gradients(packed, options):
    loss, sums, grads = loss_and_grads(make_model(tiny(), **options), PACKED)
    assert_close(loss, packed[0])
    assert_gradients_close(grads, packed[2])
    np.testing.assert_array_equal(sums.router.expert_counts_LE, packed[1].router.expert_counts_LE)


def test_recomputing_layers_keeps_less_for_the_backward_pass():
    """The policies do something: what one MoE layer keeps, in arrays of at least a token's hidden state."""

    def kept(remat):
        graph, params, bias = split_model(abstract_model(small(), remat=remat))

        def pullback(params, bias):
            return jax.vjp(lambda p: total(nnx.merge(graph, p, bias), PACKED)[0], params)[1]

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(pullback, params, bias)))

    assert kept("full") < kept("minimal") < kept("none")


def test_replayed_routing_gives_the_same_outputs_and_gradients(probes):
    model, own = probes("released")
    graph, params, bias = split_model(model)
    other_bias = jax.tree.map(lambda a: -3 * a, bias)  # would choose other experts
    again = probe(nnx.merge(graph, params, other_bias), PACKED, own.out.routing.ids)
    assert_gradients_close(again.grads, own.grads)
    assert_close(again.logits_BTV, own.logits_BTV)
    assert_close(again.out.mtp_hidden_BTD, own.out.mtp_hidden_BTD)
    for got, want in zip(again.out.routing, own.out.routing, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_every_moe_layer_runs_the_experts_it_is_told_to(probes, layer):
    """Layer 2 is the MTP layer."""
    model, own = probes("released")
    ids = own.out.routing.ids.copy()
    ids[layer] = (ids[layer] + 1) % 8
    other = probe(model, PACKED, ids)
    np.testing.assert_array_equal(other.out.routing.ids, ids)
    assert np.abs(other.out.mtp_hidden_BTD - own.out.mtp_hidden_BTD).max() > 0.1
    assert (np.abs(other.logits_BTV - own.logits_BTV).max() > 0.1) == (layer < 2)


def test_bfloat16_computation_stays_near_float32(probes):
    """Where the trunk chose the same experts: near ties fall otherwise under rounding."""
    model, exact = probes("released")
    _, params, bias = split_model(model)
    graph, _, _ = split_model(abstract_model(tiny(), dtype=jnp.bfloat16))

    @jit
    def rough(params, bias):
        model = nnx.merge(graph, params, bias)
        out = model.hidden(PACKED["tokens"], PACKED["positions"], PACKED["segment_ids"], capture=("router_logits",))
        return out, model.logits(out.hidden_BTD)

    out, logits_BTV = jax.device_get(rough(params, bias))
    float32 = (logits_BTV, out.routing.weights, out.routing.z_sum, out.captured["router_logits"])
    assert out.hidden_BTD.dtype == jnp.bfloat16 and {a.dtype for a in float32} == {np.dtype(np.float32)}
    same = (np.sort(out.routing.ids) == np.sort(exact.out.routing.ids)).all(-1)[:2].all(0)
    real = (PACKED["segment_ids"] > 0) & same
    assert real.sum() > 12
    error = np.abs(logits_BTV - exact.logits_BTV)[real]
    assert 1e-4 < error.max() < 0.3 and error.mean() < 0.03 * np.abs(exact.logits_BTV).mean()


def test_a_call_gives_logits_routing_and_the_intermediates_asked_for(probes):
    """Positions are the default ones, which restart in every segment."""
    model, want = probes("dense layers and MTP, one kv head")
    got = model(PACKED["tokens"], None, PACKED["segment_ids"], capture=CAPTURES)
    assert got.logits_BTV.dtype == got.mtp_logits_BTV.dtype == jnp.float32
    real = PACKED["segment_ids"] > 0
    assert_close(got.logits_BTV[real], want.logits_BTV[real])
    assert_close(got.mtp_logits_BTV[real], model.logits(want.out.mtp_hidden_BTD)[real])
    np.testing.assert_array_equal(got.routing.ids[:, real], want.out.routing.ids[:, real])
    assert {name: value.shape for name, value in got.captured.items()} == {
        "hidden_states": (3, 6, 15, 32),
        "attn_out": (3, 6, 15, 32),
        "router_logits": (1, 6, 15, 8),
        "final_norm": (6, 15, 32),
        "mtp_hidden": (6, 15, 32),
    }
    assert_close(model.norm(got.captured["hidden_states"][-1]), got.captured["final_norm"])


def test_an_unknown_intermediate_is_refused_with_the_known_ones(model):
    with pytest.raises(ValueError, match="cannot capture attention; choose from hidden_states, attn_out"):
        model.hidden(np.array(DOCUMENTS[:1]), capture=["attention"])


# Packed documents.


def test_packed_documents_give_the_loss_and_gradients_of_documents_apart(model, packed):
    loss, sums, grads = loss_and_grads(model, APART)
    assert_close(packed[0], loss)
    assert_close(packed[1].objective.mtp_nll, sums.objective.mtp_nll)
    assert_gradients_close(packed[2], grads)


def test_packed_documents_have_the_hidden_states_and_routing_of_documents_apart(probes):
    model, together = probes("released")
    apart = probe(model, APART)
    for i, document in enumerate(DOCUMENTS):
        for name in ("hidden_BTD", "mtp_hidden_BTD"):
            got, want = (getattr(a.out, name) for a in (together, apart))
            assert_close(of_document(got, i), want[i, : len(document)])
        got, want = (a.out.routing.ids for a in (together, apart))
        np.testing.assert_array_equal([of_document(ids, i) for ids in got], want[:, i, : len(document)])


def test_packed_documents_load_the_experts_as_documents_apart(packed, model):
    counts = loss_and_grads(model, APART)[1].router.expert_counts_LE
    np.testing.assert_array_equal(packed[1].router.expert_counts_LE, counts)
    assert (counts.sum(-1) == 3 * sum(map(len, DOCUMENTS))).all()  # padding is not counted


def test_a_change_in_one_document_changes_nothing_in_the_others(probes):
    model, before = probes("released")
    changed = dict(PACKED, tokens=PACKED["tokens"].copy())
    place = PACKED["segment_ids"] == np.array([[2], [1], [9], [9], [9], [9]])
    changed["tokens"][place] = (changed["tokens"][place] + 17) % 59
    after = probe(model, changed)
    others = (PACKED["segment_ids"] > 0) & ~place
    for name in ("hidden_BTD", "mtp_hidden_BTD"):
        got, want = (getattr(a.out, name) for a in (after, before))
        assert_close(got[others], want[others])
        assert np.abs(got - want)[place].max() > 0.1


def test_what_stands_in_the_padding_changes_no_document(probes):
    model, before = probes("released")
    changed = dict(PACKED, tokens=PACKED["tokens"].copy())
    padding = PACKED["segment_ids"] == 0
    changed["tokens"][padding] = 33
    after = probe(model, changed)
    assert_close(after.out.hidden_BTD[~padding], before.out.hidden_BTD[~padding])
    scored = ~padding & (np.roll(PACKED["segment_ids"], -1, 1) == PACKED["segment_ids"])
    assert_close(after.out.mtp_hidden_BTD[scored], before.out.mtp_hidden_BTD[scored])  # all that may have a target


def test_positions_count_from_0_in_every_run_of_a_segment():
    np.testing.assert_array_equal(
        segment_positions(jnp.array([[1, 1, 1, 2, 3, 3, 0, 0], [0, 0, 5, 5, 0, 5, 5, 5]])),
        [[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 0, 1, 0, 0, 1, 2]],
    )


def test_positions_given_are_used(probes):
    model, before = probes("released")
    stretched = probe(model, dict(PACKED, positions=2 * PACKED["positions"]))
    assert np.abs(stretched.logits_BTV - before.logits_BTV).max() > 0.1


# Norm and RoPE.


def test_the_norm_is_cast_back_before_the_weight_is_applied():
    """Spec 2.1: statistics in float32, the product with the weight in the input's dtype."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 24)), jnp.bfloat16)
    weight = jnp.asarray(1 + np.random.default_rng(1).normal(size=24), jnp.float32)
    x64 = np.asarray(x, np.float64)
    normed = jnp.asarray(x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6), jnp.bfloat16)
    want = normed * weight.astype(jnp.bfloat16)
    np.testing.assert_array_equal(jit(rms_norm)(x, weight, 1e-6), want)


def test_rope_turns_the_leading_dims_in_pairs_half_of_them_apart():
    config = tiny(head_dim=12, partial_rotary_factor=0.7)  # 8 of 12 dims
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 12)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 9, 0, 1]], np.int32)
    got = jit(lambda x: apply_rope(x, rope_tables(config, positions, jnp.float32)))(x)
    angles = positions[:, :, None, None] * 1e4 ** (-2 * np.arange(4) / 8)
    turned = (x[..., :4] + 1j * x[..., 4:8]) * np.exp(1j * angles)
    assert_close(got, np.concatenate([turned.real, turned.imag, x[..., 8:]], -1))
    np.testing.assert_array_equal(got[..., 8:], x[..., 8:])


def released(scaling: RopeScaling | None = None):
    """Ling's heads: 64 of 128 dims turned."""
    return tiny(head_dim=128, rope_theta=6e5, rope_scaling=scaling)


def yarn(**keys):
    return released(RopeScaling(factor=4.0, original_max_position_embeddings=32768, **keys))


def test_frequencies_without_yarn_are_powers_of_theta():
    inv_freq, magnitude = frequencies(released())
    assert magnitude == 1
    np.testing.assert_allclose(inv_freq, 6e5 ** (-np.arange(32) / 32), rtol=1e-6)


def test_yarn_keeps_fast_dims_divides_slow_ones_and_blends_between():
    """Spec 10b: of 64 dims at theta 6e5 and 32768 positions, pairs up to 12 are kept, from 21 on interpolated."""
    inv_freq, magnitude = frequencies(yarn())
    ratio = inv_freq / frequencies(released())[0]
    share = np.clip((np.arange(32) - 12) / (21 - 12), 0, 1)
    np.testing.assert_allclose(ratio, 1 - share + share / 4, rtol=1e-6)
    assert ratio[12] == pytest.approx(1) and ratio[13] < 0.95 and ratio[20] > 0.3 and ratio[21] == pytest.approx(0.25)
    assert magnitude == pytest.approx(1.138629, abs=1e-6)


def test_yarn_betas_move_the_blend():
    ratio = frequencies(yarn(beta_fast=64.0, beta_slow=0.25))[0] / frequencies(released())[0]
    low, high = (64 * np.log(32768 / (2 * np.pi * n)) / (2 * np.log(6e5)) for n in (64, 0.25))
    share = np.clip((np.arange(32) - np.floor(low)) / (np.ceil(high) - np.floor(low)), 0, 1)
    np.testing.assert_allclose(ratio, 1 - share + share / 4, rtol=1e-6)


def test_yarn_without_truncation_blends_between_the_very_turns():
    """As HF's code: without `truncate` the ramp's ends are not rounded to whole dims."""
    ratio = frequencies(yarn(truncate=False))[0] / frequencies(released())[0]
    low, high = (64 * np.log(32768 / (2 * np.pi * n)) / (2 * np.log(6e5)) for n in (32, 1))
    share = np.clip((np.arange(32) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(ratio, 1 - share + share / 4, rtol=1e-6)
    assert np.abs(ratio - frequencies(yarn())[0] / frequencies(released())[0]).max() > 0.01


@pytest.mark.parametrize(
    ("keys", "magnitude"),
    [
        ({"mscale": 0.707}, 1.138629),  # both keys, or neither counts
        ({"mscale_all_dim": 0.707}, 1.138629),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, 1.138629 / 1.069315),
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, 1.0),
        ({"attention_factor": 1.25}, 1.25),
        ({"attention_factor": 1.25, "mscale": 1.0, "mscale_all_dim": 0.5}, 1.25),
    ],
)
def test_yarn_scales_cos_and_sin_by_mscale_or_the_stated_factor(keys, magnitude):
    config = yarn(**keys)
    assert frequencies(config)[1] == pytest.approx(magnitude, abs=1e-6)
    cos, sin = rope_tables(config, np.array([[3]], np.int32), jnp.float32)
    np.testing.assert_allclose(cos**2 + sin**2, np.full((1, 1, 1, 32), magnitude**2), rtol=1e-5)


def test_layers_of_each_kind_are_stacked_in_order():
    config = tiny(num_hidden_layers=4, first_k_dense_replace=2)
    _, params, _ = split_model(abstract_model(config))
    assert [kind.key for kind in layer_kinds(config)] == ["softmax_dense"] * 2 + ["softmax_moe"] * 2
    assert {kind: tree["input_layernorm"]["weight"].shape[0] for kind, tree in params["layers"].items()} == {
        "softmax_dense": 2,
        "softmax_moe": 2,
    }
    assert hf_names(config, ("layers", "softmax_moe", "input_layernorm", "weight")).tolist() == [
        "model.layers.2.input_layernorm.weight",
        "model.layers.3.input_layernorm.weight",
    ]
