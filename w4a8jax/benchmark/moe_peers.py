"""vLLM's CUTLASS W4A8 for experts, as the benchmark's kernel, and what `moe_marlin` shares with it.

Needs torch only when it is called. Argument lists, the weights' encoding and the order of an MLP's steps are those of
vLLM 0.26's Python: `_custom_ops.py`, `fused_moe/experts/cutlass_moe.py`, `fused_moe/moe_permute_unpermute.py`. The
router is a product in bf16, as vLLM has it. Buffers that vLLM keeps between layers are made beforehand, others at each
launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from pallas_kernels import GROUP_SIZE
from pallas_kernels.errors import W4A8Error

from .moe_kernels import ExpertsKernel
from .moe_operands import ExpertWeights, MlpInputs
from .moe_points import Model, Point
from .operands import Tokens
from .peers import TorchRunner, signed_words, to_torch


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
            return mlp_inputs(tokens)
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
        route = router_of(model, tokens)
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
            inner8, inner_scale = _quantized(gated(products))
            results = _w4a8_product(inner8, inner_scale, offsets[:-1], second, w[1])
            out = torch.empty_like(x)
            torch.ops._moe_C.moe_unpermute(results, weights, inverse.view(-1), offsets, model.top_k, out)
            return out

        return run


def _encoded(weights: ExpertWeights, i: int) -> Any:
    """Codes in the kernel's order, their layout, group scales, channel scales, and strides of operands and result."""
    experts, n, k = weights.experts, weights.n, weights.k
    if k % 256:
        # The operator checks this no more than the reads beyond the end that follow.
        raise W4A8Error(f"vLLM's W4A8 reorders weights of K {k} wrongly: K must be a multiple of 256")
    import torch

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


def mlp_inputs(inputs: MlpInputs) -> list[Any]:
    """Tokens and the router of each set of routes, both bf16."""
    import torch

    x = to_torch(inputs.x)
    return [(x, to_torch(router).to(torch.bfloat16)) for router in inputs.routers]


def router_of(model: Model, tokens: int) -> Callable[[Any, Any], Any]:
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


def gated(products: Any) -> Any:
    """`silu(gate) * up` of products [rows, 2F], by vLLM's operator."""
    import torch

    out = torch.empty((len(products), products.shape[1] // 2), dtype=products.dtype, device=products.device)
    torch.ops._C.silu_and_mul(out, products)
    return out
