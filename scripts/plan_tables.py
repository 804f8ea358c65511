"""Writes the plans of docs/plans: python -m scripts.plan_tables [NAME...]; minutes for each on two cores.

Each is what its command prints, with the command above it; then it prints the tables for docs/plans.md. The table of
what is moved to and from storage needs no plans: python -m scripts.plan_tables traffic; a minute for all.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ling_jax.cli import parse_train
from ling_jax.plan.report import mesh_text
from ling_jax.plan.traffic import Traffic, planned_devices, traffic_of
from ling_jax.train.state import make_trainer

PLANS = Path(__file__).parents[1] / "docs" / "plans"
LONG = "--data.sequence-length 32768 --model.max-position-embeddings 32768"
BASE = "--train.dtype bfloat16 --data.sequence-length 4096"
# Name: configuration and flags; one row of 4,096 tokens for each device, in one microbatch.
RUNS = {
    "mini-v5p-4x4x4": "ling_mini_2_0 --topology v5p:4x4x4 --mesh.fsdp 8 --mesh.expert 8 --data.global-batch-size 64",
    "mini-v6e-16x16": "ling_mini_2_0 --topology v6e:16x16 --mesh.fsdp 32 --mesh.expert 8 --data.global-batch-size 256",
    "mini-tpu7x-4x4x4": "ling_mini_2_0 --topology tpu7x:4x4x4 --mesh.fsdp 16 --mesh.expert 8 "
    "--data.global-batch-size 128",
    "mini-v5p-4x4x4-two-slices": "ling_mini_2_0 --topology v5p:4x4x4 --slices 2 --mesh.data 2 --mesh.fsdp 8 "
    "--mesh.expert 8 --data.global-batch-size 128",
    "flash-v5p-8x8x4": "ling_flash_2_0 --topology v5p:8x8x4 --mesh.fsdp 16 --mesh.expert 16 "
    "--data.global-batch-size 256",
    "1t-v5p-8x8x16": "ling_1t_base --topology v5p:8x8x16 --mesh.fsdp 64 --mesh.expert 16 --data.global-batch-size 1024",
    "1t-v5p-8x8x16-32768-tokens": "ling_1t_base --topology v5p:8x8x16 --mesh.fsdp 8 --mesh.expert 16 "
    "--mesh.context 8 --data.global-batch-size 128",
}
# Rows of 32,768 tokens, and of 131,072 by YaRN: as many tokens a step as those of 4,096 have on the same devices.
LONG_ROWS = {
    "mini-v5p-4x4x4-32768-tokens": "ling_mini_2_0 --topology v5p:4x4x4 --mesh.expert 8 --mesh.context 8 "
    f"--data.global-batch-size 8 --train.dtype bfloat16 {LONG}",
    "mini-v5p-4x4x4-131072-tokens": "ling_mini_2_0 --topology v5p:4x4x4 --mesh.expert 2 --mesh.context 32 "
    "--data.global-batch-size 2 --train.dtype bfloat16 --data.sequence-length 131072 "
    "--model.max-position-embeddings 32768 --model.rope-scaling.factor 4 "
    "--model.rope-scaling.original-max-position-embeddings 32768",
}
# In bfloat16 and in FP8.
FP8 = {
    "mini-tpu7x-4x4x4": "ling_mini_base_2_0 --topology tpu7x:4x4x4 --mesh.fsdp 16 --mesh.expert 8 "
    "--data.global-batch-size 128",
    "mini-h100-8": "ling_mini_base_2_0 --topology h100:8 --mesh.expert 8 --data.global-batch-size 8",
    "1t-tpu7x-8x8x8": "ling_1t_base --topology tpu7x:8x8x8 --mesh.fsdp 64 --mesh.expert 16 "
    "--data.global-batch-size 1024",
}
# In bfloat16. Experts inside hosts of eight GPUs, whose links are nine times as fast as the network between them.
GPUS = {
    "flash-h100-8x8": "ling_flash_2_0 --topology h100:8x8 --mesh.fsdp 8 --mesh.expert 8 --data.global-batch-size 64",
}
# At 131,072 tokens, the hybrid and the model that it was made of; and the smaller hybrid on a host of GPUs.
HYBRIDS = {
    f"{name}-v5p-8x8x4-131072-tokens": f"{config} --topology v5p:8x8x4 --mesh.expert 16 --mesh.context 16 "
    "--data.global-batch-size 16 --train.dtype bfloat16 --data.sequence-length 131072"
    for name, config in {
        "flash-linear": "ring_flash_linear_2_0",
        "flash": "ring_flash_2_0 --model.max-position-embeddings 131072",
    }.items()
} | {
    "mini-linear-h100-8-bf16": "ring_mini_linear_2_0 --topology h100:8 --mesh.expert 8 --data.global-batch-size 8 "
    f"{BASE} --optimizer.mu-dtype bfloat16"
}
# The same for serving: one request and 32, weights in bfloat16 and in FP8 blocks; the mesh differs by the batch.
SERVING = {
    "mini-v5e-2x4": ("ling_mini_2_0", "v5e:2x4", {1: "--mesh.tensor 4 --mesh.expert 2", 32: "--mesh.expert 8"}),
    "mini-v6e-2x2": ("ling_mini_2_0", "v6e:2x2", {1: "--mesh.tensor 4", 32: "--mesh.expert 4"}),
    "1t-v5p-4x4x2": ("ling_1t", "v5p:4x4x2", {32: "--mesh.tensor 4 --mesh.expert 8"}),
    "ring-1t-h200-8x2": ("ring_1t", "h200:8x2", {32: "--mesh.tensor 2 --mesh.expert 8"}),
}
# Fine-tuning, with `post.py`; moments in bfloat16 where GPUs have no room for float32's.
TUNED = {
    "sft-ring-1t-v5p-8x8x16": "sft ring_1t_sft --topology v5p:8x8x16",
    "sft-mini-h100-8": "sft ling_mini_sft --topology h100:8",
}
WORST = {"mini": 8, "flash": 16, "1t": 16}  # the buffer factor from which no row is ever beyond it: mesh.expert


def commands() -> dict[str, str]:
    """Every plan twice: with buffers of twice the mean, and of the worst case."""
    found = {}
    for name, flags in RUNS.items():
        tokens = LONG if name.endswith("tokens") else "--data.sequence-length 4096"
        for suffix, factor in (("", 2), ("-worst-case", WORST[name.split("-")[0]])):
            found[name + suffix] = f"{flags} --train.dtype bfloat16 {tokens} --mesh.buffer-factor {factor}"
    for name in ("mini-v5p-4x4x4", "1t-v5p-8x8x16"):
        flags = RUNS[name].replace("ling_1t_base", "ling_1t")
        found[f"{name}-bf16-moment"] = f"{flags} {BASE} --optimizer.mu-dtype bfloat16"
    for name, flags in FP8.items():
        moments = "--optimizer.mu-dtype bfloat16"
        found[f"{name}-bf16"] = f"{flags} {BASE} {moments}"
        found[f"{name}-fp8"] = f"{flags} {BASE} {moments} --train.fp8"
    return found | {f"{name}-bf16": f"{flags} {BASE}" for name, flags in GPUS.items()} | LONG_ROWS | HYBRIDS


def serving_commands() -> dict[str, str]:
    found = {}
    for name, (model, topology, meshes) in SERVING.items():
        for batch, mesh in meshes.items():
            for suffix, more in (("bf16", ""), ("fp8", " --fp8")):
                flags = (
                    f"--config {model} --topology {topology} {mesh} --batch-size {batch} --context-length 4096{more}"
                )
                found[f"serve-{name}-batch-{batch}-{suffix}"] = flags
    return found


def serving_summary() -> str:
    """A row for each serving plan that has been made; figures are per device, but for tokens/s."""
    head = "| plan | mesh | weights and cache read in a step | arguments | temporaries | HBM | collectives a layer "
    rows = [head + "| prefill at most tokens/s | decode at most tokens/s |", "|---" * 9 + "|"]
    for name in serving_commands():
        if not (file := PLANS / f"{name}.txt").exists():
            continue
        plan = json.loads(file.read_text().splitlines()[-1])
        size = {key: f"{value / 1e9:.2f} GB" for key, value in plan["decode"]["bytes_per_device"].items()}
        mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
        too_much = "" if plan["fits"] else " **too much**"
        read = f"{plan['weight_bytes_read_per_device'] / 1e9:.2f} + {plan['cache_bytes_per_device'] / 1e9:.2f} GB"
        rows.append(
            f"| [{name}](plans/{name}.txt) | {mesh} | {read} | {size['arguments']}{too_much} "
            f"| {size['temporaries']} | {size['hbm']} | {1e6 * plan['decode']['collective_seconds_per_layer']:.2f} us "
            f"| {plan['prefill']['tokens_per_second']:,.0f} | {plan['decode']['tokens_per_second']:,.0f} |"
        )
    return "\n".join(rows)


def summary(made: Mapping[str, str]) -> str:
    """A row for each of some plans that has been made."""
    head = "| plan | parameters | devices | arguments | temporaries | HBM | at least | at most MFU | at most tokens/s |"
    rows = [head, "|---" * 9 + "|"]
    for name in made:
        if not (file := PLANS / f"{name}.txt").exists():
            continue
        plan = json.loads(file.read_text().splitlines()[-1])
        size = {key: f"{value / 1e9:.2f} GB" for key, value in plan["bytes_per_device"].items() if value is not None}
        rows.append(
            f"| [{name}](plans/{name}.txt) | {plan['params_total'] / 1e9:,.1f} G | {plan['devices']} "
            f"| {size['arguments']} | {size.get('temporaries', '?')}{'' if plan['fits'] else ' **too much**'} "
            f"| {size['hbm']} | {plan['roofline_seconds']['step']:.3f} s | {plan['mfu_at_roofline']:.0%} "
            f"| {plan['tokens_per_second_per_device']:,.0f} |"
        )
    return "\n".join(rows)


def long_summary() -> str:
    """A row for each plan of long rows, below the one of 4,096 tokens on the same devices."""
    head = "| plan | mesh | rows of a step | temporaries | compute | HBM | links | at least | at most tokens/s |"
    rows = [head, "|---" * 9 + "|"]
    for short in ("mini-v5p-4x4x4", "1t-v5p-8x8x16"):
        for name in (short, f"{short}-32768-tokens", f"{short}-131072-tokens"):
            if not (file := PLANS / f"{name}.txt").exists():
                continue
            _, parsed = parse_train(shlex.split(commands()[name]))
            plan, data = json.loads(file.read_text().splitlines()[-1]), parsed.config.data
            bounds = [f"{plan['roofline_seconds'][part]:.3f} s" for part in ("compute", "hbm", "interconnect", "step")]
            cells = [
                f"[{name}](plans/{name}.txt)",
                mesh_text(parsed.config.mesh),
                f"{data.global_batch_size:,} x {data.sequence_length:,}",
                f"{plan['bytes_per_device']['temporaries'] / 1e9:.2f} GB",
                *bounds,
                f"{plan['tokens_per_second_per_device']:,.0f}",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def traffic_of_command(command: str) -> dict[str, Traffic]:
    """The storage part of a plan with these flags; nothing is compiled."""
    _, parsed = parse_train(shlex.split(command))
    assert parsed.topology is not None
    return traffic_of(make_trainer(parsed.config, planned_devices(parsed.topology, parsed.slices)))


def traffic_summary() -> str:
    """A row for each plan whose storage differs from the others'."""
    head = "| plan | hosts | checkpoint | objects | largest | a host writes | to resume, a host reads "
    rows = [head + "| to start from a converted checkpoint | to-jax | to-hf |", "|---" * 10 + "|"]
    made = commands()
    for name in [*RUNS, *(f"{name}-fp8" for name in FP8)]:
        found = list(traffic_of_command(made[name]).values())
        times = [f"{one.of_host / 1e9:,.1f} GB, {max(one.seconds.values()):,.0f} s" for one in found]
        save = found[0]
        cells = [
            name,
            str(save.hosts),
            f"{save.written / 1e9:,.0f} GB",
            f"{save.objects:,}",
            f"{save.largest / 1e6:,.0f} MB",
        ]
        rows.append(f"| {' | '.join(cells + times)} |")
    return "\n".join(rows)


def main(names: list[str]) -> None:
    if names == ["traffic"]:
        print(traffic_summary())
        return
    PLANS.mkdir(exist_ok=True)
    for program, made in (("train.py", commands()), ("post.py", TUNED), ("sample.py", serving_commands())):
        for name, command in made.items():
            if names and name not in names:
                continue
            words = shlex.split(command)
            done = subprocess.run([sys.executable, program, *words], capture_output=True, text=True)
            if done.returncode not in (0, 3):
                raise SystemExit(f"{name}: {done.stderr}")
            (PLANS / f"{name}.txt").write_text(f"python {program} {command}\n\n{done.stdout}")
            print(name, done.stdout.splitlines()[-1], flush=True)
    print(
        f"{summary(commands())}\n\n{summary(TUNED)}\n\n{long_summary()}\n\n{traffic_summary()}\n\n{serving_summary()}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
