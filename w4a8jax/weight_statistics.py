"""What the codes and scales of a quantized layer, and the values of a plain one, look like; read a block at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.weight_format import CODES_PER_WORD, convert_scales, unusable_scales

from .checkpoints.compressed_tensors import PACKED, SCALE, QuantizedModule
from .checkpoints.reader import CheckpointReader

BLOCK_BYTES = 64 * 2**20
QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
# Group scale over the largest scale of its row, in octaves: 0 for the largest itself, down to 2^-20 and less.
SPREAD_OCTAVES = 20
_ALL_ZERO_WORD = np.uint32(0x88888888).view(np.int32)  # eight codes 0
_SMALLEST_NORMAL = 2.0**-6  # of e4m3


@dataclasses.dataclass(frozen=True)
class CodeStatistics:
    """Statistics of a quantized layer [N, K].

    Attributes:
        histogram: int64 [16], how often each code from -8 to 7 occurs.
        groups: how many group scales there are.
        scale_quantiles: of the finite scales, at `QUANTILES`.
        spread: int64 [21], groups by octaves between the row's largest scale and their own.
        channel_scale: least and greatest channel scale, as the "lut" numerics derive them.
        bad_scales: scales that are NaN, infinite or negative.
        weak_groups: groups with codes and a scale that are not zero, but whose e4m3 group scale is subnormal or zero,
            as happens below 1/3584 of the row's largest: "lut" numerics lose precision on them.
        lost_groups: of those, the ones whose e4m3 group scale is zero: "lut" numerics drop them.
    """

    histogram: np.ndarray
    groups: int
    scale_quantiles: tuple[float, ...]
    spread: np.ndarray
    channel_scale: tuple[float, float]
    bad_scales: int
    weak_groups: int
    lost_groups: int


@dataclasses.dataclass(frozen=True)
class ValueStatistics:
    """Of a float tensor: root mean square and largest magnitude of its finite values; how many are not finite."""

    rms: float
    largest: float
    not_finite: int


def code_statistics(reader: CheckpointReader, module: QuantizedModule) -> CodeStatistics:
    """Reads a quantized layer once, in blocks of rows.

    Raises:
        W4A8Error: its files are damaged.
    """
    n = module.shape[0]
    scales = reader.read(module.name + SCALE).reshape(n, -1)
    values = scales.astype(np.float32)
    bad = unusable_scales(scales)
    values = np.where(bad, 0, values)
    group_scale, channel_scale = map(np.asarray, convert_scales(jnp.asarray(values)))
    weak = (group_scale.astype(np.float32) < _SMALLEST_NORMAL) & (values > 0)
    lost = weak & (group_scale == 0)

    by_byte = np.zeros(256, np.int64)
    weak_groups = lost_groups = row = 0
    words = module.group_size // CODES_PER_WORD
    for packed in reader.blocks(module.name + PACKED, BLOCK_BYTES):
        by_byte += np.bincount(packed.view(np.uint8).reshape(-1), minlength=256)
        rows = slice(row, row + len(packed))
        row += len(packed)
        if weak[rows].any():
            used = (packed.reshape(len(packed), -1, words) != _ALL_ZERO_WORD).any(-1)
            weak_groups += int((used & weak[rows]).sum())
            lost_groups += int((used & lost[rows]).sum())
    nibbles = by_byte.reshape(16, 16)

    with np.errstate(divide="ignore", invalid="ignore"):
        octaves = -np.log2(values / values.max(axis=1, keepdims=True))
    octaves = np.clip(np.nan_to_num(octaves, nan=SPREAD_OCTAVES, posinf=SPREAD_OCTAVES), 0, SPREAD_OCTAVES)
    spread = np.bincount(octaves.astype(np.int64).reshape(-1), minlength=SPREAD_OCTAVES + 1)
    good = values[~bad]
    return CodeStatistics(
        histogram=nibbles.sum(0) + nibbles.sum(1),
        groups=scales.size,
        scale_quantiles=tuple(np.quantile(good, QUANTILES).tolist()) if good.size else (float("nan"),) * len(QUANTILES),
        spread=spread,
        channel_scale=(float(channel_scale.min()), float(channel_scale.max())),
        bad_scales=int(bad.sum()),
        weak_groups=weak_groups,
        lost_groups=lost_groups,
    )


def value_statistics(reader: CheckpointReader, name: str) -> ValueStatistics:
    """Reads a float tensor once, in blocks of rows.

    Raises:
        W4A8Error: its file is damaged.
    """
    square = largest = 0.0
    count = not_finite = 0
    for block in reader.blocks(name, BLOCK_BYTES):
        values: Any = block.astype(np.float32)
        finite = np.isfinite(values)
        if not finite.all():
            not_finite += int(values.size - finite.sum())
            values = values[finite]
        if values.size:
            square += float(np.square(values, dtype=np.float64).sum())
            largest = max(largest, float(values.max()), -float(values.min()))
            count += values.size
    return ValueStatistics(float(np.sqrt(square / count)) if count else 0.0, largest, not_finite)
