"""One run per file: `config()` gives all its settings, the file's docstring the command and what to expect."""

from ling_jax.config import DataConfig, ModelConfig, RunConfig, ScheduleConfig, TrainConfig

PRETRAINING_TOKENS = 20 * 10**12
SEQUENCE_LENGTH = 4096


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
