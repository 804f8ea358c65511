"""Ring-flash-2.0: the reasoning model post-trained from the base of Ling-flash-2.0, with the same shape.

Command:   python sample.py --checkpoint HF_DIR --chat --prompt TEXT
Hardware:  as ling_flash_2_0; never run at this size here.
Promise:   the parameter counts. The architecture is what loading and converting need; the training settings are
           ling_flash_2_0's pre-training, not Ring's post-training, which is not part of this version.
"""

from ling_jax.config import RunConfig

from . import ling_flash_2_0


def config() -> RunConfig:
    return ling_flash_2_0.config()
