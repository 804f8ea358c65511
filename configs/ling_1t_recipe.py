"""Ling-1T-base as it was pre-trained: 20.75T tokens in four stages, at a constant rate, to be merged.

Command:   python train.py ling_1t_recipe --data.tokenizer FILE, where the folders general/, reasoning/ and thought/
           hold text; then python convert.py merge --source runs/ling_1t_recipe/snapshots --last 32 --target DIR
Hardware:  a TPU or GPU pod; never run at this size here. `--topology v5p:8x8x16 --from-stage context` plans a stage.
Promise:   what is published, each figure as spec 4 has it; what is not is named in configs/__init__.py. Unknown too:
           the steps in which the batch grew to 18144 rows over about the first 500B tokens (one published example
           starts at 3024: in sixths, here), and the rate of the last stage (1.5 times, here).
"""

import dataclasses

from ling_jax.config import RunConfig

from . import BILLION, in_stages, ling_1t_base


def config() -> RunConfig:
    run = ling_1t_base.config()
    data = dataclasses.replace(run.data, batch_ramp_from=3024, batch_ramp_by=3024, batch_ramp_tokens=500 * BILLION)
    run = dataclasses.replace(run, data=data, train=dataclasses.replace(run.train, microbatches=6))
    return in_stages(run, higher_lr=1.5 * 1.86e-4)
