"""Packing against compressed-tensors, and the conversions of scales and activations against torch, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import convert_scales, pack_codes, quantize_activations, unpack_codes


def bits(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).view({1: np.uint8, 4: np.uint32}[x.dtype.itemsize])


def pairs(numerics: dict[str, np.ndarray], first: str, second: str) -> list[tuple[np.ndarray, np.ndarray]]:
    count = sum(name.startswith(f"{first}.") for name in numerics)
    assert count
    return [(numerics[f"{first}.{i}"], numerics[f"{second}.{i}"]) for i in range(count)]


def test_pack_codes_as_compressed_tensors_does(numerics: dict[str, np.ndarray]):
    for codes, packed in pairs(numerics, "codes", "packed"):
        found = pack_codes(codes)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, packed)
        np.testing.assert_array_equal(unpack_codes(packed), codes)


def test_unpack_any_words_as_compressed_tensors_does(numerics: dict[str, np.ndarray]):
    for words, codes in pairs(numerics, "words", "unpacked"):
        found = unpack_codes(words)
        assert found.dtype == np.int8
        np.testing.assert_array_equal(found, codes)
        np.testing.assert_array_equal(pack_codes(codes), words)


def test_convert_scales_as_torch_does(numerics: dict[str, np.ndarray]):
    group_scale, channel_scale = convert_scales(numerics["scale"])
    expected = numerics["group_scale"]
    assert len(np.unique(expected)) == 0x67, "every group scale from 0 to 448 / 8 should occur"
    assert group_scale.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(bits(np.asarray(group_scale)), expected)
    np.testing.assert_array_equal(bits(np.asarray(channel_scale)), bits(numerics["channel_scale"]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_quantize_activations_as_torch_does(numerics: dict[str, np.ndarray], dtype: str):
    x8, token_scale = quantize_activations(numerics["x"].astype(dtype))
    assert x8.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(bits(np.asarray(x8)), numerics["x8"])
    np.testing.assert_array_equal(bits(np.asarray(token_scale)), bits(numerics["token_scale"]))
