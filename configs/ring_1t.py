"""Ring-1T: the reasoning model post-trained from the base of Ling-1T, with the same shape.

Command:   python sample.py --checkpoint HF_DIR --chat --prompt TEXT
Hardware:  as ling_1t; never run at this size here.
Promise:   the parameter counts. The architecture is what loading and converting need; the training settings are
           ling_1t's pre-training, not Ring's post-training, which is not part of this version.
"""

from ling_jax.config import RunConfig

from . import ling_1t


def config() -> RunConfig:
    return ling_1t.config()
