"""The gated MLP."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.ops import gated

from .linear import Linear


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`, with gate and up in one fused projection."""

    def __init__(self, hidden: int, intermediate: int, *, use_bias: bool, param_dtype: Any, rngs: nnx.Rngs):
        self.gate_up = Linear(hidden, 2 * intermediate, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs)
        self.shards = 1  # pieces of the fused projection, see `models.sharding`
        self.down = Linear(intermediate, hidden, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """silu(gate) is rounded to x's dtype, and its product with up again."""
        gate_up = self.gate_up(x)
        # What stands in for a layer, to see its inputs, has no kernel.
        if self.shards == 1 and isinstance(self.down, Linear) and self.down.gates:
            return self.down.of_gated(gate_up)
        pieces = gate_up.reshape(*x.shape[:-1], self.shards, -1)
        return self.down(gated(pieces).reshape(*x.shape[:-1], -1))
