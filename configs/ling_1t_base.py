"""Ling-1T-base: Ling-1T with its multi-token-prediction layer, as the base checkpoints have it.

Command:   python train.py ling_1t_base --data.sources.0.path TEXT --data.sources.0.licence NAME
           --data.tokenizer FILE
Hardware:  a TPU or GPU pod; never run at this size here.
Promise:   the parameter counts (1012.9 billion with the MTP layer). The training settings are those of
           ling_1t, as untried.
"""

import dataclasses

from ling_jax.config import RunConfig

from . import ling_1t


def config() -> RunConfig:
    run = ling_1t.config()
    return dataclasses.replace(run, model=dataclasses.replace(run.model, num_nextn_predict_layers=1))
