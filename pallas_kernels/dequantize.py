"""From 4-bit codes and e4m3 group scales to the FP8 operands of the matrix product.

The product `code * group_scale` is rounded to e4m3 once. A code takes 16 values and a scale 256, so the
kernels look the rounded product up instead of computing it; here it is computed, with the same bits.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from .rounding import to_e4m3

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
