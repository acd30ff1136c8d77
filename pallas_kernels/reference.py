"""The arithmetic of W4A8 and W4A16 in plain jnp: every platform's fallback and every kernel's oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .activations import quantize_activations
from .rounding import round_to
from .weight_format import W4Weight


def matmul(x: Float[Array, "... K"], w: W4Weight) -> Float[Array, "... N"]:
    """fp32 `channel_scale * (token_scale * sum_k w8 * x8)`, [..., N]."""
    x8, token_scale = quantize_activations(x)
    return w.channel_scale * (token_scale * _dot(x8, w.operand()))


def matmul_w4a16(x: Float[Array, "... K"], w: W4Weight) -> Float[Array, "... N"]:
    """fp32 `channel_scale * sum_k bf16(operand) * bf16(x)`, [..., N]: weights only are quantized."""
    return w.channel_scale * _dot(round_to(x, jnp.bfloat16), round_to(w.operand(), jnp.bfloat16))


def ragged_matmul(x: Float[Array, "M K"], w: W4Weight, group_sizes: Int[Array, "E"]) -> Float[Array, "M N"]:
    """fp32 [M, N]: the first `group_sizes[0]` rows times expert 0, and so on; rows past the sum are zero."""
    x8, token_scale = quantize_activations(x)
    total = ragged_dot(x8, w.operand(), group_sizes)
    return _row_scale(w, group_sizes, len(x)) * (token_scale * total)


def ragged_matmul_w4a16(x: Float[Array, "M K"], w: W4Weight, group_sizes: Int[Array, "E"]) -> Float[Array, "M N"]:
    """`ragged_matmul` of bf16 operands, as `matmul_w4a16`."""
    total = ragged_dot(round_to(x, jnp.bfloat16), round_to(w.operand(), jnp.bfloat16), group_sizes)
    return _row_scale(w, group_sizes, len(x)) * total


def ragged_dot(x: Float[Array, "M K"], w: Float[Array, "E N K"], group_sizes: Int[Array, "E"]) -> Float[Array, "M N"]:
    """fp32 [M, N] sums of consecutive groups of rows times `w[e].T`; rows past the groups are zero."""
    operand = jnp.swapaxes(w.astype(jnp.float32), -1, -2)
    return jax.lax.ragged_dot(
        x.astype(jnp.float32), operand, group_sizes, precision="highest", preferred_element_type=jnp.float32
    )


def _row_scale(w: W4Weight, group_sizes: Int[Array, "E"], rows: int) -> Float[Array, "M N"]:
    """The channel scales of each row's expert."""
    expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows), side="right")
    return w.channel_scale.at[expert].get(mode="clip")


def _dot(x: Float[Array, "... K"], w: Float[Array, "N K"]) -> Float[Array, "... N"]:
    """fp32 sums of products that fp32 holds exactly."""
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(
        x.astype(jnp.float32), w.astype(jnp.float32), contract, precision="highest",
        preferred_element_type=jnp.float32,
    )  # fmt: skip
