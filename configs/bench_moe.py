"""The model all speed figures are about: 38 million parameters, the family's routing, no MTP.

Command:   python -m benchmarks.train_step --config bench_moe, or: python train.py bench_moe
Hardware:  any; the figures to compare with are from 2 CPU cores.
Promise:   none about learning: the sizes are fixed for comparison, and nothing is tuned.
"""

from ling_jax.config import DataConfig, ModelConfig, RunConfig, ScheduleConfig, TrainConfig


def config() -> RunConfig:
    model = ModelConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=64,
        num_experts_per_tok=8,
        num_shared_experts=1,
        n_group=8,
        topk_group=4,
        moe_intermediate_size=128,
        max_position_embeddings=2048,
        pad_token_id=1,
        eos_token_id=1,
    )
    return RunConfig(
        model=model,
        data=DataConfig(sequence_length=512, global_batch_size=8),
        schedule=ScheduleConfig(peak_lr=1e-3, warmup_steps=20),
        train=TrainConfig(steps=100, remat="none", init_std=0.02),
    )
