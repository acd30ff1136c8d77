"""The grouped kernel's schedule, pipeline, stores and zeros, interpreted on a CPU."""

import dataclasses

import interpreter
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_checkpoint, weight_of

from pallas_kernels import W4Weight, quantize_activations, tuning, w4a16_ragged_matmul
from pallas_kernels import grouped_gemm as grouped_gemm_module
from pallas_kernels.dense_gemm import TuningConfig
from pallas_kernels.fragments import FragmentWeight
from pallas_kernels.grouped_gemm import grouped_gemm
from pallas_kernels.rounding import round_to

FEW = TuningConfig(16, 2, 1, 3, ctas=3)
CASES = [  # sizes of groups, M, N, K, code_min, numerics, config
    ([5, 0, 19, 8, 0, 8], 40, 128, 256, -7, "lut", FEW),  # groups divide eights; whole eights; a whole tile
    ([0, 0, 1, 0], 8, 256, 256, -8, "lut", FEW),  # one token; rows of no group
    ([0, 33, 0], 40, 128, 384, -7, "lut", TuningConfig(16, 2, 1, 4, ctas=2)),  # all to one expert
    ([1, 0, 1, 0, 0, 1, 0, 1, 0, 0], 8, 128, 128, -7, "lut", FEW),  # more experts than tokens; one K step
    ([0, 0], 8, 128, 256, -7, "lut", FEW),  # no tokens
    ([3, 13, 12], 32, 256, 256, -7, "lut", TuningConfig(8, 1, 2, 3, ctas=2)),  # K steps in pairs
    ([3, 13, 12], 32, 256, 768, -7, "lut", TuningConfig(8, 1, 2, 3, ctas=2, slot_steps=2)),
    ([7, 0, 20], 32, 128, 256, -8, "exact", FEW),
    ([5, 0, 19, 0, 9], 40, 256, 512, -7, "lut", TuningConfig(16, 2, 1, 3, cluster=2, ctas=4)),
    ([40, 0, 30], 72, 512, 512, -8, "lut", TuningConfig(32, 1, 2, 4, cluster=2, ctas=4)),
    # Shared tiles: fewer than blocks, more, of groups of several, and by pairs of blocks; more blocks than K steps.
    ([0, 2, 0, 1], 8, 256, 512, -7, "lut", TuningConfig(8, 2, 1, 3, ctas=7, stream_k=True)),
    ([3, 13, 12], 32, 256, 768, -7, "lut", TuningConfig(8, 1, 2, 3, ctas=5, slot_steps=2, stream_k=True)),
    ([5, 0, 19, 0, 9], 40, 256, 512, -8, "lut", TuningConfig(16, 2, 1, 3, cluster=2, ctas=6, stream_k=True)),
    ([1, 0], 8, 128, 128, -7, "lut", TuningConfig(8, 2, 1, 3, ctas=3, stream_k=True)),
    ([0, 0], 8, 128, 256, -7, "lut", TuningConfig(8, 2, 1, 3, ctas=3, stream_k=True)),
    ([20, 3], 24, 128, 512, -7, "exact", TuningConfig(16, 2, 1, 3, ctas=2, stream_k=True)),
    ([150], 152, 128, 256, -7, "lut", TuningConfig(144, 1, 2, 3, ctas=1)),  # the output in two pieces
    # Large tiles with groups inside an eight, across two, and with whole 32s.
    ([3, 2, 1, 47, 0, 1, 9, 1, 60], 128, 128, 128, -7, "lut", TuningConfig(64, 2, 1, 3, ctas=2)),
    (
        [30, 100, 0, 70],
        208,
        256,
        256,
        -7,
        "lut",
        TuningConfig(128, 1, 2, 3, ctas=2),
    ),  # halves of tiles, which come last
]


def expected_of(x8: np.ndarray, token_scale: np.ndarray | None, w: W4Weight, sizes: list[int]) -> np.ndarray:
    """In float64; without token scales of W4A16, whose x is bf16 and whose weights are rounded to bf16."""
    operand = round_to(w.operand(), jnp.bfloat16) if token_scale is None else w.operand()
    operand = np.asarray(operand.astype(jnp.float32), np.float64)
    x8 = np.asarray(x8, np.float32).astype(np.float64)
    token_scale = np.ones((len(x8), 1)) if token_scale is None else np.asarray(token_scale, np.float64)
    out = np.zeros((x8.shape[0], w.shape[1]))
    for e, (end, size) in enumerate(zip(np.cumsum(sizes), sizes, strict=True)):
        rows = slice(end - size, end)
        out[rows] = np.asarray(w.channel_scale[e], np.float64) * token_scale[rows] * (x8[rows] @ operand[e].T)
    return out


@pytest.mark.parametrize(("sizes", "m", "n", "k", "code_min", "numerics", "config"), CASES)
def test_products(
    sizes: list[int],
    m: int,
    n: int,
    k: int,
    code_min: int,
    numerics: str,
    config: TuningConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes, scale = random_checkpoint(m, len(sizes), n, k, code_min=code_min)
    w = weight_of(codes, scale, code_min=code_min, numerics=numerics)
    x8, token_scale = quantize_activations(jnp.asarray(np.random.default_rng(m).standard_normal((m, k)), jnp.bfloat16))
    check(monkeypatch, x8, token_scale, w, FragmentWeight.from_weight(w), sizes, config)


def test_halves_of_tiles_in_their_groups_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_gemm_module, "_WAVES", 0)
    w = weight_of(*random_checkpoint(1, 2, 128, 128))
    x8, token_scale = quantize_activations(
        jnp.asarray(np.random.default_rng(1).standard_normal((104, 128)), jnp.bfloat16)
    )
    check(monkeypatch, x8, token_scale, w, FragmentWeight.from_weight(w), [30, 70], TuningConfig(128, 2, 1, 3, ctas=1))


@pytest.mark.parametrize(
    ("sizes", "m", "n", "k", "config"),
    [
        ([5, 0, 19, 8, 0, 8], 40, 128, 256, FEW),
        ([0, 0, 1, 0], 8, 256, 384, TuningConfig(8, 2, 2, 3, ctas=2)),
        ([40, 0, 30], 72, 512, 512, TuningConfig(32, 1, 2, 4, cluster=2, ctas=4)),
        ([0, 0], 8, 128, 256, FEW),
    ],
)
def test_w4a16_products(
    sizes: list[int], m: int, n: int, k: int, config: TuningConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = weight_of(*random_checkpoint(m, len(sizes), n, k), numerics="exact")
    w = dataclasses.replace(w, channel_scale=jnp.exp2(jnp.arange(len(sizes) * n) % 3).reshape(-1, n))
    x = jnp.asarray(np.random.default_rng(m).standard_normal((m, k)), jnp.bfloat16)
    check(monkeypatch, x, None, w, FragmentWeight.from_weight(w, "w4a16"), sizes, config)


def test_the_w4a16_op_pads_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight_of(*random_checkpoint(5, 3, 128, 256), numerics="exact")
    x = jnp.asarray(np.random.default_rng(5).standard_normal((5, 256)), jnp.float32)
    prepared, group_sizes = FragmentWeight.from_weight(w, "w4a16"), jnp.asarray([2, 0, 3], jnp.int32)
    with tuning.force_config(FEW):
        found, races = interpreter.run(monkeypatch, w4a16_ragged_matmul, x, prepared, group_sizes)
    expected = w4a16_ragged_matmul(x, w, group_sizes, out_dtype=jnp.float32)
    assert found.shape == expected.shape
    assert np.linalg.norm(found.astype(np.float64) - expected) <= 2e-3 * np.linalg.norm(expected)
    assert not races


def check(
    monkeypatch: pytest.MonkeyPatch,
    x: jax.Array,
    token_scale: jax.Array | None,
    w: W4Weight,
    prepared: FragmentWeight,
    sizes: list[int],
    config: TuningConfig,
) -> None:
    group_sizes = jnp.asarray(sizes, jnp.int32)
    found, races = interpreter.run(monkeypatch, grouped_gemm, x, token_scale, prepared, group_sizes, config)
    expected = expected_of(x, token_scale, w, sizes)
    found = found.astype(np.float64)
    # The rounding to bf16 alone is 1.7e-3.
    assert np.linalg.norm(found - expected) <= 2e-3 * np.linalg.norm(expected)
    assert not np.any(found[sum(sizes) :])
    assert not races
