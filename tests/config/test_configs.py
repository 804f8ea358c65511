"""Every file of configs/ builds the run it promises, and no default moves unseen."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ling_jax.config import MeshConfig, RunConfig, count_params
from ling_jax.generate.serving import serving_model
from ling_jax.model.model import abstract_model, device_bytes
from ling_jax.runner import _sample
from tests.tiny_run import REPO

GOLDEN = Path(__file__).with_name("golden_configs")
NAMES = sorted(path.stem for path in (REPO / "configs").glob("*.py") if path.stem != "__init__")
CONTRACT = {
    "ling_tiny", "bench_moe", "ling_mini_2_0", "ling_mini_base_2_0", "ling_flash_2_0", "ling_flash_base_2_0",
    "ling_1t", "ling_1t_base", "ring_mini_2_0", "ring_flash_2_0", "ring_1t", "ring_mini_linear_2_0",
    "ring_flash_linear_2_0",
}  # fmt: skip

# Spec 1.3: total, active with embedding and head, active without, MTP layer.
MINI = (16_255_643_392, 1_432_968_192, 789_142_528, 827_861_504)
FLASH = (102_889_705_216, 6_152_269_824, 4_864_618_496, 3_306_181_120)
ONE_T = (999_705_328_640, 51_054_407_680, 48_479_105_024, 13_222_584_832)
MINI_LINEAR = (16_423_448_320, 1_600_773_120, 956_947_456, 0)
FLASH_LINEAR = (104_181_665_536, 7_444_230_144, 6_156_578_816, 0)


def load(name: str) -> RunConfig:
    return importlib.import_module(f"configs.{name}").config()


def flatten(value, prefix: str = "") -> list[str]:
    """Sorted lines `a.b.c = value` of nested dicts and lists."""
    if isinstance(value, dict):
        items = sorted(value.items())
    elif isinstance(value, list):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return [f"{prefix} = {json.dumps(value)}"]
    return [line for key, item in items for line in flatten(item, f"{prefix}.{key}" if prefix else key)]


def test_every_promised_config_is_there():
    assert set(NAMES) >= CONTRACT


@pytest.mark.parametrize("name", NAMES)
def test_resolved_config_equals_its_committed_dump(name: str, request: pytest.FixtureRequest):
    dump = "\n".join(flatten(json.loads(load(name).to_json()))) + "\n"
    path = GOLDEN / f"{name}.txt"
    if request.config.getoption("--rewrite-golden-configs"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(dump)
    assert dump == path.read_text(), "meant? then: pytest tests/config/test_configs.py --rewrite-golden-configs"


def test_no_dump_is_left_of_a_config_that_went():
    assert {path.stem for path in GOLDEN.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_docstring_says_command_and_hardware_and_promise(name: str):
    text = importlib.import_module(f"configs.{name}").__doc__ or ""
    assert [word for word in ("Command:", "Hardware:", "Promise:") if word not in text] == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ling_mini_2_0", MINI),
        ("ring_mini_2_0", MINI),
        ("ling_flash_2_0", FLASH),
        ("ring_flash_2_0", FLASH),
        ("ling_1t", ONE_T),
        ("ring_1t", ONE_T),
        ("ring_mini_linear_2_0", MINI_LINEAR),
        ("ring_flash_linear_2_0", FLASH_LINEAR),
    ],
)
def test_parameter_counts_equal_the_release(name: str, expected: tuple[int, ...]):
    total, active, active_non_embedding, _ = expected
    assert count_params(load(name).model) == (total, active, active_non_embedding, 0)


@pytest.mark.parametrize(
    ("name", "expected", "total_with_mtp"),
    [
        ("ling_mini_base_2_0", MINI, 17_083_504_896),
        ("ling_flash_base_2_0", FLASH, 106_195_886_336),
        ("ling_1t_base", ONE_T, 1_012_927_913_472),
    ],
)
def test_base_configs_count_the_mtp_layer_in_the_total_only(name, expected, total_with_mtp):
    _, active, active_non_embedding, mtp = expected
    assert count_params(load(name).model) == (total_with_mtp, active, active_non_embedding, mtp)


def test_bench_moe_has_the_parameters_of_the_peers_it_is_measured_against():
    model = load("bench_moe").model
    moe_layers = model.num_hidden_layers - model.first_k_dense_replace
    biases = moe_layers * model.num_experts  # buffers to the peers, which count trained weights only
    assert count_params(model).total - biases == 37_998_208


@pytest.mark.parametrize(
    ("name", "peak_lr", "rows"),
    [("ling_mini_2_0", 3.36e-4, 4400), ("ling_flash_2_0", 2.61e-4, 8352), ("ling_1t", 1.86e-4, 18144)],
)
def test_full_size_runs_follow_the_published_recipe(name: str, peak_lr: float, rows: int):
    run = load(name)
    assert run.schedule.peak_lr == peak_lr
    assert run.data.global_batch_size == rows
    assert run.train.steps * rows * run.data.sequence_length == pytest.approx(20e12, rel=1e-4)


def test_the_recipe_for_a_laptop_is_the_published_one_on_another_scale():
    run = load("recipe_tiny")
    stages = [stage.config for stage in run.stage_runs()]
    assert [config.stage for config in stages] == ["general", "reasoning", "context", "thought", "yarn"]
    assert [config.data.sequence_length for config in stages] == [256, 256, 1024, 1024, 4096]
    assert [config.model.max_positions for config in stages] == [256, 256, 1024, 1024, 4096]
    assert {config.data.global_batch_size * config.data.sequence_length for config in stages} == {4096}
    general = [config.data.sources[0].weight / sum(s.weight for s in config.data.sources) for config in stages]
    assert general == pytest.approx([0.68, 0.54, 0.54, 0.55, 0.55])
    first, last = stages[0], stages[-1]
    assert last.train.bias_update_rate == first.train.bias_update_rate / 10
    assert last.model.rope_theta == 16 * first.model.rope_theta and last.schedule.peak_lr > first.schedule.peak_lr
    assert stages[2].data.long_share == 0.2 and first.data.long_share is None
    assert run.checkpoint.write_merged and sum(stage.tokens for stage in run.stages) == 2_800_000


@pytest.mark.parametrize(
    ("name", "peak_lr", "rows"), [("ling_mini_recipe", 3.36e-4, 4400), ("ling_1t_recipe", 1.86e-4, 18144)]
)
def test_the_recipes_are_what_was_published(name: str, peak_lr: float, rows: int):
    stages = load(name).stage_runs()
    names, configs = [stage.config.stage for stage in stages], [stage.config for stage in stages]
    assert names == ["general_a", "general_b", "context", "thought"]
    ends = [*(stage.first_tokens for stage in stages[1:]), stages[-1].first_tokens + 600e9]
    assert ends == pytest.approx([10e12, 20e12, 20.15e12, 20.75e12], rel=1e-4)
    assert [config.data.sequence_length for config in configs] == [4096, 4096, 32768, 32768]
    assert [config.model.rope_theta for config in configs] == [1e4, 1e4, 6e5, 6e5]
    assert [config.train.bias_update_rate for config in configs] == [1e-3, 1e-3, 1e-4, 1e-4]
    assert [config.schedule.peak_lr for config in configs[:3]] == [peak_lr] * 3 and configs[
        3
    ].schedule.peak_lr > peak_lr
    assert [config.schedule.warmup_steps for config in configs] == [2000, 0, 0, 0]
    assert [config.data.batch_at(10**13) for config in configs] == [rows, rows, rows // 8, rows // 8]
    shares = [{s.path: s.weight for s in config.data.sources} for config in configs]
    assert shares[0] == {"general": 0.68, "reasoning": 0.32} and shares[2] == shares[1]
    assert shares[1] == {"general": 0.54, "reasoning": 0.46} and shares[3]["general"] == 0.55
    assert configs[2].data.long_share == 0.2 and configs[2].model.num_nextn_predict_layers == 1


def test_a_run_too_large_to_serve_on_its_own_mesh_ends_without_a_sample(caplog):
    """Ling-1T over 1,024 devices: 4 GB of weights on each to train, but attention whole and 16 experts to serve."""
    mesh = MeshConfig(fsdp=64, expert=16)
    config = load("ling_1t")
    model = abstract_model(config.model, mesh=mesh)
    stored, served = (sum(device_bytes(m).values()) for m in (model, serving_model(model)))
    assert 3.9e9 < stored < 4.1e9 and 250e9 < served < 350e9
    trainer = SimpleNamespace(config=config, compute=SimpleNamespace(model=lambda params, bias: model))
    state = SimpleNamespace(params=None, bias=None)
    with caplog.at_level("INFO"):
        assert _sample(trainer, state, None) is None
    assert f"no sample of {served / 1e9:.1f} GB of weights a device" in caplog.text
