"""Sampling: exact supports, distributions against numpy, and streams that do not depend on the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from models.sampling import SamplingParams, sample, sequence_keys
from pallas_kernels import W4A8Error

_sample = jax.jit(sample)


def draw(logits, *, temperature=1.0, top_k=0, top_p=1.0, seed=0, count=None):
    """Token ids [count] of one row of logits, at indices 0 .. count - 1 of one stream."""
    rows = 1 if count is None else count
    logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (rows, len(logits)))
    keys = sequence_keys(jnp.full(rows, seed, jnp.uint32), jnp.arange(rows))
    arrays = jnp.full(rows, temperature), jnp.full(rows, top_k, jnp.int32), jnp.full(rows, top_p)
    tokens = np.asarray(_sample(logits, *arrays, keys))
    return int(tokens[0]) if count is None else tokens


def reference(logits, temperature, top_k, top_p):
    """The distribution to draw from, fp64 [V]."""
    logits = np.asarray(logits, np.float64)
    p = np.exp((logits - logits.max()) / temperature)
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    kept = order[: top_k or len(p)]
    total, nucleus = p[kept].sum(), []
    for i in kept:
        if nucleus and p[nucleus].sum() / total >= top_p:
            break
        nucleus.append(i)
    q = np.zeros_like(p)
    q[nucleus] = p[nucleus] / p[nucleus].sum()
    return q


CASES = [
    (1.0, 0, 1.0),
    (0.7, 0, 1.0),
    (1.0, 5, 1.0),
    (1.3, 0, 0.8),
    (0.9, 8, 0.7),
    (2.0, 1000, 0.95),
    (1.0, 1, 1.0),
    (1.0, 0, 1e-9),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), CASES)
def test_the_distribution_is_that_of_numpy(temperature, top_k, top_p):
    logits = np.random.default_rng(3).normal(size=24).astype(np.float32) * 2
    expected = reference(logits, temperature, top_k, top_p)
    count = 20_000
    drawn = np.bincount(
        draw(logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=11, count=count), minlength=24
    )
    assert not drawn[expected == 0].any()
    kept = expected > 0
    if kept.sum() > 1:
        # The seed is fixed, so this either always or never passes; a wrong distribution has p of about 0.
        assert scipy.stats.chisquare(drawn[kept], expected[kept] * count).pvalue > 1e-4


def test_a_wrong_distribution_would_be_seen():
    logits = np.random.default_rng(3).normal(size=24).astype(np.float32) * 2
    drawn = np.bincount(draw(logits, temperature=0.9, seed=11, count=20_000), minlength=24)
    expected = reference(logits, 1.0, 0, 1.0) * 20_000
    assert scipy.stats.chisquare(drawn, expected).pvalue < 1e-6


def test_greedy_takes_the_lowest_id_among_equals():
    assert draw([0.0, 3.0, 1.0, 3.0], temperature=0.0) == 1
    assert draw([-np.inf, -np.inf, -5.0], temperature=0.0) == 2


def test_top_k_takes_the_lowest_ids_among_equals():
    assert set(draw([1.0, 2.0, 2.0, 2.0, 0.0], top_k=2, count=200).tolist()) == {1, 2}


def test_top_k_beyond_the_vocabulary_and_top_p_one_keep_everything():
    logits = np.zeros(9, np.float32)
    plain = draw(logits, count=300, seed=4)
    assert set(plain.tolist()) == set(range(9))
    np.testing.assert_array_equal(plain, draw(logits, top_k=10**6, count=300, seed=4))


def test_top_p_keeps_tokens_until_the_sum_is_reached():
    logits = np.log([0.5, 0.25, 0.125, 0.125])  # exact in fp32 up to one rounding
    assert set(draw(logits, top_p=0.49, count=200).tolist()) == {0}
    assert set(draw(logits, top_p=0.6, count=200).tolist()) == {0, 1}
    assert set(draw(logits, top_p=0.80, count=200).tolist()) == {0, 1, 2}
    assert set(draw(logits, top_p=0.9, count=400).tolist()) == {0, 1, 2, 3}


def test_top_p_applies_to_what_top_k_left():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    # Of the first two, renormalized to 4/7 and 3/7, the first alone reaches 0.5; of all four it would not.
    assert set(draw(logits, top_k=2, top_p=0.5, count=200).tolist()) == {0}
    assert set(draw(logits, top_p=0.5, count=200).tolist()) == {0, 1}


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-10, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = np.random.default_rng(5).normal(size=50) * 100
    assert set(draw(logits, temperature=temperature, top_p=0.9, count=20).tolist()) == {int(np.argmax(logits))}


def test_forbidden_tokens_are_never_drawn():
    logits = np.full(20, -np.inf)
    logits[[3, 7]] = [-1e4, -1e4]
    for options in ({}, {"top_k": 5}, {"top_p": 0.99}, {"temperature": 100.0}):
        assert set(draw(logits, count=100, **options).tolist()) == {3, 7}


def test_nan_is_reported():
    for temperature in (0.0, 1.0):
        assert draw([0.0, np.nan, 1.0], temperature=temperature) == -1


def test_a_stream_depends_on_seed_and_index_alone():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 40)), jnp.float32)
    seed, index = jnp.array([5, 9, 5, 1, 2, 2**32 - 1], jnp.uint32), jnp.array([0, 0, 1, 7, 0, 3])
    temperature = jnp.array([1.0, 0.0, 1.0, 0.5, 2.0, 1.0])
    top_k, top_p = jnp.array([0, 0, 3, 0, 0, 0]), jnp.array([1.0, 1.0, 1.0, 0.5, 1.0, 1.0])
    together = _sample(logits, temperature, top_k, top_p, sequence_keys(seed, index))
    for i in range(6):
        row = slice(i, i + 1)
        alone = _sample(
            logits[row], temperature[row], top_k[row], top_p[row], sequence_keys(seed[row], index[row])
        )  # fmt: skip
        assert int(alone[0]) == int(together[i])
    assert len({draw(np.zeros(1000), seed=s) for s in range(20)}) > 15
    assert len(set(draw(np.zeros(1000), count=20).tolist())) > 15


def test_a_filter_that_keeps_the_drawn_token_does_not_change_the_draw():
    logits = np.random.default_rng(1).normal(size=30)
    plain, filtered = draw(logits, count=500, seed=8), draw(logits, top_k=15, count=500, seed=8)
    kept = np.isin(plain, np.argsort(-logits)[:15])
    assert kept.mean() > 0.6
    np.testing.assert_array_equal(plain[kept], filtered[kept])


def test_values_compile_nothing():
    fresh = jax.jit(lambda *args: sample(*args))
    keys = sequence_keys(jnp.zeros(2, jnp.uint32), jnp.zeros(2, jnp.int32))
    for temperature, k, p in CASES:
        fresh(jnp.zeros((2, 8)), jnp.full(2, temperature), jnp.full(2, k, jnp.int32), jnp.full(2, p), keys)
    assert fresh._cache_size() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature: expected 0 (greedy) or a positive number, found -0.1"),
        ({"temperature": float("nan")}, "temperature: expected 0 (greedy) or a positive number, found nan"),
        ({"temperature": float("inf")}, "temperature: expected 0 (greedy) or a positive number, found inf"),
        ({"top_k": -1}, "top_k: expected 0 (no limit) or a positive integer, found -1"),
        ({"top_k": 1.5}, "top_k: expected 0 (no limit) or a positive integer, found 1.5"),
        ({"top_p": 0}, "top_p: expected a number above 0 and at most 1, found 0"),
        ({"top_p": 1.01}, "top_p: expected a number above 0 and at most 1, found 1.01"),
        ({"seed": -1}, "seed: expected an integer in 0 .. 2**32 - 1, found -1"),
        ({"seed": 2**32}, "seed: expected an integer in 0 .. 2**32 - 1, found 4294967296"),
    ],
)
def test_bad_parameters(options, message):
    with pytest.raises(W4A8Error) as e:
        SamplingParams(**options)
    assert str(e.value) == message


def test_a_seed_is_drawn_once():
    drawn = SamplingParams(temperature=1.0).with_seed()
    assert drawn.seed is not None
    assert drawn.with_seed() == drawn
    assert drawn.seed != SamplingParams(temperature=1.0).with_seed().seed
