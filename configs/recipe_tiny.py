"""The whole recipe of Ling 2.0 on a laptop: its stages one after the other, and the merge in place of a decay.

Command:   python train.py recipe_tiny
Hardware:  2 CPU cores, 4 GB of memory.
Text:      Python's library and, as reasoning, worked sums and lines to be found again, which are made.
Promise:   in under 20 minutes a checkpoint of each stage, runs/recipe_tiny/merged, and a report whose picture shows how
           far back needles are found after each stage (docs/stages.md).
"""

import dataclasses

from ling_jax.config import DataSource, RopeScaling, RunConfig, ScheduleConfig, Stage

from . import ling_tiny

LENGTH = 256
LONGER = 4 * LENGTH  # of the stage that extends the context
LONGEST = 4 * LONGER  # YaRN
STEP = 16 * LENGTH  # tokens of each step, in all stages


def config() -> RunConfig:
    run = ling_tiny.config()

    def mixed(general: float, arithmetic: float, retrieval: float) -> tuple[DataSource, ...]:
        return (
            DataSource(path="python-stdlib", weight=general, tag="general"),
            DataSource(path="worked-arithmetic", weight=arithmetic, tag="reasoning"),
            DataSource(path="retrieval", weight=retrieval, tag="reasoning"),
        )

    stages = (
        Stage(name="general", tokens=820_000, sources=mixed(0.68, 0.06, 0.26)),
        Stage(name="reasoning", tokens=820_000, sources=mixed(0.54, 0.08, 0.38)),
        Stage(
            name="context", tokens=600_000, sequence_length=LONGER, global_batch_size=STEP // LONGER, long_share=0.2,
            rope_theta=160_000.0, max_position_embeddings=LONGER, bias_update_rate=1e-3,
        ),
        Stage(name="thought", tokens=400_000, sources=mixed(0.55, 0.15, 0.30), peak_lr=4e-3, warmup_steps=10),
        Stage(
            name="yarn", tokens=160_000, sequence_length=LONGEST, global_batch_size=STEP // LONGEST,
            rope_scaling=RopeScaling(factor=LONGEST / LONGER, original_max_position_embeddings=LONGER),
        ),
    )  # fmt: skip
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, max_position_embeddings=LENGTH),
        data=dataclasses.replace(run.data, long_document=LONGEST, holdout_max_bytes=30_000),
        schedule=ScheduleConfig(peak_lr=3e-3, warmup_steps=30),
        train=dataclasses.replace(run.train, eval_every=0, eval_needle=16),
        checkpoint=dataclasses.replace(
            run.checkpoint, snapshot_tokens=40_000, keep_snapshots=8, merge_snapshots=4, write_merged=True
        ),
        stages=stages,
    )
