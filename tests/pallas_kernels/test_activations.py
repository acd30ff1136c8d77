"""Per-token FP8 quantization against the twin, bit for bit."""

import jax
import numpy as np
import numpy_twin as twin
import pytest

from pallas_kernels import W4A8Error, quantize_activations


def _tokens():
    rng = np.random.default_rng(0)
    floor_absmax = np.float32(448) * twin.SCALE_FLOOR
    rows = [rng.normal(size=(200, 384)) * np.exp2(rng.uniform(-20, 20, (200, 1)))]
    special = np.zeros((10, 384))
    special[1] = 1e-40  # subnormal
    special[2, 5] = 1e30
    special[3] = rng.normal(size=384) * 1e30
    special[4] = -3e38
    special[5, ::2] = np.nextafter(floor_absmax, np.float32(0))
    special[6, ::2] = floor_absmax
    special[7, ::2] = np.nextafter(floor_absmax, np.float32(1))
    special[8] = rng.integers(-448, 449, 384)
    special[8, 0] = 448  # token_scale 1: the values themselves, with many ties
    special[9] = -np.linspace(0, 1, 384)
    return np.concatenate([*rows, special]).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, twin.BF16, np.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_bit_for_bit(dtype, compiled):
    with np.errstate(over="ignore"):
        x = _tokens().astype(dtype)
    x = x[np.isfinite(x.astype(np.float32)).all(-1)]
    x8, token_scale = (jax.jit(quantize_activations) if compiled else quantize_activations)(x)
    expected8, expected_scale = twin.quantize_activations(x)
    np.testing.assert_array_equal(np.asarray(token_scale).view(np.uint32), expected_scale.view(np.uint32))
    assert x8.dtype == twin.E4M3
    assert twin.same_operands(np.asarray(x8), expected8)


def test_division_is_ieee_and_not_by_a_reciprocal():
    """Tokens where x * (1 / scale) rounds to another e4m3 number than x / scale."""
    rng = np.random.default_rng(1)
    absmax = rng.uniform(1, 2, 20_000).astype(np.float32)
    scale = absmax / np.float32(448)
    tie = ((twin.MAGNITUDES[60:-1] + twin.MAGNITUDES[61:]) / 2).astype(np.float32)
    x = scale[:, None] * rng.choice(tie, (20_000, 64))
    x = np.concatenate([x, absmax[:, None]], axis=-1)
    expected, token_scale = twin.quantize_activations(x)
    assert not twin.same_operands(expected, twin.e4m3(x * (np.float32(1) / token_scale))), "the test tests nothing"
    assert twin.same_operands(np.asarray(jax.jit(quantize_activations)(x)[0]), expected)


def test_the_floor_of_the_scale():
    _, token_scale = quantize_activations(np.zeros((2, 128), np.float32))
    assert np.asarray(token_scale).view(np.uint32).tolist() == [[0x36924925]] * 2


def test_leading_axes():
    x = _tokens()[:24].reshape(2, 3, 4, 384)
    x8, token_scale = quantize_activations(x)
    assert x8.shape == x.shape
    assert token_scale.shape == (2, 3, 4, 1)
    assert twin.same_operands(np.asarray(x8), twin.quantize_activations(x)[0])


def test_refuses_what_is_not_float():
    with pytest.raises(W4A8Error, match=r"expected a float array \[..., K\], found int32\[2, 128\]"):
        quantize_activations(np.zeros((2, 128), np.int32))
