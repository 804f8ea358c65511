"""The settings: reading and writing `config.json`, its traps (spec 1.6), and every check with its message."""

import dataclasses
import json

import pytest

from ling_jax.config import (
    REQUIRED_HF_FIELDS,
    DataConfig,
    DataSource,
    ModelConfig,
    RopeScaling,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    architecture_diff,
    count_params,
    layer_kinds,
    layer_runs,
    model_settings_diff,
    routed_layers,
    train_flops_per_token,
)
from ling_jax.config.layers import layer_groups, layers_of, routers_of
from tests.support.hf_config import HF_MINI, SMALL, small, without

# config.json, in and out


def test_every_field_of_a_release_comes_back():
    written = ModelConfig.from_hf(HF_MINI).to_hf()
    assert json.dumps(written, sort_keys=True) == json.dumps(HF_MINI, sort_keys=True)


def test_a_changed_field_is_written_and_the_rest_is_kept():
    changed = dataclasses.replace(ModelConfig.from_hf(HF_MINI), num_nextn_predict_layers=1, rope_theta=1e4)
    expected = HF_MINI | {"num_nextn_predict_layers": 1, "rope_theta": 1e4}
    assert changed.to_hf() == expected


@pytest.mark.parametrize(
    "spelling",
    [
        {"eos_token_id": [156892, 156895]},
        {"head_dim": None},
        {"num_shared_experts": None},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 600000.0, "partial_rotary_factor": 0.5}},
        {"rotary_dim": 64, "partial_rotary_factor": None},
        {"n_group": 0, "topk_group": 0},
        {"num_hidden_layers": 20.0, "rope_theta": 600000.0},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 0}},
        {"router_dtype": "float32"},
        {"attention_dropout": None},
    ],
)
def test_an_unusual_spelling_comes_back_as_it_was(spelling: dict):
    assert ModelConfig.from_hf(HF_MINI | spelling).to_hf() == HF_MINI | spelling


@pytest.mark.parametrize("scaling", [None, RopeScaling(factor=4.0, original_max_position_embeddings=64, mscale=0.7)])
def test_a_config_of_our_own_survives_the_way_through_config_json(scaling):
    config = small(rope_scaling=scaling, num_nextn_predict_layers=1)
    again = ModelConfig.from_hf(json.loads(json.dumps(config.to_hf())))
    assert dataclasses.replace(again, hf_json="") == config


@pytest.mark.parametrize("kind", ["bailing_moe", "bailing_moe_v2"])
def test_both_names_of_the_model_are_read(kind: str):
    assert ModelConfig.from_hf(HF_MINI | {"model_type": kind}).hidden_size == 2048


@pytest.mark.parametrize("kind", ["bailing_hybrid", "llama", None])
def test_another_architecture_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=f"model_type = {kind!r}"):
        ModelConfig.from_hf(HF_MINI | {"model_type": kind})


# Spec 1.6: defaults of the reference class that no release uses


@pytest.mark.parametrize("name", REQUIRED_HF_FIELDS)
def test_a_missing_field_is_an_error_that_names_it(name: str):
    with pytest.raises(ValueError, match=rf"lacks {name};"):
        ModelConfig.from_hf(without(name))


def test_all_missing_fields_are_named_at_once():
    left = {key: value for key, value in HF_MINI.items() if key not in ("rope_theta", "n_group")}
    with pytest.raises(ValueError, match="lacks rope_theta, n_group;"):
        ModelConfig.from_hf(left)


def test_routed_scaling_factor_is_never_the_class_default():
    assert "routed_scaling_factor" in REQUIRED_HF_FIELDS
    assert ModelConfig.from_hf(HF_MINI).routed_scaling_factor == 2.5


@pytest.mark.parametrize("left", [without("mtp_loss_scaling_factor"), HF_MINI | {"mtp_loss_scaling_factor": None}])
def test_without_an_mtp_scale_an_mtp_layer_has_that_of_the_recipe(left: dict):
    """The official converter writes an MTP layer and no scale."""
    assert ModelConfig.from_hf(left).num_nextn_predict_layers == 0
    assert ModelConfig.from_hf(left | {"num_nextn_predict_layers": 1}).mtp_loss_scaling_factor == 0.1


def test_an_mtp_scale_of_zero_is_kept_as_zero():
    assert ModelConfig.from_hf(HF_MINI | {"num_nextn_predict_layers": 1}).mtp_loss_scaling_factor == 0.0


@pytest.mark.parametrize("name", ["score_function", "norm_topk_prob"])
def test_fields_the_reference_hard_codes_may_be_missing(name: str):
    config = ModelConfig.from_hf(without(name))
    assert config.norm_topk_prob
    assert name not in config.to_hf()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "gelu"),
        ("score_function", "softmax"),
        ("router_dtype", "bf16"),
        ("attention_dropout", 0.1),
        ("embedding_dropout", 0.1),
        ("output_dropout", 0.1),
    ],
)
def test_a_choice_that_is_not_implemented_is_refused(name: str, value):
    with pytest.raises(ValueError, match=f"{name} = {value!r}"):
        ModelConfig.from_hf(HF_MINI | {name: value})


@pytest.mark.parametrize("name", ["norm_head", "norm_softmax", "use_sliding_window"])
def test_choices_of_other_generations_are_refused_unless_they_are_off(name: str):
    assert ModelConfig.from_hf(HF_MINI | {name: False}) == ModelConfig.from_hf(HF_MINI)
    with pytest.raises(ValueError, match=f"{name} = True"):
        ModelConfig.from_hf(HF_MINI | {name: True})


def test_the_first_generation_is_refused_by_its_class_though_its_model_type_is_the_same():
    with pytest.raises(ValueError, match="Ling 1.x"):
        ModelConfig.from_hf(HF_MINI | {"architectures": ["BailingMoeForCausalLM"]})


# Rotary width and context


@pytest.mark.parametrize(
    ("fields", "width"),
    [
        ({"partial_rotary_factor": 0.5}, 64),
        ({"partial_rotary_factor": 1.0}, 128),
        ({"rotary_dim": 64}, 64),
        ({"partial_rotary_factor": 0.25, "rotary_dim": 64}, 32),
        ({"partial_rotary_factor": None, "rotary_dim": 96}, 96),
    ],
)
def test_rotary_width_is_the_factor_first_then_rotary_dim(fields: dict, width: int):
    assert ModelConfig.from_hf(without("partial_rotary_factor") | fields).rotary_width == width


def test_a_rotary_width_is_never_guessed():
    with pytest.raises(ValueError, match="partial_rotary_factor and rotary_dim are both missing"):
        ModelConfig.from_hf(without("partial_rotary_factor"))


def test_yarn_takes_the_trained_length_from_the_config_where_it_has_none():
    config = ModelConfig.from_hf(HF_MINI | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    assert config.rope_scaling == RopeScaling(factor=4.0, original_max_position_embeddings=32768)
    assert config.max_positions == 131072


def test_yarn_keys_are_read_and_zero_betas_mean_the_default():
    keys = {"factor": 2, "original_max_position_embeddings": 100, "beta_fast": 0, "beta_slow": 2, "mscale": 0.5}
    scaling = ModelConfig.from_hf(HF_MINI | {"rope_scaling": {"type": "yarn", **keys}}).rope_scaling
    assert scaling == RopeScaling(factor=2, original_max_position_embeddings=100, beta_slow=2, mscale=0.5)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "linear", "factor": 4.0}, "'linear': only 'yarn'"),
        ({"type": "yarn"}, "rope_scaling lacks 'factor'"),
        ({"type": "yarn", "factor": 0.5}, "factor = 0.5 must be at least 1"),
    ],
)
def test_a_rope_scaling_that_cannot_be_followed_is_refused(scaling: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(HF_MINI | {"rope_scaling": scaling})


def test_positions_without_yarn_are_the_trained_ones():
    assert SMALL.max_positions == 256


# Checks of the architecture: the message names both numbers


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_key_value_heads": 3}, ["num_attention_heads = 4", "num_key_value_heads = 3"]),
        ({"num_experts": 18}, ["num_experts = 18", "n_group = 4"]),
        ({"num_experts": 4}, ["num_experts / n_group = 1", "2"]),
        ({"topk_group": 5}, ["topk_group = 5", "n_group = 4"]),
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok = 9", "the 8 experts", "topk_group = 2"]),
        ({"first_k_dense_replace": 5}, ["first_k_dense_replace = 5", "num_hidden_layers = 4"]),
        ({"num_nextn_predict_layers": 2}, ["num_nextn_predict_layers = 2", "0 or 1"]),
        ({"pad_token_id": 512}, ["pad_token_id = 512", "vocabulary of 512"]),
        ({"eos_token_id": -1}, ["eos_token_id = -1", "vocabulary of 512"]),
        ({"partial_rotary_factor": 1.5}, ["width 24", "head_dim = 16"]),
        ({"partial_rotary_factor": 0.2}, ["width 3", "even"]),
        ({"partial_rotary_factor": None, "rotary_dim": 18}, ["width 18", "head_dim = 16"]),
        ({"rope_theta": 0.0}, ["rope_theta = 0.0", "positive"]),
        ({"vocab_size": 0}, ["vocab_size = 0", "at least 1"]),
        ({"num_experts_per_tok": 0}, ["num_experts_per_tok = 0", "at least 1"]),
        ({"num_shared_experts": -1}, ["num_shared_experts = -1", "at least 0"]),
        ({"mtp_loss_scaling_factor": -0.1}, ["mtp_loss_scaling_factor = -0.1", "at least 0"]),
    ],
)
def test_an_impossible_architecture_is_refused_with_both_numbers(changes: dict, parts: list[str]):
    with pytest.raises(ValueError) as error:
        small(**changes)
    assert [part for part in parts if part not in str(error.value)] == []


def test_the_group_limit_itself_is_allowed():
    assert small(num_experts_per_tok=8).num_experts_per_tok == 8


def test_the_checks_hold_for_config_json_too():
    with pytest.raises(ValueError, match="num_experts = 250 must be a multiple of n_group = 8"):
        ModelConfig.from_hf(HF_MINI | {"num_experts": 250})


# Layer plan and counts


@pytest.mark.parametrize("dense", [0, 1, 4])
def test_layers_run_as_the_dense_prefix_then_the_moe_body(dense: int):
    config = small(first_k_dense_replace=dense)
    assert [kind.key for kind in layer_kinds(config)] == ["softmax_dense"] * dense + ["softmax_moe"] * (4 - dense)
    runs = [(run.kind.key, run.first, run.count, run.routed_before) for run in layer_runs(config)]
    assert runs == [run for run in (("softmax_dense", 0, dense, 0), ("softmax_moe", 0, 4 - dense, 0)) if run[2]]


def test_a_hybrids_layers_run_where_its_kinds_change_and_any_part_of_them_can():
    """Groups of three, of which the last is softmax; an incomplete last group is softmax throughout (spec 1.5)."""
    config = small(num_hidden_layers=8, first_k_dense_replace=1, layer_group_size=3)
    kinds = layer_kinds(config)
    assert "".join(kind.mixer[0] for kind in kinds) == "llsllsss"
    assert [kind.routed for kind in kinds] == [False] + [True] * 7
    runs = layer_runs(config)
    assert [(run.kind.key, run.first, run.count, run.routed_before) for run in runs] == [
        ("linear_dense", 0, 1, 0), ("linear_moe", 0, 1, 0), ("softmax_moe", 0, 1, 1), ("linear_moe", 1, 2, 2),
        ("softmax_moe", 1, 3, 4),
    ]  # fmt: skip
    for first in range(9):
        for last in range(first, 9):
            part = layer_runs(config, first, last)
            assert [run.kind for run in part for _ in range(run.count)] == list(kinds[first:last])
            layers = [layers_of(config, run.kind.key)[run.first : run.first + run.count] for run in part]
            assert [layer for some in layers for layer in some] == list(range(first, last))
            routed = [kind.routed for kind in kinds]
            assert all(run.routed_before == sum(routed[: some[0]]) for run, some in zip(part, layers, strict=True))
    assert routers_of(config, "softmax_moe") == [1, 4, 5, 6] and routers_of(config, "linear_moe") == [0, 2, 3]
    assert routed_layers(config, mtp=False) == 7


@pytest.mark.parametrize("layers", [8, 9, 20, 32, 80])
@pytest.mark.parametrize("size", [2, 4, 5, 8])
@pytest.mark.parametrize("dense", [0, 1, 4])
def test_a_hybrid_of_any_depth_is_compiled_as_a_few_layers(layers, size, dense):
    config = small(num_hidden_layers=layers, layer_group_size=size, first_k_dense_replace=dense)
    kinds, runs = layer_kinds(config), layer_runs(config)
    groups = layer_groups(runs)
    assert sum(len(group.runs) for group in groups) <= (7 if dense > 1 else 5)
    again, at = [], 0
    for group in groups:
        for repeat in range(group.repeats):
            for run in group.runs:
                first = run.layer + repeat * group.layers
                assert first == at and run.kind == kinds[at]
                stacked = layers_of(config, run.kind.key).index(first)
                assert stacked == run.first + repeat * run.count
                if run.kind.routed:
                    before = sum(kind.routed for kind in kinds[:first])
                    assert before == run.routed_before + repeat * group.routed
                again += kinds[first : first + run.count]
                at += run.count
    assert tuple(again) == kinds


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({"tie_word_embeddings": True}, -512 * 64),
        ({"use_qk_norm": False}, -4 * 2 * 16),
        ({"use_qkv_bias": True}, 4 * (4 + 2 * 2) * 16),
        ({"use_bias": True}, 4 * 64),
        ({"num_shared_experts": 2}, 3 * 3 * 64 * 32),
        ({"moe_router_enable_expert_bias": False}, 0),  # the bias stays, training leaves it alone
    ],
)
def test_each_option_moves_the_parameter_count_by_its_tensors(changes: dict, more: int):
    assert count_params(small(**changes)).total - count_params(SMALL).total == more


def test_active_parameters_leave_out_idle_experts_and_the_bias():
    counts = count_params(SMALL)
    idle = 3 * (16 - 4) * 3 * 64 * 32
    assert counts.total - counts.active == idle + 3 * 16


def test_attention_flops_grow_with_the_sequence_and_matmul_flops_do_not():
    short, long = (train_flops_per_token(SMALL, length) for length in (128, 256))
    assert long - short == 6 * 4 * 4 * 16 * 128


# A run


def test_a_run_survives_json():
    model = small(rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=64))
    sources = (DataSource(path="a", weight=2.0, licence="MIT"), DataSource(path="b", text_field="content"))
    run = RunConfig(model=model, data=DataConfig(sources=sources, sequence_length=128), train=TrainConfig(steps=7))
    assert RunConfig.from_json(run.to_json()) == run


def test_a_run_with_a_model_from_config_json_survives_json():
    run = RunConfig(model=ModelConfig.from_hf(HF_MINI))
    assert RunConfig.from_json(run.to_json()).model.to_hf() == HF_MINI


@pytest.mark.parametrize("room", ["", "model", "data", "schedule", "train"])
def test_an_unknown_key_in_a_saved_run_is_named(room: str):
    values = json.loads(RunConfig(model=SMALL, data=DataConfig(sequence_length=128)).to_json())
    (values[room] if room else values)["learning_rat"] = 1
    with pytest.raises(ValueError, match="learning_rat"):
        RunConfig.from_json(json.dumps(values))


def test_a_sequence_longer_than_the_positions_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"sequence_length = 257 exceeds the model's 256 positions"):
        RunConfig(model=SMALL, data=DataConfig(sequence_length=257))


def test_yarn_lengthens_what_a_run_may_use():
    model = small(rope_scaling=RopeScaling(factor=2.0, original_max_position_embeddings=256))
    assert RunConfig(model=model, data=DataConfig(sequence_length=512)).model.max_positions == 512


def test_a_batch_that_grows_by_less_than_a_microbatch_is_refused():
    data = DataConfig(sequence_length=128, batch_ramp_from=2, batch_ramp_by=2, batch_ramp_tokens=1000)
    RunConfig(model=SMALL, data=data, train=TrainConfig(microbatches=4))
    with pytest.raises(ValueError, match="batch_ramp_from = 2 and batch_ramp_by = 2 must be multiples of .* = 4"):
        RunConfig(model=SMALL, data=data, train=TrainConfig(microbatches=2))


def test_a_batch_that_microbatches_cannot_share_is_refused_with_both_numbers():
    data = DataConfig(sequence_length=128, global_batch_size=8)
    with pytest.raises(ValueError, match="global_batch_size = 8 must be a multiple of train.microbatches = 3"):
        RunConfig(model=SMALL, data=data, train=TrainConfig(microbatches=3))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DataSource(path="a", weight=0.0), "weight = 0.0 of data source 'a'"),
        (lambda: DataConfig(sources=()), "data.sources is empty"),
        (lambda: DataConfig(holdout_fraction=1.0), "holdout_fraction = 1.0 must be between 0 and 1"),
        (lambda: DataConfig(sequence_length=0), "sequence_length = 0 must be at least 1"),
        (lambda: DataConfig(global_batch_size=0), "global_batch_size = 0 must be at least 1"),
        (lambda: ScheduleConfig(decay_fraction=1.1), "decay_fraction = 1.1 must be at most 1"),
        (lambda: ScheduleConfig(warmup_steps=-1), "warmup_steps = -1 must be at least 0"),
        (lambda: TrainConfig(steps=0), "steps = 0 must be at least 1"),
        (lambda: TrainConfig(bias_update_rate=-1e-3), "bias_update_rate = -0.001 must be at least 0"),
    ],
)
def test_an_impossible_setting_is_refused_with_its_limit(build, message: str):
    with pytest.raises(ValueError, match=message):
        build()


# Resume: what differs


def test_equal_architectures_have_no_diff():
    from_file = ModelConfig.from_hf(SMALL.to_hf())
    assert architecture_diff(SMALL, from_file) == []


def test_every_changed_field_is_listed_with_both_values():
    wanted = small(num_experts=32, rope_theta=1e4, use_qk_norm=False)
    assert architecture_diff(SMALL, wanted) == ["model.num_experts: 16 -> 32", "model.use_qk_norm: True -> False"]
    assert model_settings_diff(SMALL, wanted) == ["model.rope_theta: 600000.0 -> 10000.0"]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"partial_rotary_factor": None, "rotary_dim": 8}, {}),
        ({"n_group": 1, "topk_group": 1}, {"n_group": 4, "topk_group": 4}),
        ({"layer_group_size": 9, "group_norm_size": 2, "linear_silu": True}, {}),  # no group is whole: all softmax
        ({"first_k_dense_replace": 0, "intermediate_size": 7}, {"first_k_dense_replace": 0}),
        ({"num_experts_per_tok": 1, "norm_topk_prob": False}, {"num_experts_per_tok": 1}),
        ({"initializer_range": 0.1, "pad_token_id": 3, "eos_token_id": 4}, {}),
        ({"rope_scaling": RopeScaling(factor=4.0, original_max_position_embeddings=64)}, {"rope_theta": 1.5}),
        ({"max_position_embeddings": 7, "mtp_loss_scaling_factor": 0.3, "moe_router_enable_expert_bias": False}, {}),
    ],
)
def test_what_changes_no_tensor_and_no_product_is_no_other_architecture(a: dict, b: dict):
    assert architecture_diff(small(**a), small(**b)) == architecture_diff(small(**b), small(**a)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"partial_rotary_factor": 1.0}, {"topk_group": 3}, {"num_experts_per_tok": 2}, {"rms_norm_eps": 1e-5},
        {"routed_scaling_factor": 1.0}, {"norm_topk_prob": False}, {"num_nextn_predict_layers": 1},
        {"tie_word_embeddings": True}, {"use_qkv_bias": True}, {"num_shared_experts": 0},
    ],
)  # fmt: skip
def test_what_changes_a_tensor_or_the_function_is_another_architecture(change: dict):
    [line] = architecture_diff(SMALL, small(**change))
    assert line.startswith("model.")


def test_an_mtp_scale_is_a_setting_only_where_both_sides_have_an_mtp_layer():
    with_mtp, changed = small(num_nextn_predict_layers=1), {"mtp_loss_scaling_factor": 0.3}
    assert model_settings_diff(SMALL, small(**changed)) == []
    assert model_settings_diff(with_mtp, dataclasses.replace(with_mtp, **changed)) == [
        "model.mtp_loss_scaling_factor: 0.1 -> 0.3"
    ]
