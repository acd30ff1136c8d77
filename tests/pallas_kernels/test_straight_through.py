"""Training through the arithmetic: values are the kernel's, gradients those of the straight-through surrogate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import W4A8Error, W4Weight, pack_codes, quantize_activations, w4a8_matmul, w4a8_ragged_matmul
from pallas_kernels.straight_through import MasterWeight, straight_through_matmul, straight_through_ragged_matmul

N, K, EXPERTS = 64, 256, 3


def _master(shape, seed=0, code_min=-7, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape).astype(np.float32) * 0.05
    scale = np.abs(w).reshape(*shape[:-1], -1, 128).max(-1) / 7 * rng.uniform(0.7, 1.1, (*shape[:-1], shape[-1] // 128))
    return MasterWeight(jnp.asarray(w, dtype), jnp.asarray(scale, jnp.bfloat16), code_min)


@pytest.mark.parametrize("code_min", [-7, -8])
def test_codes_are_nearest(code_min):
    """No other code's value is nearer to the master weight."""
    w = _master((N, K), code_min=code_min)
    quantized = w.quantize()
    value = np.asarray(quantized.dequantize(), np.float64)
    master = np.asarray(w.master, np.float64)
    assert int(quantized.codes.min()) == code_min
    for code in range(code_min, 8):
        packed = pack_codes(jnp.full((N, K), code, jnp.int8))
        other = np.asarray(W4Weight.from_checkpoint(packed, w.scale).dequantize(), np.float64)
        assert (abs(value - master) <= abs(other - master) * (1 + 1e-6)).all()


def test_values_are_the_kernels():
    w, x = _master((N, K)), jax.random.normal(jax.random.key(0), (2, 5, K), jnp.bfloat16)
    stored = W4Weight.from_checkpoint(w.quantize().packed, w.scale)
    np.testing.assert_array_equal(straight_through_matmul(x, w), w4a8_matmul(x, stored))
    experts, sizes = _master((EXPERTS, N, K)), jnp.array([4, 0, 5])
    stored = W4Weight.from_checkpoint(experts.quantize().packed, experts.scale)
    rows = x.reshape(-1, K)
    np.testing.assert_array_equal(
        straight_through_ragged_matmul(rows, experts, sizes), w4a8_ragged_matmul(rows, stored, sizes)
    )


def _surrogate(x0, w0):
    """float64 operands that move with x and W from their rounded values: the roundings' errors are constants."""
    x8, token_scale = quantize_activations(x0)
    x_error = np.asarray(x8, np.float64) * np.asarray(token_scale, np.float64) - np.asarray(x0, np.float64)
    w_error = np.asarray(w0.quantize().dequantize(), np.float64) - np.asarray(w0.master, np.float64)
    return lambda x, w: (x + x_error, w + w_error)


def _finite_difference(f, x, direction):
    """Exact for a bilinear f, up to rounding."""
    return (f(x + direction) - f(x - direction)) / 2


@pytest.mark.parametrize("ragged", [False, True])
def test_gradient_equals_finite_differences_of_the_surrogate(ragged):
    rng = np.random.default_rng(1)
    w0 = _master((EXPERTS, N, K) if ragged else (N, K))
    x0 = jnp.asarray(rng.standard_normal((9, K)), jnp.float32)
    weights = rng.standard_normal((9, N))
    sizes = np.array([4, 0, 5])
    operands = _surrogate(x0, w0)

    def surrogate(x, w):
        x, w = operands(x, w)
        rows = w[np.repeat(np.arange(EXPERTS), sizes)] if ragged else w[None]
        return float(np.sum(weights * np.einsum("mk,mnk->mn", x, np.broadcast_to(rows, (9, N, K)))))

    def loss(x, master):
        w = MasterWeight(master, w0.scale, w0.code_min)
        y = (
            straight_through_ragged_matmul(x, w, jnp.asarray(sizes), out_dtype=jnp.float32)
            if ragged
            else (straight_through_matmul(x, w, out_dtype=jnp.float32))
        )
        return jnp.sum(y * weights.astype(np.float32))

    dx, dw = (np.asarray(g, np.float64) for g in jax.grad(loss, (0, 1))(x0, w0.master))
    x, w = np.asarray(x0, np.float64), np.asarray(w0.master, np.float64)
    for _ in range(5):
        direction = rng.standard_normal(x.shape)
        expected = _finite_difference(lambda x: surrogate(x, w), x, direction)
        assert np.sum(dx * direction) == pytest.approx(expected, rel=1e-5, abs=1e-4)
        direction = rng.standard_normal(w.shape)
        expected = _finite_difference(lambda w: surrogate(x, w), w, direction)
        assert np.sum(dw * direction) == pytest.approx(expected, rel=1e-5, abs=1e-3)


def test_a_shape_that_does_not_fit():
    with pytest.raises(W4A8Error, match=r"expected \[N, K\] to fit x"):
        straight_through_matmul(jnp.ones((2, 128)), _master((N, K)))
