"""Rotary positions, and YaRN as Qwen-2.5 documents it for inputs longer than it was trained on.

Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071); tested to equal transformers. Axes: B batch, L length,
H head dim.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

# Turns within the original length above which YaRN leaves a frequency alone, and below which it stretches it whole.
FAST, SLOW = 32, 1


def frequencies(head_dim: int, theta: float, factor: float, original_length: int) -> tuple[np.ndarray, float]:
    """Radians per position [H/2] in fp32, rounded as torch rounds them, and what cosines and sines are scaled by.

    factor 1 is plain RoPE. Else YaRN: each frequency that turns fewer than FAST times within `original_length` is
    divided by up to `factor`, and attention is sharpened by the scale 0.1 ln(factor) + 1.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths = (theta ** exponents.astype(np.float64)).astype(np.float32)
    plain = 1 / wavelengths
    if factor == 1:
        return plain, 1.0

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(original_length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(FAST)), 0)
    high = min(math.ceil(pair_that_turns(SLOW)), head_dim - 1)
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / np.float32((high - low) or 0.001)
    kept = 1 - np.clip(ramp, 0, 1)
    return 1 / (np.float32(factor) * wavelengths) * (1 - kept) + plain * kept, sharpening(factor)


def sharpening(factor: float) -> float:
    """What YaRN scales cosines and sines by."""
    return 0.1 * math.log(factor) + 1


def rope(
    x: jax.Array, positions: Int[Array, "B L"], theta: float, factor: float = 1.0, original_length: int = 32768
) -> jax.Array:
    """Rotary position embedding, rotate-half form, angles in fp32. x: [B, L, ..., H]; the rest as `frequencies`."""
    frequency, scale = frequencies(x.shape[-1], theta, factor, original_length)
    angle = positions.astype(jnp.float32)[..., None] * frequency
    angle = angle.reshape(*angle.shape[:2], *([1] * (x.ndim - 3)), x.shape[-1] // 2)
    cos, sin = jnp.cos(angle) * scale, jnp.sin(angle) * scale
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
