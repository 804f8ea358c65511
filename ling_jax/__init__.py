"""ling_jax: Ling 2.0 mixture-of-experts language models in JAX."""

from ling_jax import config
from ling_jax.config import Counts, ModelConfig, RunConfig
from ling_jax.convert.load import load_pretrained
from ling_jax.convert.tokenizer import tokenizer_of as load_tokenizer
from ling_jax.generate.engine import generate
from ling_jax.generate.score import score
from ling_jax.model.model import Ling, Output
from ling_jax.train.loss import token_logprobs

__version__ = "0.1.0"  # pyproject.toml takes it from here

__all__ = [
    "Counts",
    "Ling",
    "ModelConfig",
    "Output",
    "RunConfig",
    "__version__",
    "count_params",
    "generate",
    "load_pretrained",
    "load_tokenizer",
    "score",
    "token_logprobs",
]


def count_params(model: Ling | ModelConfig | RunConfig) -> Counts:
    """Parameters of a model, or of the one a configuration describes; no weight is looked at (spec 1.3)."""
    found = model.config if isinstance(model, Ling) else model.model if isinstance(model, RunConfig) else model
    if not isinstance(found, ModelConfig):
        raise ValueError(f"count_params needs a model or a configuration, not {type(model).__name__}")
    return config.count_params(found)
