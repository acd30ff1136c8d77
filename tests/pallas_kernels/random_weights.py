"""Random quantized weights in checkpoint form, and the cases that random numbers miss."""

from __future__ import annotations

import numpy as np
from numpy_twin import BF16, GROUP_SIZE, pack

from pallas_kernels import W4Weight


def random_checkpoint(seed: int, *shape: int, code_min: int = -8) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [..., N, K] and bf16 scales [..., N, G]: scales over several octaves, some groups zero."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(code_min, 8, shape, dtype=np.int8)
    scale_shape = (*shape[:-1], shape[-1] // GROUP_SIZE)
    scale = np.exp2(rng.uniform(-11, -5, scale_shape))
    scale[rng.random(scale_shape) < 0.05] = 0
    return codes, scale.astype(BF16)


def extreme_checkpoint(n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of: zero scales, tiny scales (the channel scale's floor), huge ones, one group 2^13 above the others."""
    codes, scale = random_checkpoint(7, n, k)
    scale[0::5] = 0
    scale[1::5] *= BF16.type(2.0**-20)
    scale[2::5] *= BF16.type(2.0**40)
    scale[3::5, -1:] *= BF16.type(2.0**13)
    codes[:, ::3] = -8
    return codes, scale


def weight_of(codes: np.ndarray, scale: np.ndarray, **options) -> W4Weight:
    return W4Weight.from_checkpoint(pack(codes), scale, **options)
