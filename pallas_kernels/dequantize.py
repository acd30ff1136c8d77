"""From 4-bit codes and e4m3 group scales to the FP8 operands of the matrix product.

The product `code * group_scale` is rounded to e4m3 once. A code takes 16 values and a scale 256, so the
kernels look the rounded product up instead of computing it; here it is computed, with the same bits.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from .rounding import e4m3_values, to_e4m3

CODES = tuple(range(-8, 8))


def expand_groups(scale: Shaped[Array, "... N G"], k: int) -> Shaped[Array, "... N K"]:
    """Repeats each group's scale over its `k // G` columns."""
    return jnp.repeat(scale, k // scale.shape[-1], axis=-1)


def dequantize_lut(codes: Int[Array, "... N K"], group_scale: Float[Array, "... N G"]) -> Float[Array, "... N K"]:
    """`w8 = e4m3(codes * group_scale)`, the FP8 operand, as `float8_e4m3fn` [..., N, K]."""
    scale = expand_groups(group_scale.astype(jnp.float32), codes.shape[-1])
    return to_e4m3(codes.astype(jnp.float32) * scale)


def lut_levels(group_scale: Float[Array, "..."]) -> Float[Array, "... 16"]:
    """The 16 values that a group's weights can take, for codes -8..7, as `float8_e4m3fn` [..., 16]."""
    return to_e4m3(jnp.asarray(CODES, jnp.float32) * group_scale.astype(jnp.float32)[..., None])


def lut_magnitudes(group_scale: Float[Array, "..."]) -> Float[Array, "... 9"]:
    """fp32 `e4m3(q * g)` for q = 0..8: the magnitudes of codes 0, -1, ..., -8."""
    return e4m3_values(jnp.arange(9, dtype=jnp.float32) * group_scale.astype(jnp.float32)[..., None])


def nearest_codes(
    groups: Float[Array, "... G S"], magnitudes: Float[Array, "... G 9"], code_min: int
) -> Int[Array, "... G S"]:
    """int8 codes in code_min..7 whose level is nearest to a weight; between two levels, the smaller.

    Args:
        groups: fp32 weights in groups of S.
        magnitudes: of codes 0, -1, ..., -8 of each group, in the weights' unit, ascending.
        code_min: -7 or -8.
    """
    borders = (magnitudes[..., 1:] * 0.5 + magnitudes[..., :-1] * 0.5)[..., None]
    magnitude = jnp.abs(groups)
    count = sum((magnitude > borders[..., q, :]).astype(jnp.int8) for q in range(7))
    if code_min == -8:
        count += (-groups > borders[..., 7, :]).astype(jnp.int8)
    return jnp.where(groups < 0, -count, count)
