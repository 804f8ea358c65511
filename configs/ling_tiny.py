"""A small Ling 2.0 (sparse MoE, shared expert, MTP) that learns Python on a laptop.

Command:   make quickstart, or: python train.py ling_tiny
Hardware:  2 CPU cores, 4 GB of memory.
Text:      the .py files of the Python that runs it; a 4096-token BPE is trained on their training split.
Promise:   in about 10 minutes, validation bits per byte well below `xz -9` of the same bytes (see README.md).
"""

from ling_jax.config import DataConfig, ModelConfig, RunConfig, ScheduleConfig, TrainConfig


def config() -> RunConfig:
    model = ModelConfig(
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        num_shared_experts=1,
        n_group=4,
        topk_group=2,
        moe_intermediate_size=96,
        num_nextn_predict_layers=1,
        rope_theta=10000.0,
        max_position_embeddings=2048,
        pad_token_id=1,
        eos_token_id=1,
    )
    return RunConfig(
        model=model,
        data=DataConfig(sequence_length=256, global_batch_size=16),
        schedule=ScheduleConfig(peak_lr=4e-3, warmup_steps=30, decay_fraction=0.7, decay="linear"),
        train=TrainConfig(
            steps=1000,
            remat="none",
            init_std=0.02,
            bias_update_rate=1e-2,  # 1e-3 suits runs of a hundred thousand steps
            eval_every=250,
        ),
    )
