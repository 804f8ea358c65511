"""Ling-flash-base-2.0: Ling-flash-2.0 with its multi-token-prediction layer, as the base checkpoints have it.

Command:   python train.py ling_flash_base_2_0 --data.sources.0.path TEXT --data.sources.0.licence NAME
           --data.tokenizer FILE
Hardware:  a TPU or GPU pod; never run at this size here.
Promise:   the parameter counts (106.2 billion with the MTP layer). The training settings are those of
           ling_flash_2_0, as untried.
"""

import dataclasses

from ling_jax.config import RunConfig

from . import ling_flash_2_0


def config() -> RunConfig:
    run = ling_flash_2_0.config()
    return dataclasses.replace(run, model=dataclasses.replace(run.model, num_nextn_predict_layers=1))
