"""vLLM's Marlin W4A16 for experts, as the benchmark's kernel. Needs torch only when it is called.

Argument lists, the weights' encoding and the order of an MLP's steps are those of vLLM 0.26's Python: `_custom_ops.py`,
`fused_moe/experts/marlin_moe.py`, `fused_moe/moe_align_block_size.py`, `quantization/utils/marlin_utils.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from .moe_operands import ExpertWeights, MlpInputs
from .moe_peers import VllmExperts, gated, mlp_inputs, router_of
from .moe_points import Point
from .operands import Tokens
from .peers import UINT4B8, marlin_scales, to_torch


class VllmMarlinExperts(VllmExperts):
    """`moe_wna16_marlin_gemm`: codes with bf16 activations, partial sums reduced in fp32."""

    def weight(self, weights: Sequence[ExpertWeights], i: int) -> Any:
        return [_repacked(w, i) for w in weights]

    def inputs(self, point: Point, tokens: Tokens | MlpInputs) -> list[Any]:
        import torch

        if isinstance(tokens, MlpInputs):
            return mlp_inputs(tokens)
        found = []
        for i in range(point.routes.sets):
            x = to_torch(tokens.bf16[i])[: point.rows]
            # Rows are sorted already: each is a token of its own that meets one expert.
            ids = np.repeat(np.arange(point.model.experts, dtype=np.int32), point.routes.sizes(i))[:, None]
            aligned = _aligned(torch.from_numpy(ids).to(x.device), point)
            found.append((x, aligned, torch.ones(point.rows, 1, device=x.device)))
        return found

    def product(self, point: Point) -> Callable[[Any, Any], Any]:
        ((n, k),) = point.shapes

        def run(inputs: Any, w: Any) -> Any:
            x, aligned, weights = inputs
            return _marlin(x, w[0], n, k, aligned, weights, block_size(point), 1, False)

        return run

    def mlp(self, point: Point) -> Callable[[Any, Any], Any]:
        import torch

        model = point.model
        route = router_of(model, point.tokens)
        (n1, k1), (n2, k2) = point.shapes

        def run(inputs: Any, w: Any) -> Any:
            x, router = inputs
            weights, ids = route(x, router)
            aligned = _aligned(ids, point)
            products = _marlin(x, w[0], n1, k1, aligned, weights, block_size(point), model.top_k, False)
            rows = _marlin(gated(products), w[1], n2, k2, aligned, weights, block_size(point), 1, True)
            out = torch.empty_like(x)
            torch.ops._moe_C.moe_sum(rows.view(-1, model.top_k, model.hidden), out, None, None)
            return out

        return run


def block_size(point: Point) -> int:
    """Rows of an expert that Marlin computes at a time, as vLLM chooses them."""
    sizes = (8, 16, 32, 48, 64)
    return next((size for size in sizes if point.rows / point.model.experts / size < 0.9), sizes[-1])


def _repacked(weights: ExpertWeights, i: int) -> Any:
    """Codes and scales in Marlin's order, and its workspace."""
    import torch

    w, scale = weights.quantized(i)
    words = to_torch(w.packed)  # [E, N, K/8]
    none = torch.empty(0, dtype=torch.int32, device=words.device)
    packed = torch.empty((weights.experts, weights.k // 16, 2 * weights.n), dtype=torch.int32, device=words.device)
    for out, part in zip(packed, words, strict=True):
        out.copy_(torch.ops._C.gptq_marlin_repack(part.t().contiguous(), none, weights.k, weights.n, 4, False))
    multiprocessors = torch.cuda.get_device_properties(words.device).multi_processor_count
    workspace = torch.zeros(4 * multiprocessors, dtype=torch.int32, device=words.device)
    return packed, to_torch(marlin_scales(jnp.swapaxes(scale, 1, 2))), workspace


def _aligned(ids: Any, point: Point) -> Any:
    """Places of rows in blocks of one expert each, the blocks' experts, and how many rows they have together."""
    import torch

    experts, block, rows = point.model.experts, block_size(point), ids.numel()
    most = rows + experts * (block - 1)
    most = min(most, rows * block) if rows < experts else most
    options: dict[str, Any] = {"dtype": torch.int32, "device": ids.device}
    sizes = most, -(-most // block), 1
    places, block_experts, total = (torch.empty(size, **options) for size in sizes)
    torch.ops._moe_C.moe_align_block_size(ids, experts, block, places, block_experts, total, None)
    return places, block_experts, total


def _marlin(x: Any, w: Any, n: int, k: int, aligned: Any, weights: Any, block: int, top_k: int, weighted: bool) -> Any:
    """bf16 [rows * top_k, N]; each row of x times `top_k` experts, times their weights if wanted."""
    import torch

    packed, scale, workspace = w
    out = torch.empty((len(x) * top_k, n), dtype=x.dtype, device=x.device)
    return torch.ops._moe_C.moe_wna16_marlin_gemm(
        x,
        out,
        packed,
        None,  # bias
        scale,
        None,  # scales of activations
        None,  # global scale
        None,  # zero points
        None,  # order of groups, and of columns
        None,
        workspace,
        *aligned,
        weights,
        block,
        top_k,
        weighted,
        UINT4B8,
        len(x),
        n,
        k,
        True,  # all of K is here
        False,  # atomic additions
        True,  # sums in fp32
        False,  # zero points are floats
        -1,  # its own choice of tiles, and of blocks a multiprocessor
        -1,
        -1,
    )
