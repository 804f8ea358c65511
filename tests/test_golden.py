"""The official PyTorch numbers: every case folder under $LING_GOLDEN_DIR (default tests/golden).

What a case is, is read from its files; a case that compares nothing fails.
"""

import dataclasses
import json
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from ling_jax import generate, load_pretrained
from ling_jax.config import layer_kinds
from ling_jax.convert.mapping import hf_names
from ling_jax.kernels.lightning import base_slopes, lightning, slopes_of
from ling_jax.model.model import CAPTURES, Ling, abstract_model, split_model
from ling_jax.model.rope import frequencies
from ling_jax.train.loss import IGNORE, NextToken, TargetCounts, shift_targets

FOLDER = Path(os.environ.get("LING_GOLDEN_DIR", Path(__file__).parent / "golden"))
TOLERANCE = 1e-4
TIE = 1e-4  # greedy ids may differ where the two best logits are closer than this
INPUTS = {"input_ids", "labels", "attention_mask", "position_ids", "mtp_flat_targets"}
INFORMATION = {"bf16_compute", "rotary_dim_only"}
LOSSES = {"lm_loss", "mtp_loss", "total_loss"}


class Comparison:
    """Counts comparisons and collects what differs."""

    def __init__(self):
        self.count, self.ties, self.problems = 0, 0, []

    def values(self, name, want, got, mask=None):
        want, got = np.asarray(want), np.asarray(got)
        if want.shape != got.shape:
            got = got.reshape(want.shape)
        if mask is not None:
            want, got = want[mask], got[mask]
        error = np.abs(want.astype(np.float64) - got.astype(np.float64)).max()
        limit = TOLERANCE * max(1.0, np.abs(want).max())
        self.note(name, error <= limit, f"max error {error:.3g}, allowed {limit:.3g}")

    def equal(self, name, want, got, mask=None):
        want, got = np.asarray(want), np.asarray(got).reshape(np.shape(want))
        differ = want != got if mask is None else (want != got) & mask[..., None]
        self.note(name, not differ.any(), f"{differ.sum()} of {differ.size} ids differ")

    def note(self, name, ok, text):
        self.count += 1
        if not ok:
            self.problems.append(f"{name}: {text}")

    def finish(self, case):
        print(f"{case}: {self.count} comparisons, {self.ties} greedy ties, {len(self.problems)} failed")
        assert self.count > 0, f"{case} compared nothing"
        assert not self.problems, "\n".join(self.problems[:30])


def kind_of(case: Path) -> str:
    """ling, ling-fp8, ring-linear or lightning, from the files alone; anything else is unknown."""
    if not (case / "config.json").exists():
        names = load_file(case / "expected.safetensors").keys() if (case / "expected.safetensors").exists() else []
        return "lightning" if any(name.startswith("base_slopes.") for name in names) else "unknown"
    config = json.loads((case / "config.json").read_text())
    if config.get("model_type") in ("bailing_moe", "bailing_moe_v2"):
        return "ling-fp8" if "quantization_config" in config else "ling"
    return "ring-linear" if config.get("model_type") == "bailing_moe_linear" else "unknown"


def cases():
    folders = sorted(p for p in FOLDER.iterdir() if p.is_dir())
    assert folders, f"no golden cases under {FOLDER}"
    for folder in folders:
        yield pytest.param(folder, id=folder.name)


def scenarios_of(case: Path) -> dict[str, dict[str, np.ndarray]]:
    """expected.safetensors as {scenario: {rest of the name: tensor}}."""
    grouped: dict[str, dict[str, np.ndarray]] = {}
    for name, value in load_file(case / "expected.safetensors").items():
        scenario, rest = name.split(".", 1)
        grouped.setdefault(scenario, {})[rest] = value
    return grouped


def shift_left(labels):
    return np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], IGNORE)], axis=1)


def flat_mtp_targets(labels):
    """The reference's MTP target: labels rolled per row, then shifted over the flattened batch (spec 2.6)."""
    flat = shift_left(labels).reshape(-1)
    return np.append(flat[1:], IGNORE).reshape(labels.shape)


def batch_of(data: dict) -> dict[str, np.ndarray]:
    """The library's batch for a scenario: the attention mask as segment ids, explicit positions."""
    tokens = data["input_ids"].astype(np.int32)
    segments = data.get("attention_mask", np.ones_like(tokens)).astype(np.int32)
    default = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    positions = data.get("position_ids", default).astype(np.int32)
    batch = {"tokens": tokens, "positions": positions, "segment_ids": segments}
    if "labels" in data:
        batch["targets"] = shift_left(data["labels"]).astype(np.int32)
    return batch


def losses(model: Ling, batch, mtp_targets) -> dict[str, jax.Array]:
    graph, params, bias = split_model(model)
    return _losses(graph, params, bias, batch, mtp_targets)


@partial(jax.jit, static_argnums=0)
def _losses(graph, params, bias, batch, mtp_targets):
    model = nnx.merge(graph, params, bias)
    objective = NextToken(model.config)
    sums, _ = objective.sums(model, batch, mtp_targets)
    counts = TargetCounts(*(jnp.sum(x, dtype=jnp.float32) for x in (batch["targets"] >= 0, mtp_targets >= 0)))
    mtp = sums.mtp_nll / jnp.maximum(counts.mtp_targets, 1)
    total = objective.loss(sums, counts)
    return {"lm_loss": sums.nll / counts.targets, "mtp_loss": mtp, "total_loss": total}


def outputs(model: Ling, batch) -> dict[str, np.ndarray]:
    """Every tensor a scenario may expect, under the case's names."""
    out = model(batch["tokens"], batch["positions"], batch["segment_ids"], capture=CAPTURES)
    named = {"logits": out.logits_BTV, "final_norm": out.captured["final_norm"]}
    if out.mtp_logits_BTV is not None:
        named |= {"mtp_logits.0": out.mtp_logits_BTV, "mtp_hidden.0": out.captured["mtp_hidden"]}
    for name in ("hidden_states", "attn_out"):
        named |= {f"{name}.{i}": value for i, value in enumerate(out.captured[name])}
    linear = [layer for layer, kind in enumerate(layer_kinds(model.config)) if kind.mixer == "linear"]
    for name in ("linear_raw", "linear_state") if linear else ():
        named |= {f"{name}.{layer}": value for layer, value in zip(linear, out.captured[name], strict=True)}
    if out.routing is not None:
        first = model.config.first_k_dense_replace
        for i, ids in enumerate(out.routing.ids):
            named[f"topk_idx.{i + first}"] = ids
            named[f"topk_weight.{i + first}"] = out.routing.weights[i]
            named[f"router_logits.{i + first}"] = out.captured["router_logits"][i]
    return {name: np.asarray(value) for name, value in named.items()}


def by_expert(ids, weights):
    return np.take_along_axis(weights, ids.argsort(-1), -1)


def compare_scenario(compare: Comparison, model: Ling, name: str, data: dict, meta: dict):
    batch = batch_of(data)
    mask = data["attention_mask"].astype(bool) if "attention_mask" in data else None
    got = outputs(model, batch)
    for key, want in data.items():
        if key in INPUTS or key in LOSSES:
            continue
        if key.startswith("topk_idx"):
            compare.equal(f"{name}.{key}", np.sort(want, -1), np.sort(got[key], -1), mask)
        elif key.startswith("topk_weight"):
            ids = key.replace("weight", "idx")
            compare.values(f"{name}.{key}", by_expert(data[ids], want), by_expert(got[ids], got[key]), mask)
        else:
            compare.values(f"{name}.{key}", want, got[key], mask)
    if "lm_loss" in data:
        compare_losses(compare, model, name, data, batch, meta)


def compare_losses(compare: Comparison, model: Ling, name: str, data: dict, batch: dict, meta: dict):
    """Against the reference's flat MTP target; where a padded row makes that meaningless, per row."""
    per_row = np.asarray(shift_targets(jnp.asarray(batch["targets"]), jnp.asarray(batch["segment_ids"])))
    flat = data.get("mtp_flat_targets", flat_mtp_targets(data["labels"])).astype(np.int32)
    padded = "attention_mask" in data
    got = losses(model, batch, per_row if padded else flat)
    compare.values(f"{name}.lm_loss", data["lm_loss"], got["lm_loss"])
    if not padded:
        for key in ("mtp_loss", "total_loss"):
            if key in data:
                compare.values(f"{name}.{key}", data[key], got[key])
    expected = meta.get("losses", {}).get(name, {}).get("mtp_loss_per_row")
    if expected is not None:
        compare.values(f"{name}.mtp_loss_per_row", expected, losses(model, batch, per_row)["mtp_loss"])


def gradients(model: Ling, data: dict) -> dict[str, np.ndarray]:
    """d total_loss / d parameter, under HF's names, with the reference's own MTP target."""
    graph, params, bias = split_model(model)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)  # as the reference's are, whatever the file has
    batch, flat = batch_of(data), flat_mtp_targets(data["labels"]).astype(np.int32)

    grads = jax.grad(lambda p: _losses(graph, p, bias, batch, flat)["total_loss"])(params)
    named = {}
    for path, value in nnx.traversals.flatten_mapping(grads).items():
        names = hf_names(model.config, path)
        parts = np.asarray(value).reshape(-1, *value.shape[names.ndim :])
        named |= dict(zip(names.reshape(-1), parts, strict=True))
    return named


def compare_gradients(compare: Comparison, model: Ling, file: Path):
    data = load_file(file)
    got = gradients(model, data)
    want = {name: value for name, value in data.items() if name not in INPUTS | LOSSES}
    assert want.keys() == got.keys(), f"{file.name}: gradients of {sorted(want.keys() ^ got.keys())[:5]}"
    for name, value in want.items():
        compare.values(f"{file.stem}/{name}", value, got[name])


def compare_ids(compare: Comparison, name: str, want, got, step_logits):
    """Greedy ids, equal up to the first place where the two best logits tie within 1e-4."""
    want = [int(t) for t in want]
    if want != got:
        first = next(i for i, (a, b) in enumerate(zip(want, got, strict=True)) if a != b)
        best = np.sort(step_logits[first])[-2:]
        if best[1] - best[0] < TIE:
            compare.ties += 1
            want, got = want[:first], got[:first]
    compare.note(name, want == got, f"generated {got}, expected {want}")


def compare_generation(compare: Comparison, model: Ling, file: Path):
    data = load_file(file)
    count = len([name for name in data if name.endswith(".prompt")])
    prompts = [data[f"gen.{i}.prompt"][0].tolist() for i in range(count)]
    logits = []
    for i, prompt in enumerate(prompts):
        want = data[f"gen.{i}.new_ids"][0]
        step_logits = data[f"gen.{i}.step_logits"][0]
        logits.append(step_logits)
        compare_ids(compare, f"gen.{i}.new_ids", want, generate(model, [prompt], len(want))[0], step_logits)
        full = model(np.array([[*prompt, *want]], np.int32)).logits_BTV[:, len(prompt) - 1 : -1]
        compare.values(f"gen.{i}.step_logits", data[f"gen.{i}.step_logits"], full)
    if "gen.batch.new_ids" in data:
        mask = data["gen.batch.attention_mask"].astype(bool)
        rows = [ids[keep].tolist() for ids, keep in zip(data["gen.batch.input_ids"], mask, strict=True)]
        want = data["gen.batch.new_ids"]
        got = generate(model, rows, want.shape[1])
        for i, row in enumerate(got):
            compare_ids(compare, f"gen.batch.{i}", want[i], row, logits[i])


def rounded_to_bfloat16(model: Ling) -> Ling:
    """The model with its weights, but not the expert bias, rounded; it computes in float32 as before."""
    graph, params, bias = split_model(model)
    return nnx.merge(graph, jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params), bias)


def with_slopes(model: Ling, convention: str) -> Ling:
    """The model with its weights, whose linear layers' states decay as that code has it."""
    _, params, bias = split_model(model)
    other = abstract_model(dataclasses.replace(model.config, slope_convention=convention), dtype=model.dtype)
    return nnx.merge(split_model(other)[0], params, bias)


def compare_ling(compare: Comparison, case: Path):
    meta = json.loads((case / "meta.json").read_text())
    loaded = load_pretrained(case)
    model = with_slopes(loaded, meta.get("slope_convention", loaded.config.slope_convention))
    scenarios = scenarios_of(case)
    for name, data in scenarios.items():
        if name in INFORMATION:
            continue
        if name.startswith("conv_"):
            inputs = {key: value for key, value in scenarios["fwd"].items() if key in INPUTS}
            compare_scenario(compare, with_slopes(loaded, name.removeprefix("conv_")), name, inputs | data, meta)
            continue
        if name == "bf16_dequant":
            inputs = {key: value for key, value in scenarios["fwd"].items() if key in INPUTS}
            compare_scenario(compare, rounded_to_bfloat16(model), name, inputs | data, meta)
            continue
        if name == "yarn":
            inv_freq, magnitude = frequencies(model.config)
            compare.values("yarn.inv_freq", data["inv_freq"], inv_freq)
            compare.values("yarn.attention_scaling", data["attention_scaling"], magnitude)
        else:
            compare_scenario(compare, model, name, data, meta)
    for file in sorted(case.glob("grads_*.safetensors")):
        compare_gradients(compare, model, file)
    if (case / "generate.safetensors").exists():
        compare_generation(compare, model, case / "generate.safetensors")


def compare_lightning(compare: Comparison, case: Path):
    """The tables of slopes, and attention in chunks: alone, from a state, packed, with its gradients."""
    for scenario, data in scenarios_of(case).items():
        if scenario == "base_slopes":
            for heads, want in data.items():
                compare.values(f"base_slopes.{heads}", want, base_slopes(int(heads)))
        elif scenario == "slopes":
            for name, want in data.items():
                convention, heads, layers = name.split(".")
                sizes = int(heads[1:]), int(layers[1:])
                got = [slopes_of(sizes[0], layer, sizes[1], convention) for layer in range(sizes[1])]
                compare.values(f"slopes.{name}", want, got)
        else:
            compare_attention(compare, scenario, data)


def compare_attention(compare: Comparison, scenario: str, data: dict):
    q, k, v = (jnp.asarray(data[name]) for name in "qkv")
    slopes, scale = jnp.asarray(np.abs(data["g"]), jnp.float32), q.shape[-1] ** -0.5
    whole = jnp.ones(q.shape[:2], jnp.int32)
    nothing = jnp.zeros((q.shape[0], *q.shape[2:], v.shape[-1]), jnp.float32)
    run = partial(lightning, scale=scale)
    settings = {"": (whole, nothing)}
    if "state_in" in data:
        settings["_with_state"] = whole, jnp.asarray(data["state_in"])
    if "reset" in data:
        settings["_packed"] = whole + jnp.cumsum(jnp.asarray(data["reset"]) != 0, 1), nothing
    if "grad_out" in data:

        def attend(q, k, v, state):
            return run(q, k, v, slopes, whole, state)[0]

        out, pull = jax.vjp(attend, q, k, v, settings["_with_state"][1])
        compare.values(f"{scenario}.out", data["out"], out)
        for name, got in zip(("q", "k", "v", "state_in"), pull(jnp.asarray(data["grad_out"])), strict=True):
            compare.values(f"{scenario}.d_{name}", data[f"d_{name}"], got)
        return
    for suffix, (segments, state) in settings.items():
        out, after = run(q, k, v, slopes, segments, state)
        compare.values(f"{scenario}.out{suffix}", data[f"out{suffix}"], out)
        compare.values(f"{scenario}.state_out{suffix}", data[f"state_out{suffix}"], after)


@pytest.mark.parametrize("case", list(cases()))
def test_equals_the_official_model(case):
    kind = kind_of(case)
    assert kind != "unknown", f"{case}: unknown kind of golden case"
    compare = Comparison()
    (compare_lightning if kind == "lightning" else compare_ling)(compare, case)
    compare.finish(case.name)
