"""Products of torch and of vLLM's kernel libraries, as the benchmark's kernels. Needs torch only when it is called.

vLLM's operators come from the two libraries of its wheel (0.26.0), loaded without the rest of vLLM; argument lists and
the weights' encodings are those of its Python: `_custom_ops.py`, `model_executor/kernels/linear/mixed_precision`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels import GROUP_SIZE
from pallas_kernels.errors import W4A8Error

from .kernels import Kernel, Runner
from .operands import Tokens, Weights

VLLM = "0.26.0"
_LIBRARIES = ("_C_stable_libtorch.abi3.so", "_moe_C_stable_libtorch.abi3.so")
# vllm.scalar_type: four bits, unsigned, biased by 8; mantissa at bit 8, bias at bit 17, IEEE NaNs (1) at bit 50.
UINT4B8 = 4 << 8 | 8 << 17 | 1 << 50


def torch_available() -> bool:
    """Whether torch can be imported."""
    return importlib.util.find_spec("torch") is not None


def torch_kernels() -> list[Kernel]:
    """torch's: bf16, and FP8 with scales for each token and channel, with and without fast accumulation."""
    return [
        TorchMatmul("torch bf16", "bf16", 2, 2),
        TorchScaled("torch fp8 rowwise, fast", "w4a8", 1, 1, tolerance=3e-2),
        TorchScaled("torch fp8 rowwise", "w4a8", 1, 1),
    ]


def vllm_kernels(folder: str | Path) -> list[Kernel]:
    """vLLM's, from a folder that holds its two kernel libraries, at whatever depth.

    Raises:
        W4A8Error: torch is missing, a library is missing or cannot be loaded.
    """
    load_vllm(folder)
    group = 0.5 + 2 / GROUP_SIZE
    return [
        VllmW4A8("vllm cutlass w4a8", "w4a8", 0.5 + 1 / GROUP_SIZE, 1, tolerance=3e-2),
        VllmFP8("vllm cutlass fp8", "w4a8", 1, 1, tolerance=3e-2),
        VllmMachete("vllm machete w4a16", "w4a16", group, 2),
        VllmMarlin("vllm marlin w4a16", "w4a16", group, 2),
    ]


def load_vllm(folder: str | Path) -> None:
    """Loads vLLM's two kernel libraries from a folder that holds them, at whatever depth.

    Raises:
        W4A8Error: torch is missing, a library is missing or cannot be loaded.
    """
    folder = Path(folder).expanduser()
    if not torch_available():
        raise W4A8Error("--vllm: needs torch 2.11, which is not installed")
    import torch

    for name in _LIBRARIES:
        found = sorted(folder.rglob(name))
        if not found:
            raise W4A8Error(f"--vllm {folder}: has no {name}")
        try:
            torch.ops.load_library(str(found[0]))
        except OSError as e:
            raise W4A8Error(f"--vllm {folder}: {name} cannot be loaded: {e.__cause__ or e}") from e


class TorchRunner(Runner):
    """What torch's products and MLPs share."""

    def synchronize(self, result: Any) -> None:
        import torch

        torch.cuda.synchronize()

    def compare(self, a: Any, b: Any, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, bool]:
        import torch

        r, c = (torch.from_numpy(v).to(a.device) for v in (rows, columns))
        return a[r][:, c].double().cpu().numpy(), torch.equal(a.view(torch.int16), b.view(torch.int16))

    def release(self) -> None:
        import torch

        torch.cuda.empty_cache()


class TorchKernel(TorchRunner, Kernel):
    """What torch's products share."""

    def inputs(self, tokens: Tokens) -> list[Any]:
        if self.input_bytes == 2:
            return [to_torch(x) for x in tokens.bf16]
        return [(to_torch(x8), to_torch(token_scale)) for x8, token_scale in tokens.fp8]


class TorchMatmul(TorchKernel):
    """`x @ w.T` in bf16."""

    def weight(self, weights: Weights, i: int) -> Any:
        return to_torch(weights.bf16(i)).t()

    def function(self, m: int, n: int, k: int) -> Callable[[Any, Any], Any]:
        import torch

        return torch.matmul


class TorchScaled(TorchKernel):
    """`torch._scaled_mm`: cuBLAS with a scale for each token and each channel."""

    def weight(self, weights: Weights, i: int) -> Any:
        # [K, N], column-major; scales [1, N].
        return to_torch(weights.fp8(i)).t(), to_torch(weights.quantized(i)[0].channel_scale)[None]

    def function(self, m: int, n: int, k: int) -> Callable[[Any, Any], Any]:
        import torch

        fast = self.name.endswith("fast")

        def product(inputs: Any, w: Any) -> Any:
            return torch._scaled_mm(
                inputs[0], w[0], scale_a=inputs[1], scale_b=w[1], out_dtype=torch.bfloat16, use_fast_accum=fast
            )

        return product


class VllmFP8(TorchKernel):
    """`cutlass_scaled_mm`, with scales [M, 1] and [N, 1]."""

    def weight(self, weights: Weights, i: int) -> Any:
        return to_torch(weights.fp8(i)).t(), to_torch(weights.quantized(i)[0].channel_scale)[:, None]

    def function(self, m: int, n: int, k: int) -> Callable[[Any, Any], Any]:
        import torch

        def product(inputs: Any, w: Any) -> Any:
            out = torch.empty((m, n), dtype=torch.bfloat16, device=inputs[0].device)
            torch.ops._C.cutlass_scaled_mm(out, inputs[0], w[0], inputs[1], w[1], None)
            return out

        return product


class VllmW4A8(TorchKernel):
    """`cutlass_w4a8_mm`, in the schedule that it chooses."""

    def weight(self, weights: Weights, i: int) -> Any:
        import torch

        if weights.k % 256:
            # The operator checks this no more than the reads beyond the end that follow.
            raise W4A8Error(f"vLLM's W4A8 reorders weights of K {weights.k} wrongly: K must be a multiple of 256")
        w, _ = weights.quantized(i)
        # Two's complement [K/8, N], column-major; group scales [K/128, N].
        words = to_torch(signed_words(w.packed)).t()
        packed = torch.ops._C.cutlass_encode_and_reorder_int4b(words)
        scales = torch.ops._C.cutlass_pack_scale_fp8(to_torch(w.group_scale.T))
        return packed, scales, to_torch(w.channel_scale)[:, None]

    def function(self, m: int, n: int, k: int) -> Callable[[Any, Any], Any]:
        import torch

        def product(inputs: Any, w: Any) -> Any:
            x8, token_scale = inputs
            return torch.ops._C.cutlass_w4a8_mm(x8, w[0], w[1], GROUP_SIZE, w[2], token_scale, None, None)

        return product


class VllmMachete(TorchKernel):
    """`machete_mm`: codes with bf16 activations, in the schedule that it chooses."""

    def weight(self, weights: Weights, i: int) -> Any:
        import torch

        w, scale = weights.quantized(i)
        # Offset binary, as checkpoints have it: [K/8, N], column-major; scales [K/128, N].
        packed = torch.ops._C.machete_prepack_B(to_torch(w.packed).t(), torch.bfloat16, UINT4B8, torch.bfloat16)
        return packed, to_torch(scale.T)

    def function(self, m: int, n: int, k: int) -> Callable[[Any, Any], Any]:
        import torch

        def product(x: Any, w: Any) -> Any:
            return torch.ops._C.machete_mm(x, w[0], UINT4B8, None, w[1], None, GROUP_SIZE, None, None, None)

        return product


class VllmMarlin(TorchKernel):
    """`marlin_gemm`: codes with bf16 activations, partial sums reduced in fp32."""

    def weight(self, weights: Weights, i: int) -> Any:
        import torch

        w, scale = weights.quantized(i)
        words = to_torch(w.packed).t().contiguous()  # [K/8, N]
        none = torch.empty(0, dtype=torch.int32, device=words.device)
        packed = torch.ops._C.gptq_marlin_repack(words, none, weights.k, weights.n, 4, False)
        multiprocessors = torch.cuda.get_device_properties(words.device).multi_processor_count
        workspace = torch.zeros(multiprocessors, dtype=torch.int32, device=words.device)
        return packed, to_torch(marlin_scales(scale.T)), none, workspace

    def function(self, m: int, n: int, k: int) -> Callable[[Any, Any], Any]:
        import torch

        def product(x: Any, w: Any) -> Any:
            packed, scale, none, workspace = w
            unused = None, None, None  # bias comes before the scales; scales of activations, global scale after
            return torch.ops._C.marlin_gemm(
                x,
                None,
                packed,
                unused[0],
                scale,
                unused[1],
                unused[2],
                none,
                none,
                none,
                workspace,
                UINT4B8,
                m,
                n,
                k,
                True,
                False,
                True,
                False,
            )

        return product


def to_torch(x: Array) -> Any:
    """The same memory as a torch tensor."""
    import torch

    if x.dtype == jnp.float8_e4m3fn:
        return torch.from_dlpack(_bytes(x)).view(torch.float8_e4m3fn)
    return torch.from_dlpack(jax.block_until_ready(x))


def signed_words(packed: Array) -> Array:
    """Words of codes in offset binary (code + 8) as words in two's complement, int32: bit 3 of each nibble flips."""
    return packed ^ jnp.uint32(0x88888888).view(jnp.int32)


def marlin_scales(scale: Array) -> Array:
    """Group scales [..., K/128, N] as Marlin reads them: of each 64 columns, 8 j + i comes at 8 i + j."""
    return scale.reshape(*scale.shape[:-1], -1, 8, 8).swapaxes(-1, -2).reshape(scale.shape)


def _bytes(x: Array) -> Array:
    return jax.block_until_ready(jax.lax.bitcast_convert_type(x, jnp.uint8))
