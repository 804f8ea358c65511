"""Ling-mini-base-2.0 as it was pre-trained: 20.75T tokens in four stages, at a constant rate, to be merged.

Command:   python train.py ling_mini_recipe --data.tokenizer FILE, where the folders general/, reasoning/ and thought/
           hold text; then python convert.py merge --source runs/ling_mini_recipe/snapshots --last 32 --target DIR
Hardware:  a TPU or GPU pod; never run at this size here. `--topology v5p:4x4x4 --from-stage context` plans a stage.
Promise:   what is published, each figure as spec 4 has it; what is not is named in configs/__init__.py. Unknown too:
           how mini's batch grew to 4400 rows (no ramp here), and the rate of the last stage (1.5 times, here).
"""

from ling_jax.config import RunConfig

from . import in_stages, ling_mini_base_2_0


def config() -> RunConfig:
    return in_stages(ling_mini_base_2_0.config(), higher_lr=1.5 * 3.36e-4)
