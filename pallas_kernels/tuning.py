"""Which kernel runs, and how it divides the work."""

import jax

from .dense_gemm import TuningConfig


def hopper() -> bool:
    """Whether JAX's default device is a Hopper GPU, which the kernels are for."""
    return jax.default_backend() == "gpu" and jax.devices()[0].compute_capability == "9.0"


def takes(n: int, k: int) -> bool:
    """Whether the dense kernel can take a weight [N, K]."""
    return n % 128 == 0 and k % 128 == 0


def heuristic(m: int, n: int) -> TuningConfig:
    """A configuration for M tokens and N outputs, N a multiple of 128.

    From measurements on one H100 (`experiments/gemm_probe.py`): with few tokens the kernel is bound by memory, and
    small tiles in a deep pipeline keep most multiprocessors busy; with many, the largest tiles that fit are best.
    Between 64 and 512 tokens, and for N that is no multiple of 256, nothing was measured.
    """
    if m <= 64:
        return TuningConfig(next(t for t in (8, 16, 32, 64) if m <= t), 2, 1, 8)
    if n % 256 or (m <= 128 and n < 256 * 66):
        return TuningConfig(128, 2, 1, 6)
    return TuningConfig(160, 2, 2, 3) if m >= 8192 else TuningConfig(128, 2, 2, 4)
