"""The quantization kernel: interpreted on a CPU, and on a Hopper GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import quantize_activations, quantize_kernel, tuning
from pallas_kernels.quantize_kernel import quantize_tokens
from pallas_kernels.rounding import divide

CASES = [(1, 384, 1, "bfloat16"), (3, 1024, 8, "bfloat16"), (2, 12288, 2, "bfloat16"), (5, 128, 8, "float32")]


def tokens(m: int, k: int, dtype: str) -> jax.Array:
    """Tokens of very different sizes; the second is zero."""
    rng = np.random.default_rng(k)
    x = rng.standard_normal((m, k)) * np.exp(rng.uniform(-30, 30, (m, 1)))
    x[1:2] = 0
    return jnp.asarray(x, dtype)


def check(found: tuple[jax.Array, jax.Array], x: jax.Array, rows: int) -> None:
    x8, scale = found
    assert x8.shape == (rows, x.shape[1])
    assert scale.shape == (rows, 1)
    expected8, expected_scale = quantize_activations(x)
    at = np.minimum(np.arange(rows), len(x) - 1)
    np.testing.assert_array_equal(np.asarray(x8).view(np.uint8), np.asarray(expected8).view(np.uint8)[at])
    np.testing.assert_array_equal(np.asarray(scale), np.asarray(expected_scale)[at])


@pytest.mark.parametrize(("m", "k", "rows", "dtype"), CASES)
def test_interpreted(m: int, k: int, rows: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_threads(text: str, arrays: list[jax.Array], layout: object) -> jax.Array:
        # The interpreter knows no PTX. Both texts divide the first by the second.
        return divide(arrays[0], arrays[1])

    monkeypatch.setattr(quantize_kernel, "_with_threads", with_threads)
    x = tokens(m, k, dtype)
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            check(quantize_tokens(x, rows), x, rows)
        assert not gpu_callbacks.get_races().races_found
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


@pytest.mark.gpu
@pytest.mark.skipif(not tuning.hopper(), reason="no Hopper GPU")
@pytest.mark.parametrize(("m", "k", "rows", "dtype"), [*CASES, (4000, 36864, 4000, "bfloat16")])
def test_on_gpu(m: int, k: int, rows: int, dtype: str) -> None:
    x = tokens(m, k, dtype)
    check(quantize_tokens(x, rows), x, rows)


@pytest.mark.parametrize("bits", [7, 10])
def test_quotients_from_an_inverse_are_rounded_to_nearest(bits: int) -> None:
    """What `_DIVIDE_BY_INVERSE` computes, for every mantissa of bf16 or fp16, and that of every token's scale."""
    mantissas = (np.uint32(0x3F800000) + (np.arange(2**bits, dtype=np.uint32) << (23 - bits))).view(np.float32)
    x, y = mantissas[:, None], mantissas / np.float32(448)

    def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return (a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)).astype(np.float32)

    inverse = np.float32(1) / y
    quotient = x * inverse
    np.testing.assert_array_equal(fma(fma(-quotient, y, x), inverse, quotient), x / y)
