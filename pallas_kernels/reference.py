"""The arithmetic of W4A8 and W4A16 in plain jnp: every platform's fallback and every kernel's oracle."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .activations import activation_values, quantize_activations
from .rounding import round_to
from .weight_format import W4Weight

_IN_BF16 = {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float8_e4m3fn)}


def matmul(x: Float[Array, "... K"], w: W4Weight) -> Float[Array, "... N"]:
    """fp32 `channel_scale * (token_scale * sum_k w8 * x8)`, [..., N]."""
    x8, token_scale = activation_values(x)
    x8 = x8.astype(jnp.bfloat16) if _narrow() else x8
    return w.channel_scale * (token_scale * _dot(x8, w.operand()))


def matmul_w4a16(x: Float[Array, "... K"], w: W4Weight) -> Float[Array, "... N"]:
    """fp32 `channel_scale * sum_k bf16(operand) * bf16(x)`, [..., N]: weights only are quantized."""
    return w.channel_scale * _dot(round_to(x, jnp.bfloat16), round_to(w.operand(), jnp.bfloat16))


def ragged_matmul(x: Float[Array, "M K"], w: W4Weight, group_sizes: Int[Array, "E"]) -> Float[Array, "M N"]:
    """fp32 [M, N]: the first `group_sizes[0]` rows times expert 0, and so on; rows past the sum are zero."""
    x8, token_scale = quantize_activations(x)
    total = _ragged_dot(x8, w, W4Weight.operand, group_sizes)
    return _row_scale(w, group_sizes, len(x)) * (token_scale * total)


def ragged_matmul_w4a16(x: Float[Array, "M K"], w: W4Weight, group_sizes: Int[Array, "E"]) -> Float[Array, "M N"]:
    """`ragged_matmul` of bf16 operands, as `matmul_w4a16`."""
    total = _ragged_dot(round_to(x, jnp.bfloat16), w, lambda part: round_to(part.operand(), jnp.bfloat16), group_sizes)
    return _row_scale(w, group_sizes, len(x)) * total


@jax.custom_vjp
def ragged_dot(x: Float[Array, "M K"], w: Float[Array, "E N K"], group_sizes: Int[Array, "E"]) -> Float[Array, "M N"]:
    """fp32 [M, N] sums of consecutive groups of rows times `w[e].T`; rows past the groups are zero."""
    return _ragged_dot(x, w, lambda part: part, group_sizes)


def _ragged_dot_forward(x: Array, w: Array, group_sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return ragged_dot(x, w, group_sizes), (x, w, group_sizes)


def _ragged_dot_backward(saved: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, np.ndarray]:
    x, w, group_sizes = saved
    _, transpose = jax.vjp(lambda x, w: _whole_ragged_dot(x, w, group_sizes), x, w)
    return *transpose(g), np.zeros(group_sizes.shape, jax.dtypes.float0)


ragged_dot.defvjp(_ragged_dot_forward, _ragged_dot_backward)


def _ragged_dot(x: Array, w: Any, operand: Callable[[Any], Array], group_sizes: Array) -> Array:
    """`ragged_dot` with `operand(w)` [E, N, K], for `w` a pytree of arrays [E, ...]."""
    # Experts divided among devices stay where they are: in tiles, each device would need each expert.
    by_tiles = jax.default_backend() == "cpu" and jax.local_device_count() == 1
    return (_tiled_ragged_dot if by_tiles else _dense_ragged_dot)(x, w, operand, group_sizes)


def _dense_ragged_dot(x: Array, w: Any, operand: Callable[[Any], Array], group_sizes: Array) -> Array:
    return _whole_ragged_dot(x, operand(w), group_sizes)


def _whole_ragged_dot(x: Array, w: Array, group_sizes: Array) -> Array:
    return jax.lax.ragged_dot(
        x.astype(jnp.float32), jnp.swapaxes(w.astype(jnp.float32), -1, -2), group_sizes, precision="highest",
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _tiled_ragged_dot(x: Array, w: Any, operand: Callable[[Any], Array], group_sizes: Array) -> Array:
    """In tiles of rows of one expert, and only that expert's weights dequantized.

    XLA's own ragged_dot multiplies every row with every expert on a CPU, and holds E times the result.
    """
    m, k = x.shape
    experts = len(group_sizes)
    n = jax.eval_shape(operand, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), w)).shape[0]
    rows = min(128, max(8, 1 << (m // experts).bit_length()))
    ends = jnp.cumsum(group_sizes)
    last_tile = jnp.cumsum(-(-group_sizes // rows))
    x = jnp.pad(x.astype(jnp.float32), ((0, rows), (0, 0)))

    def tile(i: Array, out: Array) -> Array:
        expert = jnp.searchsorted(last_tile, i, side="right")
        start = ends[expert] - group_sizes[expert] + (i - last_tile[expert] - (-group_sizes[expert] // rows)) * rows
        weight = operand(jax.tree.map(lambda leaf: leaf[expert], w))
        product = _dot(jax.lax.dynamic_slice(x, (start, 0), (rows, k)), weight)
        # Rows of the next expert, if any, are overwritten by its own tile, which comes later.
        return jax.lax.dynamic_update_slice(out, product, (start, 0))

    out = jax.lax.fori_loop(0, last_tile[-1], tile, jnp.zeros((m + rows, n), jnp.float32))[:m]
    return jnp.where(jnp.arange(m)[:, None] < ends[-1], out, 0)


def _row_scale(w: W4Weight, group_sizes: Int[Array, "E"], rows: int) -> Float[Array, "M N"]:
    """The channel scales of each row's expert."""
    expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows), side="right")
    return w.channel_scale.at[expert].get(mode="clip")


def _dot(x: Float[Array, "... K"], w: Float[Array, "N K"]) -> Float[Array, "... N"]:
    """fp32 sums of products that fp32 holds exactly."""
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    # bf16 holds e4m3 exactly, and CPUs with instructions for it multiply it twice as fast; others half as fast.
    dtype = jnp.bfloat16 if {x.dtype, w.dtype} <= _IN_BF16 and _narrow() else jnp.float32
    return jax.lax.dot_general(
        x.astype(dtype), w.astype(dtype), contract, precision="highest", preferred_element_type=jnp.float32
    )


def _narrow() -> bool:
    return jax.default_backend() == "cpu" and _multiplies_bf16()


@functools.cache
def _multiplies_bf16() -> bool:
    """Whether this machine's processor has instructions for products of bf16, as far as Linux tells."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return not words.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})
