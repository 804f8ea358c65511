"""Ling-1T: 999.7 billion parameters, 51 billion of them used by a token.

Command:   python train.py ling_1t --data.sources.0.path TEXT --data.sources.0.licence NAME
           --data.tokenizer FILE
Hardware:  a TPU or GPU pod; never run at this size here.
Promise:   the parameter counts, which a test checks against the released model's. The training settings are the
           published 20T-token recipe, of which no step has been run (see ling_mini_2_0 on rope_theta).
"""

from ling_jax.config import ModelConfig, RunConfig

from . import pretraining


def config() -> RunConfig:
    model = ModelConfig(
        hidden_size=8192,
        intermediate_size=18432,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        moe_intermediate_size=2048,
        first_k_dense_replace=4,
    )
    return pretraining(model, peak_lr=1.86e-4, sequences_per_batch=18144)
