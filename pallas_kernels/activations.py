"""Per-token FP8 quantization of activations."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .errors import W4A8Error
from .rounding import E4M3_MAX, divide, e4m3_values

# 1 / (448 * 512) rounded to fp32, as vLLM has it: a token of zeros, or of tiny values, is divided by this.
MIN_SCALE = np.uint32(0x36924925).view(np.float32)


def e4m3_unit(largest: Float[Array, "..."]) -> Float[Array, "..."]:
    """fp32 `max(largest / 448, 1 / (448 * 512))`: the scale that brings `largest` to e4m3's maximum."""
    return jnp.maximum(divide(largest, jnp.float32(E4M3_MAX)), MIN_SCALE)


def quantize_activations(
    x: Float[Array, "... K"], axis_name: str | None = None
) -> tuple[Float[Array, "... K"], Float[Array, "... 1"]]:
    """Quantizes each token (the last axis) to FP8.

    Args:
        x: [..., K], any float dtype; computed in fp32.
        axis_name: the mesh axis that divides tokens, inside `jax.shard_map`: then x is this device's part of each, and
            token_scale that of the whole token.

    Returns:
        x8: `float8_e4m3fn` [..., K], `e4m3(x / token_scale)`.
        token_scale: fp32 [..., 1], `max(max|x| / 448, 1 / (448 * 512))`.

    Raises:
        W4A8Error: x is not floating point, or has no axis.

    The definition is that of vLLM's `dynamic_per_token_scaled_fp8_quant` without an upper bound.
    """
    values, token_scale = activation_values(x, axis_name)
    return values.astype(jnp.float8_e4m3fn), token_scale


def activation_values(
    x: Float[Array, "... K"], axis_name: str | None = None
) -> tuple[Float[Array, "... K"], Float[Array, "... 1"]]:
    """`quantize_activations` with the values of x8 as fp32."""
    if x.ndim == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise W4A8Error(f"activations: expected a float array [..., K], found {x.dtype}{list(x.shape)}")
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    token_scale = e4m3_unit(largest if axis_name is None else jax.lax.pmax(largest, axis_name))
    return e4m3_values(divide(x, token_scale)), token_scale
