"""Stand-ins for the kernels, on any device: the same products, in plain jnp, from the kernels' layout of a weight."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import FragmentWeight, divided_moe, ops, quantize_activations, tuning
from pallas_kernels.dequantize import dequantize_lut, expand_groups
from pallas_kernels.rounding import round_to


def operand(w: FragmentWeight) -> jax.Array:
    """What the kernel multiplies by, [..., N, K], before the channel scale: the inverse of `from_weight`."""
    if len(w.shape) == 3:
        flat = FragmentWeight(*(v.reshape(-1, *v.shape[2:]) for v in (w.words, w.scales)), None, None, w.form)
        return operand(flat).reshape(w.shape)
    (n, k), (tiles, groups) = w.shape, w.words.shape[:2]
    codes = _codes(w.words.reshape(tiles, groups, 1024), w.form)
    if w.form == "bf16":
        # tile, group, vector, warp, lane row, lane column, word, code, pair, half
        codes = codes.reshape(tiles, groups, 2, 4, 8, 4, 4, 2, 2, 2).transpose(0, 3, 9, 4, 1, 2, 6, 8, 5, 7)
    else:
        # tile, group, vector, warp, lane row, lane column, word, half, code
        codes = codes.reshape(tiles, groups, 2, 4, 8, 4, 4, 2, 4).transpose(0, 3, 7, 4, 1, 2, 6, 5, 8)
    codes = codes.reshape(n, k)
    if w.form.startswith("subnormal"):
        scale = w.scales.transpose(0, 2, 1).reshape(n, groups) / 512
    else:
        scale = w.scales.reshape(tiles, groups, 4, 8, 2).transpose(0, 2, 4, 3, 1).reshape(n, groups)
    if w.scales.dtype == jnp.uint8:
        return dequantize_lut(codes, jax.lax.bitcast_convert_type(scale, jnp.float8_e4m3fn))
    exact = codes.astype(jnp.float32) * expand_groups(scale.astype(jnp.float32), k)
    return round_to(exact, jnp.bfloat16) if w.form == "bf16" else exact


def _codes(words: jax.Array, form: str) -> jax.Array:
    """int8 [..., 8] of words in a form."""
    i, words = jnp.arange(8, dtype=jnp.uint32), words[..., None]
    nibble = (words >> 4 * i & 15).astype(jnp.int32)
    if form == "bf16":
        return (nibble - 8).astype(jnp.int8)
    if form == "two_tables":
        large, negative, low = nibble >> 3, nibble >> 2 & 1, nibble & 3
        magnitude = jnp.where(large == 1, 4 + low, jnp.where((negative == 1) & (low == 0), 8, low))
    else:
        at = 4 * i if form == "sign_magnitude" else jnp.where(i < 4, 8 * i, (8 * i + 28) % 32)
        magnitude = (words >> at & 7).astype(jnp.int32)
        negative = (words >> jnp.where(i < 4, 8 * i + 7, (8 * i + 3) % 32) & 1).astype(jnp.int32)
        magnitude += negative if form == "subnormal_8" else 0
    return jnp.where(negative == 1, -magnitude, magnitude).astype(jnp.int8)


@contextmanager
def kernels(out_dtype: Any = jnp.bfloat16) -> Iterator[None]:
    """Within it, this device has kernels, which round to a dtype. They refuse weights that are divided, as kernels do.

    What was compiled before it, or within it, is not used after.
    """

    def dense(x: jax.Array, token_scale: jax.Array | None, w: FragmentWeight, config: Any) -> jax.Array:
        assert w.partition is None
        config.check(*w.shape, w.form)
        total = jnp.dot(x.astype(jnp.float32), operand(w).astype(jnp.float32).T, precision="highest")
        return round_to(w.channel_scale * (total if token_scale is None else token_scale * total), out_dtype)

    def grouped(x: jax.Array, token_scale: jax.Array | None, w: FragmentWeight, sizes: jax.Array, _: Any) -> jax.Array:
        assert w.partition is None
        ends = jnp.cumsum(sizes)
        expert = jnp.searchsorted(ends, jnp.arange(len(x)), side="right")
        own = operand(w).astype(jnp.float32).at[expert].get(mode="clip")
        total = jnp.einsum("mk,mnk->mn", x.astype(jnp.float32), own, precision="highest")
        total = w.channel_scale.at[expert].get(mode="clip") * (total if token_scale is None else token_scale * total)
        total = jnp.where(jnp.arange(len(x))[:, None] < ends[-1], total, 0)
        return round_to(total, out_dtype)

    def quantize_tokens(x: jax.Array, rows: int, place: jax.Array | None = None) -> tuple[jax.Array, ...]:
        x8, token_scale = quantize_activations(x)
        source = jnp.minimum(jnp.arange(rows), len(x) - 1)
        if place is not None:
            source = jnp.zeros(rows, jnp.int32).at[place].set(jnp.arange(len(x))[:, None])
        return x8[source], token_scale[source]

    def quantize_gated(gate_up: jax.Array, rows: int) -> tuple[jax.Array, ...]:
        return quantize_tokens(ops.gated(gate_up), rows)

    dense_gemm, grouped_gemm = jax.jit(dense, static_argnums=3), jax.jit(grouped, static_argnums=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "hopper", lambda: True)
        patch.setattr(ops, "_dense_gemm", dense_gemm)
        for module in (ops, divided_moe):
            patch.setattr(module, "_grouped_gemm", grouped_gemm)
            patch.setattr(module, "quantize_tokens", quantize_tokens)
            patch.setattr(module, "quantize_gated", quantize_gated)
        jax.clear_caches()
        yield
    jax.clear_caches()
