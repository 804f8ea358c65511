"""Ling-flash-2.0: 103 billion parameters, 6.2 billion of them used by a token.

Command:   python train.py ling_flash_2_0 --data.sources.0.path TEXT --data.sources.0.licence NAME
           --data.tokenizer FILE
Hardware:  a TPU or GPU pod; never run at this size here.
Promise:   the parameter counts, which a test checks against the released model's. The training settings are the
           published 20T-token recipe, of which no step has been run (see ling_mini_2_0 on rope_theta).
"""

from ling_jax.config import ModelConfig, RunConfig

from . import pretraining


def config() -> RunConfig:
    model = ModelConfig(
        hidden_size=4096,
        intermediate_size=9216,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=4,
        moe_intermediate_size=1024,
        first_k_dense_replace=1,
    )
    return pretraining(model, peak_lr=2.61e-4, sequences_per_batch=8352)
