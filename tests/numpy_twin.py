"""The W4A8 arithmetic a second time, in numpy and ml_dtypes, written from its definition alone.

Nothing here imports the library, and nothing here is fast: rounding to e4m3 is a search among the 127 finite
magnitudes in float64, not a cast, so a fault in a cast cannot hide. M tokens, N outputs, K inputs, G groups,
E experts.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
GROUP_SIZE = 128
SCALE_FLOOR = np.uint32(0x36924925).view(np.float32)  # 1 / (448 * 512) in fp32
F448 = np.float32(448.0)


def _e4m3_magnitudes() -> np.ndarray:
    """The value of bytes 0x00..0x7e, from the fields of the format: 4 exponent bits, bias 7, 3 mantissa bits."""
    values = []
    for byte in range(0x7F):
        exponent, mantissa = byte >> 3, byte & 7
        if exponent == 0:
            values.append(mantissa * 2.0**-9)
        else:
            values.append((8 + mantissa) * 2.0 ** (exponent - 10))
    return np.array(values, np.float64)


MAGNITUDES = _e4m3_magnitudes()
_MIDPOINTS = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2


def e4m3_bytes(x: np.ndarray) -> np.ndarray:
    """Clamp to +-448 and round to nearest, ties to even: uint8 bytes of `x`, any float array. NaN gives 0x7f."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        x = np.asarray(x).astype(np.float64)
    magnitude = np.minimum(np.abs(x), 448.0)
    below = np.searchsorted(_MIDPOINTS, magnitude, side="left")  # the midpoint itself stays with the lower value
    tie = (below < _MIDPOINTS.size) & (magnitude == _MIDPOINTS[np.minimum(below, _MIDPOINTS.size - 1)])
    index = below + (tie & (below % 2 == 1))
    index = np.where(np.isnan(x), 0x7F, index)
    return (index + np.where(np.signbit(x) & ~np.isnan(x), 0x80, 0)).astype(np.uint8)


def e4m3(x: np.ndarray) -> np.ndarray:
    """`x` rounded to float8_e4m3fn."""
    return e4m3_bytes(x).view(E4M3)


def e4m3_values(x8: np.ndarray) -> np.ndarray:
    """e4m3 (or its bytes) to float64, exactly."""
    byte = np.asarray(x8).view(np.uint8)
    table = np.append(MAGNITUDES, np.nan)
    return np.where(byte & 0x80, -1.0, 1.0) * table[byte & 0x7F]


def same_operands(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bytes, where -0 counts as +0 (it cannot change a sum) and any NaN as any NaN."""

    def canonical(x: np.ndarray) -> np.ndarray:
        byte = np.asarray(x).view(np.uint8)
        byte = np.where(byte == 0x80, 0, byte)
        return np.where(byte == 0xFF, 0x7F, byte)

    return a.shape == b.shape and bool(np.array_equal(canonical(a), canonical(b)))


def quantize_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`x` [..., K] to (x8 e4m3 [..., K], token_scale fp32 [..., 1])."""
    x = np.asarray(x).astype(np.float32)
    absmax = np.max(np.abs(x), axis=-1, keepdims=True)
    token_scale = np.maximum((absmax / F448).astype(np.float32), SCALE_FLOOR)
    return e4m3((x / token_scale).astype(np.float32)), token_scale


def convert_scales(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stored scales [..., N, G] to (group_scale e4m3 [..., N, G], channel_scale fp32 [..., N])."""
    s = np.asarray(scale).astype(np.float32)
    c0 = np.maximum((np.max(np.abs(s), axis=-1, keepdims=True) / F448).astype(np.float32), SCALE_FLOOR)
    first = e4m3((s / c0).astype(np.float32))
    return e4m3(e4m3_values(first) / 8), (np.float32(8) * c0)[..., 0]


def products(codes: np.ndarray, group_scale: np.ndarray) -> np.ndarray:
    """w8 = e4m3(code * group_scale), one rounding. Codes [..., N, K], group_scale e4m3 [..., N, G]."""
    spread = np.repeat(e4m3_values(group_scale), GROUP_SIZE, axis=-1)
    return e4m3(codes.astype(np.float64) * spread)


def lut_weight(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The weights as the LUT kernel sees them, w8 * channel_scale, float64 [..., N, K]."""
    group_scale, channel_scale = convert_scales(scale)
    return e4m3_values(products(codes, group_scale)) * channel_scale[..., None].astype(np.float64)


def exact_weight(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The weights under `exact` numerics, codes * scale with no further rounding, float64 [..., N, K]."""
    return codes.astype(np.float64) * np.repeat(np.asarray(scale).astype(np.float64), GROUP_SIZE, axis=-1)


def weight(codes: np.ndarray, scale: np.ndarray, numerics: str) -> np.ndarray:
    return {"lut": lut_weight, "exact": exact_weight}[numerics](codes, scale)


def matmul(
    x: np.ndarray, codes: np.ndarray, scale: np.ndarray, *, numerics: str = "lut", scheme: str = "w4a8"
) -> np.ndarray:
    """x [..., K] times the quantized weight [N, K], in float64 from the operands on: [..., N].

    "w4a16" takes bf16 activations and, before the channel scale, bf16 weights.
    """
    if scheme == "w4a8":
        x8, token_scale = quantize_activations(x)
        return (e4m3_values(x8) @ weight(codes, scale, numerics).T) * token_scale.astype(np.float64)
    if numerics == "exact":
        w, channel_scale = exact_weight(codes, scale).astype(np.float32).astype(BF16).astype(np.float64), 1.0
    else:
        group_scale, channel_scale = convert_scales(scale)
        w = e4m3_values(products(codes, group_scale))
    return (np.asarray(x).astype(BF16).astype(np.float64) @ w.T) * np.float64(channel_scale)


def ragged_matmul(
    x: np.ndarray, codes: np.ndarray, scale: np.ndarray, group_sizes: np.ndarray, **options: str
) -> np.ndarray:
    """Rows of x [M, K], sorted by expert, each times its expert's weight [E, N, K]; rows past the last give 0."""
    out = np.zeros((x.shape[0], codes.shape[-2]), np.float64)
    start = 0
    for expert, size in enumerate(group_sizes):
        rows = slice(start, start + int(size))
        out[rows] = matmul(x[rows], codes[expert], scale[expert], **options) if size else 0
        start += int(size)
    return out


def pack(codes: np.ndarray) -> np.ndarray:
    """Codes [..., N, K] to int32 [..., N, K/8]: nibble i of word j is code + 8 of column 8j + i, lowest first."""
    words = codes.reshape(*codes.shape[:-1], -1, 8).astype(np.int64) + 8
    return sum(words[..., i] << (4 * i) for i in range(8)).astype(np.uint32).view(np.int32)


def unpack(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack`, int8."""
    words = np.asarray(packed).view(np.uint32).astype(np.int64)
    nibbles = np.stack([(words >> (4 * i)) & 15 for i in range(8)], axis=-1)
    return (nibbles - 8).astype(np.int8).reshape(*words.shape[:-1], -1)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b||, in float64."""
    a, b = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
