"""GPTQ against an independent implementation in float64, and against what it should beat."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_twin as twin
import pytest

from pallas_kernels import W4A8Error, W4Weight
from w4a8jax.quantization import gptq
from w4a8jax.quantization.gptq import factorize, gptq_quantize_weight
from w4a8jax.quantization.rtn import quantize_weight

CASES = pytest.mark.parametrize(
    ("numerics", "code_min", "act_order"),
    [("lut", -7, False), ("lut", -8, False), ("lut", -7, True), ("exact", -7, False), ("exact", -8, True)],
)


def _layer(n=24, k=384, tokens=1024, seed=0):
    """A weight fp32 [N, K], inputs [T, K] with few strong directions, and their Hessian."""
    rng = np.random.default_rng(seed)
    w = (0.02 * rng.standard_normal((n, k))).astype(np.float32)
    x = rng.standard_normal((tokens, 32)) @ rng.standard_normal((32, k)) + rng.standard_normal((tokens, k))
    x = (x * np.exp(0.5 * rng.standard_normal(k))).astype(np.float32)
    return w, x, x.T @ x


def _levels(scale, numerics, code_min):
    """float64 [G, codes]: a row's levels from its stored scales bf16 [G], by the twin's arithmetic."""
    codes = np.arange(code_min, 8, dtype=np.int8)
    each = np.repeat(codes[:, None], 128 * len(scale), axis=1)
    value = twin.weight(each, np.repeat(scale[None], len(codes), axis=0), numerics)
    return value[:, ::128].T


def _gptq(w, h, scale, numerics, code_min, damping, order):
    """GPTQ in float64 by the textbook, with the scales given: int8 codes [N, K]."""
    k = w.shape[1]
    h = h.astype(np.float64)
    h = h + damping * np.mean(np.diag(h)) * np.eye(k)
    upper = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    codes = np.zeros(w.shape, np.int8)
    for row in range(len(w)):
        levels = _levels(scale[row], numerics, code_min)
        rest = w[row, order].astype(np.float64)
        for j, column in enumerate(order):
            best = int(np.argmin(np.abs(levels[column // 128] - rest[j])))
            error = (rest[j] - levels[column // 128, best]) / upper[j, j]
            rest[j:] -= error * upper[j, j:]
            codes[row, column] = best + code_min
    return codes


def _output_error(value, w, h):
    difference, w, h = (np.asarray(a, np.float64) for a in (np.asarray(value, np.float64) - w, w, h))
    return np.sqrt(np.sum((difference @ h) * difference) / np.sum((w @ h) * w))


def _kernel_error(tensor, w, h, numerics="lut"):
    return _output_error(twin.weight(twin.unpack(tensor.packed), tensor.scale, numerics), w, h)


@CASES
def test_equals_float64(numerics, code_min, act_order):
    w, _, h = _layer()
    factor = factorize(h, act_order=act_order)
    result = gptq_quantize_weight(w, factor, numerics=numerics, code_min=code_min)
    assert not result.fallback
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(h.shape[0])
    expected = _gptq(w, h, np.asarray(result.tensor.scale), numerics, code_min, 0.01, order)
    codes = twin.unpack(result.tensor.packed)
    # fp32 may decide a tie otherwise, after which the rest of the row is another as good solution.
    same = np.mean(np.all(codes == expected, axis=1))
    assert same >= 0.9
    twin_error = _output_error(twin.weight(expected, result.tensor.scale, numerics), w, h)
    assert abs(result.output_error / twin_error - 1) < 5e-3


def test_groups_take_the_best_candidate():
    """No scale of the first group, whose columns have had no feedback yet, has a lower error than the one chosen."""
    w, _, h = _layer(n=8)
    factor = factorize(h)
    result = gptq_quantize_weight(w, factor, numerics="exact")
    upper = np.linalg.cholesky(np.linalg.inv(h + 0.01 * np.mean(np.diag(h)) * np.eye(len(h)))).T
    rtn = quantize_weight(w, numerics="exact", importance=factor.importance)
    for row in range(len(w)):
        peak = np.abs(w[row, :128]).max()
        tried = [*np.linspace(0.6, 1.0, 7) * peak / 7, float(rtn.scale[row, 0])]
        scores = []
        for scale in np.asarray(tried).astype(twin.BF16).astype(np.float64):
            rest, score = w[row].astype(np.float64), 0.0
            for j in range(128):
                error = (rest[j] - scale * np.clip(np.round(rest[j] / scale), -7, 7)) / upper[j, j]
                rest[j:] -= error * upper[j, j:]
                score += error**2
            scores.append(score)
        found = float(result.tensor.scale[row, 0])
        chosen = int(np.argmin(np.abs(np.asarray(tried) - found)))
        assert scores[chosen] <= min(scores) * 1.01


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("numerics", ["lut", "exact"])
def test_beats_round_to_nearest(numerics, act_order):
    w, _, h = _layer()
    result = gptq_quantize_weight(w, factorize(h, act_order=act_order), numerics=numerics)
    plain = _kernel_error(quantize_weight(w, numerics=numerics), w, h, numerics)
    assert result.output_error < 0.7 * min(result.rtn_output_error, plain)
    assert result.output_error == pytest.approx(_kernel_error(result.tensor, w, h, numerics), rel=1e-3)


def test_kernel_exact_beats_the_plain_objective():
    """Codes chosen for code * scale lose where the kernel multiplies by e4m3(code * group_scale)."""
    gains = []
    for seed in range(5):
        w, _, h = _layer(seed=seed)
        factor = factorize(h)
        aware = gptq_quantize_weight(w, factor, numerics="lut")
        plain = gptq_quantize_weight(w, factor, numerics="exact")
        gains.append(_kernel_error(aware.tensor, w, h) / _kernel_error(plain.tensor, w, h))
    assert max(gains) < 0.95


def test_reports_the_kernels_error():
    w, x, h = _layer()
    result = gptq_quantize_weight(w, factorize(h))
    weight = W4Weight.from_checkpoint(jnp.asarray(result.tensor.packed), jnp.asarray(result.tensor.scale))
    value = np.asarray(weight.dequantize(), np.float64)
    x64 = x.astype(np.float64)
    direct = np.linalg.norm(x64 @ (value - w).T) / np.linalg.norm(x64 @ w.T)
    assert result.output_error == pytest.approx(direct, rel=1e-3)
    assert result.tensor.relative_error == pytest.approx(twin.relative(value, w), rel=1e-5)
    assert result.tensor.histogram.sum() == w.size
    assert result.tensor.histogram[0] == 0  # no code -8


def test_search_helps():
    w, _, h = _layer()
    factor = factorize(h)
    errors = [gptq_quantize_weight(w, factor, search=search).output_error for search in ("full", "fast", "none")]
    assert errors[0] <= errors[1] * 1.02
    assert errors[0] < errors[2]


def test_diagonal_hessian_is_weighted_rounding():
    """Without correlations there is nothing to feed back: with its scales, the codes are round-to-nearest's."""
    w, _, h = _layer()
    factor = factorize(np.diag(np.diag(h)))
    result = gptq_quantize_weight(w, factor, search="none")
    weighted = quantize_weight(w, importance=factor.importance)
    np.testing.assert_array_equal(result.tensor.packed, weighted.packed)
    np.testing.assert_array_equal(result.tensor.scale, weighted.scale)
    assert _kernel_error(weighted, w, np.diag(np.diag(h))) < _kernel_error(quantize_weight(w), w, np.diag(np.diag(h)))


def test_extreme_rows():
    """Rows of zeros, tiny and huge values, and an outlier: finite, and within a step of round-to-nearest."""
    w, _, h = _layer(n=8)
    w[1] = 0
    w[2] *= 1e-8
    w[3] *= 1e30
    w[4, :128] = 0
    w[5, 7] = 50
    for numerics in ("lut", "exact"):
        result = gptq_quantize_weight(w, factorize(h), numerics=numerics)
        value = twin.weight(twin.unpack(result.tensor.packed), result.tensor.scale, numerics)
        assert np.isfinite(value).all()
        assert (value[1] == 0).all()
        assert _output_error(value[3:4], w[3:4], h) < 0.2


def test_dead_inputs_and_few_tokens():
    """A Hessian of rank 8 with inputs that are always zero still has a factor."""
    w, x, _ = _layer()
    x = x[:8].copy()
    x[:, 100:140] = 0
    result = gptq_quantize_weight(w, factorize(x.T @ x))
    assert not result.fallback
    assert result.output_error < result.rtn_output_error


def test_damping_is_raised_until_it_works(monkeypatch):
    _, _, h = _layer()
    plain, real = factorize(h), gptq._upper
    nothing = jnp.full_like(h, jnp.nan), False
    monkeypatch.setattr(gptq, "_upper", lambda h, order, d: real(h, order, d) if d > 0.5 else nothing)
    assert factorize(h).damping == pytest.approx(100 * plain.damping)


def test_blocks_of_rows_do_not_matter(monkeypatch):
    w, _, h = _layer(n=300)
    factor = factorize(h)
    expected = gptq_quantize_weight(w, factor).tensor
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [gptq._block_rows(n) for n in (1, 300, 4096, 14336, 73728)] == [256, 512, 4096, 16384, 16384]
    found = gptq_quantize_weight(w, factor).tensor
    np.testing.assert_array_equal(found.packed, expected.packed)
    np.testing.assert_array_equal(found.scale, expected.scale)


def test_falls_back_where_round_to_nearest_is_better(monkeypatch):
    w, _, h = _layer()
    factor = factorize(h)
    spoiled = factor.__class__(factor.hessian, jnp.full_like(factor.upper, jnp.nan), None, factor.damping)
    result = gptq_quantize_weight(w, spoiled)
    assert "round-to-nearest" in result.fallback
    np.testing.assert_array_equal(result.tensor.packed, quantize_weight(w, importance=factor.importance).packed)


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (np.zeros((128, 128)), "no calibration token"),
        (np.full((128, 128), np.nan), "NaN or Inf"),
        (np.ones((128, 64)), r"expected \[K, K\]"),
        (np.diag(np.where(np.arange(128) == 5, 13000.0, -100.0)), "not positive definite"),
    ],
)
def test_bad_hessians(hessian, message):
    with pytest.raises(W4A8Error, match=message):
        factorize(hessian)


def test_bad_arguments():
    w, _, h = _layer(n=2)
    factor = factorize(h)
    with pytest.raises(W4A8Error, match="of 384 inputs"):
        gptq_quantize_weight(w[:, :256], factor)
    with pytest.raises(W4A8Error, match="search"):
        gptq_quantize_weight(w, factor, search="most")  # type: ignore[arg-type]
    with pytest.raises(W4A8Error, match="damping"):
        factorize(h, damping=0)
    with pytest.raises(W4A8Error, match="importance"):
        quantize_weight(w, importance=np.ones(3))
