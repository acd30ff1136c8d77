"""Random operands of a product, the same numbers for every kernel, and what the product should be."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels import GROUP_SIZE, W4A8Error, W4Weight, quantize_activations
from pallas_kernels.weight_format import CODES_PER_WORD, Numerics

# What a kernel multiplies: w4a8, FP8 activations and e4m3(code * group scale), with token and channel scales; exact,
# the same with code * scale; fp8, w4a8 without token and channel scales; bf16, bf16 activations and the dequantized
# weight rounded to bf16; w4a16, bf16 activations and code * scale.
Reference = Literal["w4a8", "exact", "fp8", "bf16", "w4a16"]

_COMPARED_TOKENS = 256


class Weights:
    """Sets of random weights [N, K], made when they are asked for, the same ones each time."""

    def __init__(self, n: int, k: int, code_min: int = -7, seed: int = 0) -> None:
        self.n, self.k, self.code_min, self.seed = n, k, code_min, seed
        self._fp8 = functools.cache(lambda i: _operand(self.quantized(i)[0]))
        self._bf16 = functools.cache(lambda i: _dequantize(self.quantized(i)[0]))
        self._sample = functools.cache(self._sample_of)

    def quantized(self, i: int, numerics: Numerics = "lut") -> tuple[W4Weight, Array]:
        """Set i: the weight, and its scales as a checkpoint has them, bf16 [N, K/128]."""
        return random_weight(jax.random.fold_in(jax.random.key(self.seed), i), self.n, self.k, self.code_min, numerics)

    def fp8(self, i: int) -> Array:
        """Set i as the tensor cores take it, `float8_e4m3fn` [N, K], without the channel scale."""
        return self._fp8(i)

    def bf16(self, i: int) -> Array:
        """Set i dequantized, bf16 [N, K]."""
        return self._bf16(i)

    def sample(self, rows: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of set 0, float64: [R, K] FP8 operand, [R] channel scale, [R, K] code times scale."""
        return self._sample(rows)

    def _sample_of(self, rows: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        w, scale = self.quantized(0)
        index = jnp.asarray(rows)
        part = W4Weight(w.packed[index], w.group_scale[index], w.channel_scale[index], w.numerics, w.code_min)
        plain = _float64(part.codes) * np.repeat(_float64(scale[index]), GROUP_SIZE, axis=1)
        return _float64(part.operand()), _float64(part.channel_scale), plain


class Activations:
    """Random activations, bf16 [rows, K], and quantized to FP8 with a scale for each row; `Tokens` takes parts.

    They are made once for all M: a program for each M would take longer to compile than a kernel takes to measure.
    """

    def __init__(self, k: int, rows: int, seed: int = 1) -> None:
        self.k = k
        self.bf16 = _random_tokens(jax.random.key(seed), rows, k)
        self.fp8, self.scale = _quantize(self.bf16)


class Tokens:
    """Sets of random activations [M, K]: bf16, and quantized to FP8 with a scale for each token."""

    def __init__(self, source: Activations, m: int, sets: int) -> None:
        """Raises:
        W4A8Error: the source has fewer than M * sets rows.
        """
        if m * sets > source.bf16.shape[0]:
            raise W4A8Error(f"benchmark: {sets} sets of {m} tokens are more than {source.bf16.shape[0]}")
        self.m, self._source = m, source
        parts = [_part(source.bf16, source.fp8, source.scale, i * m, m) for i in range(sets)]
        self.bf16 = [x for x, _, _ in parts]
        self.fp8 = [(x8, scale) for _, x8, scale in parts]

    def sample(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of set 0, float64: [R, K] bf16, [R, K] FP8, [R, 1] token scale."""
        # Always as many, so that one program serves all M.
        padded = np.resize(rows, _COMPARED_TOKENS)
        found = _rows(self._source.bf16, self._source.fp8, self._source.scale, padded)
        x, x8, token_scale = (np.asarray(v, np.float64)[: len(rows)] for v in found)
        return x, x8, token_scale


def expected(kind: Reference, weights: Weights, tokens: Tokens, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """float64 [R, C] of the product of set 0, at some rows (tokens) and columns (outputs)."""
    w8, channel_scale, plain = weights.sample(tuple(columns.tolist()))
    x, x8, token_scale = tokens.sample(rows)
    if kind in ("w4a8", "fp8"):
        product = x8 @ w8.T
        return product if kind == "fp8" else token_scale * channel_scale * product
    if kind == "exact":
        return token_scale * (x8 @ plain.T)
    # The rounding of the weight to bf16 is the kernel's, or its operand's: 2 parts in 1000 at most.
    return x @ (plain if kind == "w4a16" else w8 * channel_scale[:, None]).T


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """The Euclidean norm of the difference over that of what is wanted; infinite if anything is not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def sample_indices(m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """At most 256 tokens and 64 outputs to compare, sorted: the first and the last always among them."""

    def some(size: int, most: int) -> np.ndarray:
        if size <= most:
            return np.arange(size)
        return np.unique([0, size - 1, *np.random.default_rng(size).choice(size, most - 2, replace=False)])

    return some(m, _COMPARED_TOKENS), some(n, 64)


def _float64(x: Any) -> np.ndarray:
    return np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def random_weight(key: Array, n: int, k: int, code_min: int, numerics: Numerics) -> tuple[W4Weight, Array]:
    """A weight [N, K] of random codes and scales, and its scales as a checkpoint has them, bf16 [N, K/128]."""
    code_key, scale_key = jax.random.split(key)
    words = jax.random.bits(code_key, (n, k // CODES_PER_WORD), jnp.uint32)
    if code_min == -7:
        # A nibble of 0 is code -8: where all four bits are 0, make it 8, code 0.
        zero = ~(words | words >> 1 | words >> 2 | words >> 3) & jnp.uint32(0x11111111)
        words = words | zero << 3
    scale = 0.02 * jnp.exp2(jax.random.uniform(scale_key, (n, k // GROUP_SIZE), minval=-1.0, maxval=1.0))
    scale = scale.astype(jnp.bfloat16)
    packed = jax.lax.bitcast_convert_type(words, jnp.int32)
    return W4Weight.from_checkpoint(packed, scale, numerics=numerics, code_min=code_min), scale


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_tokens(key: Array, m: int, k: int) -> Array:
    return jax.random.normal(key, (m, k), jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=4)
def _part(x: Array, x8: Array, token_scale: Array, start: Any, m: int) -> list[Array]:
    return [jax.lax.dynamic_slice_in_dim(v, start, m) for v in (x, x8, token_scale)]


@jax.jit
def _rows(x: Array, x8: Array, token_scale: Array, rows: Any) -> list[Array]:
    return [v[rows].astype(jnp.float32) for v in (x, x8, token_scale)]


# Apart from what makes them: in one program, XLA would quantize the numbers before they are rounded to bf16.
_quantize = jax.jit(quantize_activations)
_operand = jax.jit(lambda w: w.operand())
_dequantize = jax.jit(lambda w: w.dequantize(jnp.bfloat16))
