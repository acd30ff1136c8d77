"""A linear layer whose weight is a float array or a `W4Weight`."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels import FragmentWeight, W4Weight, w4a8_matmul, w4a16_matmul
from pallas_kernels.ops import w4a8_gated_matmul
from pallas_kernels.straight_through import MasterWeight, straight_through_matmul

LARGE = 2**22  # weights of a layer; smaller ones are fast rather than frugal

Scheme = Literal["bf16", "w4a8", "w4a16"]


class Linear(nnx.Module):
    """`y = x @ weight.T + bias`, with the weight [N, K] as Hugging Face stores it.

    `weight` holds a float array, or once a quantized checkpoint is loaded a `W4Weight` or its layout for a kernel; then
    `scheme` says whether activations are quantized too ("w4a8") or only weights ("w4a16"). "bf16" stands for any float
    weight. A `MasterWeight`, in training, computes as w4a8.
    """

    def __init__(self, k: int, n: int, *, use_bias: bool = False, param_dtype: Any = jnp.bfloat16, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(0.02)
        self.weight = nnx.Param(init(rngs.params(), (n, k), param_dtype))
        self.bias = nnx.Param(jnp.zeros((n,), param_dtype)) if use_bias else nnx.data(None)
        self.scheme: Scheme = "bf16"

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... N"]:
        weight: Any = self.weight.get_value()
        if math.prod(weight.shape) >= LARGE and jax.default_backend() == "cpu":
            # Else XLA widens all layers' weights to fp32 before it computes the first, and holds them all.
            weight, x = jax.lax.optimization_barrier((weight, x))
        if isinstance(weight, W4Weight | FragmentWeight):
            matmul: Any = {"w4a8": w4a8_matmul, "w4a16": w4a16_matmul}[self.scheme]
            y = matmul(x, weight, out_dtype=x.dtype)
        elif isinstance(weight, MasterWeight):
            y = straight_through_matmul(x, weight, out_dtype=x.dtype)
        else:
            y = x @ weight.astype(x.dtype).T
        return self._biased(y)

    @property
    def gates(self) -> bool:
        """Whether `of_gated` computes in fewer passes."""
        return isinstance(self.weight.get_value(), FragmentWeight) and self.scheme == "w4a8"

    def of_gated(self, gate_up: Float[Array, "... 2K"]) -> Float[Array, "... N"]:
        """Of `gated(gate_up)`, for W4A8."""
        weight: Any = self.weight.get_value()
        return self._biased(w4a8_gated_matmul(gate_up, weight, out_dtype=gate_up.dtype))

    def _biased(self, y: Float[Array, "... N"]) -> Float[Array, "... N"]:
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)
