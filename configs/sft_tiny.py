"""Fine-tuning in two modes on a laptop: a small Ling that answers sums at once, or thinks step by step first.

Command:   python post.py sft sft_tiny
Hardware:  2 CPU cores, 3 GB of memory.
Text:      sums of three to five numbers, worked out by the task itself; a tokenizer is trained on them.
Promise:   in under 15 minutes, from random weights: asked to think, it gets most new sums right, and few at once.
           python -m ling_jax.post.evaluate --checkpoint runs/sft_tiny --task sums
"""

from ling_jax.config import (
    DataConfig,
    DataSource,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    SFTConfig,
    SFTRun,
    TrainConfig,
)


def config() -> SFTRun:
    model = ModelConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        num_shared_experts=1,
        n_group=4,
        topk_group=2,
        moe_intermediate_size=48,
        num_nextn_predict_layers=0,
        rope_theta=10000.0,
        max_position_embeddings=512,
        pad_token_id=1,
        eos_token_id=1,
    )
    return SFTRun(
        model=model,
        data=DataConfig(
            sources=(DataSource(path="sums"),), sequence_length=256, global_batch_size=8, holdout_max_bytes=5_000
        ),
        optimizer=OptimizerConfig(weight_decay=0.01),
        schedule=ScheduleConfig(peak_lr=2e-3, warmup_steps=50, decay_fraction=0.5, decay="cosine"),
        train=TrainConfig(remat="none", init_std=0.02, bias_update_rate=1e-2, eval_every=500),
        sft=SFTConfig(epochs=2, task_rows=60_000),
    )
