"""The kernels and the train step compile for H100 GPUs, with no GPU here, and need no array that grows with rows times
experts or tokens times tokens.

The compiler comes with JAX's CUDA plugin, two ordinary wheels.
"""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from configs import ling_mini_2_0
from ling_jax.config import MeshConfig
from ling_jax.kernels import blockwise
from ling_jax.kernels.attention import attention, cached_attention
from ling_jax.kernels.blockwise import quantise_tiles
from ling_jax.kernels.fp8 import FP8Weight
from ling_jax.kernels.weight import LayerWeight, as_weight
from ling_jax.parallel.mesh import make_mesh
from ling_jax.plan import gpu
from ling_jax.plan.count import Sent, Work
from ling_jax.plan.hardware import wires_of
from ling_jax.plan.plan import make_plan, topology_devices, trace_step
from ling_jax.plan.report import render
from ling_jax.plan.roofline import bound
from ling_jax.train.state import make_trainer
from ling_jax.train.step import make_train_step
from tests.parallel.test_topology import arguments, attention_and_experts, run_config, step_arguments
from tests.support.marks import nightly

KERNELS = {
    "gpu_attention", "gpu_attention_q", "gpu_attention_kv", "gpu_grouped_product", "gpu_grouped_gradient",
}  # fmt: skip
TRITON = r"__gpu\$xla\.gpu\.triton"


@pytest.fixture
def devices() -> list:
    """A host of eight."""
    if reason := gpu.missing():
        pytest.skip(reason)
    return topology_devices("h100:8", 1)


def kernels(text: str) -> set[str]:
    """The Pallas kernels that a compiled program calls."""
    calls = [line for line in text.splitlines() if re.search(f'custom_call_target="{TRITON}"', line)]
    return {found[0] for line in calls if (found := re.search(r"gpu_(attention|grouped|fp8)\w*", line))}


def largest_array(text: str) -> int:
    """The most elements that an array of a compiled program has, those inside fusions too."""
    shapes = set(re.findall(r"= (?:pred|[a-z]+\d+)\[([\d,]+)\]", text))
    return max(int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes)


def compiled(f, args, device):
    """`f` compiled for one device; outside `shard_map` JAX asks the abstract mesh for its kind."""
    mesh = Mesh(np.array([device]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in args]
    with use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(f).lower(*args).compile()


def lowered_step(devices, **options) -> str:
    trainer = make_trainer(run_config(MeshConfig(fsdp=2, expert=4), **options), devices)
    return make_train_step(trainer).trace(*step_arguments(trainer)).lower().as_text()


def test_a_topology_is_hosts_of_gpus(devices):
    hosts = topology_devices("h100:8x4", 1)
    assert len(devices) == 8 and len({device.process_index for device in devices}) == 1
    assert [device.process_index for device in hosts] == [host for host in range(4) for _ in range(8)]
    assert {device.device_kind for device in hosts} == {"NVIDIA H100 80GB HBM3"}


@pytest.mark.parametrize(("name", "slices"), [("h100", 1), ("h100:8x", 1), ("h100:0", 1), ("h100:8", 2)])
def test_a_topology_that_is_none_is_one_sentence(name, slices):
    with pytest.raises(ValueError, match="h100:8x4 are four"):
        topology_devices(name, slices)


def test_without_the_compiler_what_to_install_is_one_sentence(monkeypatch):
    monkeypatch.setattr(gpu, "PLUGINS", ("no_such_package",))
    with pytest.raises(ValueError, match="no topology 'h100:8': .* pip install jax-cuda13-plugin jax-cuda13-pjrt"):
        topology_devices("h100:8", 1)
    monkeypatch.undo()
    if gpu.missing() is None:
        monkeypatch.setattr(gpu, "_assembler", lambda: False)
        with pytest.raises(ValueError, match="NVIDIA's assembler ptxas is not on the path"):
            topology_devices("h100:8", 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_h100_attention_and_grouped_products_are_pallas_kernels(devices, dtype):
    program = compiled(attention_and_experts, arguments(dtype), devices[0])
    assert kernels(program.as_text()) == KERNELS


def test_attention_over_32768_tokens_needs_no_array_of_tokens_by_tokens(devices):
    """The gradient of one of Ling-mini's layers: temporaries are queries, keys and their gradients."""
    shapes = (1, 32768, 16, 128), (1, 32768, 4, 128), (1, 32768, 4, 128)
    args = [*(jax.ShapeDtypeStruct(s, "bfloat16") for s in shapes), jax.ShapeDtypeStruct((1, 32768), "int32")]

    def total(q, k, v, segments):
        return attention(q, k, v, segments, 0.1).astype("float32").sum()

    program = compiled(jax.grad(total, (0, 1, 2)), args, devices[0])
    assert program.memory_analysis().temp_size_in_bytes < 0.5e9
    assert largest_array(program.as_text()) <= 32768 * 16 * 128


@pytest.mark.slow
def test_a_step_of_two_layers_of_ling_mini_fits_a_host_and_multiplies_no_row_with_every_expert(devices):
    run = ling_mini_2_0.config()
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, num_hidden_layers=2),
        mesh=dataclasses.replace(run.mesh, expert=8),
        data=dataclasses.replace(run.data, sequence_length=4096, global_batch_size=8),
    )
    program = trace_step(run, devices).traced.lower().compile()
    assert program.memory_analysis().temp_size_in_bytes < 5e9
    text, model = program.as_text(), run.model
    assert kernels(text) == KERNELS
    pairs, local = 4096 * model.num_experts_per_tok, model.num_experts // 8
    assert largest_array(text) < pairs * local * model.moe_intermediate_size / 2


def test_the_train_step_has_the_kernels_and_the_exchanges(devices):
    text = lowered_step(devices)
    assert text.count("xla.gpu.triton") >= 8 and "ragged_all_to_all" in text
    assert "ragged_dot" not in text and "tpu_custom_call" not in text


def test_fp8_products_are_kernels_of_fp8_where_the_gpu_multiplies_it(devices):
    text = lowered_step(devices, fp8=True)
    calls = [line for line in text.splitlines() if "xla.gpu.triton" in line]
    by_name = {name: [line for line in calls if f"gpu_fp8_{name}" in line] for name in ("product", "gradient")}
    for lines in by_name.values():
        assert lines and all(line.count("f8E4M3FN>") >= 2 for line in lines)
    assert any("gpu_fp8_quantise" in line for line in calls) and "gpu_grouped" not in text


@pytest.mark.nightly
def test_older_gpus_have_no_kernels_of_fp8():
    older = lowered_step(topology_devices("a100:8", 1), fp8=True)
    assert "gpu_fp8" not in older and "gpu_attention" in older


@pytest.mark.parametrize("name", ["h100:8", nightly("b200:8")])
def test_fp8_kernels_compile_and_their_partial_sums_leave_no_processor(name):
    """A linear layer and grouped products, forward and backward: 4,096 rows, 2048 inputs, 512 outputs."""
    if reason := gpu.missing():
        pytest.skip(reason)

    def products(x, g, codes, scales, sizes):
        total = []
        for w, rows in ((FP8Weight(codes, scales), sizes), (FP8Weight(codes[0], scales[0]), None)):
            total += [blockwise.product(quantise_tiles(a, 1), w, rows, d, a.dtype) for a, d in ((x, 1), (g, 2))]
            total.append(blockwise.weight_gradient(quantise_tiles(g, 0), quantise_tiles(x, 0), rows))
        return total

    shapes = {(4096, 2048): "bfloat16", (4096, 512): "bfloat16", (4, 512, 2048): "float8_e4m3fn", (4, 4, 16): "float32"}
    args = [*(jax.ShapeDtypeStruct(*of) for of in shapes.items()), jax.ShapeDtypeStruct((4,), "int32")]
    program = compiled(products, args, topology_devices(name, 1)[0])
    assert kernels(program.as_text()) == {"gpu_fp8_product", "gpu_fp8_gradient", "gpu_fp8_quantise"}
    codes = 2 * 4096 * (2048 + 512)
    assert program.memory_analysis().temp_size_in_bytes < 2 * codes  # 16 float32 sums of [4096, 512] are 134 MB


def test_attention_over_a_cache_copies_no_keys(devices):
    """One token of each of eight requests in a room of 4,096: XLA's form writes the keys anew, for each head's part."""
    shapes = (8, 1, 16, 128), (8, 4096, 4, 128), (8, 4096, 4, 128)
    args = [*(jax.ShapeDtypeStruct(s, "bfloat16") for s in shapes), jax.ShapeDtypeStruct((8, 1), "int32")]
    program = compiled(lambda *args: cached_attention(*args, 0.1), args, devices[0])
    assert "gpu_attention_cached" in kernels(program.as_text())
    assert program.memory_analysis().temp_size_in_bytes < 3e6


@pytest.mark.parametrize(("fp8", "block"), [(False, 1), (True, 1), (True, 4)])
def test_decoding_copies_no_experts(devices, fp8, block):
    """A token's 8 experts of 256: 8 MB of codes, of a stack of two layers' 537 MB; and as many more rows."""
    stack = jax.ShapeDtypeStruct((2, 256, 512, 2048), "float8_e4m3fn" if fp8 else "bfloat16")
    scales = jax.ShapeDtypeStruct((2, 256, 4, 16), "float32")
    rows = [jax.ShapeDtypeStruct((8 * block, 2048), "bfloat16"), jax.ShapeDtypeStruct((256,), "int32")]

    def product(x, sizes, layer, stack, scales):
        weight = as_weight(FP8Weight(stack, scales) if fp8 else stack)
        return LayerWeight(weight, layer).product(x, sizes, block, 1)

    args = [*rows, jax.ShapeDtypeStruct((), "int32"), stack, scales]
    assert compiled(product, args, devices[0]).memory_analysis().temp_size_in_bytes < 1e6


@pytest.mark.parametrize("fp8", [False, nightly(True)])
def test_the_counted_work_of_a_step_is_that_on_tpu(devices, fp8):
    """The kernels have other names, operands and costs of their own; the matrix products are the same."""
    config = run_config(MeshConfig(fsdp=2, expert=4, dispatcher="ragged_all_to_all"), fp8)
    on_gpu, on_tpu = (trace_step(config, ds).count.total() for ds in (devices, topology_devices("v5p:2x2x2", 1)))
    assert on_gpu.flops["bfloat16"] == pytest.approx(on_tpu.flops["bfloat16"])
    assert on_gpu.flops.get("float8_e4m3fn", 0) == pytest.approx(on_tpu.flops.get("float8_e4m3fn", 0))
    assert ("float8_e4m3fn" in on_gpu.flops) == fp8
    assert on_gpu.hbm_bytes == pytest.approx(on_tpu.hbm_bytes, rel=0.2)


@pytest.mark.parametrize("name", ["a100:8", nightly("h200:8"), nightly("b200:8")])
def test_the_kernels_compile_for_other_gpus(name):
    if reason := gpu.missing():
        pytest.skip(reason)
    program = compiled(attention_and_experts, arguments("bfloat16"), topology_devices(name, 1)[0])
    assert kernels(program.as_text()) == KERNELS


def test_a_plan_has_the_links_that_the_gpus_have(devices):
    """Inside a host all go through one switch; between hosts there is the network."""
    inside = make_mesh(MeshConfig(fsdp=2, expert=4), devices)
    assert [(w.name, w.ring, w.bytes_per_second) for w in wires_of(inside, ("expert",))] == [("nvlink", 4, 450e9)]
    between = make_mesh(MeshConfig(fsdp=4, expert=8), topology_devices("h100:8x4", 1))
    assert [w.name for w in wires_of(between, ("expert",))] == ["nvlink"]
    assert [(w.name, w.bytes_per_second) for w in wires_of(between, ("fsdp",))] == [("dcn", 50e9)]
    sent = Work(sent=[Sent("ragged-all-to-all", ("expert",), 450e9)])
    assert bound(sent, between).interconnect == pytest.approx(1.0)  # no byte passes a third GPU


@pytest.mark.nightly
def test_a_plan_of_two_layers_on_a_host_is_printed(devices):
    told = render(make_plan(run_config(MeshConfig(fsdp=2, expert=4)), "h100:8"))
    assert "h100:8: 8 devices" in told and "fits, with" in told and "usable HBM" in told and "nvlink" not in told
