"""Rotary position embedding, with Hugging Face's scaling variants.

The variants' formulas are those of transformers' `modeling_rope_utils`.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import W4A8Error

from ..config import RopeConfig

# The parameters that each variant cannot do without.
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}


def check_rope(rope: RopeConfig, head_dim: int) -> None:
    """Checks that `rope_table` can be computed.

    Raises:
        W4A8Error: the variant is unknown, or a parameter that it needs is missing or does not fit head_dim.
    """
    if head_dim % 2:
        raise W4A8Error(f"config.json: head_dim must be even, found {head_dim}")
    if rope.kind not in _NEEDED:
        raise W4A8Error(f'config.json: rope_type "{rope.kind}" is unknown; known are {", ".join(_NEEDED)}')
    parameters = dict(rope.scaling)
    for name in _NEEDED[rope.kind]:
        if parameters.get(name) is None:
            raise W4A8Error(f'config.json: rope_type "{rope.kind}" needs "{name}" in rope_parameters')
        if rope.kind == "longrope" and len(parameters[name]) != head_dim // 2:
            found = len(parameters[name])
            raise W4A8Error(f"config.json: {name} must have head_dim / 2 = {head_dim // 2} numbers, found {found}")


def rope_table(
    rope: RopeConfig, head_dim: int, max_context: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T D/2"], Float[Array, "B T D/2"]]:
    """fp32 cosines and sines of the rotation angles, [B, T, D/2], times the variant's attention factor.

    Args:
        rope: variant and parameters.
        head_dim: D, even.
        max_context: the model's, in tokens; some variants scale relative to it.
        positions: int [B, T]. "dynamic" and "longrope" depend on the length of each sequence, which is its largest
            position + 1: give padding the position of a real token.

    Raises:
        W4A8Error: as `check_rope`.
    """
    check_rope(rope, head_dim)
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
) -> tuple[Float[Array, "#B #T D/2"], float]:
    parameters = dict(rope.scaling)
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    plain = 1.0 / (np.float32(rope.theta) ** exponent)
    original = parameters.get("original_max_position_embeddings") or max_context
    length = jnp.max(positions, axis=-1)[:, None, None] + 1  # of each sequence so far
    factor = parameters.get("factor") or max_context / original
    length = jnp.max(positions, axis=-1)[:, None, None] + 1
    match rope.kind:
        case "linear":
            return jnp.asarray(plain / np.float32(factor)), 1.0
        case "llama3":
            return jnp.asarray(_llama3(plain, parameters, original)), 1.0
        case "yarn":
            return jnp.asarray(_yarn(rope, plain, head_dim, parameters, original)), _yarn_attention(parameters)
        case "dynamic":
            # The base grows with the sequence.
            relative = jnp.maximum(length, max_context).astype(jnp.float32) / max_context
            growth = (factor * relative - (factor - 1)) ** (head_dim / (head_dim - 2))
            return 1.0 / ((rope.theta * growth) ** jnp.asarray(exponent)), 1.0
        case "longrope":
            short, long = (jnp.asarray(parameters[name], jnp.float32) for name in ("short_factor", "long_factor"))
            attention = parameters.get("attention_factor")
            if attention is None:
                attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
            return 1.0 / (jnp.where(length > original, long, short) * jnp.asarray(1.0 / plain)), attention
    return jnp.asarray(plain), 1.0


def _llama3(plain: np.ndarray, parameters: dict, original: float) -> np.ndarray:
    factor, low, high = (parameters[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    wavelength = 2 * math.pi / plain
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return (plain / factor * (1 - smooth) + plain * smooth).astype(np.float32)


def _yarn(rope: RopeConfig, plain: np.ndarray, head_dim: int, parameters: dict, original: float) -> np.ndarray:
    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    return (plain / parameters["factor"] * ramp + plain * (1 - ramp)).astype(np.float32)


def _yarn_attention(parameters: dict) -> float:
    def magnitude(scale: float, m: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    factor = parameters["factor"]
    if parameters.get("attention_factor") is not None:
        return parameters["attention_factor"]
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return magnitude(factor, parameters["mscale"]) / magnitude(factor, parameters["mscale_all_dim"])
    return magnitude(factor)
