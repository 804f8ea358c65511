"""A small Ling 2.0 with FP8's tile sizes (hidden and expert width 256), to see what FP8 costs in quality.

Command:   python -m scripts.fp8_comparison: this run in bfloat16, FP8 (five seeds each), with 8-bit AdamW, in float32.
Hardware:  2 CPU cores, 4 GB of memory; about 6 to 15 minutes a run.
Text:      the .py files of the Python that runs it; a 4096-token BPE is trained on their training split.
Promise:   FP8's mean gap to bfloat16 over five seeds is at most 0.25% of validation loss (docs/fp8.md: +0.03%).
"""

from ling_jax.config import DataConfig, ModelConfig, RunConfig, ScheduleConfig, TrainConfig


def config() -> RunConfig:
    model = ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        num_shared_experts=1,
        n_group=4,
        topk_group=2,
        moe_intermediate_size=256,
        num_nextn_predict_layers=1,
        rope_theta=10000.0,
        max_position_embeddings=2048,
        pad_token_id=1,
        eos_token_id=1,
    )
    return RunConfig(
        model=model,
        data=DataConfig(sequence_length=256, global_batch_size=4, holdout_fraction=0.1, holdout_max_bytes=1_000_000),
        schedule=ScheduleConfig(peak_lr=2e-3, warmup_steps=100, decay_fraction=0.5, decay="linear"),
        train=TrainConfig(
            steps=2000,
            dtype="bfloat16",
            remat="none",
            init_std=0.02,
            bias_update_rate=3e-3,
            eval_every=1000,
        ),
    )
