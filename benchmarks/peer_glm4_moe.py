"""The other side of benchmarks.peers: transformers' Glm4Moe, which is Ling 2.0's block with q, k and v projected apart.

    .venv-peers/bin/python benchmarks/peer_glm4_moe.py JSON

Imports torch, transformers and numpy only: it runs on a Python of its own (requirements-peers.txt). JSON is an object
with the numbers of one measurement, made by `benchmarks.peers.peer_spec`; the last line of standard output is one JSON
object. `dtype` is "float32", "bfloat16" (weights, optimizer state and computation), or "autocast" (training only:
float32 weights, bfloat16 where torch.autocast says so).
"""

import contextlib
import itertools
import json
import platform
import statistics
import sys
import time
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import DynamicCache, Glm4MoeConfig, Glm4MoeForCausalLM, StaticCache

WARMUP_STEPS = 2
PREFILL_EXPERTS = "grouped_mm"  # the only one that does not gather weights for every token, or loop over experts
EXPERTS = ("grouped_mm", "batched_mm")
CACHES = ("dynamic", "static")
PROBE_TOKENS = 16

# Fields of our configuration that Glm4MoeConfig has too, and those that it calls otherwise.
SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "num_experts_per_tok", "n_group", "topk_group", "moe_intermediate_size",
    "first_k_dense_replace", "routed_scaling_factor", "norm_topk_prob", "rms_norm_eps", "use_qk_norm",
    "max_position_embeddings", "tie_word_embeddings", "pad_token_id", "eos_token_id",
)  # fmt: skip
RENAMED = {
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "use_qkv_bias": "attention_bias",
}


def make_model(spec: dict[str, Any]) -> Glm4MoeForCausalLM:
    """The model of our sizes with random weights.

    Raises:
      ValueError: if it has another number of parameters than ours.
    """
    ours = spec["model"]
    values = {name: ours[name] for name in SAME} | {theirs: ours[name] for name, theirs in RENAMED.items()}
    factor, theta = ours["partial_rotary_factor"], ours["rope_theta"]
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": factor}
    config = Glm4MoeConfig(**values, rope_parameters=rope, num_mtp_layers=0, initializer_range=spec["init_std"])
    config._attn_implementation, config._experts_implementation = "sdpa", PREFILL_EXPERTS
    torch.manual_seed(0)
    model = Glm4MoeForCausalLM(config)
    count = parameters(model)
    if count != spec["parameters"]:
        raise ValueError(f"Glm4Moe has {count:,} parameters at these sizes, ours {spec['parameters']:,}: not the same")
    if spec["dtype"] == "bfloat16":
        for value in model.parameters():  # not of buffers: rotary frequencies and balance biases stay float32
            value.data = value.data.bfloat16()
    return model


def parameters(model: Glm4MoeForCausalLM) -> int:
    """The routers' balance biases included, as in our count."""
    biases = [value for name, value in model.named_buffers() if name.endswith("e_score_correction_bias")]
    return sum(value.numel() for value in [*model.parameters(), *biases])


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Forward, backward and AdamW on one batch of random tokens: our benchmark's, drawn in the same way."""
    model = make_model(spec).train()
    options = spec["optimizer"]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        betas=(options["b1"], options["b2"]),
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        fused=True,
    )
    shape = (spec["batch"], spec["sequence_length"] + 1)
    ids = np.random.default_rng(0).integers(2, spec["model"]["vocab_size"], shape, np.int32)
    ids = torch.from_numpy(ids.astype(np.int64))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].reshape(-1)
    computation = contextlib.nullcontext()
    if spec["dtype"] == "autocast":
        computation = torch.autocast("cpu", dtype=torch.bfloat16)

    def step(learning_rate: float) -> None:
        optimizer.zero_grad(set_to_none=True)
        with computation:
            logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()

    times = []
    for count in range(1, WARMUP_STEPS + spec["steps"] + 1):
        started = time.perf_counter()
        step(options["peak_lr"] * min(count / max(options["warmup_steps"], 1), 1.0))
        times.append(time.perf_counter() - started)
        print(f"step {count}: {times[-1] * 1e3:.0f} ms", file=sys.stderr)
    seconds = statistics.median(times[WARMUP_STEPS:])
    tokens = spec["batch"] * spec["sequence_length"]
    return {"tokens_per_second": tokens / seconds, "step_ms": seconds * 1e3, "setting": "sdpa grouped_mm fused-adamw"}


class Setting(NamedTuple):
    """How answers are made."""

    experts: str  # of the tokens after the prompt
    cache: str
    threads: int

    def __str__(self) -> str:
        return f"sdpa {self.experts} {self.cache}-cache {self.threads}-thread"


class Decoder:
    """Greedy decoding by a bare loop over the model's forward: `generate` adds its own checks to every token."""

    def __init__(self, model: Glm4MoeForCausalLM, prompts: torch.Tensor, slots: int) -> None:
        self.model, self.prompts, self.slots = model.eval(), prompts, slots

    def start(self, cache: str) -> tuple[Any, torch.Tensor]:
        """(keys and values of the prompts, first token of each answer)"""
        self.model.set_experts_implementation(PREFILL_EXPERTS)
        config = self.model.config
        kept = DynamicCache(config=config) if cache == "dynamic" else StaticCache(config, max_cache_len=self.slots)
        return kept, self.next(self.prompts, kept)

    def next(self, ids: torch.Tensor, kept: Any) -> torch.Tensor:
        logits = self.model(input_ids=ids, past_key_values=kept, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def run(self, setting: Setting, new_tokens: int) -> tuple[float, float]:
        """Seconds of all, and of all but the prompts."""
        torch.set_num_threads(setting.threads)
        started = time.perf_counter()
        kept, token = self.start(setting.cache)
        self.model.set_experts_implementation(setting.experts)
        answer = [token]
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            answer.append(self.next(answer[-1], kept))
        torch.cat(answer, dim=1).tolist()
        ended = time.perf_counter()
        return ended - started, ended - first


@torch.inference_mode()
def decode(spec: dict[str, Any]) -> dict[str, Any]:
    """Times the fastest of all settings, found by short runs of each, twice, in the order of the first and its
    reverse."""
    ids = np.random.default_rng(0).integers(2, spec["model"]["vocab_size"], (spec["batch"], spec["prompt_len"]))
    new, short = spec["new_tokens"], min(spec["new_tokens"], PROBE_TOKENS)
    decoder = Decoder(make_model(spec), torch.from_numpy(ids), spec["prompt_len"] + new)
    threads = sorted({1, spec["threads"]})
    settings = [Setting(*each) for each in itertools.product(EXPERTS, CACHES, threads)]
    probes: dict[Setting, float] = {}
    decoder.run(settings[0], short)
    for setting in settings + settings[::-1]:
        whole, later = decoder.run(setting, short)
        estimate = whole - later + later * (new - 1) / max(short - 1, 1)
        probes[setting] = min(estimate, probes.get(setting, estimate))
    for setting, seconds in probes.items():
        print(f"{setting}: about {seconds * 1e3:.0f} ms", file=sys.stderr)
    best = min(settings, key=lambda setting: probes[setting])
    whole, one = (statistics.median(decoder.run(best, count)[0] for _ in range(spec["runs"])) for count in (new, 1))
    return {
        "tokens_per_second": spec["batch"] * new / whole,
        "step_ms": (whole - one) / max(new - 1, 1) * 1e3,
        "setting": str(best),
    }


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    transformers.logging.set_verbosity_error()
    try:
        result = {"train": train, "decode": decode}[spec["what"]](spec)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(result | {"parameters": spec["parameters"], "versions": versions}))


if __name__ == "__main__":
    main()
