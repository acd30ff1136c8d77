"""The gated MLP."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from .linear import Linear


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`, with gate and up in one fused projection."""

    def __init__(self, hidden: int, intermediate: int, *, use_bias: bool, param_dtype: Any, rngs: nnx.Rngs):
        self.gate_up = Linear(hidden, 2 * intermediate, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs)
        self.shards = 1  # pieces of the fused projection, see `models.sharding`
        self.down = Linear(intermediate, hidden, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        pieces = self.gate_up(x).reshape(*x.shape[:-1], self.shards, 2, -1)
        gate, up = (pieces[..., i, :].reshape(*x.shape[:-1], -1) for i in range(2))
        return self.down(jax.nn.silu(gate) * up)
