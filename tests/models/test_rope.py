"""Rotary embedding; transformers' own numbers are compared in tests/oracle."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from models.config import RopeConfig
from models.layers.rope import apply_rope, rope_table
from pallas_kernels import W4A8Error

D, CONTEXT = 16, 64
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "short_factor": (1.0,) * (D // 2),
    "long_factor": (4.0,) * (D // 2),
    "original_max_position_embeddings": 32,
}


def rope(kind: str = "default", *, theta: float = 10000.0, interleaved: bool = False, **scaling: object) -> RopeConfig:
    return RopeConfig(theta, interleaved, kind, tuple(sorted(scaling.items())))


def angles(config: RopeConfig, positions: list[list[int]], head_dim: int = D, context: int = CONTEXT) -> np.ndarray:
    """Angles [B, T, D/2] that stay below pi, without the attention factor."""
    cos, sin = rope_table(config, head_dim, context, jnp.asarray(positions))
    assert cos.dtype == sin.dtype == jnp.float32
    return np.arctan2(np.asarray(sin), np.asarray(cos))


def attention_factor(config: RopeConfig) -> float:
    cos, sin = rope_table(config, D, CONTEXT, jnp.asarray([[3]]))
    factors = np.hypot(np.asarray(cos), np.asarray(sin))
    np.testing.assert_allclose(factors, factors[0, 0, 0], rtol=1e-6)
    return float(factors[0, 0, 0])


PLAIN = 10000.0 ** (-np.arange(0, D, 2) / D)


def test_frequencies_are_powers_of_theta():
    np.testing.assert_allclose(angles(rope(), [[0, 1, 2]])[0], [0 * PLAIN, PLAIN, 2 * PLAIN], rtol=1e-6)


def test_long_positions_keep_their_angle():
    cos, _ = rope_table(rope(theta=5e5), 128, 131072, jnp.asarray([[131071]]))
    exact = 131071 * 5e5 ** (-np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(np.asarray(cos)[0, 0], np.cos(exact), atol=0.02)  # fp32 angles, as transformers has them


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_distance_alone(interleaved: bool):
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, D)), jnp.float32) for _ in range(2))

    def product(i: int, j: int) -> float:
        at = [rope_table(rope(), D, CONTEXT, jnp.asarray([[position]])) for position in (i, j)]
        rotated = [apply_rope(x, *table, interleaved=interleaved) for x, table in zip((q, k), at, strict=True)]
        return float(jnp.vdot(*rotated))

    assert product(9, 5) == pytest.approx(product(33, 29), rel=1e-4)
    assert product(9, 5) != pytest.approx(product(9, 6), rel=1e-2)
    assert product(7, 7) == pytest.approx(float(jnp.vdot(q, k)), rel=1e-5)


def test_pairs_are_halves_or_neighbours():
    x = np.arange(1.0, D + 1, dtype=np.float32).reshape(1, 1, 1, D)
    table = rope_table(rope(), D, CONTEXT, jnp.asarray([[1]]))
    halves = np.asarray(apply_rope(jnp.asarray(x), *table, interleaved=False))[0, 0, 0]
    neighbours = np.asarray(apply_rope(jnp.asarray(x), *table, interleaved=True))[0, 0, 0]
    c, s = math.cos(PLAIN[1]), math.sin(PLAIN[1])
    np.testing.assert_allclose(halves[[1, 9]], [2 * c - 10 * s, 10 * c + 2 * s], rtol=1e-5)
    np.testing.assert_allclose(neighbours[[2, 3]], [3 * c - 4 * s, 4 * c + 3 * s], rtol=1e-5)


def test_a_rotation_is_rounded_once():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 1, 2, D)), jnp.bfloat16)
    table = rope_table(rope(), D, CONTEXT, jnp.asarray([[5]]))
    found = apply_rope(x, *table, interleaved=False)
    assert found.dtype == jnp.bfloat16
    wide = apply_rope(x.astype(jnp.float32), *table, interleaved=False)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wide.astype(jnp.bfloat16)))


def test_linear_stretches_positions():
    linear = angles(rope("linear", factor=4.0), [[4, 8]])
    np.testing.assert_allclose(linear, angles(rope(), [[1, 2]]), rtol=1e-6)


def test_llama3_stretches_low_frequencies_alone():
    found = angles(rope("llama3", **LLAMA3), [[1]])[0, 0]
    wavelength = 2 * math.pi / PLAIN
    fast, slow = wavelength < 32 / 4, wavelength > 32
    assert fast.any()
    assert slow.any()
    assert not (fast | slow).all()
    np.testing.assert_allclose(found[fast], PLAIN[fast], rtol=1e-6)
    np.testing.assert_allclose(found[slow], PLAIN[slow] / 8, rtol=1e-6)
    between = ~(fast | slow)
    assert ((found < PLAIN) & (found > PLAIN / 8))[between].all()


def test_yarn_stretches_low_frequencies_and_sharpens_attention():
    config = rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=1.0)
    found = angles(config, [[1]])[0, 0]
    assert found[0] == pytest.approx(PLAIN[0], rel=1e-6)
    assert found[-1] == pytest.approx(PLAIN[-1] / 4, rel=1e-6)
    assert attention_factor(config) == pytest.approx(0.1 * math.log(4) + 1)
    assert attention_factor(rope("yarn", factor=4.0, attention_factor=1.5)) == pytest.approx(1.5)
    assert attention_factor(rope("yarn", factor=4.0, mscale=1.0, mscale_all_dim=1.0)) == pytest.approx(1)


def test_longrope_has_factors_for_short_and_long_sequences():
    config = rope("longrope", **LONGROPE)
    short, long = angles(config, [[1, 31], [1, 32]])[:, 0]
    np.testing.assert_allclose(short, PLAIN, rtol=1e-6)
    np.testing.assert_allclose(long, PLAIN / 4, rtol=1e-6)
    assert attention_factor(config) == pytest.approx(math.sqrt(1 + math.log(2) / math.log(32)))


def test_dynamic_grows_beyond_the_context():
    config = rope("dynamic", factor=2.0)
    inside, twice = angles(config, [[1, CONTEXT - 1], [1, 2 * CONTEXT - 1]])[:, 0]
    np.testing.assert_allclose(inside, PLAIN, rtol=1e-6)
    theta = 10000 * 3 ** (D / (D - 2))
    np.testing.assert_allclose(twice, theta ** (-np.arange(0, D, 2) / D), rtol=1e-5)


@pytest.mark.parametrize("config", [rope("dynamic", factor=2.0), rope("longrope", **LONGROPE)], ids=["dynamic", "long"])
def test_a_sequence_does_not_depend_on_others_in_the_batch(config: RopeConfig):
    alone = angles(config, [[0, 1]])
    np.testing.assert_array_equal(angles(config, [[0, 1], [0, 1000]])[:1], alone)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (rope("su"), 'rope_type "su" is unknown'),
        (rope("llama3", factor=8.0, low_freq_factor=1.0), 'rope_type "llama3" needs "high_freq_factor"'),
        (rope("linear"), 'rope_type "linear" needs "factor"'),
        (rope("longrope", **{**LONGROPE, "long_factor": (1.0,)}), "long_factor must have head_dim / 2 = 8 numbers"),
    ],
)
def test_what_is_missing_is_named(config: RopeConfig, message: str):
    with pytest.raises(W4A8Error, match=message):
        rope_table(config, D, CONTEXT, jnp.asarray([[0]]))
