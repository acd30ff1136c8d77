"""The matrix products that models call: they check, choose an implementation and define gradients."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from . import reference
from .errors import W4A8Error
from .rounding import round_to
from .weight_format import W4Weight


def w4a8_matmul(x: Float[Array, "... K"], w: W4Weight, *, out_dtype: Any = jnp.bfloat16) -> Float[Array, "... N"]:
    """`x @ w.T` with INT4 weights and FP8 activations, accumulated in fp32.

    Args:
        x: [..., K], any float dtype; quantized to FP8 per token.
        w: [N, K], in "lut" or "exact" numerics.
        out_dtype: dtype of the result, rounded once from fp32.

    Returns:
        [..., N] `channel_scale[n] * (token_scale[m] * sum_k w8[n, k] * x8[m, k])`.

    Raises:
        W4A8Error: shapes or dtypes do not fit.

    The gradient is straight-through: x receives `g @ (w8 * channel_scale)` as if it had not been quantized, and
    channel_scale its true gradient; codes and group scales are constants.
    """
    _check(x, w, 2)
    return round_to(_w4a8(x, w), out_dtype)


def w4a16_matmul(x: Float[Array, "... K"], w: W4Weight, *, out_dtype: Any = jnp.bfloat16) -> Float[Array, "... N"]:
    """`x @ w.T` with INT4 weights dequantized to bf16 and bf16 activations, accumulated in fp32.

    Arguments, result and errors are those of `w4a8_matmul`; the gradient is that of the rounded operands.
    """
    _check(x, w, 2)
    return round_to(reference.matmul_w4a16(x, w), out_dtype)


def w4a8_ragged_matmul(
    x: Float[Array, "M K"], w: W4Weight, group_sizes: Int[Array, "E"], *, out_dtype: Any = jnp.bfloat16
) -> Float[Array, "M N"]:
    """`w4a8_matmul` of consecutive groups of rows, each with its own weight, as `jax.lax.ragged_dot`.

    Args:
        x: [M, K]; rows are sorted by group.
        w: [E, N, K].
        group_sizes: int [E], rows of each group; their sum may be less than M, and rows past it give zeros.
        out_dtype: dtype of the result, rounded once from fp32.

    Raises:
        W4A8Error: shapes or dtypes do not fit.
    """
    _check(x, w, 3)
    if x.ndim != 2:
        raise W4A8Error(f"x: expected [M, K], found {list(x.shape)}")
    if group_sizes.shape != w.shape[:1] or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        found = f"{group_sizes.dtype}{list(group_sizes.shape)}"
        raise W4A8Error(f"group_sizes: expected integers [{w.shape[0]}], one for each expert, found {found}")
    return round_to(reference.ragged_matmul(x, w, group_sizes), out_dtype)


def _check(x: Array, w: W4Weight, rank: int) -> None:
    if not isinstance(w, W4Weight):
        raise W4A8Error(f"w: expected a W4Weight, found {type(w).__name__}")
    if len(w.shape) != rank:
        raise W4A8Error(f"w: expected {['[N, K]', '[E, N, K]'][rank - 2]}, found {list(w.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise W4A8Error(f"x: expected a float dtype, found {x.dtype}")
    if x.ndim == 0 or x.shape[-1] != w.shape[-1]:
        raise W4A8Error(f"x: expected [..., {w.shape[-1]}] to fit w {list(w.shape)}, found {list(x.shape)}")


@jax.custom_vjp
def _w4a8(x: Array, w: W4Weight) -> Array:
    return reference.matmul(x, w)


def _w4a8_forward(x: Array, w: W4Weight) -> tuple[Array, tuple[Array, W4Weight]]:
    return _w4a8(x, w), (x, w)


def _w4a8_backward(saved: tuple[Array, W4Weight], g: Array) -> tuple[Array, W4Weight]:
    x, w = saved
    dot = partial(jnp.dot, precision="highest")
    dx = dot(g * w.channel_scale, w.operand().astype(jnp.float32)).astype(x.dtype)
    unscaled = reference.matmul(x, W4Weight(w.packed, w.group_scale, jnp.ones_like(w.channel_scale), w.numerics))
    d_channel_scale = jnp.sum((g * unscaled).reshape(-1, g.shape[-1]), axis=0)
    no_tangent = np.zeros(w.packed.shape, jax.dtypes.float0)
    return dx, W4Weight(no_tangent, jnp.zeros_like(w.group_scale), d_channel_scale, w.numerics, w.code_min)


_w4a8.defvjp(_w4a8_forward, _w4a8_backward)
