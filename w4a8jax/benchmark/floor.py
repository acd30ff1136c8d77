"""The least time that a W4A8 product can take on a device."""

from __future__ import annotations

import dataclasses


def w4a8_bytes(m: int, n: int, k: int) -> float:
    """Bytes that must move: codes, one-byte group scales of 128, FP8 activations, bf16 output."""
    return n * k / 2 + n * k / 128 + m * k + 2 * m * n


def operand_bytes(m: int, n: int, k: int, weight_bytes: float, input_bytes: float) -> float:
    """Bytes that must move with so many bytes for each weight and for each activation, and a bf16 output."""
    return n * k * weight_bytes + m * k * input_bytes + 2 * m * n


def flops(m: int, n: int, k: int) -> float:
    """Operations of a product, multiplications and additions."""
    return 2.0 * m * n * k


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device was measured to do.

    Attributes:
        copy: bytes per second, read and written.
        fp8: operations per second of the best cuBLAS FP8 product in the run; None where none was measured.
    """

    copy: float
    fp8: float | None = None

    def floor_us(self, m: int, n: int, k: int) -> float:
        """Microseconds: the bytes at the rate of a copy, or the operations at cuBLAS's FP8 rate, if that is more."""
        compute = 0.0 if self.fp8 is None else flops(m, n, k) / self.fp8
        return 1e6 * max(w4a8_bytes(m, n, k) / self.copy, compute)
