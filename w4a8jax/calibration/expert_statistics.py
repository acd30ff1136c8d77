"""What the experts of a layer see on the calibration samples: Hessians, of a few experts at a time.

Each expert is calibrated on all tokens that count, however rarely its router picks it: those that are sent to it count
in full, the others with a small weight, which leaves the Hessian of an expert that is picked often as it is and gives
that of one that never is the rank of all tokens'. With weight 1 this is what llm-compressor's `calibrate_all_experts`
does. The layer's output, from which the next layer's inputs come, takes the true routing.

The inputs of a layer's experts, the same for all, are kept in a file, so that attention runs once, not once for each
group of experts.
"""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.config import MoEConfig
from models.decoder import Block
from models.layers.linear import Scheme
from pallas_kernels import W4Weight, w4a8_matmul, w4a16_matmul
from pallas_kernels.moe import gated, route, router_logits

from .hessian_sum import HessianSum
from .statistics import CHUNK, ResidualStream, TokenFile, inputs, kernel_inputs

ExpertMatrix = Float[Array, "N K"] | W4Weight
Leaf = Literal["gate_up", "down"]


def expert_inputs(block: Block, stream: ResidualStream) -> TokenFile:
    """What enters a layer's router and experts, a row for each token that counts."""
    file, row = TokenFile(int(stream.mask.sum()), stream.config.hidden_size, stream.dtype), 0
    for found in inputs(block, stream, ["mlp"], stream.mask):
        file.write(row, found["mlp"])
        row += len(found["mlp"])
    return file


def expert_groups(config: MoEConfig, hidden: int, memory: int) -> list[range]:
    """Experts whose Hessians are held at once: as many as fit into `memory` bytes, at least one."""
    size = max(1, memory // (4 * max(hidden, config.intermediate_size) ** 2))
    return [range(first, min(first + size, config.num_experts)) for first in range(0, config.num_experts, size)]


def expert_hessians(
    config: MoEConfig,
    router: Float[Array, "E D"],
    tokens: TokenFile,
    gate_up: Mapping[int, ExpertMatrix | None],
    *,
    scheme: Scheme,
    unrouted_weight: float,
) -> dict[int, Float[Array, "K K"]]:
    """sum weight * x x^T over the tokens that count, of the inputs x of some experts; fp32 [K, K] each.

    Args:
        config: of the experts.
        router: its weight.
        tokens: of `expert_inputs`.
        gate_up: the experts, each with its gate_up [2F, D], float or quantized, if the Hessian is that of down's inputs
            (K = F); None if it is that of gate_up's (K = D).
        scheme: x as that scheme's kernel multiplies it, "w4a8" rounded to FP8 by token.
        unrouted_weight: the weight of a token for experts that it is not sent to; 1 for those that it is sent to.
    """
    sums = {
        e: HessianSum(tokens.width if weight is None else config.intermediate_size) for e, weight in gate_up.items()
    }
    size = min(CHUNK, tokens.tokens)
    for start in range(0, tokens.tokens, size):
        rows = tokens.read(start, min(size, tokens.tokens - start))
        counted = np.arange(size) < len(rows)
        x = jnp.asarray(np.concatenate([rows, np.zeros((size - len(rows), tokens.width), rows.dtype)]))
        weights = token_weights(config, router, x, unrouted_weight)
        for e, weight in gate_up.items():
            sums[e].add(_multiplied(x, weight, scheme=scheme), counted, weights[:, e])
    return {e: sums.pop(e).result() for e in gate_up}


@partial(jax.jit, static_argnames=("config",))
def token_weights(
    config: MoEConfig, router: Float[Array, "E D"], x: Float[Array, "T D"], unrouted_weight: float
) -> Float[Array, "T E"]:
    """What each token counts for each expert: 1 if it is sent there, else `unrouted_weight`."""
    _, experts = route(router_logits(x, router), config.top_k, selection=config.selection, normalize=config.normalize)
    sent = jax.nn.one_hot(experts, config.num_experts, dtype=bool).any(axis=1)
    return jnp.where(sent, 1.0, unrouted_weight)


def expert_inner(x: Float[Array, "T D"], gate_up: ExpertMatrix, scheme: Scheme) -> Float[Array, "T F"]:
    """An expert's `silu(gate) * up` for each token, which down multiplies, with the roundings of `moe_mlp`."""
    if isinstance(gate_up, W4Weight):
        matmul = w4a8_matmul if scheme == "w4a8" else w4a16_matmul
        return gated(matmul(x, gate_up, out_dtype=x.dtype))
    return gated(x @ gate_up.astype(x.dtype).T)


@partial(jax.jit, static_argnames=("scheme",))
def _multiplied(x: Float[Array, "T D"], gate_up: ExpertMatrix | None, *, scheme: Scheme) -> Float[Array, "T K"]:
    """The inputs of an expert's down, or of its gate_up, as the kernel multiplies them."""
    return kernel_inputs(x if gate_up is None else expert_inner(x, gate_up, scheme), scheme == "w4a8")
