"""Rounding to e4m3 and the LUT's products, bit for bit against the twin, compiled and not."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_twin as twin
import pytest

from pallas_kernels import lut_levels, to_e4m3
from pallas_kernels.dequantize import dequantize_lut

MODES = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
ALL_BYTES = np.arange(256, dtype=np.uint8).view(twin.E4M3)


def _run(function, compiled, *arguments):
    return np.asarray((jax.jit(function) if compiled else function)(*arguments))


def _same_bytes(a, b):
    np.testing.assert_array_equal(a.view(np.uint8) & 0x7F, b.view(np.uint8) & 0x7F)
    keep_sign = ~np.isnan(b.astype(np.float32))
    np.testing.assert_array_equal(a.view(np.uint8)[keep_sign], b.view(np.uint8)[keep_sign])


@MODES
def test_every_bf16_value_rounds_as_defined(compiled):
    x = np.arange(65536, dtype=np.uint16).view(twin.BF16)
    _same_bytes(_run(to_e4m3, compiled, x), twin.e4m3(x))


@MODES
def test_ties_and_their_fp32_neighbours(compiled):
    """A cast by way of fp16 or bf16 would round a value just off a tie twice, and wrongly."""
    middle = ((twin.MAGNITUDES[1:] + twin.MAGNITUDES[:-1]) / 2).astype(np.float32)
    ulps = np.array([-4096, -257, -129, -16, -2, -1, 0, 1, 2, 16, 129, 257, 4096], np.int32)
    around = (middle.view(np.int32)[:, None] + ulps).view(np.float32).ravel()
    edges = np.array([0, 1e-45, 1e-38, 2**-10, 448, 449, 464, 480, 1e30, np.inf], np.float32)
    x = np.concatenate([around, twin.MAGNITUDES.astype(np.float32), edges])
    x = np.concatenate([x, -x, np.float32([np.nan])])
    _same_bytes(_run(to_e4m3, compiled, x), twin.e4m3(x))


@MODES
def test_random_fp32_bit_patterns(compiled):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    usual = (rng.normal(size=200_000) * np.exp2(rng.uniform(-12, 9, 200_000))).astype(np.float32)
    x = np.concatenate([bits, usual])
    _same_bytes(_run(to_e4m3, compiled, x), twin.e4m3(x))


@MODES
def test_lut_of_all_codes_and_all_scale_bytes(compiled):
    """The two NaN bytes, 0x7f and 0xff, give NaN for every code, code 0 too; no other byte gives any."""
    levels = _run(lut_levels, compiled, ALL_BYTES)
    codes = np.arange(-8, 8, dtype=np.int8)
    expected = twin.e4m3(codes * twin.e4m3_values(ALL_BYTES)[:, None])
    assert levels.shape == (256, 16)
    assert twin.same_operands(levels, expected)
    nan = np.isnan(levels.astype(np.float32))
    assert nan[[0x7F, 0xFF]].all()
    assert nan.sum() == 32


@MODES
def test_dequantized_operands_of_all_codes_and_all_scale_bytes(compiled):
    codes = np.tile(np.arange(-8, 8, dtype=np.int8), (256, twin.GROUP_SIZE // 16))
    w8 = _run(dequantize_lut, compiled, codes, ALL_BYTES[:, None])
    assert w8.dtype == twin.E4M3
    assert twin.same_operands(w8, twin.products(codes, ALL_BYTES[:, None]))


def test_products_never_clip_at_converted_scales():
    """At most 448 / 8 for a group scale: the lowest code's product is -448, not clipped to it."""
    levels = np.asarray(lut_levels(jnp.asarray(56, jnp.float8_e4m3fn))).astype(np.float32)
    assert levels[0] == -448
    assert levels[1] > -448
