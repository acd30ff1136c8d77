"""Packing, scale conversion and the construction of `W4Weight`, against the twin."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_twin as twin
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import extreme_checkpoint, random_checkpoint, weight_of

from pallas_kernels import W4A8Error, W4Weight, convert_scales, pack_codes, unpack_codes

MODES = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])


def test_the_packed_word_of_the_format():
    codes = jnp.asarray([[-8, -7, -1, 0, 1, 2, 6, 7]], jnp.int8)
    word = np.asarray(pack_codes(codes)).view(np.uint32)
    assert word.tolist() == [[0xFEA98710]]
    assert unpack_codes(pack_codes(codes)).tolist() == codes.tolist()


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 3), max_size=2), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_pack_and_unpack_any_shape(lead, n, words, seed):
    codes = np.random.default_rng(seed).integers(-8, 8, (*lead, n, 8 * words), dtype=np.int8)
    packed = np.asarray(pack_codes(jnp.asarray(codes)))
    np.testing.assert_array_equal(packed, twin.pack(codes))
    np.testing.assert_array_equal(unpack_codes(jnp.asarray(packed)), codes)
    np.testing.assert_array_equal(twin.unpack(packed), codes)


def test_pack_refuses_a_partial_word():
    with pytest.raises(W4A8Error, match="K must be a multiple of 8, found 12"):
        pack_codes(jnp.zeros((1, 12), jnp.int8))


def _scales():
    """bf16 [N, 4]: many octaves between and within rows, every kind of edge."""
    rng = np.random.default_rng(3)
    wide = np.exp2(rng.uniform(-30, 10, (3000, 1)) + rng.uniform(-16, 0, (3000, 4)))
    usual = rng.uniform(0.004, 0.008, (3000, 4))
    floor = 2.0**-9 * (1 + np.arange(-8, 9)[:, None] * np.array([0, 0.0, 2**-8, 2**-7]))
    edges = np.array([[0, 0, 0, 0], [1, 0, 1e-9, 0.25], [3e38, 1, 3e38, 2e38], [1e-38, 1e-39, 0, 0]])
    ratio = twin.MAGNITUDES[:, None] * np.array([0, 1, 1.004, 0.996]) + np.array([448, 0, 0, 0])
    return np.concatenate([wide, usual, floor, edges, -usual[:50], ratio, ratio / 448 / 100]).astype(twin.BF16)


@MODES
def test_convert_scales_bit_for_bit(compiled):
    scale = _scales()
    group_scale, channel_scale = (jax.jit(convert_scales) if compiled else convert_scales)(scale)
    expected_group, expected_channel = twin.convert_scales(scale)
    assert group_scale.dtype == twin.E4M3
    assert channel_scale.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(channel_scale).view(np.uint32), expected_channel.view(np.uint32))
    assert twin.same_operands(np.asarray(group_scale), expected_group)


def test_a_row_s_largest_scale_becomes_56_and_scales_below_the_floor_do_not():
    group_scale, channel_scale = convert_scales(jnp.asarray([[0.01, 0.005], [1e-4, 5e-5]], jnp.bfloat16))
    assert group_scale.astype(jnp.float32).tolist() == [[56, 28], [2.75, 1.375]]
    assert channel_scale[1] == 8 * twin.SCALE_FLOOR


@pytest.mark.parametrize("numerics", ["lut", "exact"])
@MODES
@pytest.mark.parametrize("make", [lambda: random_checkpoint(1, 40, 512), lambda: extreme_checkpoint(40, 512)])
def test_dequantize_is_what_the_twin_computes(numerics, compiled, make):
    codes, scale = make()

    def dequantize(packed, scale):
        return W4Weight.from_checkpoint(packed, scale, numerics=numerics).dequantize()

    value = (jax.jit(dequantize) if compiled else dequantize)(jnp.asarray(twin.pack(codes)), jnp.asarray(scale))
    np.testing.assert_array_equal(value, twin.weight(codes, scale, numerics).astype(np.float32))


def test_attributes():
    codes, scale = random_checkpoint(2, 3, 16, 256)
    w = weight_of(codes, scale, code_min=-8)
    assert w.shape == (3, 16, 256)
    assert w.group_size == 128
    assert w.numerics == "lut"
    assert w.code_min == -8
    assert w.group_scale.dtype == twin.E4M3
    assert w.channel_scale.shape == (3, 16)
    np.testing.assert_array_equal(w.codes, codes)
    exact = weight_of(codes, scale, numerics="exact", code_min=-7)
    assert exact.group_scale.dtype == twin.BF16
    assert exact.code_min == -7
    assert (np.asarray(exact.channel_scale) == 1).all()


PACKED, SCALE = np.zeros((16, 32), np.int32), np.ones((16, 2), twin.BF16)


@pytest.mark.parametrize(
    ("packed", "scale", "options", "message"),
    [
        (PACKED.astype(np.int64), SCALE, {}, r"weight_packed: expected int32 .* found int64\[16, 32\]"),
        (PACKED[0], SCALE, {}, r"weight_packed: expected int32 \[..., N, K/8\], found int32\[32\]"),
        (PACKED, SCALE[:8], {}, r"weight_scale: expected \[16, 2\] .* found bfloat16\[8, 2\]"),
        (PACKED, np.ones((16, 3), twin.BF16), {}, r"weight_scale: expected \[16, 2\] .* found bfloat16\[16, 3\]"),
        (PACKED, np.ones((16, 0), twin.BF16), {}, r"weight_scale: expected \[16, 2\]"),
        (PACKED, SCALE[None], {}, r"weight_scale: expected \[16, 2\] .* found bfloat16\[1, 16, 2\]"),
        (PACKED, SCALE.astype(np.int32), {}, r"weight_scale: expected a float dtype, found int32\[16, 2\]"),
        (PACKED, SCALE, {"numerics": "fast"}, r"numerics: expected .* found 'fast'"),
        (PACKED, SCALE, {"code_min": -6}, r"code_min: expected -8 or -7, found -6"),
    ],
)
def test_refusals_say_what_was_expected_and_found(packed, scale, options, message):
    with pytest.raises(W4A8Error, match=message) as caught:
        W4Weight.from_checkpoint(packed, scale, **options)
    assert "\n" not in str(caught.value)
