"""Rotary position embedding over the leading dims of each head, with YaRN.

Legend: B rows, T tokens, H heads, C head_dim, r rotated dims.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ling_jax.config import ModelConfig


def _yarn_frequencies(config: ModelConfig, inv_freq: np.ndarray) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071, sections 3.2-3.4; spec 2.3): slow dims are interpolated by `factor`, fast
    ones kept, a linear ramp between; cos and sin are scaled by the returned attention factor."""
    scaling = config.rope_scaling
    assert scaling is not None
    width, theta = config.rotary_width, config.rope_theta

    def dim_of(rotations: float) -> float:
        period = scaling.original_max_position_embeddings / (2 * math.pi * rotations)
        return width * math.log(period) / (2 * math.log(theta))

    low, high = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / (high - low if high != low else 0.001), 0, 1)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1

    if scaling.attention_factor is not None:
        magnitude = scaling.attention_factor
    elif scaling.mscale and scaling.mscale_all_dim:
        magnitude = mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    else:
        magnitude = mscale(1)
    return inv_freq * ((1 - ramp) + ramp / scaling.factor), magnitude


def frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Returns the float32 [r/2] inverse frequencies and the factor on cos and sin (1 without YaRN)."""
    width = config.rotary_width
    inv_freq = 1.0 / config.rope_theta ** (np.arange(0, width, 2, dtype=np.float64) / max(width, 1))
    magnitude = 1.0
    if config.rope_scaling is not None:
        inv_freq, magnitude = _yarn_frequencies(config, inv_freq)
    return inv_freq.astype(np.float32), magnitude


def rope_tables(config: ModelConfig, positions_BT: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each [B, T, 1, r/2]: built in float32, cast to the compute dtype (spec 2.3)."""
    inv_freq, magnitude = frequencies(config)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * inv_freq
    return (jnp.cos(angles) * magnitude).astype(dtype), (jnp.sin(angles) * magnitude).astype(dtype)


def apply_rope(x_BTHC: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the first r dims, dim i with dim i + r/2 (NeoX order); the rest pass through (spec 2.3)."""
    cos, sin = tables
    half = cos.shape[-1]
    first, second, rest = x_BTHC[..., :half], x_BTHC[..., half : 2 * half], x_BTHC[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
