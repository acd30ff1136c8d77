"""The quantization kernel: interpreted on a CPU, and on a Hopper GPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import quantize_activations, quantize_kernel, tuning
from pallas_kernels.quantize_kernel import quantize_gated, quantize_tokens
from pallas_kernels.rounding import divide, round_to

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


def interpreted(monkeypatch: pytest.MonkeyPatch, kernel: Any, x: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """The interpreter knows no PTX: its texts divide the first operand by the second, or are silu of one."""

    def with_threads(text: str, arrays: list[jax.Array], layout: object) -> jax.Array:
        return jax.nn.silu(arrays[0]) if len(arrays) == 1 else divide(arrays[0], arrays[1])

    monkeypatch.setattr(quantize_kernel, "_with_threads", with_threads)
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            found = jax.block_until_ready(kernel(x, rows))
        assert not gpu_callbacks.get_races().races_found
        return found
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


@pytest.mark.parametrize(("m", "k", "rows", "dtype"), CASES)
def test_interpreted(m: int, k: int, rows: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens(m, k, dtype)
    check(interpreted(monkeypatch, quantize_tokens, x, rows), x, rows)


def check_placed(found: tuple[jax.Array, jax.Array], x: jax.Array, place: jax.Array) -> None:
    for value, expected in zip(found, quantize_activations(x), strict=True):
        rows = np.asarray(value)[np.asarray(place)]
        np.testing.assert_array_equal(
            rows.view(np.uint8), np.repeat(np.asarray(expected)[:, None], place.shape[1], 1).view(np.uint8)
        )


def placed(m: int, top_k: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(m).permutation(m * top_k).reshape(m, top_k), jnp.int32)


@pytest.mark.parametrize(("m", "k", "top_k", "rows"), [(3, 1024, 2, 8), (2, 384, 8, 16)])
def test_placed_interpreted(m: int, k: int, top_k: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, place = tokens(m, k, "bfloat16"), placed(m, top_k)
    check_placed(interpreted(monkeypatch, lambda x, rows: quantize_tokens(x, rows, place), x, rows), x, place)


@pytest.mark.gpu
@pytest.mark.skipif(not tuning.hopper(), reason="no Hopper GPU")
@pytest.mark.parametrize(
    ("m", "k", "top_k", "dtype"), [(1, 2048, 8, "bfloat16"), (999, 4096, 2, "bfloat16"), (77, 18432, 8, "float32")]
)
def test_placed_on_gpu(m: int, k: int, top_k: int, dtype: str) -> None:
    x, place = tokens(m, k, dtype), placed(m, top_k)
    check_placed(quantize_tokens(x, m * top_k + 8, place), x, place)


def gated(gate_up: jax.Array) -> jax.Array:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    silu = round_to(jax.nn.silu(gate.astype(jnp.float32)), gate_up.dtype)
    return round_to(silu.astype(jnp.float32) * up.astype(jnp.float32), gate_up.dtype)


@pytest.mark.parametrize(("m", "inner", "rows"), [(3, 768, 8), (2, 14336, 2)])
def test_gated_interpreted(m: int, inner: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = jnp.asarray(4 * np.random.default_rng(inner).standard_normal((m, 2 * inner)), jnp.bfloat16)
    check(interpreted(monkeypatch, quantize_gated, x, rows), gated(x), rows)


@pytest.mark.gpu
@pytest.mark.skipif(not tuning.hopper(), reason="no Hopper GPU")
@pytest.mark.parametrize(("m", "k", "rows", "dtype"), [*CASES, (4000, 36864, 4000, "bfloat16")])
def test_on_gpu(m: int, k: int, rows: int, dtype: str) -> None:
    x = tokens(m, k, dtype)
    check(quantize_tokens(x, rows), x, rows)


@pytest.mark.gpu
@pytest.mark.skipif(not tuning.hopper(), reason="no Hopper GPU")
@pytest.mark.parametrize(("m", "inner", "rows"), [(3, 768, 8), (1, 4096, 1), (1000, 14336, 1000), (5, 24576, 8)])
def test_gated_on_gpu(m: int, inner: int, rows: int) -> None:
    """silu's last bits are not XLA's, so that a product here and there is rounded the other way."""
    x = jnp.asarray(4 * np.random.default_rng(inner).standard_normal((m, 2 * inner)), jnp.bfloat16)
    at = np.minimum(np.arange(rows), m - 1)
    (x8, scale), (expected8, expected_scale) = quantize_gated(x, rows), quantize_activations(gated(x))
    np.testing.assert_allclose(scale, np.asarray(expected_scale)[at], rtol=2**-8)
    found, expected = (np.asarray(v).view(np.int8).astype(int) for v in (x8, expected8))
    differ = found != expected[at]
    assert np.mean(differ) < 0.02
    values, others = (
        np.asarray(v.astype(jnp.float32)) * np.asarray(s) for v, s in ((x8, scale), (expected8[at], expected_scale[at]))
    )
    np.testing.assert_allclose(values, others, rtol=0.13, atol=float(np.max(np.asarray(scale))) * 2**-8)


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
