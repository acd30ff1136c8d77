"""The dense kernel's schedule, pipeline, ragged edges, sums across blocks and epilogue, interpreted on a CPU."""

import dataclasses

import interpreter
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_checkpoint, weight_of

from pallas_kernels import quantize_activations, tuning, w4a16_matmul
from pallas_kernels.dense_gemm import TuningConfig, dense_gemm
from pallas_kernels.fragments import FragmentWeight

CASES = [  # M, N, K, code_min, config
    (136, 256, 1024, -7, TuningConfig(16, 2, 1, 16, stream_k=True, ctas=4)),  # more stages than steps in a tile
    (8, 256, 256, -7, TuningConfig(8, 2, 1, 3, ctas=2)),  # a tile for each block
    (1, 768, 512, -8, TuningConfig(8, 2, 3, 3, ctas=1)),  # few tokens, odd warpgroups, one block
    (40, 512, 512, -7, TuningConfig(16, 2, 1, 3, ctas=3)),  # ragged tokens, odd stages, uneven waves
    (24, 512, 768, -8, TuningConfig(16, 2, 1, 3, stream_k=True, ctas=3)),  # two blocks share a tile
    (8, 256, 1536, -7, TuningConfig(8, 2, 2, 4, stream_k=True, ctas=6)),  # six do
    (8, 256, 256, -7, TuningConfig(8, 2, 1, 3, stream_k=True, ctas=9)),  # more blocks than steps
    (8, 512, 1024, -7, TuningConfig(8, 2, 1, 3, stream_k=True, ctas=7, lead=2)),  # owners do more than the others
    (40, 512, 512, -8, TuningConfig(16, 2, 2, 4, stream_k=True, ctas=5)),  # full waves, then a shared tail
    (40, 512, 512, -7, TuningConfig(16, 2, 1, 3, cluster=2, ctas=4)),
    (40, 512, 512, -8, TuningConfig(16, 2, 1, 3, stream_k=True, cluster=2, ctas=6)),
    (40, 256, 768, -7, TuningConfig(16, 1, 2, 3, ctas=2)),  # K steps in pairs, an odd number of stages
    (40, 512, 1024, -8, TuningConfig(16, 1, 2, 4, stream_k=True, cluster=2, ctas=6)),  # pairs, shared tiles
    (
        136,
        256,
        512,
        -7,
        TuningConfig(136, 1, 2, 3, ctas=2),
    ),  # the output in one piece, since its half is no multiple of 8
    (144, 256, 512, -8, TuningConfig(144, 1, 2, 3, ctas=2)),  # the output in two pieces
    (40, 256, 1792, -7, TuningConfig(16, 1, 2, 3, ctas=2, slot_steps=2)),  # two K steps a slot, odd numbers of slots
    (40, 512, 1024, -8, TuningConfig(16, 1, 2, 4, stream_k=True, cluster=2, ctas=6, slot_steps=2)),
    (8, 512, 1024, -7, TuningConfig(8, 2, 1, 3, stream_k=True, ctas=7, lead=4, slot_steps=2)),
]


@pytest.mark.parametrize(("m", "n", "k", "code_min", "config"), CASES)
def test_products(m: int, n: int, k: int, code_min: int, config: TuningConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight_of(*random_checkpoint(m, n, k, code_min=code_min), code_min=code_min)
    x = jnp.asarray(np.random.default_rng(m).standard_normal((m, k)), jnp.bfloat16)
    x8, token_scale = quantize_activations(x)
    prepared = FragmentWeight.from_weight(w)

    found, races = interpreter.run(monkeypatch, dense_gemm, x8, token_scale, prepared, config)

    a, b = (np.asarray(v.astype(jnp.float32), np.float64) for v in (x8, w.operand()))
    expected = np.asarray(w.channel_scale, np.float64) * np.asarray(token_scale, np.float64) * (a @ b.T)
    # The rounding to bf16 alone is 1.7e-3.
    assert np.linalg.norm(found.astype(np.float64) - expected) < 2e-3 * np.linalg.norm(expected)
    assert not races


@pytest.mark.parametrize("code_min", [-7, -8])
def test_exact_products(code_min: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight_of(*random_checkpoint(1, 256, 768, code_min=code_min), code_min=code_min, numerics="exact")
    x8, token_scale = quantize_activations(jnp.asarray(np.random.default_rng(1).standard_normal((24, 768))))
    config = TuningConfig(16, 2, 1, 3, stream_k=True, ctas=3)
    found, races = interpreter.run(monkeypatch, dense_gemm, x8, token_scale, FragmentWeight.from_weight(w), config)
    a, b = (np.asarray(v.astype(jnp.float32), np.float64) for v in (x8, w.operand()))
    expected = np.asarray(token_scale, np.float64) * (a @ b.T)
    assert np.linalg.norm(found.astype(np.float64) - expected) < 2e-3 * np.linalg.norm(expected)
    assert not races


@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [
        (1, 384, 512, TuningConfig(8, 2, 3, 3, ctas=1)),
        (40, 512, 512, TuningConfig(16, 2, 2, 4, stream_k=True, ctas=5)),
        (40, 512, 640, TuningConfig(16, 2, 1, 3, stream_k=True, cluster=2, ctas=6)),
        (24, 256, 768, TuningConfig(16, 2, 1, 3, ctas=2, slot_steps=2)),
    ],
)
def test_w4a16_products(m: int, n: int, k: int, config: TuningConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight_of(*random_checkpoint(m, n, k), numerics="exact")
    w = dataclasses.replace(w, channel_scale=jnp.exp2(jnp.arange(n) % 3))
    x = jnp.asarray(np.random.default_rng(m).standard_normal((m, k)), jnp.bfloat16)
    prepared = FragmentWeight.from_weight(w, "w4a16")

    found, races = interpreter.run(monkeypatch, dense_gemm, x, None, prepared, config)

    a, b = (np.asarray(v.astype(jnp.bfloat16), np.float64) for v in (x, w.operand()))
    expected = np.asarray(w.channel_scale, np.float64) * (a @ b.T)
    # The rounding to bf16 alone is 1.7e-3.
    assert np.linalg.norm(found.astype(np.float64) - expected) < 1.8e-3 * np.linalg.norm(expected)
    assert not races


def test_the_w4a16_op_pads_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight_of(*random_checkpoint(2, 128, 256), numerics="exact")
    x = jnp.asarray(np.random.default_rng(2).standard_normal((3, 3, 256)), jnp.float32)
    prepared = FragmentWeight.from_weight(w, "w4a16")
    with tuning.force_config(TuningConfig(16, 2, 1, 3, ctas=2)):
        found, races = interpreter.run(monkeypatch, w4a16_matmul, x, prepared)
    expected = np.asarray(w4a16_matmul(x, w, out_dtype=jnp.float32))
    assert found.shape == (3, 3, 128)
    assert np.linalg.norm(found.astype(np.float32) - expected) < 1.8e-3 * np.linalg.norm(expected)
    assert not races


def test_a_race_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose stores to shared memory are not made visible to the copy that reads them."""
    monkeypatch.setattr(interpreter.plgpu, "commit_smem", lambda: None)
    w = weight_of(*random_checkpoint(0, 256, 256, code_min=-7), code_min=-7)
    x8, token_scale = quantize_activations(jnp.ones((8, 256), jnp.bfloat16))
    config = TuningConfig(8, 2, 1, 3, ctas=2)
    _, races = interpreter.run(monkeypatch, dense_gemm, x8, token_scale, FragmentWeight.from_weight(w), config)
    assert races


def test_an_early_release_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that does not wait for its wgmmas before it releases what they read."""
    monkeypatch.setattr(interpreter.plgpu, "wgmma_wait", lambda in_flight: None)
    w = weight_of(*random_checkpoint(0, 256, 1024, code_min=-7), code_min=-7)
    x8, token_scale = quantize_activations(jnp.arange(8.0 * 1024).reshape(8, 1024) % 13)
    config = TuningConfig(8, 2, 1, 3, ctas=2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="changed before the wgmma was waited for"):
        interpreter.run(monkeypatch, dense_gemm, x8, token_scale, FragmentWeight.from_weight(w), config)
