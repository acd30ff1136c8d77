"""Round-to-nearest INT4 with a scale search, against the weights as the kernel will see them.

The LUT kernel does not multiply by `code * s`. From a row's stored scales it makes a channel scale and e4m3
group scales g, and rounds each product to e4m3 (`pallas_kernels.convert_scales`, `lut_levels`). So with the
row's largest scale given, a group does not choose a number but one of about eight g an octave, and its levels
`channel_scale * e4m3(code * g)` are not evenly spaced. Both roundings are known, so they need not be paid for:

    for each of some candidates for the row's largest scale, which fixes the channel scale:
        for each group, for each of some g below and at the one that just reaches the group's largest weight:
            error = sum over the group of the squared distance to the nearest level
        each group takes its best g; the group that loses least by it takes the row's largest scale
    each row takes its best candidate; codes are the nearest levels of what `convert_scales` returns for the
    scales as stored

Shapes: N outputs, K inputs, G = K/128 groups, R rows of a block, C candidates.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import GROUP_SIZE, W4A8Error, convert_scales, pack_codes, to_e4m3
from pallas_kernels.dequantize import lut_magnitudes, nearest_codes

from ..one_ahead import one_ahead

Numerics = Literal["lut", "exact"]
Search = Literal["full", "fast", "none"]

# Candidates for a row's largest scale, as factors of (largest weight) / 7, and for a group's g, as steps on the
# e4m3 grid from the smallest g with 7 * g >= (largest weight). More of either gains less than 1e-4 of the error.
_ROW_FACTORS = {"full": np.geomspace(0.72, 1.0, 12), "fast": np.geomspace(0.8, 0.92, 3)}
_GRID_STEPS = {"full": np.arange(-5, 0), "fast": np.arange(-4, 0)}
# Without the e4m3 grid a group's scale is free: factors of (largest weight) / 7. At 1 and 7/8 code 7 or -8 is the
# largest weight itself, which is best for a group that is nothing but an outlier.
_EXACT_FACTORS = {"full": np.append(np.linspace(0.5, 1.0, 30), [0.875, 1.03]), "fast": np.linspace(0.6, 1.0, 8)}

_BLOCK_WEIGHTS = 2**20  # a block's candidates then stay in a CPU core's caches
_BLOCK_ROWS = 256  # at most: weights of a small model, padded to them, compile once for each K
_UNROLL = 8
_SUBNORMAL_GRID_INDEX = 8
_TOP_GRID_INDEX = 0x66  # the e4m3 byte of 448 / 8, the g of a row's largest scale
_MIN_SCALE = 2.0**-100  # for zero groups: not 0, so that whoever divides by it gets 0 and not NaN


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A weight [N, K] in the checkpoint's form, with how well it fits.

    Attributes:
        packed: int32 [N, K/8], `weight_packed`.
        scale: bfloat16 [N, K/128], `weight_scale`; positive.
        relative_error: ||w_kernel - w|| / ||w||, Frobenius, w_kernel as the kernel computes it; 0 for w = 0.
        histogram: int64 [16], how often each code from -8 to 7 occurs.
    """

    packed: np.ndarray
    scale: np.ndarray
    relative_error: float
    histogram: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight."""
        return self.packed.shape[0], self.packed.shape[1] * 8


def quantize_weight(
    w: Any,
    *,
    numerics: Numerics = "lut",
    code_min: int = -7,
    search: Search = "full",
    importance: Any = None,
    name: str = "weight",
) -> QuantizedTensor:
    """Quantizes a weight to INT4 in groups of 128 columns.

    Rows are handled in blocks of about a million weights, so memory beyond the result is small, and a shape
    compiles once. One CPU core does about 12 million weights a second with "full", 35 with "fast" and 150 with "none".

    Args:
        w: [N, K], any float dtype, numpy (a memory map is read block by block) or JAX.
        numerics: what the weight will run under: "lut" minimizes the error of `channel_scale * e4m3(code * g)`,
            "exact" (also right for W4A16) that of `code * scale`.
        code_min: lowest code, -7 (a faster kernel) or -8 (one level more for negative weights).
        search: "full", "fast" (fewer candidates), or "none": the largest weight / 7 (/ 7.5 if code_min is -8)
            and codes `round(w / scale)`, the usual round-to-nearest.
        importance: [K], what a squared error in each column costs, such as the mean square of its inputs; all the
            same by default. The relative error returned does not know it.
        name: the tensor's name, for errors.

    Raises:
        W4A8Error: w is not a float matrix, K is not a multiple of 128, w has NaN or Inf, an option is unknown.
    """
    _check(w, numerics, code_min, search, name)
    n, k = w.shape
    if importance is not None:
        importance = jnp.asarray(importance, jnp.float32)
        if importance.shape != (k,):
            raise W4A8Error(f"{name}: importance: expected [{k}], a number a column, found {list(importance.shape)}")
    packed, scale = np.empty((n, k // 8), np.int32), np.empty((n, k // GROUP_SIZE), jnp.bfloat16)
    by_byte = np.zeros(256, np.int64)
    error = total = 0.0
    pending = (
        (rows, _quantize_block(b, importance, numerics=numerics, code_min=code_min, search=search))
        for rows, b in _blocks(w)
    )
    for rows, result in one_ahead(pending):
        count = rows.stop - rows.start
        block_packed, block_scale, unit, row_error, row_total = (np.asarray(r)[:count] for r in result)
        if not np.isfinite(unit).all():
            _raise_not_finite(w, rows.start + int(np.argmin(np.isfinite(unit))), name)
        packed[rows], scale[rows] = block_packed, block_scale
        by_byte += np.bincount(block_packed.view(np.uint8).reshape(-1), minlength=256)
        square = unit.astype(np.float64) ** 2
        error += float(row_error @ square)
        total += float(row_total @ square)
    nibbles = by_byte.reshape(16, 16)
    histogram = nibbles.sum(0) + nibbles.sum(1)
    return QuantizedTensor(packed, scale, float(np.sqrt(error / total)) if total else 0.0, histogram)


def _check(w: Any, numerics: str, code_min: int, search: str, name: str) -> None:
    if numerics not in get_args(Numerics):
        raise W4A8Error(f'{name}: numerics: expected "lut" or "exact", found {numerics!r}')
    if code_min not in (-8, -7):
        raise W4A8Error(f"{name}: code_min: expected -7 or -8, found {code_min!r}")
    if search not in get_args(Search):
        raise W4A8Error(f'{name}: search: expected "full", "fast" or "none", found {search!r}')
    if not hasattr(w, "dtype") or not jnp.issubdtype(w.dtype, jnp.floating):
        found = getattr(w, "dtype", type(w).__name__)
        raise W4A8Error(f"{name}: expected a float array [N, K], found {found}; only float weights are quantized")
    if w.ndim != 2 or 0 in w.shape:
        raise W4A8Error(f"{name}: expected a matrix [N, K], found shape {list(w.shape)}; quantize experts one by one")
    if w.shape[1] % GROUP_SIZE:
        raise W4A8Error(
            f"{name}: K must be a multiple of the group size {GROUP_SIZE}, found shape {list(w.shape)}; "
            "leave this layer in bf16 (ignore it)"
        )


def _raise_not_finite(w: Any, row: int, name: str) -> None:
    values = np.asarray(w[row]).astype(np.float32)
    column = int(np.argmin(np.isfinite(values)))
    raise W4A8Error(
        f"{name}: expected finite weights, found {values[column]} at [{row}, {column}]; the checkpoint is damaged "
        "or outside fp32's range"
    )


def _blocks(w: Any) -> Iterator[tuple[slice, np.ndarray | Array]]:
    """Blocks of rows, padded with zero rows to one size, a power of two, so that each K compiles once or so."""
    n, k = w.shape
    size = min(1 << max(0, (_BLOCK_WEIGHTS // k).bit_length() - 1), _BLOCK_ROWS)
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        block = w[rows] if isinstance(w, jax.Array) else np.asarray(w[rows])
        if block.dtype == np.float64:
            with np.errstate(over="ignore"):
                block = block.astype(np.float32)
        missing = size - (rows.stop - rows.start)
        if missing:
            pad = jnp.pad if isinstance(block, jax.Array) else np.pad
            block = pad(block, ((0, missing), (0, 0)))
        yield rows, block


@partial(jax.jit, static_argnames=("numerics", "code_min", "search"))
def _quantize_block(
    w: Float[Array, "R K"],
    importance: Float[Array, "K"] | None = None,
    *,
    numerics: Numerics,
    code_min: int,
    search: Search,
) -> tuple[Int[Array, "R K/8"], Float[Array, "R G"], Float[Array, "R"], Float[Array, "R"], Float[Array, "R"]]:
    """Packed codes, scales, a unit for each row, and in that unit the row's squared error and squared norm."""
    rows, k = w.shape
    groups = w.astype(jnp.float32).reshape(rows, k // GROUP_SIZE, GROUP_SIZE)
    peak = jnp.max(jnp.abs(groups), axis=-1)
    # Squares are taken in units of the row's largest weight, so that they neither overflow nor vanish.
    unit = jnp.maximum(jnp.max(peak, axis=-1), 2.0**-10)
    # A maximum may lose a NaN (XLA's on CPUs does), so that it has to be looked for.
    unit = jnp.where(jnp.all(jnp.isfinite(groups), axis=(1, 2)), unit, jnp.nan)
    if search == "none":
        scale = _to_bf16(peak / (7 if code_min == -7 else 7.5))
    else:
        score = _Scorer(groups / unit[:, None, None], code_min, importance)
        find = _search_lut if numerics == "lut" else _search_exact
        scale = find(score, peak, unit, search)
    scale = jnp.maximum(scale, _MIN_SCALE).astype(jnp.bfloat16)

    levels, channel_scale = _kernel_levels(scale, numerics)
    if search == "none":
        codes = jnp.clip(jnp.round(groups / scale.astype(jnp.float32)[..., None]), code_min, 7).astype(jnp.int8)
    else:
        codes = nearest_codes(groups, levels * channel_scale[:, None, None], code_min)
    codes = jax.lax.optimization_barrier(codes)  # computed once, not again in each use
    value = _take_level(codes, levels) * (channel_scale / unit)[:, None, None]
    relative = groups / unit[:, None, None]
    row_error = jnp.sum((value - relative) ** 2, axis=(1, 2))
    row_total = jnp.sum(relative**2, axis=(1, 2))
    return pack_codes(codes.reshape(rows, k)), scale, unit, row_error, row_total


def _to_bf16(x: Array) -> Array:
    """Rounds fp32 to bf16's precision; a pair of casts could be optimized away by XLA."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _kernel_levels(scale: Float[Array, "R G"], numerics: Numerics) -> tuple[Array, Array]:
    """The magnitudes of codes 0..8, fp32 [R, G, 9], before the channel scale [R]."""
    if numerics == "lut":
        group_scale, channel_scale = convert_scales(scale)
        return lut_magnitudes(group_scale), channel_scale
    levels = jnp.arange(9, dtype=jnp.float32) * scale.astype(jnp.float32)[..., None]
    return levels, jnp.ones(scale.shape[:1], jnp.float32)


def _take_level(codes: Int[Array, "R G 128"], levels: Float[Array, "R G 9"]) -> Float[Array, "R G 128"]:
    """The signed level of each code; selects, since a gather is slow on a CPU."""
    magnitude = jnp.abs(codes)
    value = jnp.zeros(codes.shape, jnp.float32)
    for q in range(1, 9):
        value = jnp.where(magnitude == q, levels[..., q, None], value)
    return jnp.where(codes < 0, -value, value)


class _Scorer:
    """Squared errors of groups for candidate levels, the inner loop of the search."""

    def __init__(self, groups: Float[Array, "R G 128"], code_min: int, importance: Float[Array, "K"] | None = None):
        # Groups of all rows go last, as one axis: each of the 128 steps is then a vector operation over them.
        # The barrier keeps the transpose apart: fused into what follows, it would read memory in strides.
        self.shape = groups.shape[:2]
        by_column = jax.lax.optimization_barrier(groups.reshape(-1, GROUP_SIZE).T)
        by_column = by_column.reshape(-1, _UNROLL, by_column.shape[1])
        self.magnitude = jnp.abs(by_column)
        self.negative = jnp.maximum(-by_column, 0) if code_min == -8 else None
        self.importance = None
        if importance is not None:
            # Once for each row: a product that is broadcast within the loop would not be a vector operation.
            by_group = jnp.broadcast_to(importance.reshape(1, -1, GROUP_SIZE), groups.shape)
            self.importance = jax.lax.optimization_barrier(by_group.reshape(-1, GROUP_SIZE).T)
            self.importance = self.importance.reshape(by_column.shape)

    def __call__(self, levels: Float[Array, "C R G 9"]) -> Float[Array, "C R G"]:
        """sum min_q (|w| - level_q)^2 - sum w^2, which is sum min_q (level_q^2 - 2 |w| level_q), q = 0 giving 0."""
        levels = levels.reshape(len(levels), -1, 9)
        # Each is one array that is computed once: as a value for each q, XLA would compile, and compute, all of them 14
        # times over.
        square, minus_two = jax.lax.optimization_barrier(
            tuple(jnp.moveaxis(a, -1, 0) for a in (levels * levels, -2 * levels))
        )

        def add_columns(i: Array, total: Array) -> Array:
            for column in range(_UNROLL):
                magnitude = self.magnitude[i, column]
                error = jnp.zeros_like(total)
                for q in range(1, 8):
                    error = jnp.minimum(error, square[q] + minus_two[q] * magnitude)
                if self.negative is not None:
                    error = jnp.minimum(error, square[8] + minus_two[8] * self.negative[i, column])
                if self.importance is not None:
                    error = error * self.importance[i, column]
                total = total + error
            return total

        total = jax.lax.fori_loop(0, self.magnitude.shape[0], add_columns, jnp.zeros_like(square[0]))
        return total.reshape(-1, *self.shape)


def _search_lut(score: _Scorer, peak: Float[Array, "R G"], unit: Float[Array, "R"], search: Search) -> Array:
    """The scales fp32 [R, G] (values of bf16) that serve the LUT kernel best."""
    row_peak = jnp.max(peak, axis=-1)
    steps = jnp.asarray(_GRID_STEPS[search], jnp.int32)[:, None, None]

    def try_factor(factor: Array) -> tuple[Array, Array, Array]:
        row_scale = _to_bf16(factor * row_peak / 7)
        top, channel_scale = convert_scales(row_scale[:, None])
        reach = _grid_index_above(peak / (7 * channel_scale[:, None]))
        reach += reach <= _SUBNORMAL_GRID_INDEX  # where steps are coarse, the g above is worth a try
        index = jnp.clip(reach + steps, 1, _TOP_GRID_INDEX)
        index = jnp.append(index, jnp.full_like(index[:1], _TOP_GRID_INDEX), axis=0)
        gain = score(lut_magnitudes(_grid_value(index)) * (channel_scale / unit)[:, None, None])
        best_gain = jnp.min(gain, axis=0)
        index = jnp.take_along_axis(index, jnp.argmin(gain, axis=0, keepdims=True), axis=0)[0]
        # The channel scale stands only if a group does have the row's largest scale: the one that loses least by
        # it. A row so small that its channel scale is at the floor has no such duty.
        loss = gain[-1] - best_gain
        bound = (_grid_index(top) == _TOP_GRID_INDEX)[:, 0]
        keeper = jax.nn.one_hot(jnp.argmin(loss, axis=-1), loss.shape[-1], dtype=bool) & bound[:, None]
        index = jnp.where(keeper, _TOP_GRID_INDEX, index).astype(jnp.uint8)
        row_gain = jnp.sum(best_gain, axis=-1) + jnp.where(bound, jnp.min(loss, axis=-1), 0)
        return row_gain, index, channel_scale

    gain, index, channel_scale = jax.lax.map(try_factor, jnp.asarray(_ROW_FACTORS[search], jnp.float32))
    best = jnp.argmin(gain, axis=0, keepdims=True)
    index = jnp.take_along_axis(index, best[..., None], axis=0)[0]
    channel_scale = jnp.take_along_axis(channel_scale, best, axis=0)[0]
    return _to_bf16(_grid_value(index).astype(jnp.float32) * channel_scale[:, None])


def _search_exact(score: _Scorer, peak: Float[Array, "R G"], unit: Float[Array, "R"], search: Search) -> Array:
    """The scales fp32 [R, G] (values of bf16) with the least error of `code * scale`."""
    factors = jnp.asarray(_EXACT_FACTORS[search], jnp.float32).reshape(-1, 8)

    def try_factors(factor: Float[Array, "8"]) -> tuple[Array, Array]:
        scale = _to_bf16(factor[:, None, None] * peak / 7)
        gain = score((scale / unit[:, None])[..., None] * jnp.arange(9, dtype=jnp.float32))
        best = jnp.argmin(gain, axis=0, keepdims=True)
        return jnp.min(gain, axis=0), jnp.take_along_axis(scale, best, axis=0)[0]

    gain, scale = jax.lax.map(try_factors, factors)
    return jnp.take_along_axis(scale, jnp.argmin(gain, axis=0, keepdims=True), axis=0)[0]


def _grid_value(index: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The e4m3 numbers >= 0 are in the order of their bytes."""
    return jax.lax.bitcast_convert_type(index.astype(jnp.uint8), jnp.float8_e4m3fn)


def _grid_index(value: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    return jax.lax.bitcast_convert_type(value, jnp.uint8)


def _grid_index_above(x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """The index of the smallest e4m3 number that is at least x, for 0 <= x <= 448."""
    nearest = to_e4m3(x)
    return _grid_index(nearest).astype(jnp.int32) + (nearest.astype(jnp.float32) < x)
