"""Rotary positions, and YaRN as Qwen-2.5 documents it for inputs longer than it was trained on.

Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071); tested to equal transformers. Axes: B batch, L length,
H head dim.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from r3jax.errors import UserError

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
    return 1 / (np.float32(factor) * wavelengths) * (1 - kept) + plain * kept, _sharpening(factor)


def _sharpening(factor: float) -> float:
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


def rope_of(hf_config: dict[str, Any]) -> dict[str, Any]:
    """ModelConfig's rope fields from a Hugging Face config.json, in the form of transformers 4 or 5: those it names.

    Raises UserError, which names it, for a kind of scaling other than YaRN or a setting of YaRN that Qwen-2.5 leaves
    at its default. `rope_keys` is the inverse.
    """
    written = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    if not isinstance(written, dict):
        raise UserError('"rope_parameters" is not a group of values')
    given = {name: value for name, value in written.items() if value is not None}
    kinds = {given.pop(name) for name in ("rope_type", "type") if name in given}  # some files write both names
    theta = given.pop("rope_theta", hf_config.get("rope_theta", 10000.0))  # transformers' own default
    if not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise UserError(f'"rope_theta" must be a number above 0, not {theta!r}')
    fields: dict[str, Any] = {"rope_theta": float(theta)}
    known: dict[str, float] = {"partial_rotary_factor": 1.0}
    if kinds == {"yarn"}:
        longest = hf_config.get("max_position_embeddings") or 32768
        original = given.pop("original_max_position_embeddings", None) or longest
        factor = float(given.pop("factor", None) or longest / original)
        if factor < 1:
            raise UserError(f"YaRN's factor is {factor}, it must be at least 1")
        fields |= {"rope_factor": factor, "rope_original_length": int(original)}
        known |= {"beta_fast": FAST, "beta_slow": SLOW, "attention_factor": _sharpening(factor), "truncate": True}
    elif kinds - {"default"}:
        names = " and ".join(sorted(map(repr, kinds)))
        raise UserError(f"the rope scaling {names} is not implemented, only 'default' and 'yarn' are")
    for name, value in given.items():
        if not isinstance(value, int | float) or not math.isclose(value, known.get(name, math.nan), rel_tol=1e-6):
            raise UserError(f"a rope scaling with {name}={value!r} is not implemented")
    return fields


def rope_keys(theta: float, factor: float, original_length: int) -> dict[str, Any]:
    """The keys of a Hugging Face config.json that `rope_of` reads, as Qwen-2.5 documents them."""
    if factor == 1:
        return {"rope_theta": theta}
    scaling = {"type": "yarn", "factor": factor, "original_max_position_embeddings": original_length}
    return {"rope_theta": theta, "rope_scaling": scaling}
