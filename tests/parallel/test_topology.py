"""The train step compiles for real TPU topologies, with no TPU here, and moves what it should in the dtype it should.

The compiler comes with libtpu, an ordinary wheel.
"""

import dataclasses
import json
import re
from collections import defaultdict

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from ling_jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from ling_jax.kernels.attention import attention
from ling_jax.kernels.grouped import grouped_product, grouped_weight_gradient
from ling_jax.parallel.mesh import BATCH_AXES, make_mesh
from ling_jax.plan.plan import make_plan
from ling_jax.plan.report import render
from ling_jax.plan.serving import make_serving_plan
from ling_jax.train.state import make_trainer
from ling_jax.train.step import make_train_step
from tests.support.helpers import tiny
from tests.support.marks import nightly

ROWS, LENGTH = 8, 512
KINDS = "reduce-scatter|all-reduce|all-gather|collective-permute|ragged-all-to-all|all-to-all"
# Sizes that fill a TPU's registers: smaller ones take XLA other ways.
MODEL = tiny(
    vocab_size=1024, hidden_size=1024, intermediate_size=512, head_dim=128, moe_intermediate_size=128,
    num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, max_position_embeddings=LENGTH,
    first_k_dense_replace=0, num_nextn_predict_layers=0,
)  # fmt: skip


@pytest.fixture
def tpu(monkeypatch):
    """Devices of a TPU topology, of so many slices."""
    settings = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-128", "TPU_WORKER_HOSTNAMES": "localhost"}
    for name, value in {**settings, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        monkeypatch.setenv(name, value)

    def devices(name: str, slices: int = 1):
        return topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices).devices

    return devices


@pytest.fixture
def devices(tpu):
    return tpu("v5p:2x2x2")


def run_config(mesh: MeshConfig, fp8: bool = False, rows: int = ROWS, model: ModelConfig = MODEL) -> RunConfig:
    return RunConfig(
        model=model,
        mesh=mesh,
        data=DataConfig(sequence_length=LENGTH, global_batch_size=rows),
        train=TrainConfig(dtype="bfloat16", fp8=fp8),
    )


def step_arguments(trainer) -> tuple:
    state = jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        jax.eval_shape(trainer.init),
        trainer.shardings(),
    )
    rows = NamedSharding(trainer.compute.mesh, PartitionSpec(BATCH_AXES))
    names = ("tokens", "targets", "positions", "segment_ids")
    return state, {name: jax.ShapeDtypeStruct((ROWS, LENGTH), "int32", sharding=rows) for name in names}


def compiled_step(devices, mesh: MeshConfig, fp8: bool = False, model: ModelConfig = MODEL) -> str:
    """The train step's optimized program."""
    trainer = make_trainer(run_config(mesh, fp8, model=model), devices)
    return make_train_step(trainer).lower(*step_arguments(trainer)).compile().as_text()


def collectives(text: str) -> dict[str, list[tuple[str, int]]]:
    """By kind of collective, the dtype and number of elements of each result."""
    found = defaultdict(list)
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({KINDS})(-start)?\(", line)
        if match:
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])[:1]:
                size = 1
                for dim in filter(None, dims.split(",")):
                    size *= int(dim)
                found[match[2]].append((dtype, size))
    return found


def test_an_axis_may_be_a_part_of_the_torus(tpu):
    """4 x 4 x 4 chips as 8 x 8: no axis of the torus has 8."""
    mesh = make_mesh(MeshConfig(fsdp=8, expert=8), tpu("v5p:4x4x4"))
    assert mesh.shape["fsdp"] == mesh.shape["expert"] == 8


def test_only_data_crosses_slices(tpu):
    devices = tpu("v5p:2x2x2", 2)
    mesh = make_mesh(MeshConfig(data=4, expert=4), devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices).reshape(4, 4)
    assert (slices == slices[:, :1]).all() and sorted(slices[:, 0]) == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="mesh.data = 1 must be a multiple of the 2 slices"):
        make_mesh(MeshConfig(expert=16), devices)


@pytest.mark.parametrize(("reduce_dtype", "wire"), [("float32", "f32"), nightly("bfloat16", "bf16")])
def test_gradients_are_reduced_by_reduce_scatter_in_the_chosen_dtype(devices, reduce_dtype, wire):
    """The mesh has `data`: over a group of all 8 chips this compiler replaces a reduce-scatter by an all-reduce."""
    found = collectives(compiled_step(devices, MeshConfig(data=2, fsdp=4, reduce_dtype=reduce_dtype)))
    assert len(found["reduce-scatter"]) >= 9  # one for each matrix of a layer, at least
    assert {dtype for dtype, _ in found["reduce-scatter"]} == {wire}
    biggest = max(size for _, size in found["all-reduce"])
    assert biggest <= MODEL.vocab_size * MODEL.hidden_size / 4, "a matrix was reduced whole"
    assert {dtype for dtype, size in found["all-reduce"] if size > 10_000} == {wire}
    weights = [size for dtype, size in found["all-gather"] if dtype == "bf16"]
    assert len(weights) >= 8, "weights travel in the compute dtype"


@pytest.mark.nightly
def test_tensor_and_context_parallel_steps_compile_with_the_exchanges_and_the_kernels_they_name(devices):
    text = compiled_step(devices, MeshConfig(context=2, expert=2, tensor=2))
    assert {"collective-permute", "ragged-all-to-all", "all-to-all", "all-reduce"} <= collectives(text).keys()
    assert kernels(text) == KERNELS


@pytest.mark.nightly
def test_two_groups_of_a_hybrid_compile_with_rows_cut_over_devices(devices):
    """The two repeats are one program, whose states go to the devices that have their heads and back."""
    hybrid = dataclasses.replace(MODEL, num_hidden_layers=4, layer_group_size=2, group_norm_size=2)
    text = compiled_step(devices, MeshConfig(expert=4, context=2), model=hybrid)
    states = [shape for kind, shapes in collectives(text).items() if kind == "all-to-all" for shape in shapes]
    assert states, collectives(text).keys()
    assert any("exchange_states" in line and "all-to-all" in line for line in text.splitlines())


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("mesh", "rows", "length"),
    [(MeshConfig(fsdp=8, expert=8), 64, LENGTH), (MeshConfig(expert=2, context=32), 2, 32 * LENGTH)],
)
def test_a_plan_of_two_layers_is_printed(mesh, rows, length, caplog):
    """The other Python has it in `.ci/run`: JAX 0.10 cannot print the program, which only its largest buffers are read
    from."""
    config = run_config(mesh, rows=rows, model=dataclasses.replace(MODEL, max_position_embeddings=length))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=length))
    plan = make_plan(config, "v5p:4x4x4")
    told, size = render(plan), json.loads(plan.to_json())["bytes_per_device"]
    assert plan.memory.fits and "fits, with" in told and 0 < size["temporaries"] < size["peak"] <= size["hbm"]
    unknown = "largest buffers: not known, since this version of JAX cannot print the program" in told
    assert unknown != bool(plan.buffers) and unknown == ("the largest buffers are not known" in caplog.text)
    assert plan.buffers or jax.__version_info__ < (0, 12)


def gathered_bytes(text: str) -> int:
    widths = {"bf16": 2, "f32": 4, "f8e4m3fn": 1, "u8": 1, "s32": 4, "pred": 1}
    return sum(widths[dtype] * size for dtype, size in collectives(text)["all-gather"])


@pytest.mark.nightly
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="older versions compile it but cannot print the program")
def test_in_fp8_weights_travel_and_are_multiplied_as_codes(tpu):
    """Every product of attention and experts is a kernel whose operands are FP8; none is multiplied out for it."""
    mesh, devices = MeshConfig(fsdp=2, expert=4), tpu("tpu7x:2x2x1")
    wide, text = compiled_step(devices, mesh), compiled_step(devices, mesh, fp8=True)
    assert {"fp8_product", "fp8_weight_gradient"} <= kernels(text)
    assert kernels(text) & {"gmm", "tgmm"} == set() == kernels(wide) & {"fp8_product"}
    assert "f8e4m3fn" in {dtype for dtype, _ in collectives(text)["all-gather"]}
    assert gathered_bytes(text) < 0.65 * gathered_bytes(wide)  # the embedding and the head stay in bfloat16
    calls = [
        line
        for line in text.splitlines()
        if re.search(r"%fp8_(?:product|weight_gradient)[.\d]* = .*tpu_custom_call", line)
    ]
    assert len(calls) >= 3 * 5 and all(line.count("f8e4m3fn[") >= 2 for line in calls)
    assert not re.findall(r"= (?:bf16|f32)\[[\d,]{8,}\]\S* convert\(\S*f8e4m3fn", text)


KERNELS = {"splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv", "gmm", "tgmm"}


def kernels(text: str) -> set[str]:
    """The Pallas kernels that a compiled program calls."""
    called = re.findall(r"%(\w+)[.\d]* = .*custom_call_target=\"tpu_custom_call\"", text)
    return {re.sub("_segmented.*", "", name) for name in called}


def attention_and_experts(q, kv, segments, rows, weights, sizes):
    """The products and the gradients of both, at widths of Ling-mini."""

    def total(q, kv):
        return attention(q, kv, kv, segments, 0.1).astype("float32").sum()

    y = grouped_product(rows, weights, sizes, 128, 1)
    back = grouped_product(y, weights, sizes, 128, 2)
    return jax.grad(total, (0, 1))(q, kv), y, back, grouped_weight_gradient(y, rows, sizes, 128)


def arguments(dtype: str, sharding=None) -> list[jax.ShapeDtypeStruct]:
    shapes = [(1, 1024, 4, 128), (1, 1024, 2, 128), (1, 1024), (4096, 2048), (4, 512, 2048), (4,)]
    dtypes = [dtype, dtype, "int32", dtype, "float32", "int32"]
    return [jax.ShapeDtypeStruct(*a, sharding=sharding) for a in zip(shapes, dtypes, strict=True)]


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="older versions compile it but cannot print the program")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_tpu_attention_and_grouped_products_are_pallas_kernels(devices, dtype):
    args = arguments(dtype, SingleDeviceSharding(devices[0]))
    assert kernels(jax.jit(attention_and_experts).lower(*args).compile().as_text()) == KERNELS


def test_for_cuda_attention_is_xlas_and_grouped_products_are_ragged_dots():
    """The machine that lowers has neither a GPU nor a say."""
    traced = jax.jit(attention_and_experts).trace(*arguments("bfloat16"))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("ragged_dot") >= 3 and "tpu_custom_call" not in text


def test_the_train_step_lowers_for_cuda_with_its_ragged_products_and_exchanges():
    trainer = make_trainer(run_config(MeshConfig(fsdp=2, expert=4)), jax.devices())
    text = make_train_step(trainer).trace(*step_arguments(trainer)).lower(lowering_platforms=("cuda",)).as_text()
    assert "ragged_dot" in text and "ragged_all_to_all" in text and "tpu_custom_call" not in text


def test_for_cuda_fp8_products_are_dots_of_fp8():
    trainer = make_trainer(run_config(MeshConfig(fsdp=2, expert=4), fp8=True), jax.devices())
    text = make_train_step(trainer).trace(*step_arguments(trainer)).lower(lowering_platforms=("cuda",)).as_text()
    products = [line for line in text.splitlines() if re.search(r"(dot_general|ragged_dot)\W", line)]
    in_fp8 = [line for line in products if line.count("f8E4M3FN") >= 2]
    assert any("ragged_dot" in line for line in in_fp8) and any("dot_general" in line for line in in_fp8)
    assert len(in_fp8) >= 20 and "ragged_all_to_all" in text and "tpu_custom_call" not in text


def test_serving_reads_weights_and_cache_once_a_step(tpu):
    """Counted bytes of a decoding step against the shapes; both programs compile and fit."""
    split = MeshConfig(expert=2, tensor=2)
    tpu("v5e:2x2")
    plan = make_serving_plan(MODEL, split, "v5e:2x2", rows=4, slots=LENGTH, chunk=64, dtype="bfloat16")
    assert plan.fits and [call.name for call in plan.calls] == ["prefill", "decode"]
    c, layers = MODEL, MODEL.num_hidden_layers
    head = c.vocab_size * c.hidden_size
    heads = c.num_attention_heads * c.head_dim * 2 + 2 * c.num_key_value_heads * c.head_dim
    experts = c.num_experts * (1 - (1 - c.num_experts_per_tok / c.num_experts) ** 4)  # of four tokens
    wide = 3 * c.hidden_size * c.moe_intermediate_size
    router = c.num_experts * c.hidden_size
    weights = 2 * (layers * (heads * c.hidden_size / 2 + wide * experts / 4 + wide / 2 + router) + head / 2)
    cache = 2 * 2 * layers * 2 * LENGTH * c.num_key_value_heads / 2 * c.head_dim  # two rows, one head
    assert plan.weights == pytest.approx(weights, rel=0.01) and plan.cache == cache
    decode = plan.calls[1]
    assert decode.memory.arguments > weights + cache
    assert decode.count.total().hbm_bytes == pytest.approx(weights + cache, rel=0.15)
    kinds = {sent.kind for sent in decode.count.total().sent if sent.bytes > 1e3}
    assert kinds == {"all-reduce", "ragged-all-to-all", "all-gather"}  # of rows and logits, not of weights
    assert sum(sent.bytes for sent in decode.count.total().sent) < 0.02 * weights
    assert set(json.loads(plan.to_json())) >= {"prefill", "decode", "cache_bytes_per_device"}
