"""Rotary position embedding, with Hugging Face's scaling variants.

The variants' formulas are those of transformers' `modeling_rope_utils`.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import W4A8Error

from ..config import RopeConfig


def rope_table(
    rope: RopeConfig, head_dim: int, max_context: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T D/2"], Float[Array, "B T D/2"]]:
    """fp32 cosines and sines of the rotation angles, [B, T, D/2], times the variant's attention factor.

    Args:
        rope: variant and parameters.
        head_dim: D, even.
        max_context: the model's, in tokens; some variants scale relative to it.
        positions: int [B, T].

    Raises:
        W4A8Error: the variant is unknown, or a parameter that it needs is missing.
    """
    frequencies, factor = _frequencies(rope, head_dim, max_context, positions)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(
    x: Float[Array, "B T H D"], cos: Float[Array, "B T D/2"], sin: Float[Array, "B T D/2"], *, interleaved: bool
) -> Float[Array, "B T H D"]:
    """Rotates the pairs of each head, in fp32; the result has x's dtype."""
    wide = x.astype(jnp.float32)
    cos, sin = cos[:, :, None], sin[:, :, None]
    if interleaved:
        a, b = wide[..., ::2], wide[..., 1::2]
        rotated = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    else:
        a, b = jnp.split(wide, 2, axis=-1)
        rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x.dtype)


def _frequencies(
    rope: RopeConfig, head_dim: int, max_context: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "D/2"], float]:
    parameters = dict(rope.scaling)

    def need(name: str) -> float:
        if parameters.get(name) is None:
            raise W4A8Error(f'config.json: rope_type "{rope.kind}" needs "{name}" in rope_parameters')
        return parameters[name]

    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    plain = 1.0 / (np.float32(rope.theta) ** exponent)
    original = parameters.get("original_max_position_embeddings") or max_context
    match rope.kind:
        case "default":
            return jnp.asarray(plain), 1.0
        case "linear":
            return jnp.asarray(plain / np.float32(need("factor"))), 1.0
        case "llama3":
            return jnp.asarray(_llama3(plain, need, original)), 1.0
        case "yarn":
            return jnp.asarray(_yarn(rope, plain, head_dim, parameters, need, original)), _yarn_factor(parameters, need)
        case "dynamic":
            # The base grows with the sequence, so it depends on the positions at hand.
            factor = need("factor")
            length = jnp.maximum(jnp.max(positions) + 1, max_context).astype(jnp.float32)
            growth = (factor * length / max_context - (factor - 1)) ** (head_dim / (head_dim - 2))
            return 1.0 / ((rope.theta * growth) ** jnp.asarray(exponent)), 1.0
        case "longrope":
            short, long = (np.asarray(need(name), np.float32) for name in ("short_factor", "long_factor"))
            scale = jnp.where(jnp.max(positions) + 1 > original, jnp.asarray(long), jnp.asarray(short))
            factor = parameters.get("factor") or max_context / original
            attention = parameters.get("attention_factor")
            if attention is None:
                attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
            return 1.0 / (scale * jnp.asarray(1.0 / plain)), attention
    raise W4A8Error(f'config.json: rope_type "{rope.kind}" is unknown')


def _llama3(plain: np.ndarray, need, original: float) -> np.ndarray:
    factor, low, high = need("factor"), need("low_freq_factor"), need("high_freq_factor")
    wavelength = 2 * math.pi / plain
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return (plain / factor * (1 - smooth) + plain * smooth).astype(np.float32)


def _yarn(rope: RopeConfig, plain: np.ndarray, head_dim: int, parameters: dict, need, original: float) -> np.ndarray:
    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    return (plain / need("factor") * ramp + plain * (1 - ramp)).astype(np.float32)


def _yarn_factor(parameters: dict, need) -> float:
    def magnitude(scale: float, m: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    if parameters.get("attention_factor") is not None:
        return parameters["attention_factor"]
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return magnitude(need("factor"), parameters["mscale"]) / magnitude(need("factor"), parameters["mscale_all_dim"])
    return magnitude(need("factor"))
