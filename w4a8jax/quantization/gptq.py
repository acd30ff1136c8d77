"""GPTQ against the values that the kernel multiplies by.

GPTQ (Frantar et al., 2022, arXiv:2210.17323) rounds a weight's columns one after the other, and changes the columns
that are still to come so that they make up for each column's error on the calibration tokens. With the Hessian
H = sum x x^T of the layer's inputs and the upper triangular U with H^-1 = U^T U:

    for each column j:
        q_j   = the value nearest to w_j that the kernel can produce
        err_j = (w_j - q_j) / U_jj
        w_l  -= err_j * U_jl        for all l > j

sum_j err_j^2 is then the squared error of the layer's output. What is particular here:

- The values that the kernel can produce are, for `lut`, channel_scale * e4m3(code * group_scale) with the scales that
  `convert_scales` makes of those stored: not evenly spaced, and not code * scale. Both roundings are in the objective.
- The scale of a group is chosen by that objective too: when its turn comes, the 128 columns are rounded with each
  candidate, feedback included, and the candidate with the least sum of err_j^2 stays. The channel scale, and the group
  that must keep the row's largest scale so that it holds, come from round-to-nearest weighted by H's diagonal.
- `act_order` takes columns in the order of H's diagonal, largest first. Groups stay where they are, as the kernel wants
  them, with the scales of that weighted round-to-nearest.

Rows are independent, so they are handled in blocks; columns run in a compiled loop, a group at a time.

Shapes: N outputs, K inputs, G = K/128 groups, R rows of a block, C candidates for a scale.
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import GROUP_SIZE, W4A8Error, W4Weight, convert_scales, pack_codes
from pallas_kernels.dequantize import lut_magnitudes

from . import rtn
from .rtn import Numerics, QuantizedTensor

GptqSearch = Literal["full", "fast", "none"]

# Candidates for a group's scale; see the constants of the same kind in rtn.py. "none" keeps those of the weighted RTN.
_GRID_STEPS = {"full": (-5, -4, -3, -2, -1, 0), "fast": (-4, -3, -2), "none": ()}
_EXACT_FACTORS = {"full": tuple(np.linspace(0.6, 1.0, 7)), "fast": (0.7, 0.8, 0.9), "none": ()}

_ROWS = 1024  # of a block
_FEW_ROWS = 256  # of a block of a weight of at most _ROWS rows: those of a small model then compile once for each K
_MOST_ROWS = 16384  # of a block on a GPU, where every column is launches of kernels
_SUB = 16  # columns that are corrected one by one, before the group's others are by a matrix product
_RETRIES = 4  # each with ten times the damping


@dataclasses.dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a layer's inputs; layers with the same input share it.

    Attributes:
        hessian: fp32 [K, K], in units of its diagonal's mean.
        upper: fp32 [K, K], U of the damped Hessian, H^-1 = U^T U, columns in `order`.
        order: int [K], the columns as they are rounded; None: as they are.
        damping: what was added to the diagonal, in the same unit.
    """

    hessian: Float[Array, "K K"]
    upper: Float[Array, "K K"]
    order: np.ndarray | None
    damping: float

    @property
    def importance(self) -> Float[Array, "K"]:
        """fp32 [K], the damped diagonal."""
        return _diagonal(self.hessian, self.damping)


@dataclasses.dataclass(frozen=True)
class GptqResult:
    """A weight quantized by GPTQ, or by round-to-nearest if that is better.

    Attributes:
        tensor: the quantized weight.
        output_error: ||(w_kernel - w) x|| / ||w x|| over the calibration tokens.
        rtn_output_error: the same of round-to-nearest, weighted by H's diagonal.
        fallback: why it is not GPTQ's; "" if it is.
    """

    tensor: QuantizedTensor
    output_error: float
    rtn_output_error: float
    fallback: str = ""


def factorize(hessian: Any, *, damping: float = 0.01, act_order: bool = False, name: str = "Hessian") -> Factor:
    """Prepares a Hessian; where its factor is not finite, again with ten times the damping, up to 1000 times.

    Args:
        hessian: [K, K], sum of x x^T over the calibration tokens, any positive multiple of it; fp32 is enough.
        damping: added to the diagonal, relative to its mean.
        act_order: round the columns with the largest diagonal first.
        name: of the layer, for errors.

    Raises:
        W4A8Error: it is no square matrix, is not finite, is zero (no token counted), or has no factor with any damping.
    """
    h = jnp.asarray(hessian, jnp.float32)
    if h.ndim != 2 or h.shape[0] != h.shape[1] or h.shape[0] == 0:
        raise W4A8Error(f"{name}: Hessian: expected [K, K], found {list(h.shape)}")
    if not (np.isfinite(damping) and damping > 0):
        raise W4A8Error(f"damping: expected a positive number, found {damping}")
    h, mean, finite = _normalize(h)
    if not finite:
        raise W4A8Error(f"{name}: the Hessian has NaN or Inf: the layer's inputs are not finite")
    if mean <= 0:
        raise W4A8Error(f"{name}: the Hessian is zero: no calibration token reached the layer")
    order = np.argsort(-np.asarray(_diagonal(h, 0.0)), kind="stable") if act_order else None
    for attempt in range(_RETRIES):
        tried = damping * 10**attempt
        upper, finite = _upper(h, order, tried)
        if finite:
            return Factor(h, upper, order, tried)
    raise W4A8Error(f"{name}: the Hessian is not positive definite, even with {tried:g} of its mean on the diagonal")


@jax.jit
def _normalize(h: Float[Array, "K K"]) -> tuple[Float[Array, "K K"], Float[Array, ""], Bool[Array, ""]]:
    """In units of the diagonal's mean; the mean; whether all is finite."""
    mean = jnp.mean(jnp.diagonal(h))
    return h / mean, mean, jnp.isfinite(mean) & jnp.all(jnp.isfinite(h))


@jax.jit
def _diagonal(h: Float[Array, "K K"], damping: float) -> Float[Array, "K"]:
    return jnp.diagonal(h) + damping


@jax.jit
def _upper(
    h: Float[Array, "K K"], order: Int[Array, "K"] | None, damping: float
) -> tuple[Float[Array, "K K"], Bool[Array, ""]]:
    """U with (h + damping I)^-1 = U^T U, rows and columns of h in `order`; whether it is finite.

    Without the inverse: with rows and columns reversed, h = L L^T; so h = R R^T with R = L reversed, upper triangular,
    and U = R^-1.
    """
    h = h if order is None else h[order][:, order]
    eye = jnp.eye(h.shape[0], dtype=jnp.float32)
    lower = jnp.linalg.cholesky((h + damping * eye)[::-1, ::-1], symmetrize_input=False)
    upper = jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)[::-1, ::-1]
    return upper, jnp.all(jnp.isfinite(upper))


def gptq_quantize_weight(
    w: Any,
    factor: Factor,
    *,
    numerics: Numerics = "lut",
    code_min: int = -7,
    search: GptqSearch = "full",
    name: str = "weight",
) -> GptqResult:
    """Quantizes a weight to INT4 in groups of 128 columns, for the least error of the layer's output.

    If round-to-nearest does better on the calibration tokens, or GPTQ's result is not finite, its result is returned,
    with the reason in `fallback`.

    Args:
        w: [N, K], any float dtype, numpy or JAX.
        factor: of `factorize`, for inputs of this layer.
        numerics: "lut" or "exact", as for `quantize_weight`.
        code_min: lowest code, -7 or -8.
        search: candidates for each group's scale: "full", "fast", or "none": those of round-to-nearest weighted by the
            Hessian's diagonal, which `act_order` always takes.
        name: the tensor's name, for errors.

    Raises:
        W4A8Error: as `quantize_weight`; or the factor is one of another K.
    """
    if search not in _GRID_STEPS:
        raise W4A8Error(f'{name}: search: expected "full", "fast" or "none", found {search!r}')
    start = rtn.quantize_weight(w, numerics=numerics, code_min=code_min, importance=_importance(w, factor), name=name)
    n = w.shape[0]
    packed, scale = np.empty_like(start.packed), np.empty_like(start.scale)
    rows = _block_rows(n)
    sums = np.zeros(5)
    for begin in range(0, n, rows):
        part = slice(begin, min(begin + rows, n))
        block = jnp.asarray(_pad_rows(np.asarray(w[part]), rows), jnp.float32)
        first_scale, first_packed = (_pad_rows(a[part], rows) for a in (start.scale, start.packed))
        new_packed, new_scale = _solve_rows(
            block, factor.upper, jnp.asarray(first_scale), factor.order, numerics=numerics, code_min=code_min,
            search="none" if factor.order is not None else search,
        )  # fmt: skip
        errors = _errors(block, factor.hessian, new_packed, new_scale, first_packed, first_scale, numerics=numerics)
        packed[part], scale[part] = (np.asarray(a)[: part.stop - begin] for a in (new_packed, new_scale))
        sums += np.array([np.asarray(e, np.float64)[: part.stop - begin].sum() for e in errors])
    output, rtn_output, output_total, plain, total = sums.tolist()
    error, rtn_error = ((max(e, 0.0) / output_total) ** 0.5 if output_total > 0 else 0.0 for e in (output, rtn_output))
    if not output <= rtn_output:  # also where it is NaN
        reason = f"GPTQ's output error {error:.4f} is not below round-to-nearest's {rtn_error:.4f}"
        return GptqResult(start, rtn_error, rtn_error, reason)
    nibbles = np.bincount(packed.view(np.uint8).reshape(-1), minlength=256).reshape(16, 16)
    relative = (plain / total) ** 0.5 if total else 0.0
    return GptqResult(QuantizedTensor(packed, scale, relative, nibbles.sum(0) + nibbles.sum(1)), error, rtn_error)


def _block_rows(n: int) -> int:
    """How many of N rows are solved at a time."""
    if jax.default_backend() == "cpu":
        return _ROWS if n > _ROWS else _FEW_ROWS
    return min(_MOST_ROWS, max(_FEW_ROWS, 1 << (n - 1).bit_length()))


def _importance(w: Any, factor: Factor) -> Float[Array, "K"]:
    k = factor.hessian.shape[0]
    if getattr(w, "ndim", 0) == 2 and w.shape[1] != k:
        raise W4A8Error(f"the Hessian is of {k} inputs, but the weight has shape {list(w.shape)}")
    return factor.importance


def _pad_rows(a: np.ndarray, rows: int) -> np.ndarray:
    """With zero rows at the end, so that each K compiles once or so."""
    return a if len(a) == rows else np.concatenate([a, np.zeros((rows - len(a), *a.shape[1:]), a.dtype)])


@partial(jax.jit, static_argnames=("numerics", "code_min", "search"))
def _solve_rows(
    w: Float[Array, "R K"],
    upper: Float[Array, "K K"],
    scale: Float[Array, "R G"],
    order: Int[Array, "K"] | None,
    *,
    numerics: Numerics,
    code_min: int,
    search: GptqSearch,
) -> tuple[Int[Array, "R K/8"], Float[Array, "R G"]]:
    """Packed codes and bf16 scales; `scale` holds those of round-to-nearest."""
    rows, k = w.shape
    # Squares are taken in units of the row's largest weight, so that they neither overflow nor vanish.
    unit = jnp.maximum(jnp.max(jnp.abs(w), axis=1), 2.0**-10)
    grid = _ScaleGrid(scale, unit, numerics, search)
    work = (w / unit[:, None]).T
    if order is not None:
        work = work[order]
        group_of = (order // GROUP_SIZE).astype(jnp.int32)
        fixed = grid.all_levels()

    def solve_group(g: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        work, codes, chosen = carry
        first = g * GROUP_SIZE
        columns = jax.lax.dynamic_slice_in_dim(work, first, GROUP_SIZE)
        triangle = jax.lax.dynamic_slice(upper, (first, first), (GROUP_SIZE, GROUP_SIZE))
        if order is not None:
            groups = jax.lax.dynamic_slice_in_dim(group_of, first, GROUP_SIZE)
            errors, new = _round_columns(columns, triangle, fixed, groups, code_min)
            error, new = errors[:, 0], new[:, 0]
        else:
            peak = jnp.max(jnp.abs(columns), axis=0)
            candidates, levels = grid.candidates(g, peak)
            nothing = jnp.zeros(GROUP_SIZE, jnp.int32)
            errors, new = _round_columns(columns, triangle, levels[None], nothing, code_min)
            best = jnp.argmin(jnp.sum(errors**2, axis=0), axis=0)[None]
            error = jnp.take_along_axis(errors, best[None], axis=1)[:, 0]
            new = jnp.take_along_axis(new, best[None], axis=1)[:, 0]
            chosen = jax.lax.dynamic_update_slice_in_dim(chosen, jnp.take_along_axis(candidates, best, axis=0), g, 0)
        ahead = jax.lax.dynamic_slice_in_dim(upper, first, GROUP_SIZE)
        work = work - jnp.dot(ahead.T, error, precision=jax.lax.Precision.HIGHEST)
        return work, jax.lax.dynamic_update_slice_in_dim(codes, new, first, 0), chosen

    start = (work, jnp.zeros((k, rows), jnp.int8), grid.first)
    _, codes, chosen = jax.lax.fori_loop(0, k // GROUP_SIZE, solve_group, start)
    if order is not None:
        codes = jnp.zeros_like(codes).at[order].set(codes, unique_indices=True)
        return pack_codes(codes.T), scale
    return pack_codes(codes.T), grid.stored(chosen)


class _ScaleGrid:
    """The scales that a group may take, and their levels. A "choice" is a grid index for `lut`, a scale for `exact`."""

    def __init__(self, scale: Float[Array, "R G"], unit: Float[Array, "R"], numerics: Numerics, search: GptqSearch):
        self.numerics, self.unit = numerics, unit
        self.first: Array  # [G, R], round-to-nearest's choices
        if numerics == "lut":
            group_scale, self.channel_scale = convert_scales(scale)
            self.first = rtn._grid_index(group_scale).astype(jnp.int32).T
            # The channel scale holds as long as one group keeps the row's largest scale.
            self.top = jnp.max(self.first, axis=0)
            self.keeper = jnp.argmax(self.first, axis=0)
            self.steps = jnp.asarray(_GRID_STEPS[search], jnp.int32)
        else:
            self.first = scale.astype(jnp.float32).T
            self.steps = jnp.asarray(_EXACT_FACTORS[search], jnp.float32)

    def candidates(self, g: Array, peak: Float[Array, "R"]) -> tuple[Array, Float[Array, "9 C R"]]:
        """Choices [C, R] for group g and their levels, given its largest weights in the rows' units."""
        first = jax.lax.dynamic_index_in_dim(self.first, g)
        peak = peak * self.unit
        if self.numerics == "lut":
            reach = rtn._grid_index_above(jnp.minimum(peak / (7 * self.channel_scale), 448.0))
            tried = jnp.clip(reach + self.steps[:, None], 1, self.top)
            choices = jnp.where(self.keeper == g, self.top, jnp.concatenate([first, tried]))
        else:
            tried = jnp.maximum(rtn._to_bf16(self.steps[:, None] * peak / 7), rtn._MIN_SCALE)
            choices = jnp.concatenate([first, tried])
        return choices, self._levels(choices)

    def all_levels(self) -> Float[Array, "G 9 1 R"]:
        """Of round-to-nearest's choices."""
        return jnp.moveaxis(self._levels(self.first), 0, 1)[:, :, None]

    def _levels(self, choices: Array) -> Float[Array, "9 C R"]:
        """The magnitudes of codes 0..8, in the rows' units."""
        if self.numerics == "lut":
            levels = lut_magnitudes(rtn._grid_value(choices)) * (self.channel_scale / self.unit)[:, None]
        else:
            levels = jnp.arange(9, dtype=jnp.float32) * (choices / self.unit)[..., None]
        return jnp.moveaxis(levels, -1, 0)

    def stored(self, chosen: Array) -> Float[Array, "R G"]:
        """The checkpoint's bf16 scales for choices [G, R]."""
        scale = chosen
        if self.numerics == "lut":
            scale = rtn._to_bf16(rtn._grid_value(chosen).astype(jnp.float32) * self.channel_scale)
        return jnp.maximum(scale, rtn._MIN_SCALE).astype(jnp.bfloat16).T


def _round_columns(
    columns: Float[Array, "128 R"],
    upper: Float[Array, "128 128"],
    levels: Float[Array, "L 9 C R"],
    table: Int[Array, "128"],
    code_min: int,
) -> tuple[Float[Array, "128 C R"], Int[Array, "128 C R"]]:
    """Rounds 128 columns with feedback among them, once for each candidate.

    Args:
        columns: their values.
        upper: the part of U for them.
        levels: magnitudes of codes 0..8; `table` says which of L tables a column takes.

    Returns:
        err_j of each column, and int8 codes.
    """
    highest = jax.lax.Precision.HIGHEST
    borders = levels[:, 1:] * 0.5 + levels[:, :-1] * 0.5
    shape = (GROUP_SIZE, *levels.shape[2:])

    def round_column(j: Array, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        part, errors, codes, first = carry
        block = jax.lax.dynamic_slice(upper, (first, first), (_SUB, _SUB))
        # Errors of columns from j on are still zero.
        x = part[j] - jnp.tensordot(block[:, j], errors, axes=1, precision=highest)
        which = table[first + j]
        magnitude, border, level = jnp.abs(x), borders[which], levels[which]
        code = sum((magnitude > border[q]).astype(jnp.int8) for q in range(7))
        if code_min == -8:
            code += (-x > border[7]).astype(jnp.int8)
        value = jnp.zeros_like(x)
        for q in range(1, 9):
            value = jnp.where(code == q, level[q], value)
        negative = x < 0
        error = (x - jnp.where(negative, -value, value)) / block[j, j]
        return part, errors.at[j].set(error), codes.at[j].set(jnp.where(negative, -code, code)), first

    def round_part(s: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        work, errors, codes = carry
        first = s * _SUB
        part = jax.lax.dynamic_slice_in_dim(work, first, _SUB)
        zeros = jnp.zeros_like(part)
        _, error, code, _ = jax.lax.fori_loop(0, _SUB, round_column, (part, zeros, zeros.astype(jnp.int8), first))
        ahead = jax.lax.dynamic_slice_in_dim(upper, first, _SUB)
        work = work - jnp.tensordot(ahead.T, error, axes=1, precision=highest)
        errors = jax.lax.dynamic_update_slice_in_dim(errors, error, first, 0)
        return work, errors, jax.lax.dynamic_update_slice_in_dim(codes, code, first, 0)

    work = jnp.broadcast_to(columns[:, None], shape)
    start = (work, jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int8))
    _, errors, codes = jax.lax.fori_loop(0, GROUP_SIZE // _SUB, round_part, start)
    return errors, codes


@partial(jax.jit, static_argnames=("numerics",))
def _errors(
    w: Float[Array, "R K"],
    hessian: Float[Array, "K K"],
    packed: Array,
    scale: Array,
    other_packed: Array,
    other_scale: Array,
    *,
    numerics: Numerics,
) -> tuple[Array, Array, Array, Array, Array]:
    """Of each row [R]: output error of two quantizations, output's square, weight error of the first, weight's square.

    Squares, as the kernel sees the weights.
    """

    def quadratic(x: Array) -> Array:
        return jnp.sum(jnp.dot(x, hessian, precision=jax.lax.Precision.HIGHEST) * x, axis=1)

    difference, other = (
        W4Weight.from_checkpoint(p, s, numerics=numerics).dequantize() - w
        for p, s in ((packed, scale), (other_packed, other_scale))
    )
    squares = jnp.sum(difference**2, axis=1), jnp.sum(w**2, axis=1)
    return quadratic(difference), quadratic(other), quadratic(w), *squares
