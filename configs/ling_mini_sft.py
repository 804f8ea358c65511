"""Fine-tuning of Ling-mini-2.0 in two modes, on a host of eight GPUs or a slice of a TPU pod.

Command:   python post.py sft ling_mini_sft --init-from inclusionAI/Ling-mini-base-2.0 --data.sources.0.path ROWS
Hardware:  8 H100; never run at this size here. `--topology h100:8` plans it, and docs/plans.md has what that gives.
Text:      conversations of your own, .jsonl or .parquet (docs/fine_tuning.md).
Promise:   none. What is published of Ling's decoupled fine-tuning (spec 8.1) is that it has two modes; rates, batch and
           epochs are not. Those here are Ring-1T's (configs/ring_1t_sft.py), with rows of 8,192 tokens.
"""

import dataclasses

from ling_jax.config import DataConfig, DataSource, MeshConfig, SFTRun

from . import ling_mini_base_2_0, ring_1t_sft


def config() -> SFTRun:
    run, base = ring_1t_sft.config(), ling_mini_base_2_0.config()
    return dataclasses.replace(
        run,
        model=base.model,
        mesh=MeshConfig(expert=8),
        data=DataConfig(sources=(DataSource(path="conversations"),), sequence_length=8192, global_batch_size=8),
    )
