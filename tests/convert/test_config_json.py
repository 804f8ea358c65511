"""config.json as many programs write it: one model whoever wrote it, and an error for what cannot be understood."""

import dataclasses
import json

import pytest

from ling_jax.config import ModelConfig, RopeScaling, architecture_diff, model_settings_diff
from tests.support.hf_config import HF_MINI, small, without

# One model, written by many programs

YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
# Each says the same as HF_MINI: what it leaves out, then what it says otherwise.
ORIGINS = {
    "official converter": (
        ["mtp_loss_scaling_factor", "num_nextn_predict_layers", "initializer_range", "max_window_layers"],
        {"transformers_version": "4.52.3", "use_rmsnorm": True, "rope_theta": 600000.0},
    ),
    "saved again by the official class": (["model_type"], {}),
    "rotary_dim, as Ling-1T": (["partial_rotary_factor"], {"rotary_dim": 64}),
    "both spellings": ([], {"rotary_dim": 64}),
    "an MTP scale without an MTP layer": ([], {"mtp_loss_scaling_factor": 0.1}),
    "nulls": (
        ["norm_topk_prob"],
        {"use_qkv_bias": None, "use_bias": None, "tie_word_embeddings": None, "num_nextn_predict_layers": None,
         "mtp_loss_scaling_factor": None, "rotary_dim": None, "rope_parameters": None, "score_function": None},
    ),
    "whole numbers and fractions": ([], {"num_experts": 256.0, "rope_theta": 600000.0, "rms_norm_eps": 0.000001}),
    "several ends": ([], {"eos_token_id": [156892, 156895]}),
    "head_dim follows": ([], {"head_dim": None}),
    "transformers 5, theta moved": (
        ["rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype"],
        {"rope_parameters": {"rope_theta": 600000, "rope_type": "default", "partial_rotary_factor": 0.5},
         "dtype": "bfloat16"},
    ),
    "transformers 5, in both": (["rope_scaling"], {"rope_parameters": {"rope_theta": 6e5, "rope_type": "default"}}),
    "transformers 5, beside": (["rope_scaling"], {"rope_parameters": {"rope_type": "default", "rope_theta": None}}),
    "transformers 5, empty": (["rope_scaling"], {"rope_parameters": {}}),
}  # fmt: skip


@pytest.mark.parametrize(("left_out", "said"), ORIGINS.values(), ids=ORIGINS.keys())
def test_files_of_every_origin_read_to_the_same_model(left_out: list[str], said: dict):
    file = {key: value for key, value in HF_MINI.items() if key not in left_out} | said
    read, release = ModelConfig.from_hf(file), ModelConfig.from_hf(HF_MINI)
    assert read == release and hash(read) == hash(release)
    assert architecture_diff(read, release) == model_settings_diff(read, release) == []
    assert read.to_hf() == {"model_type": "bailing_moe"} | file


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_scaling": {"type": "yarn", **YARN}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4}},
        {"rope_scaling": {"rope_type": "yarn", "type": "yarn", **YARN, "beta_fast": 32, "beta_slow": 0}},
        {"rope_scaling": {"rope_type": "yarn", **YARN, "mscale": None, "attention_factor": None}},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "yarn", **YARN}},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "yarn", **YARN, "rope_theta": 600000.0}},
        {"rope_scaling": {"type": "yarn", **YARN}, "rope_parameters": {"type": "yarn", "rope_theta": 600000, **YARN}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 32768},
        {"rope_parameters": {"rope_type": "yarn", **YARN, "truncate": True, "partial_rotary_factor": 0.5}},
    ],
)
def test_yarn_is_read_wherever_it_is_written(spelling: dict):
    expected = dataclasses.replace(ModelConfig.from_hf(HF_MINI), rope_scaling=RopeScaling(**YARN))
    assert ModelConfig.from_hf(HF_MINI | spelling) == expected
    assert ModelConfig.from_hf(HF_MINI | spelling).to_hf() == HF_MINI | spelling


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta twice, 10000.0 and 600000"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}}, "partial_rotary_factor twice"),
        (
            {"rope_scaling": {"type": "yarn", **YARN}, "rope_parameters": {"type": "yarn", **YARN, "factor": 8.0}},
            "factor twice, 4.0 and 8.0",
        ),
        (
            {"rope_scaling": {"type": "yarn", **YARN}, "rope_parameters": {"rope_type": "default"}},
            "rope_type twice, 'yarn' and 'default'",
        ),
        ({"rope_scaling": {"type": "yarn", "rope_type": "default", **YARN}}, "type 'yarn' and rope_type 'default'"),
        ({"rope_scaling": YARN}, "has factor, but rope_type None: say 'yarn'"),
        ({"rope_scaling": {"rope_type": "yarn", **YARN, "factor": None}}, "lacks 'factor', or it is null"),
        ({"rope_scaling": {"rope_type": "yarn", **YARN, "short_factor": [1]}}, "has short_factor, which"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters type 'llama3': only 'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "has full_attention, which"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "factor = '4' must be of type float"),
        ({"rope_scaling": [4.0]}, "must be an object or null"),
        ({"rope_theta": None}, "lacks rope_theta"),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default"}}, "lacks rope_theta"),
        ({"num_experts": None}, "lacks num_experts"),
        ({"topk_group": 0}, "topk_group = 0 must be at least 1"),
        ({"num_hidden_layers": 20.5}, "num_hidden_layers = 20.5 must be of type int"),
        ({"vocab_size": "157184"}, "vocab_size = '157184' must be of type int"),
    ],
)
def test_what_cannot_be_understood_is_an_error(said: dict, message: str):
    with pytest.raises(ValueError) as error:
        ModelConfig.from_hf(HF_MINI | said)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "file",
    [
        HF_MINI,
        without("rope_scaling") | {"rope_parameters": {"rope_type": "yarn", **YARN, "rope_theta": 600000.0}},
        without("rope_theta") | {"rope_parameters": {"rope_type": "default", "rope_theta": 600000.0}},
        HF_MINI | {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 32768},
    ],
)
@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1e4},
        {"rope_scaling": RopeScaling(factor=2.0, original_max_position_embeddings=4096, truncate=False)},
        {"rope_scaling": None, "max_position_embeddings": 4096},
    ],
)
def test_a_changed_rotary_embedding_is_changed_in_every_place_that_names_it(file: dict, changes: dict):
    changed = dataclasses.replace(ModelConfig.from_hf(file), **changes)
    assert ModelConfig.from_hf(json.loads(json.dumps(changed.to_hf()))) == changed


def test_a_model_type_that_was_lost_is_written_again():
    assert ModelConfig.from_hf(without("model_type")).to_hf() == HF_MINI | {"model_type": "bailing_moe"}
    with pytest.raises(ValueError, match="model_type = None"):
        ModelConfig.from_hf(without("model_type") | {"architectures": None})


def test_a_config_of_our_own_is_written_as_the_official_converter_writes():
    written = small(num_nextn_predict_layers=1, num_shared_experts=2).to_hf()
    same = ("attention_dropout", "embedding_dropout", "hidden_act", "model_type", "output_dropout", "router_dtype",
            "score_function", "tie_word_embeddings", "use_cache", "use_bias", "use_qkv_bias")  # fmt: skip
    assert {name: written[name] for name in same} == {name: HF_MINI[name] for name in same}
    assert written["architectures"] == ["BailingMoeV2ForCausalLM"]
    assert written["auto_map"] == {
        "AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config",
        "AutoModel": "modeling_bailing_moe_v2.BailingMoeV2Model",
        "AutoModelForCausalLM": "modeling_bailing_moe_v2.BailingMoeV2ForCausalLM",
    }
    assert written["moe_shared_expert_intermediate_size"] == 64 and written["use_rmsnorm"] is True
    assert written["transformers_version"] == "4.52.3"
    assert "layer_group_size" not in written and "rotary_dim" not in written


def test_a_linear_config_of_our_own_names_the_linear_class():
    written = small(layer_group_size=2, group_norm_size=2).to_hf()
    assert written["model_type"] == "bailing_moe_linear"
    assert written["architectures"] == ["BailingMoeLinearV2ForCausalLM"]
    assert written["auto_map"]["AutoConfig"] == "configuration_bailing_moe_linear_v2.BailingMoeLinearV2Config"
    assert dataclasses.replace(ModelConfig.from_hf(written), mtp_loss_scaling_factor=0.1) == small(
        layer_group_size=2, group_norm_size=2
    )


@pytest.mark.parametrize(("head_dim", "dims"), [(128, 64), (49, 24), (12, 8), (80, 20), (6, 2)])
def test_a_rotated_width_survives_as_a_share_of_the_head(head_dim: int, dims: int):
    config = small(head_dim=head_dim, partial_rotary_factor=None, rotary_dim=dims)
    written = config.to_hf()
    assert ModelConfig.from_hf(written).rotary_width == int(head_dim * written["partial_rotary_factor"]) == dims
    again = ModelConfig.from_hf({**written, "partial_rotary_factor": None, "rotary_dim": dims})
    assert again.rotary_width == dims and architecture_diff(again, config) == []
