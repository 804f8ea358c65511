"""Ring-mini-linear-2.0: 16.4 billion parameters, 1.6 billion of them used by a token; four of five layers are linear.

Command:   python sample.py --checkpoint HF_DIR --chat --prompt TEXT
Hardware:  a TPU or GPU pod; never run at this size here.
Promise:   the parameter counts, which a test checks against the released model's. The architecture is the release's;
           the training settings are ling_mini_2_0's pre-training, since those of the linear model are not public.
"""

import dataclasses

from ling_jax.config import RunConfig

from . import ling_mini_2_0


def config() -> RunConfig:
    run = ling_mini_2_0.config()
    linear = dataclasses.replace(
        run.model, layer_group_size=5, group_norm_size=4, rope_theta=1e6, max_position_embeddings=131072
    )
    return dataclasses.replace(run, model=linear)
