"""Plans: work counted from the traced step equals what is counted by hand, and no bound beats the hardware.

Legend: N tokens of a device, D hidden, V vocabulary, T tokens of a row.
"""

import dataclasses
import json
import math
import re
import shlex
import subprocess
import sys
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from ling_jax.cli import parse_train
from ling_jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig, count_params
from ling_jax.parallel.mesh import make_mesh
from ling_jax.plan import suggest
from ling_jax.plan.count import Count, Key, Work, key_of
from ling_jax.plan.hardware import chip_of, peak_flops, wires_of
from ling_jax.plan.memory import Memory, largest_buffers, memory_of_error
from ling_jax.plan.plan import Plan, compile_plan, topology_devices, trace_step
from ling_jax.plan.report import render
from ling_jax.plan.roofline import bound
from scripts.plan_tables import PLANS, commands
from tests.support.helpers import tiny
from tests.support.marks import nightly
from tests.tiny_run import REPO

LENGTH = 512
MODEL = tiny(
    vocab_size=9216, hidden_size=1024, intermediate_size=512, head_dim=128, moe_intermediate_size=128,
    num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, max_position_embeddings=4096,
    num_nextn_predict_layers=0, num_experts=16, n_group=4, topk_group=2,
)  # fmt: skip


def run_config(model: ModelConfig = MODEL, mesh: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    """One row for each device; `changes` are of TrainConfig and DataConfig."""
    mesh_config = MeshConfig(**(mesh or {"fsdp": 8}))
    data = {"sequence_length": LENGTH, "global_batch_size": mesh_config.batch_shards}
    data |= {name: changes.pop(name) for name in list(changes) if name in data}
    train = TrainConfig(**{"dtype": "bfloat16", "remat": "full", **changes})
    return RunConfig(model=model, mesh=mesh_config, data=DataConfig(**data), train=train)


@cache
def devices(name: str = "v5p:2x2x2", slices: int = 1):
    return topology_devices(name, slices)


@cache
def count(config: RunConfig, topology: str = "v5p:2x2x2", slices: int = 1) -> tuple[Count, Any]:
    step = trace_step(config, devices(topology, slices))
    return step.count, step.trainer.compute.mesh


def flops_by_hand(config: RunConfig) -> float:
    """FLOPs of one device; each product as often as it is made in a step: forward, twice backward, and again where the
    backward pass makes it once more."""
    c, full = config.model, config.train.remat == "full"
    tokens = config.data.global_batch_size * config.data.sequence_length
    heads, groups, hidden = c.num_attention_heads, c.num_key_value_heads, c.hidden_size
    scores = heads * c.head_dim * config.data.sequence_length / 2  # multiplications of one of the products with scores
    attention = hidden * (2 * heads + 2 * groups) * c.head_dim * (3 + full) + scores * (2 * (1 + full) + 7)
    shared = 3 * hidden * c.shared_intermediate_size

    def layers(number: int, whole: bool) -> float:
        """MoE layers; `whole` if their output is made again too, not only what their gradients need."""
        again = full and whole
        experts = 3 * hidden * c.moe_intermediate_size * c.num_experts_per_tok * (3 + 2 / 3 + again)
        down = 1 if again else 2 / 3
        router = hidden * c.num_experts * (3 + full)
        return number * (attention + experts + shared * (3 + full * down) + router)

    dense = attention + 3 * hidden * c.intermediate_size * (3 + full * 2 / 3)
    total = c.first_k_dense_replace * dense + layers(c.num_hidden_layers - c.first_k_dense_replace, False)
    mtp = c.num_nextn_predict_layers
    total += mtp * (layers(1, True) + 2 * hidden * hidden * (3 + full))
    head = c.vocab_size * hidden * 4 * (1 + mtp)  # logits are never kept
    return 2 * tokens * (total + head) / (config.mesh.batch_shards * config.mesh.context)


SHAPES = {
    "tiny": {},
    "no dense layer": {"first_k_dense_replace": 0},
    "MTP": {"num_nextn_predict_layers": 1},
    "deep": {"num_hidden_layers": 12},
    "wide": {"hidden_size": 2048, "moe_intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4},
}


@pytest.mark.parametrize("remat", ["full", "none"])
@pytest.mark.parametrize("shape", ["MTP", *(nightly(shape) for shape in SHAPES if shape != "MTP")])
def test_flops_are_those_counted_by_hand(shape, remat):
    config = run_config(dataclasses.replace(MODEL, **SHAPES[shape]), {"expert": 8}, remat=remat)
    got = count(config)[0].total().total_flops
    assert got == pytest.approx(flops_by_hand(config), rel=0.01)


def weights_sent(counted: Count) -> float:
    """Bytes of the all-gathers of weights that FP8 makes products with."""

    def of_layers(key: Key) -> bool:
        return "gather_weights" in key.scope and "loss" not in key.scope and "router" not in key.scope

    return sum(sent.bytes for sent in counted.total(of_layers).sent if sent.kind == "all-gather")


@pytest.mark.nightly
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 2, "expert": 4}], ids=str)
def test_in_fp8_the_same_products_read_and_send_half_the_bytes(mesh):
    model = dataclasses.replace(MODEL, num_nextn_predict_layers=1)
    wide, narrow = (count(run_config(model, mesh, fp8=fp8), "tpu7x:2x2x1")[0] for fp8 in (False, True))
    assert narrow.total().total_flops == pytest.approx(wide.total().total_flops, rel=1e-6)
    head = narrow.total(lambda key: "loss" in key.scope or "router" in key.scope or key.scope == "mtp")
    scores = narrow.total(lambda key: "attention" in key.scope).flops["bfloat16"]  # eh_proj, head and scores stay
    in_fp8 = narrow.total().flops["float8_e4m3fn"]
    assert in_fp8 + scores + head.total_flops == pytest.approx(narrow.total().total_flops, rel=1e-4)
    assert weights_sent(narrow) < 0.6 * weights_sent(wide)  # eh_proj stays
    quantised = narrow.total(lambda key: "quantise_weights" in key.scope)
    assert sum(sent.bytes for sent in quantised.sent) < 0.05 * weights_sent(narrow)  # the greatest magnitudes


def test_eight_bit_moments_are_counted_on_one_device():
    config = run_config(mesh={"fsdp": 8})
    coded = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, eight_bit=True))
    read = [count(c)[0].total(lambda key: "optimizer" in key.scope).hbm_bytes for c in (config, coded)]
    assert read[1] < 2 * read[0]


def test_long_rows_cut_over_context_make_the_same_products():
    whole = count(run_config(mesh={"expert": 8}, sequence_length=4096))[0].total().total_flops
    cut = count(run_config(mesh={"expert": 2, "context": 4}, sequence_length=4096))[0].total().total_flops
    assert cut == pytest.approx(whole / 4, rel=0.01)


def test_the_length_of_a_scan_is_read_not_assumed():
    """Four and twenty MoE layers."""

    def moe_work(layers: int) -> Work:
        step, _ = count(run_config(dataclasses.replace(MODEL, num_hidden_layers=layers + 1), {"fsdp": 2, "expert": 4}))
        return step.total(lambda key: key.scope in ("experts", "router", "shared_expert", "dispatch"))

    few, many = moe_work(4), moe_work(20)
    assert many.total_flops == pytest.approx(5 * few.total_flops)
    assert many.hbm_bytes == pytest.approx(5 * few.hbm_bytes)
    assert sum(sent.bytes for sent in many.sent) == pytest.approx(5 * sum(sent.bytes for sent in few.sent))


def test_microbatches_are_a_loop_too():
    one = count(run_config(mesh={"expert": 8}))[0].total()
    two = count(run_config(mesh={"expert": 8}, global_batch_size=16, microbatches=2))[0].total()
    assert two.total_flops == pytest.approx(2 * one.total_flops, rel=1e-6)


def test_what_a_remat_policy_keeps_is_not_made_again():
    def recomputed(remat: str) -> Work:
        step, _ = count(run_config(mesh={"expert": 8}, remat=remat))
        return step.total(lambda key: key.phase == "recompute")

    full = recomputed("full")
    layers, tokens, c = MODEL.num_hidden_layers, LENGTH, MODEL
    scores = 2 * 2 * tokens * c.num_attention_heads * c.head_dim * tokens / 2
    without = recomputed("save_attention").total_flops
    assert full.total_flops - without == pytest.approx(layers * scores, rel=0.01)
    assert any(sent.kind == "ragged-all-to-all" for sent in full.sent)
    assert not any(sent.kind == "ragged-all-to-all" for sent in recomputed("save_dispatch").sent)
    assert recomputed("offload").total_flops == full.total_flops
    assert recomputed("none").total_flops == 0


def sent_by_kind(step: Count) -> dict[str, float]:
    """Without what is smaller than any matrix: counts, sums, vectors' gradients."""
    found: dict[str, float] = {}
    for sent in step.total().sent:
        found[sent.kind] = found.get(sent.kind, 0.0) + sent.bytes
    return found


def matrices(c: ModelConfig) -> dict[str, float]:
    """Elements of the matrices of all layers together."""
    moe = c.num_hidden_layers - c.first_k_dense_replace
    attention = c.hidden_size * (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    return {
        "experts": moe * c.num_experts * 3 * c.hidden_size * c.moe_intermediate_size,
        "router": moe * c.num_experts * c.hidden_size,
        "others": c.num_hidden_layers * attention
        + moe * 3 * c.hidden_size * c.shared_intermediate_size
        + c.first_k_dense_replace * 3 * c.hidden_size * c.intermediate_size,
        "head": c.vocab_size * c.hidden_size,
    }


def test_fsdp_sends_weights_twice_and_gradients_once():
    """Each device gets 7/8 of every matrix in bfloat16 (the router in float32) for both passes, and sends 7/8 of its
    gradients in float32. Only the embeddings that are looked up travel."""
    sent, m = sent_by_kind(count(run_config(mesh={"fsdp": 8}))[0]), matrices(MODEL)
    gathered = 2 * (2 * (m["experts"] + m["others"] + m["head"]) + 4 * m["router"])
    assert sent["all-gather"] == pytest.approx(7 / 8 * gathered, rel=0.02)
    scattered = 4 * (m["experts"] + m["others"] + m["head"] + m["router"])
    assert sent["reduce-scatter"] == pytest.approx(7 / 8 * scattered, rel=0.02)
    assert sent["all-to-all"] == pytest.approx(2 * 7 / 8 * LENGTH * MODEL.hidden_size * 2, rel=0.02)
    assert "ragged-all-to-all" not in sent


def test_expert_parallelism_sends_rows_five_times():
    """There and back; in the backward pass there again, their cotangents, and back. Experts' weights stay."""
    sent, m = sent_by_kind(count(run_config(mesh={"expert": 8}))[0]), matrices(MODEL)
    layers = MODEL.num_hidden_layers - MODEL.first_k_dense_replace
    pairs = layers * LENGTH * MODEL.num_experts_per_tok
    assert sent["ragged-all-to-all"] == pytest.approx(7 / 8 * pairs * (5 * MODEL.hidden_size * 2 + 3 * 4), rel=0.001)
    gathered = 2 * (2 * (m["others"] + m["head"]) + 4 * m["router"])
    assert sent["all-gather"] == pytest.approx(7 / 8 * gathered, rel=0.02)
    assert sent["reduce-scatter"] == pytest.approx(7 / 8 * 4 * (m["others"] + m["head"] + m["router"]), rel=0.02)


def test_a_ring_passes_keys_and_values_on():
    """Three hops of four ranks forward and again when recomputed, three backward with float32 gradients beside them,
    and a last one of those; the rows' segments go along."""
    config = run_config(mesh={"expert": 2, "context": 4}, sequence_length=4096)
    tokens, c = 4096 // 4, MODEL
    pair = 2 * tokens * c.num_key_value_heads * c.head_dim
    hops = 3 * 3 * (2 * pair + 4 * tokens) + (3 + 1) * 4 * pair
    assert sent_by_kind(count(config)[0])["collective-permute"] == pytest.approx(c.num_hidden_layers * hops, rel=0.02)


def test_only_data_uses_the_network_between_slices():
    step, mesh = count(run_config(mesh={"data": 2, "fsdp": 8}), slices=2)
    over = {sent.axes for sent in step.total().sent if any(w.name == "dcn" for w in wires_of(mesh, sent.axes))}
    assert over and all("data" in axes for axes in over)
    gradients = sum(sent.bytes for sent in step.total().sent if sent.axes == ("data",))
    m = matrices(MODEL)
    assert gradients == pytest.approx(4 * (sum(m.values()) + m["head"]) / 8, rel=0.02)


@pytest.mark.parametrize("topology", ["v5p:2x2x2", nightly("v6e:2x4"), nightly("tpu7x:2x2x1")])
def test_no_scope_beats_the_hardware(topology):
    step, mesh = count(run_config(mesh={"fsdp": 2, "expert": 4}), topology)
    device = mesh.devices.flat[0]
    for key, work in [*step.work.items(), (key_of(""), step.total())]:
        seconds = bound(work, mesh).seconds
        assert work.total_flops <= peak_flops(device, "bfloat16") * seconds * (1 + 1e-9), key
        assert work.hbm_bytes <= chip_of(device).hbm_bytes_per_second * seconds * (1 + 1e-9), key
        links = 6 * chip_of(device).link_bytes_per_second
        assert sum(sent.bytes for sent in work.sent) <= links * seconds * (1 + 1e-9), key


def test_an_axis_has_the_links_of_the_dims_it_lies_along():
    mesh = make_mesh(MeshConfig(fsdp=16, expert=4), devices("v5p:4x4x4"))
    fsdp, expert = wires_of(mesh, ("fsdp",)), wires_of(mesh, ("expert",))
    assert sorted([len(fsdp), len(expert)]) == [1, 2] and {wire.ring for wire in fsdp + expert} == {4}
    assert {wire.name for wire in fsdp}.isdisjoint(wire.name for wire in expert)
    assert all(wire.is_ring for wire in fsdp + expert)


def test_scopes_and_phases_are_read_from_name_stacks():
    assert key_of("//shard_map/jvp(attention)/gather_weights/") == ("attention/gather_weights", "forward")
    assert key_of("/transpose(jvp())/checkpoint/rematted_computation/router") == ("router", "recompute")
    assert key_of("/transpose(jvp(mtp))/experts") == ("mtp/experts", "backward")
    assert key_of("/optimizer/mul") == ("optimizer", "update")


OOM = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (184.00G) exceeds available HBM (95.73G). HLO module: jit_step."
)


def test_a_program_that_does_not_fit_says_by_how_much():
    memory = memory_of_error(OOM, 3.0 * 2**30, 95.73 * 2**30)
    assert not memory.fits and memory.temporaries == 184 * 2**30 and memory.peak == 187 * 2**30


def test_what_an_unknown_out_of_memory_error_needs_is_not_invented():
    assert math.isinf(memory_of_error("RESOURCE_EXHAUSTED: HbmOom: something new", 1.0, 2.0).peak)


def test_only_running_out_of_hbm_is_a_plan_that_does_not_fit():
    """By the compiler's own words for a program that needs more, and for a kernel that runs out of VMEM."""

    class Lowered:
        words = OOM

        def lower(self):
            raise jax.errors.JaxRuntimeError(self.words)

    config = run_config(mesh={"fsdp": 4})
    step = trace_step(config, topology_devices("v5p:2x2x1", 1))
    lowered: Any = Lowered()
    plan = compile_plan(config, "v5p:2x2x1", 1, step._replace(traced=lowered))
    assert not plan.memory.fits and plan.memory.temporaries == 184 * 2**30
    assert "DOES NOT FIT by" in render(plan)
    lowered.words = "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: Ran out of memory in memory space vmem"
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compile_plan(config, "v5p:2x2x1", 1, step._replace(traced=lowered))


def test_a_program_that_cannot_be_printed_is_planned_without_its_buffers():
    """By the words of a version of JAX that cannot."""

    class Compiled:
        def lower(self):
            return self

        def compile(self):
            return self

        def memory_analysis(self):
            sizes = dict(argument_size_in_bytes=5, temp_size_in_bytes=7, output_size_in_bytes=3, alias_size_in_bytes=3)
            return SimpleNamespace(**sizes)

        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure (hlo_instruction.cc:1) async-update")

    config = run_config(mesh={"fsdp": 4})
    step = trace_step(config, topology_devices("v5p:2x2x1", 1))
    program: Any = Compiled()
    plan = compile_plan(config, "v5p:2x2x1", 1, step._replace(traced=program))
    assert plan.memory.fits and plan.memory.peak == 12 and plan.buffers == []
    assert "largest buffers: not known, since this version of JAX cannot print the program" in render(plan)


def test_the_largest_buffers_are_those_outside_fusions_and_in_hbm():
    text = """
%fused_computation (p: f32[8,8]) -> f32[999,999] {
  ROOT %big = f32[999,999]{1,0} broadcast(%p)
}
ENTRY %main (a: f32[8,8]) -> f32[64,64] {
  %a = f32[8,8]{1,0} parameter(0)
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%a), calls=%fused_computation, metadata={op_name="jvp(experts)/mul"}
  %v = f32[512,512]{1,0:T(8,128)S(1)} copy(%a)
  ROOT %y = f32[64,64]{1,0} custom-call(%x), metadata={op_name="transpose(jvp(attention))/kernel"}
}
"""
    found = [(b.bytes, b.shape, b.scope, b.count) for b in largest_buffers(text)]
    assert found == [
        (16384, "f32[64,64]", "attention (backward)", 1),
        (16384, "bf16[64,128]", "experts (forward)", 1),
    ]


FLAGS = {
    "model.num-hidden-layers": 1, "model.first-k-dense-replace": 0, "model.num-nextn-predict-layers": 0,
    "model.vocab-size": 8192, "model.eos-token-id": 1, "model.pad-token-id": 1, "data.sequence-length": 512,
    "data.global-batch-size": 8, "train.dtype": "bfloat16", "mesh.fsdp": 2, "mesh.expert": 4, "mesh.buffer-factor": 4,
}  # fmt: skip


@pytest.mark.nightly
def test_ling_mini_with_one_layer_is_planned_by_the_command():
    """At Ling-mini's widths; the whole depth is what docs/plans.md shows."""
    flags = [text for name, value in FLAGS.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "train.py", "ling_mini_2_0", "--topology", "v5p:2x2x2", *flags]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    plan = json.loads(lines[-1])
    assert plan["topology"] == "v5p:2x2x2" and plan["devices"] == plan["chips"] == 8 and plan["fits"]
    size = plan["bytes_per_device"]
    assert size["arguments"] == pytest.approx(12 * plan["params_total"] / 8, rel=0.05)
    assert size["temporaries"] > 0 and size["peak"] <= size["hbm"]
    assert plan["roofline_seconds"]["step"] >= plan["roofline_seconds"]["compute"] > 0
    assert 0 < plan["mfu_at_roofline"] < 1 and plan["collective_bytes_per_device"]["ragged-all-to-all"] > 0
    told = "\n".join(lines[:-1])
    for words in ("fits, with", "largest buffers", "attention", "experts", "recompute", "bounds, not forecasts"):
        assert words in told


@pytest.mark.nightly
def test_the_best_bound_that_fits_is_suggested(monkeypatch):
    """Among the meshes of 4 chips and two microbatchings. The compiler, which other tests run, is replaced by one that
    needs a gigabyte of temporaries."""
    traced = {}

    def compiled(config, topology, slices, step):
        hbm = suggest.chip_of(step.trainer.compute.mesh.devices.flat[0]).hbm_bytes
        memory = Memory(step.given, 1e9, step.given + 1e9, hbm, "")
        return Plan(
            config, topology, slices, step.trainer.compute.mesh, count_params(MODEL), step.count, memory, [], {}, 0.0
        )

    def trace_once(config, devices, original=suggest.trace_step):
        if config not in traced:
            traced[config] = original(config, devices)
        return traced[config]

    monkeypatch.setattr(suggest, "trace_step", trace_once)
    monkeypatch.setattr(suggest, "compile_plan", compiled)
    monkeypatch.setattr(suggest, "POLICIES", ("full",))
    monkeypatch.setattr(suggest, "BUFFERS", (2.0,))
    model = dataclasses.replace(MODEL, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    config = run_config(model, mesh={"fsdp": 4}, global_batch_size=8)
    found = suggest.suggest(config, "v5p:2x2x1", 1)
    meshes = {(c.config.mesh.fsdp, c.config.mesh.expert) for c in found.candidates}
    assert meshes == {(4, 1), (2, 2), (1, 4)}
    assert {c.config.train.microbatches for c in found.candidates} == {1, 2}
    seconds = [c.seconds for c in found.candidates]
    assert seconds == sorted(seconds) and found.best is not None
    assert found.best.config == found.candidates[0].config
    assert found.candidates[0].floor < found.best.memory.peak < found.best.memory.hbm
    text = suggest.render("NAME", found)
    assert text.splitlines()[-1].startswith("python train.py NAME --mesh.data 1 --mesh.fsdp")
    small = chip_of(devices()[0]).__class__(**{**vars(chip_of(devices()[0])), "hbm_bytes": 1.0})
    monkeypatch.setattr(suggest, "chip_of", lambda device: small)
    none = suggest.suggest(config, "v5p:2x2x1", 1)
    assert none.best is None and "nothing that was compiled fits" in suggest.render("NAME", none)


def test_an_unknown_topology_is_one_error():
    with pytest.raises(ValueError, match="no TPU topology 'v9:1x1'"):
        topology_devices("v9:1x1", 1)


# The committed plans of long rows.


@pytest.mark.parametrize("short", ["mini-v5p-4x4x4", "1t-v5p-8x8x16"])
def test_long_rows_are_planned_with_as_many_tokens_a_step_and_their_bounds_are_higher(short):
    plans = [name for name in commands() if re.fullmatch(f"{short}(-[0-9]+-tokens)?", name)]
    assert len(plans) == (3 if short.startswith("mini") else 2)
    tokens, bounds = set(), []
    for name in plans:
        told = (PLANS / f"{name}.txt").read_text().splitlines()
        assert told[0] == f"python train.py {commands()[name]}"
        data = parse_train(shlex.split(commands()[name]))[1].config.data
        tokens.add(data.global_batch_size * data.sequence_length)
        plan = json.loads(told[-1])
        assert plan["fits"] and f"{data.global_batch_size} rows of {data.sequence_length} tokens" in "\n".join(told)
        bounds.append((data.sequence_length, plan["roofline_seconds"]["compute"]))
    assert len(tokens) == 1
    assert [compute for _, compute in sorted(bounds)] == sorted(compute for _, compute in bounds)
