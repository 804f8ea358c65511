"""Ring-flash-linear-2.0: 104 billion parameters, 7.4 billion of them used by a token; seven of eight layers are linear.

Command:   python sample.py --checkpoint HF_DIR --chat --prompt TEXT
Hardware:  a TPU or GPU pod; never run at this size here.
Promise:   the parameter counts, which a test checks against the released model's. The training settings are
           ling_flash_2_0's pre-training, since those of the linear model are not public.
"""

import dataclasses

from ling_jax.config import RunConfig

from . import ling_flash_2_0


def config() -> RunConfig:
    run = ling_flash_2_0.config()
    linear = dataclasses.replace(
        run.model,
        layer_group_size=8,
        max_position_embeddings=131072,
        # Assumed, as Ring-mini-linear-2.0's: no public copy of this model's config.json is known.
        group_norm_size=4,
        rope_theta=1e6,
    )
    return dataclasses.replace(run, model=linear, assumed=("group_norm_size", "rope_theta"))
