"""A mixture of experts in place of the MLP."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels import moe_mlp
from pallas_kernels.fragments import Scheme
from pallas_kernels.moe import route, router_logits

from ..config import MoEConfig
from .linear import LARGE
from .mlp import MLP


class Experts(nnx.Module):
    """The weights of all experts of a layer, E experts of width F.

    `gate_up` [E, 2F, D] and `down` [E, D, F] hold float arrays, or once a quantized checkpoint is loaded `W4Weight`s;
    then `scheme` says whether activations are quantized too.
    """

    def __init__(self, hidden: int, config: MoEConfig, *, param_dtype: Any, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(0.02)
        count, inner = config.num_experts, config.intermediate_size
        self.gate_up = nnx.Param(init(rngs.params(), (count, 2 * inner, hidden), param_dtype))
        self.down = nnx.Param(init(rngs.params(), (count, hidden, inner), param_dtype))
        self.scheme: Scheme = "w4a8"


class MoE(nnx.Module):
    """The sum of each token's experts, or its sum or mean with an MLP that all tokens share.

    The router [E, D] is in fp32 whatever the other parameters' dtype: a rounding there decides which experts a token
    meets.
    """

    def __init__(self, hidden: int, config: MoEConfig, *, use_bias: bool, param_dtype: Any, rngs: nnx.Rngs):
        self.config = config
        init = jax.nn.initializers.normal(0.02)
        self.router = nnx.Param(init(rngs.params(), (config.num_experts, hidden), jnp.float32))
        self.experts = Experts(hidden, config, param_dtype=param_dtype, rngs=rngs)
        self.shared = nnx.data(None)
        if width := config.shared_intermediate_size:
            self.shared = MLP(hidden, width, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs)

    def choose(self, x: Float[Array, "... D"]) -> tuple[Float[Array, "... top_k"], Int[Array, "... top_k"]]:
        """fp32 weights and int32 experts of each token, greatest first."""
        config, logits = self.config, router_logits(x, self.router.get_value())
        flat = route(
            logits.reshape(-1, config.num_experts), config.top_k, selection=config.selection, normalize=config.normalize
        )
        weights, experts = (part.reshape(*x.shape[:-1], config.top_k) for part in flat)
        return weights, experts

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        config = self.config
        gate_up, down = self.experts.gate_up.get_value(), self.experts.down.get_value()
        inputs = x
        if math.prod(gate_up.shape) >= LARGE and jax.default_backend() == "cpu":
            # As in `Linear`: a layer's weights are widened when their turn comes, not all layers' at once.
            gate_up, down, inputs = jax.lax.optimization_barrier((gate_up, down, x))
        routed = moe_mlp(
            inputs,
            self.router.get_value(),
            gate_up,
            down,
            top_k=config.top_k,
            selection=config.selection,
            normalize=config.normalize,
            scheme=self.experts.scheme,
        )
        if self.shared is None:
            return routed
        total = routed + self.shared(x)
        return total / 2 if config.shared_combination == "average" else total
