"""Normalization over the last axis, computed in fp32."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """`weight * x / rms(x)`; the normalized value is rounded to x's dtype before the product, as Llama's is."""

    def __init__(self, size: int, *, eps: float, param_dtype: Any = jnp.bfloat16):
        self.weight = nnx.Param(jnp.ones((size,), param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.weight.get_value().astype(x.dtype) * wide.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Mean-subtracting normalization with a weight and no bias, as Cohere's is; rounded once, at the end."""

    def __init__(self, size: int, *, eps: float, param_dtype: Any = jnp.bfloat16):
        self.weight = nnx.Param(jnp.ones((size,), param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (self.weight.get_value().astype(jnp.float32) * wide).astype(x.dtype)
