"""A mixture of experts as it is trained: every expert computes every token, and a loss keeps the experts in use.

With so few and small experts, two large matrix products are faster than sorting tokens, and any compiler differentiates
them. The weights are those of the library's `MoE`, the result the same but for the order of roundings.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from models.layers.moe import MoE
from pallas_kernels.moe import router_logits


class DenselyComputedMoE:
    """Computes what a `MoE` computes, and notes where tokens went.

    After a call with x [B, T, D]: `chosen`, bool [B, T, E], the experts of each token; `balance`, fp32, the load
    balancing loss of Switch Transformers (arXiv 2101.03961) for top-k: E * sum_e (share of choices that fell on e) *
    (mean router probability of e), 1 when all experts are used alike.
    """

    def __init__(self, moe: MoE):
        self.moe = moe
        self.chosen: jax.Array
        self.balance: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        config, experts = self.moe.config, self.moe.experts
        logits = router_logits(x, self.moe.router.get_value())
        weights, indices = self.moe.choose(x)
        picked = jax.nn.one_hot(indices, config.num_experts, dtype=jnp.float32)
        weight = jnp.einsum("btk,btke->bte", weights, picked)
        self.chosen = picked.sum(2) > 0
        share = self.chosen.mean((0, 1), dtype=jnp.float32) / config.top_k
        probability = jax.nn.softmax(logits, axis=-1).mean((0, 1))
        self.balance = config.num_experts * jnp.sum(share * probability)

        gate, up = jnp.split(jnp.einsum("btd,efd->btef", x, experts.gate_up.get_value().astype(x.dtype)), 2, axis=-1)
        inner = jax.nn.silu(gate) * up * weight[..., None].astype(x.dtype)
        routed = jnp.einsum("btef,edf->btd", inner, experts.down.get_value().astype(x.dtype))
        if self.moe.shared is None:
            return routed
        total = routed + self.moe.shared(x)
        return total / 2 if config.shared_combination == "average" else total
