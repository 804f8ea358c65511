"""One run per file: `config()` gives all its settings, the file's docstring the command and what to expect."""

import dataclasses

from ling_jax.config import (
    DataConfig,
    DataSource,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    Stage,
    TrainConfig,
    by_tag,
)

PRETRAINING_TOKENS = 20 * 10**12
SEQUENCE_LENGTH = 4096
TRILLION, BILLION = 10**12, 10**9


def pretraining(model: ModelConfig, *, peak_lr: float, sequences_per_batch: int) -> RunConfig:
    """Ling 2.0's published 4K pre-training recipe (arXiv 2510.22115, section 3.2), one constant batch size.

    The published run grew its batch over roughly the first 500 billion tokens, in steps that are not public.
    """
    return RunConfig(
        model=model,
        data=DataConfig(sequence_length=SEQUENCE_LENGTH, global_batch_size=sequences_per_batch),
        schedule=ScheduleConfig(peak_lr=peak_lr, warmup_steps=2000),
        train=TrainConfig(
            steps=PRETRAINING_TOKENS // (SEQUENCE_LENGTH * sequences_per_batch),
            dtype="bfloat16",
            init_std=0.006,
            bias_update_rate=1e-3,
        ),
    )


def in_stages(run: RunConfig, higher_lr: float) -> RunConfig:
    """Ling 2.0's stages of pre-training (technical report, section 3; spec 4), from the settings of its run at 4K.

    Known: tokens, lengths, shares, rates of the first three, the bias update. Not published, and chosen here: what the
    sources are beyond their shares; the batch at 32K (as many tokens a step as at 4K); that 20% is a share of tokens;
    the last stage's rate, which is only called higher, and that it needs no warmup; whether moments go on (they do).

    Args:
      run: its settings at 4K, with the published batch and rate.
      higher_lr: of the last stage.
    """
    general = DataSource(path="general", tag="general")
    reasoning, thought = (DataSource(path=name, tag="reasoning") for name in ("reasoning", "thought"))
    sources = (general, reasoning)
    rows = run.data.global_batch_size // 8
    stages = (
        Stage(name="general_a", tokens=10 * TRILLION, sources=by_tag(sources, {"general": 0.68, "reasoning": 0.32})),
        Stage(name="general_b", tokens=10 * TRILLION, sources=by_tag(sources, {"general": 0.54, "reasoning": 0.46})),
        Stage(
            name="context", tokens=150 * BILLION, sequence_length=32768, global_batch_size=rows, long_share=0.2,
            rope_theta=600_000.0, max_position_embeddings=32768, bias_update_rate=1e-4,
        ),
        Stage(
            name="thought", tokens=600 * BILLION, peak_lr=higher_lr,
            # The report does not say how much of the reasoning is chains of thought: half, here.
            sources=by_tag((*sources, thought), {"general": 0.55, "reasoning": 0.45}),
        ),
    )  # fmt: skip
    model = dataclasses.replace(run.model, rope_theta=10_000.0, max_position_embeddings=4096)
    data = dataclasses.replace(run.data, block_length=32768, long_document=32768)
    checkpoint = dataclasses.replace(run.checkpoint, snapshot_tokens=5 * BILLION, keep_snapshots=32)
    schedule = dataclasses.replace(run.schedule, decay_fraction=0.0)
    changes = dict(model=model, data=data, checkpoint=checkpoint, schedule=schedule, stages=stages)
    return dataclasses.replace(run, **changes)
