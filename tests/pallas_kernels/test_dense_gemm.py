"""The dense kernel on a Hopper GPU."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import extreme_checkpoint, random_checkpoint, weight_of

from pallas_kernels import W4A8Error, W4Weight, quantize_activations, w4a8_matmul
from pallas_kernels.dense_gemm import TuningConfig, dense_gemm
from pallas_kernels.fragments import FragmentWeight
from pallas_kernels.ops import w4a8_gated_matmul
from pallas_kernels.rounding import round_to


def on_hopper() -> bool:
    return jax.default_backend() == "gpu" and jax.devices()[0].compute_capability == "9.0"


gpu = [pytest.mark.gpu, pytest.mark.skipif(not on_hopper(), reason="no Hopper GPU")]
# Tokens and TuningConfig: tile_tokens, row_blocks, warpgroups, stages, stream_k, cluster, ctas, lead, slot_steps.
CASES = [
    (1, (8, 2, 1, 8, True)),
    (8, (8, 2, 3, 4)),
    (24, (16, 2, 2, 8, True)),
    (64, (64, 3, 2, 4, True)),
    (136, (128, 2, 1, 6, True, 2)),
    (504, (96, 2, 3, 3, True)),
    (1000, (160, 2, 2, 3)),
    (136, (160, 2, 2, 4)),
    (200, (256, 1, 2, 4)),
    (256, (256, 1, 2, 4)),
    (1000, (192, 1, 2, 5, True)),
    (1504, (256, 1, 2, 4, True, 2)),
    (1504, (16, 2, 1, 16, True)),
    (5, (8, 1, 2, 4, True, 1, 132, 2, 2)),
    (40, (16, 1, 2, 4, True, 2, 132, 0, 2)),
    (200, (64, 2, 2, 3, False, 1, 132, 0, 2)),
]


def on_cpu(w: W4Weight, x: Any) -> tuple[FragmentWeight, np.ndarray]:
    """The kernel's weight, and the product of x in float64. Made on the CPU, where small programs compile quickly."""
    with jax.default_device(jax.devices("cpu")[0]):
        x8, token_scale = (np.asarray(v) for v in quantize_activations(x))
        expected = np.asarray(w.channel_scale, np.float64) * (
            token_scale.astype(np.float64) * (x8.astype(np.float64) @ np.asarray(w.operand()).astype(np.float64).T)
        )
        return jax.device_get(jax.jit(FragmentWeight.from_weight)(w)), expected


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="no Hopper GPU")
class TestOpOnGpu:
    @pytest.mark.parametrize("seed", range(8))
    def test_random_ragged_shapes(self, seed: int) -> None:
        """25 shapes a seed, with the heuristic's configurations; memory holds NaN where the kernel must write."""
        rng = np.random.default_rng(seed)
        failed = []
        for i in range(25):
            m, (n, k) = int(np.exp(rng.uniform(0, 8))), 128 * rng.integers(1, 25, 2)
            code_min, numerics = [(-7, "lut"), (-8, "lut"), (-7, "exact"), (-8, "exact")][i % 4]
            codes, scale = random_checkpoint(i, n, k, code_min=code_min)
            x = (rng.standard_normal((m, k)) * np.exp(rng.uniform(-9, 9, (m, 1)))).astype(jnp.bfloat16)
            f, expected = on_cpu(weight_of(codes, scale, numerics=numerics, code_min=code_min), x)
            f, x = jax.device_put((f, x))
            product = jax.jit(w4a8_matmul)
            jax.block_until_ready(jax.device_put(np.full((4 * m * n + 2**24,), np.nan, np.float32))).delete()
            found, again = (np.asarray(product(x, f), np.float64) for _ in range(2))
            error = np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)
            # Of 3072 products at most; the limit is test_products', with room for longer sums.
            if not error < 2.5e-3 or not np.array_equal(found, again) or np.any(np.asarray(f.flags)):
                failed.append((m, int(n), int(k), numerics, code_min, error, np.array_equal(found, again)))
        assert not failed

    @pytest.mark.parametrize("m", [1, 9, 300])
    def test_gated_product(self, m: int) -> None:
        rng = np.random.default_rng(m)
        w = weight_of(*random_checkpoint(m, 384, 768))
        gate_up = jnp.asarray(rng.standard_normal((m, 2 * 768)), jnp.bfloat16)
        expected = np.asarray(jax.jit(w4a8_gated_matmul)(gate_up, w), np.float64)
        found = np.asarray(jax.jit(w4a8_gated_matmul)(gate_up, FragmentWeight.from_weight(w)), np.float64)
        # silu's last bits are not XLA's, so that an FP8 code here and there is the neighbour.
        assert found.shape == expected.shape
        assert np.linalg.norm(found - expected) < 5e-3 * np.linalg.norm(expected)

    @pytest.mark.parametrize("numerics", ["lut", "exact"])
    def test_extreme_scales(self, numerics: str) -> None:
        w = weight_of(*extreme_checkpoint(640, 512), numerics=numerics)
        f, expected = on_cpu(w, np.eye(512, dtype=np.float32).astype(jnp.bfloat16))
        found = np.asarray(jax.jit(w4a8_matmul)(jnp.eye(512, dtype=jnp.bfloat16), jax.device_put(f)), np.float64)
        np.testing.assert_allclose(found, expected, rtol=2**-8)


@pytest.mark.parametrize("code_min", [-7, -8])
class TestOnGpu:
    pytestmark = gpu

    def test_operands_are_the_references_bits(self, code_min: int) -> None:
        w = weight_of(*random_checkpoint(0, 768, 512, code_min=code_min), code_min=code_min)
        f = FragmentWeight.from_weight(w)
        unscaled = dataclasses.replace(f, channel_scale=jnp.ones(768))
        eye = jnp.eye(512, dtype=jnp.float8_e4m3fn)
        found = dense_gemm(eye, jnp.ones((512, 1)), unscaled, TuningConfig(128))
        np.testing.assert_array_equal(found.astype(jnp.float32), w.operand().astype(jnp.float32).T)

    @pytest.mark.parametrize(("m", "config"), CASES)
    def test_products(self, code_min: int, m: int, config: tuple[Any, ...]) -> None:
        rng = np.random.default_rng(m)
        w = weight_of(*random_checkpoint(m, 768, 512, code_min=code_min), code_min=code_min)
        f = FragmentWeight.from_weight(w)
        x8, token_scale = quantize_activations(jnp.asarray(rng.standard_normal((m, 512)), jnp.bfloat16))
        found, again = (np.asarray(dense_gemm(x8, token_scale, f, TuningConfig(*config)), np.float64) for _ in "12")
        np.testing.assert_array_equal(found, again)
        a, b = (np.asarray(v.astype(jnp.float32), np.float64) for v in (x8, w.operand()))
        expected = np.asarray(w.channel_scale, np.float64) * np.asarray(token_scale, np.float64) * (a @ b.T)
        # The rounding to bf16 alone is 1.7e-3; the tensor core's sums of 512 products come on top.
        assert np.linalg.norm(found - expected) < 2e-3 * np.linalg.norm(expected)
        assert not np.any(np.asarray(f.flags))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TuningConfig(16, 2, 3), "no multiple of 384 rows"),
        (TuningConfig(128, 2, 2, 8), "bytes of shared memory"),
        (TuningConfig(12), "tile_tokens must be a multiple of 8"),
        (TuningConfig(16, 0), "row_blocks must be"),
        (TuningConfig(16, 3, 1), "even for odd warpgroups"),
        (TuningConfig(16, 2, 2, 4, cluster=2), "no multiple of 512 rows"),
        (TuningConfig(16, 2, 1, 2), "at least 3 stages"),
        (TuningConfig(16, slot_steps=3), "slot_steps must be 1 or 2"),
    ],
)
def test_configs_that_do_not_fit_are_refused(config: TuningConfig, message: str) -> None:
    f = FragmentWeight.from_weight(weight_of(*random_checkpoint(0, 256, 256, code_min=-7), code_min=-7))
    with pytest.raises(W4A8Error, match=message):
        dense_gemm(jnp.zeros((16, 256), jnp.float8_e4m3fn), jnp.ones((16, 1)), f, config)


@pytest.mark.parametrize("config", [TuningConfig(16, 1, 2), TuningConfig(16, slot_steps=2)])
def test_pairs_of_steps_need_pairs_and_lut(config: TuningConfig) -> None:
    config.check(256, 512, "sign_magnitude")
    for k, form in ((384, "sign_magnitude"), (512, "subnormal")):
        with pytest.raises(W4A8Error, match="for K a multiple of 256"):
            config.check(256, k, form)


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="no Hopper GPU")
@pytest.mark.parametrize("code_min", [-7, -8])
@pytest.mark.parametrize(("m", "config"), [(1, (8, 2, 1, 8, True)), (136, (64, 2, 2, 6, True)), (504, (64, 2, 2, 6))])
def test_exact_products_on_gpu(code_min: int, m: int, config: tuple[Any, ...]) -> None:
    codes, scale = random_checkpoint(m, 768, 512, code_min=code_min)
    w = weight_of(codes, scale, numerics="exact", code_min=code_min)
    x = np.random.default_rng(m).standard_normal((m, 512))
    x8, token_scale = quantize_activations(jnp.asarray(x, jnp.bfloat16))
    found = np.asarray(dense_gemm(x8, token_scale, FragmentWeight.from_weight(w), TuningConfig(*config)), np.float64)
    a, b = (np.asarray(v, np.float32).astype(np.float64) for v in (x8, w.operand()))
    expected = np.asarray(token_scale, np.float64) * (a @ b.T)
    # The rounding to bf16 alone is 1.7e-3, and sums are of 128 products.
    assert np.linalg.norm(found - expected) < 1.8e-3 * np.linalg.norm(expected)


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="no Hopper GPU")
class TestW4A16OnGpu:
    def test_operands_are_the_references_bits(self) -> None:
        codes, scale = random_checkpoint(0, 768, 512)
        scale[::7] *= scale.dtype.type(2.0**-100)
        scale[1::7] *= scale.dtype.type(2.0**100)
        w = weight_of(codes, scale, numerics="exact")
        f = FragmentWeight.from_weight(w, "w4a16")
        found = dense_gemm(jnp.eye(512, dtype=jnp.bfloat16), None, f, TuningConfig(128, 2, 2, 3))
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(round_to(w.operand(), found.dtype)).T)

    @pytest.mark.parametrize("code_min", [-7, -8])
    @pytest.mark.parametrize(
        ("m", "config"),
        [
            (1, (8, 2, 1, 8, True)),
            (8, (8, 2, 3, 4)),
            (24, (16, 2, 2, 8, True)),
            (136, (128, 2, 1, 4, True, 2)),
            (1000, (128, 2, 2, 3)),
            (1504, (16, 2, 1, 16, True)),
        ],
    )
    def test_products(self, code_min: int, m: int, config: tuple[Any, ...]) -> None:
        w = weight_of(*random_checkpoint(m, 768, 512, code_min=code_min), numerics="exact", code_min=code_min)
        f = FragmentWeight.from_weight(w, "w4a16")
        x = jnp.asarray(np.random.default_rng(m).standard_normal((m, 512)), jnp.bfloat16)
        found, again = (np.asarray(dense_gemm(x, None, f, TuningConfig(*config)), np.float64) for _ in "12")
        np.testing.assert_array_equal(found, again)
        a, b = (np.asarray(round_to(v, jnp.bfloat16), np.float64) for v in (x, w.operand()))
        # The rounding to bf16 alone is 1.7e-3.
        assert np.linalg.norm(found - a @ b.T) < 1.8e-3 * np.linalg.norm(a @ b.T)
        assert not np.any(np.asarray(f.flags))


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
def test_operands_of_the_other_scheme_are_refused(scheme: Any) -> None:
    w = weight_of(*random_checkpoint(0, 256, 256, code_min=-7), code_min=-7, numerics="exact")
    f = FragmentWeight.from_weight(w, scheme)
    x8, token_scale = quantize_activations(jnp.ones((16, 256), jnp.bfloat16))
    x = jnp.ones((16, 256), jnp.bfloat16)
    wrong: Any = {"w4a8": [(x, token_scale), (x8, None)], "w4a16": [(x8, None), (x, token_scale)]}[scheme]
    for operands in wrong:
        with pytest.raises(W4A8Error, match="do not fit weights in form"):
            dense_gemm(*operands, f, TuningConfig(16))


def test_bf16_tokens_take_twice_the_shared_memory() -> None:
    config = TuningConfig(128, 2, 2, 4)
    config.check(256, 256, "two_tables")
    with pytest.raises(W4A8Error, match="bytes of shared memory"):
        config.check(256, 256, "bf16")
