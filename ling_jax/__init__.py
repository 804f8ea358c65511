"""ling_jax: Ling 2.0 mixture-of-experts language models in JAX."""

from ling_jax.config import Counts, ModelConfig, RunConfig, count_params
from ling_jax.convert.load import load_pretrained
from ling_jax.generate.engine import generate
from ling_jax.model.model import Ling, Output
from ling_jax.train.loss import token_logprobs

__all__ = [
    "Counts",
    "Ling",
    "ModelConfig",
    "Output",
    "RunConfig",
    "count_params",
    "generate",
    "load_pretrained",
    "token_logprobs",
]
