"""Long chain-of-thought fine-tuning of Ring-1T as the report has it: packed rows of 64K tokens, three epochs.

Command:   python post.py sft ring_1t_sft --init-from inclusionAI/Ling-1T-base --data.sources.0.path ROWS
Hardware:  v5p:8x8x16; never run at this size here. `--topology v5p:8x8x16` plans it (docs/plans.md).
Text:      conversations of your own; the report's are 46% mathematics, 26% STEM, 20% code and 8% others.
Promise:   what is published (spec 8.2): 64K packing, 3 epochs, 2e-4 with a cosine and 30 warm-up steps, weight decay
           0.1. Not published, and chosen here: the batch (64 rows), the rate at the cosine's end (0), the balance's
           rate (that of pre-training's end), and how 64K positions came about (YaRN, as the released model has it).
"""

import dataclasses

from ling_jax.config import DataConfig, DataSource, MeshConfig, RopeScaling, ScheduleConfig, SFTConfig, SFTRun

from . import ring_1t


def config() -> SFTRun:
    run = ring_1t.config()
    return SFTRun(
        model=dataclasses.replace(
            run.model, rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=32768)
        ),
        mesh=MeshConfig(fsdp=4, expert=16, context=16),
        data=DataConfig(sources=(DataSource(path="conversations"),), sequence_length=65536, global_batch_size=64),
        optimizer=dataclasses.replace(run.optimizer, weight_decay=0.1),
        schedule=ScheduleConfig(peak_lr=2e-4, warmup_steps=30, decay_fraction=1.0, decay="cosine"),
        train=dataclasses.replace(run.train, dtype="bfloat16", bias_update_rate=1e-4, microbatches=1),
        sft=SFTConfig(epochs=3, answer_tags=False),
    )
