"""Rounding that means what it says, on every platform and under jit.

XLA is free to compute in more precision than a program asks for. Where each bit counts that has to be prevented:

- A conversion to a narrow type and back may be dropped altogether (seen on an H100 for e4m3 and bf16).
- Division by a constant, or by a value that is broadcast, becomes a product with the reciprocal; and division itself is
  off by up to two units in the last place on GPUs (seen on an H100 in 30 % of quotients).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

E4M3_MAX = 448.0
_EXPONENT = 0x7F800000  # of fp32
_SMALLEST_NORMAL = 0x3C800000  # e4m3's, 2**-6, as fp32


def to_e4m3(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounds to `float8_e4m3fn`, to nearest, ties to even, after clamping to +-448; NaN stays NaN."""
    return e4m3_values(x).astype(jnp.float8_e4m3fn)


def e4m3_values(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The values of `to_e4m3` as fp32, without the conversions to FP8 and back, which CPUs do step by step."""
    x = jnp.clip(x.astype(jnp.float32), -E4M3_MAX, E4M3_MAX)
    exponent = jax.lax.bitcast_convert_type(x, jnp.int32) & _EXPONENT
    # Neighbours in e4m3 are 2**-3 of the exponent's power apart; subnormals as the smallest normals.
    spacing = jnp.maximum(exponent, _SMALLEST_NORMAL) - (3 << 23)
    inverse = jax.lax.bitcast_convert_type((254 << 23) - spacing, jnp.float32)
    return jnp.round(x * inverse) * jax.lax.bitcast_convert_type(spacing, jnp.float32)


def round_to(x: Float[Array, "..."], dtype: jax.typing.DTypeLike) -> Float[Array, "..."]:
    """`x.astype(dtype)` for fp32 x and a float dtype of 16 or 32 bits, with a rounding that is not dropped."""
    info = jnp.finfo(dtype)
    if info.bits < 32:
        x = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    return x.astype(dtype)


@jax.custom_jvp
def divide(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """IEEE fp32 `x / y`, rounded to nearest, for positive y that broadcasts to x.

    Exact for quotients of at least 2**-80; smaller ones may be off by two units in the last place.
    """
    y = jnp.broadcast_to(jnp.asarray(y, jnp.float32), x.shape)
    return jax.lax.platform_dependent(x, y, cpu=_plain_divide, default=_corrected_divide)


@divide.defjvp
def _divide_jvp(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    quotient = divide(x, y)
    return quotient, (dx - quotient * dy) / y


def _plain_divide(x: Array, y: Array) -> Array:
    # A divisor that depends on each x is not replaced by its reciprocal.
    return x / jnp.where(jnp.isnan(x), x, y)


def _corrected_divide(x: Array, y: Array) -> Array:
    """Moves a quotient that is off by up to two units to the nearest, by its exact remainder."""
    a = jnp.abs(x)
    q = _plain_divide(a, y)
    for _ in range(2):
        bits = jax.lax.bitcast_convert_type(q, jnp.int32)
        above = jax.lax.bitcast_convert_type(bits + 1, jnp.float32)
        below = jax.lax.bitcast_convert_type(jnp.maximum(bits - 1, 0), jnp.float32)
        remainder = _remainder(a, q, y)
        up, down = 2 * remainder > y * (above - q), -2 * remainder > y * (q - below)
        q = jnp.where(up, above, jnp.where(down, below, q))
    return jnp.where(x < 0, -q, q)


def _remainder(a: Array, q: Array, y: Array) -> Array:
    """`a - q * y` for q near a / y. Halves of 12 bits have exact products, so that each step is exact."""
    (q_high, q_low), (y_high, y_low) = _split(q), _split(y)
    return (((a - q_high * y_high) - q_high * y_low) - q_low * y_high) - q_low * y_low


def _split(x: Array) -> tuple[Array, Array]:
    high = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.int32) & ~0xFFF, jnp.float32)
    return high, x - high
