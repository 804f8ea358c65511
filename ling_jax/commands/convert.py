"""Weights converted and compared: python convert.py to-jax|to-hf|merge|merge-adapter|linearize|inspect|verify."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import tyro

from ling_jax.cli import program, run_main
from ling_jax.convert.linearize import linearize
from ling_jax.convert.merge import merge
from ling_jax.convert.merge_weights import Decay
from ling_jax.convert.survey import survey
from ling_jax.convert.to_hf import slopes_told, to_hf
from ling_jax.convert.to_jax import to_jax
from ling_jax.convert.transfer import Shard
from ling_jax.convert.verify import verify


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToJax:
    """From a HF folder of safetensors (bf16, float32, FP8 blocks) to a checkpoint that can be trained and sampled."""

    source: str
    """A HF folder, here or at gs://, s3://, or a hub id (ORG/NAME or ORG/NAME@REVISION)."""
    target: str
    """The checkpoint's folder, here or in a bucket; must not exist."""
    dtype: Literal["keep", "bfloat16", "float32"] = "keep"
    """keep: every tensor's own, FP8 codes and scales included."""

    def run(self) -> int:
        print(to_jax(self.source, self.target, self.dtype).render())
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToHF:
    """From a run, or another HF folder, to a HF folder for transformers, vLLM and SGLang."""

    source: str
    """A run folder, its checkpoints/, one step of it, a converted checkpoint, a HF folder, all here or in a bucket, or
    a hub id."""
    target: str
    """The HF folder, here or in a bucket; must not exist."""
    format: Literal["keep", "bf16", "fp32", "fp8"] = "keep"
    """keep: as it came, byte for byte."""
    max_shard_size: str = "5GB"
    """Of one file; MB and TB are known too."""
    mtp: bool = True
    """Whether the MTP layer goes along; programs that do not know it open what --no-mtp writes."""

    def run(self) -> int:
        audit = to_hf(self.source, self.target, self.format, self.max_shard_size, self.mtp)
        print(audit.render())
        print(*slopes_told(audit.config), sep="\n", end="")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """Averages checkpoints of a run at a constant learning rate, in place of a decay, into one without moments."""

    source: str
    """A run's folder, or its checkpoints/, here or in a bucket."""
    target: str
    """The checkpoint's folder, here or in a bucket; must not exist."""
    steps: str | None = None
    """Which checkpoints: 100,200,300."""
    last: int | None = None
    """How many of the latest, instead of --steps."""
    decay: Decay | None = None
    """The decay of the learning rate that the average stands for; linear, the default, is the uniform mean."""
    weights: str | None = None
    """A file with a JSON list of weights instead, oldest first, whose sum is 1."""
    top: int | None = None
    """How many of these, or of all that are saved, are averaged: the best by --rank-by, uniformly."""
    rank_by: str | None = None
    """With --top: a loss that validation logs (eval/SOURCE/nats_per_token), or TASK/METRIC of evaluated steps."""
    shard: str = "1/1"
    """i/n: this is the i-th (1 to n) of n processes that make the target together, on one host or several."""

    def run(self) -> int:
        audit = merge(
            self.source,
            self.target,
            steps=None if self.steps is None else _numbers("--steps", self.steps, ","),
            last=self.last,
            decay=self.decay,
            weights=self.weights,
            top=self.top,
            rank_by=self.rank_by,
            shard=_shard(self.shard),
        )
        if audit is not None:
            print(audit.render())
        return 0


def _numbers(flag: str, text: str, between: str) -> list[int]:
    parts = text.split(between)
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{flag} {text}: give whole numbers with {between} between them")
    return [int(part) for part in parts]


def _shard(text: str) -> Shard:
    numbers = _numbers("--shard", text, "/")
    if len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1]:
        raise ValueError(f"--shard {text}: give i/n, such as 2/4, with i from 1 to n")
    return Shard(*numbers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeAdapter:
    """Adds a LoRA adapter of PEFT to the weights it was trained beside, and writes a HF folder in their dtypes."""

    source: str
    """The model: a HF folder, a hub id, or a run of ours that the adapter was trained on an export of."""
    adapter: str
    """A folder with adapter_config.json and adapter_model.safetensors, or a hub id of one."""
    target: str
    """The HF folder; must not exist."""

    def run(self) -> int:
        print(to_hf(self.source, self.target, adapter=self.adapter).render())
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linearize:
    """From Ling to the beginnings of a Ring-linear, a HF folder to train on from: most attention becomes linear."""

    source: str
    """The model: a HF folder, a hub id, or a run of ours; not in FP8."""
    target: str
    """The HF folder; must not exist."""
    layer_group_size: int
    """Layers of a group; the last of each keeps softmax attention (5 in Ring-mini-linear, 8 in Ring-flash-linear)."""
    heads: Literal["replicate", "random"] = "replicate"
    """The key and value heads that linear attention has more of: copies of those that were shared, or random ones."""
    group_norm_size: int | None = None
    """Groups of the new output norm; by default 4, as the released models, if that divides the heads."""

    def run(self) -> int:
        audit = linearize(self.source, self.target, self.layer_group_size, self.heads, self.group_norm_size)
        print(audit.render())
        print(*slopes_told(audit.config), sep="\n", end="")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """The configuration, parameter counts, tensors, dtypes and checksums of a folder of weights."""

    source: str
    """A HF folder, a hub id, a run folder, its checkpoints/, one step of it, or a converted checkpoint."""
    checksums: bool = True
    """Read every weight, for its checksum and to find NaN."""
    each: bool = False
    """A line for each tensor, not for each stack of layers and experts."""

    def run(self) -> int:
        print(survey(self.source, self.checksums).render(self.each))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Compares every tensor of two folders, and both models' logits; exit code 1 if they differ."""

    source: str
    """A: any folder of weights."""
    target: str
    """B: another one; its tensors must be A's, or A's cast to its dtypes."""
    logits: bool = True
    """Run both models on fixed prompts too, if they fit in memory."""

    def run(self) -> int:
        found = verify(self.source, self.target, self.logits)
        print(found.render())
        return 0 if found.good else 1


def main(argv: Sequence[str]) -> int:
    jax.config.update("jax_platforms", "cpu")  # a TPU or GPU is left alone
    named = {
        "to-jax": ToJax,
        "to-hf": ToHF,
        "merge": Merge,
        "merge-adapter": MergeAdapter,
        "linearize": Linearize,
        "inspect": Inspect,
        "verify": Verify,
    }
    return tyro.extras.subcommand_cli_from_dict(
        named, args=list(argv), prog=program("convert.py"), description=__doc__
    ).run()


def run() -> None:
    """The command `ling-convert`."""
    run_main(main)
