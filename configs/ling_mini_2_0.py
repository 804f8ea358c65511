"""Ling-mini-2.0: 16.3 billion parameters, 1.4 billion of them used by a token.

Command:   python train.py ling_mini_2_0 --data.sources.0.path TEXT --data.sources.0.licence NAME
           --data.tokenizer FILE
Hardware:  a TPU or GPU pod; never run at this size here.
Promise:   the parameter counts, which a test checks against the released model's. The training settings are the
           published 20T-token recipe, of which no step has been run. rope_theta and the 32K positions are the
           release's; the published run itself used 10000 and 4096 in this phase.
"""

from ling_jax.config import ModelConfig, RunConfig

from . import pretraining


def config() -> RunConfig:
    model = ModelConfig(
        hidden_size=2048,
        intermediate_size=5120,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=4,
        moe_intermediate_size=512,
        first_k_dense_replace=1,
    )
    return pretraining(model, peak_lr=3.36e-4, sequences_per_batch=4400)
