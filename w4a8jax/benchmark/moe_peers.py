"""vLLM's kernels for experts, as the benchmark's: CUTLASS W4A8 and Marlin W4A16. Needs torch only when it is called.

Argument lists, the weights' encodings and the order of an MLP's steps are those of vLLM 0.26's Python:
`_custom_ops.py`, `fused_moe/experts/cutlass_moe.py` and `marlin_moe.py`, `fused_moe/moe_permute_unpermute.py`. The
router is a product in bf16, as vLLM has it. Buffers that vLLM keeps between layers are made beforehand, others at each
launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from pallas_kernels import GROUP_SIZE
from pallas_kernels.errors import W4A8Error

from .moe_kernels import ExpertsKernel
from .moe_operands import ExpertWeights, MlpInputs
from .moe_points import Model, Point
from .operands import Tokens
from .peers import UINT4B8, TorchRunner, load_vllm, marlin_scales, signed_words, to_torch


def vllm_experts(folder: str | Path) -> list[ExpertsKernel]:
    """vLLM's, from a folder that holds its two kernel libraries, at whatever depth.

    Raises:
        W4A8Error: torch is missing, a library is missing or cannot be loaded.
    """
    load_vllm(folder)
    return [
        VllmW4A8Experts("vllm cutlass w4a8", "w4a8", 0.5 + 1 / GROUP_SIZE, 1, tolerance=3e-2),
        VllmMarlinExperts("vllm marlin w4a16", "w4a16", 0.5 + 2 / GROUP_SIZE, 2),
    ]


class VllmExperts(TorchRunner, ExpertsKernel):
    """What vLLM's share: both run products and MLPs."""

    def takes(self, point: Point) -> bool:
        return True

    def function(self, point: Point) -> Callable[[Any, Any], Any]:
        """Products and MLPs take the same two arguments: the inputs of a set, and the weights of each product."""
        return self.mlp(point) if point.product == "mlp" else self.product(point)

    def product(self, point: Point) -> Callable[[Any, Any], Any]:
        """A single product."""
        raise NotImplementedError

    def mlp(self, point: Point) -> Callable[[Any, Any], Any]:
        """The whole MLP."""
        raise NotImplementedError


class VllmW4A8Experts(VllmExperts):
    """`cutlass_w4a8_moe_mm`, in the schedule that it chooses."""

    def weight(self, weights: Sequence[ExpertWeights], i: int) -> Any:
        return [_encoded(w, i) for w in weights]

    def inputs(self, point: Point, tokens: Tokens | MlpInputs) -> list[Any]:
        import torch

        if isinstance(tokens, MlpInputs):
            return _mlp_inputs(tokens)
        ((n, k),), found = point.shapes, []
        for i in range(point.routes.sets):
            x8, token_scale = (to_torch(v)[: point.rows] for v in tokens.fp8[i])
            sizes = torch.from_numpy(point.routes.sizes(i)).to(x8.device)
            offsets = torch.cumsum(sizes, 0, dtype=torch.int64) - sizes
            # (N, M, K): the kernel has weights as its first operand.
            problems = torch.stack([torch.full_like(sizes, n), sizes, torch.full_like(sizes, k)], 1).contiguous()
            found.append((x8, token_scale, offsets, problems))
        return found

    def product(self, point: Point) -> Callable[[Any, Any], Any]:
        def run(inputs: Any, w: Any) -> Any:
            x8, token_scale, offsets, problems = inputs
            return _w4a8_product(x8, token_scale, offsets, problems, w[0])

        return run

    def mlp(self, point: Point) -> Callable[[Any, Any], Any]:
        import torch

        model, tokens, rows = point.model, point.tokens, point.rows
        options: dict[str, Any] = {"device": "cuda", "dtype": torch.int32}
        route = _router(model, tokens)
        places = torch.arange(rows, **options).view(tokens, model.top_k)
        offsets = torch.empty(model.experts + 1, device="cuda", dtype=torch.int64)
        permuted, inverse = torch.empty(rows, **options), torch.empty(tokens, model.top_k, **options)
        scratch = [torch.empty(tokens, model.top_k, **options) for _ in range(3)]
        size = torch.ops._moe_C.moe_permute_sort_workspace_size(rows, model.experts)
        workspace = torch.empty(size, dtype=torch.int8, device="cuda")

        def run(inputs: Any, w: Any) -> Any:
            x, router = inputs
            weights, ids = route(x, router)
            x8, token_scale = _quantized(x)
            rows8 = torch.empty((rows, model.hidden), dtype=x8.dtype, device=x8.device)
            permuted.fill_(rows)
            torch.ops._moe_C.moe_permute_with_scratch(
                x8,
                ids,
                places,
                None,
                model.experts,
                model.experts,
                model.top_k,
                rows8,
                offsets,
                inverse,
                permuted,
                workspace,
                *scratch,
            )
            row_scale = token_scale[permuted.clamp(max=rows - 1) // model.top_k]
            first, second = (torch.empty(model.experts, 3, **options) for _ in range(2))
            torch.ops._C.get_cutlass_moe_mm_problem_sizes_from_expert_offsets(
                offsets, first, second, model.inner, model.hidden, True
            )
            products = _w4a8_product(rows8, row_scale, offsets[:-1], first, w[0])
            inner8, inner_scale = _quantized(_gated(products))
            results = _w4a8_product(inner8, inner_scale, offsets[:-1], second, w[1])
            out = torch.empty_like(x)
            torch.ops._moe_C.moe_unpermute(results, weights, inverse.view(-1), offsets, model.top_k, out)
            return out

        return run


class VllmMarlinExperts(VllmExperts):
    """`moe_wna16_marlin_gemm`: codes with bf16 activations, partial sums reduced in fp32."""

    def weight(self, weights: Sequence[ExpertWeights], i: int) -> Any:
        return [_repacked(w, i) for w in weights]

    def inputs(self, point: Point, tokens: Tokens | MlpInputs) -> list[Any]:
        import numpy as np
        import torch

        if isinstance(tokens, MlpInputs):
            return _mlp_inputs(tokens)
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
        route = _router(model, point.tokens)
        (n1, k1), (n2, k2) = point.shapes

        def run(inputs: Any, w: Any) -> Any:
            x, router = inputs
            weights, ids = route(x, router)
            aligned = _aligned(ids, point)
            products = _marlin(x, w[0], n1, k1, aligned, weights, block_size(point), model.top_k, False)
            rows = _marlin(_gated(products), w[1], n2, k2, aligned, weights, block_size(point), 1, True)
            out = torch.empty_like(x)
            torch.ops._moe_C.moe_sum(rows.view(-1, model.top_k, model.hidden), out, None, None)
            return out

        return run


def block_size(point: Point) -> int:
    """Rows of an expert that Marlin computes at a time, as vLLM chooses them."""
    sizes = (8, 16, 32, 48, 64)
    return next((size for size in sizes if point.rows / point.model.experts / size < 0.9), sizes[-1])


def _encoded(weights: ExpertWeights, i: int) -> Any:
    """Codes in the kernel's order, their layout, group scales, channel scales, and strides of operands and result."""
    import torch

    experts, n, k = weights.experts, weights.n, weights.k
    if k % 256:
        # The operator checks this no more than the reads beyond the end that follow.
        raise W4A8Error(f"vLLM's W4A8 reorders weights of K {k} wrongly: K must be a multiple of 256")
    w, _ = weights.quantized(i)
    packed, layout = torch.ops._C.cutlass_encode_and_reorder_int4b_grouped(to_torch(signed_words(w.packed)))
    scales = torch.ops._C.cutlass_pack_scale_fp8(to_torch(jnp.swapaxes(w.group_scale, 1, 2)))
    strides = [torch.full((experts,), size, dtype=torch.int64, device="cuda") for size in (k, n)]
    # Strides of group scales are pairs of which the second is 0.
    scale_strides = torch.stack([strides[1], torch.zeros_like(strides[1])], 1).contiguous()
    return packed, layout, scales, to_torch(w.channel_scale)[..., None], strides, scale_strides


def _w4a8_product(x8: Any, token_scale: Any, offsets: Any, problems: Any, w: Any) -> Any:
    import torch

    packed, layout, scales, channel_scale, (x_strides, out_strides), scale_strides = w
    out = torch.empty((len(x8), packed.shape[1]), dtype=torch.bfloat16, device=x8.device)
    torch.ops._C.cutlass_w4a8_moe_mm(
        out,
        x8,
        packed,
        token_scale,
        channel_scale,
        scales,
        GROUP_SIZE,
        offsets,
        problems,
        x_strides,
        layout,
        out_strides,
        scale_strides,
        None,
    )
    return out


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


def _mlp_inputs(inputs: MlpInputs) -> list[Any]:
    import torch

    x = to_torch(inputs.x)
    return [(x, to_torch(router).to(torch.bfloat16)) for router in inputs.routers]


def _router(model: Model, tokens: int) -> Callable[[Any, Any], Any]:
    """Weights fp32 and experts int32, [tokens, top_k] each, of tokens and a router."""
    import torch

    shape = tokens, model.top_k
    weights = torch.empty(shape, dtype=torch.float32, device="cuda")
    ids, sources = (torch.empty(shape, dtype=torch.int32, device="cuda") for _ in range(2))
    # Of topk_softmax's arguments the last is a bias; topk_sigmoid has a factor after it.
    softmax = model.selection == "softmax"
    select = torch.ops._moe_C.topk_softmax if softmax else torch.ops._moe_C.topk_sigmoid
    more = (True, None) if softmax else (True, None, 1.0)

    def route(x: Any, router: Any) -> Any:
        logits = torch.nn.functional.linear(x, router).float()
        select(weights, ids, sources, logits, *more)
        return weights, ids

    return route


def _quantized(x: Any) -> Any:
    import torch

    x8 = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((len(x), 1), dtype=torch.float32, device=x.device)
    torch.ops._C.dynamic_per_token_scaled_fp8_quant(x8, x, scale, None)
    return x8, scale


def _gated(products: Any) -> Any:
    import torch

    out = torch.empty((len(products), products.shape[1] // 2), dtype=products.dtype, device=products.device)
    torch.ops._C.silu_and_mul(out, products)
    return out
