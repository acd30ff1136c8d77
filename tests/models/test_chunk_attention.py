"""Attention of a chunk to a cache, block by block, against all scores at once in float64; its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.kv_cache import LayerCache
from models.layers import chunk_attention as module
from models.layers.chunk_attention import chunk_attention

HEADS, KV_HEADS, SIZE = 4, 2, 8


def _expected(q, keys, values, window):
    """q [T, N, D] are the last of the tokens that keys and values [S, H, D] are of."""
    keys, values = (np.repeat(a, HEADS // KV_HEADS, axis=1) for a in (keys, values))
    query, key = len(keys) - len(q) + np.arange(len(q))[:, None], np.arange(len(keys))
    seen = (key <= query) & (query - key < (window or len(keys)))
    scores = np.where(seen[:, None], np.einsum("tnd,snd->tns", q, keys) / SIZE**0.5, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("tns,snd->tnd", p / p.sum(axis=-1, keepdims=True), values)


@pytest.mark.parametrize("steps", [16, 192, 200])
@pytest.mark.parametrize(("slots", "window"), [(500, None), (512, None), (100, 100), (300, 300), (40, 300)])
def test_blocks_give_what_all_scores_at_once_do(slots, window, steps, monkeypatch):
    """Rows with full, partly filled and empty caches, rings that went round; blocks of 64 in caches of any size."""
    monkeypatch.setattr(module, "_CPU_BYTES", 1)
    rng = np.random.default_rng(slots + steps)
    starts = [0, 1, 64, 130, 299] if window is None else [0, 1, 39, 1000]
    if slots < (window or 0):  # a cache for less than a window never goes round
        starts, steps = [0, 1, 20], 16
    lengths = [steps - 3 * (row % 2) for row in range(len(starts))]
    held, fresh = np.zeros((2, len(starts), slots, KV_HEADS, SIZE)), rng.normal(size=(2, len(starts), steps, 2, SIZE))
    q = 3 * rng.normal(size=(len(starts), steps, HEADS, SIZE))
    expected = []
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        old = rng.normal(size=(2, start, KV_HEADS, SIZE))
        for position in range(max(0, start - slots), start):
            held[:, row, position % slots] = old[:, position]
        keys, values = np.concatenate([old, fresh[:, row, :length]], axis=1)
        expected.append(_expected(q[row, :length], keys, values, window))
    held[:, 0] = 1e3  # what was never written must not count
    arrays = [jnp.asarray(a, jnp.float32) for a in (q, *fresh)]
    cache = LayerCache(*(jnp.asarray(a, jnp.float32) for a in held))
    found = jax.jit(chunk_attention, static_argnums=6)(*arrays, cache, jnp.array(starts), jnp.array(lengths), window)
    for row, values in enumerate(expected):
        np.testing.assert_allclose(found[row, : len(values)], values, rtol=2e-4, atol=2e-5)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("start", [0, 50])
def test_sequences_of_no_tokens_stay_finite(window, start):
    q, k = jnp.ones((1, 80, HEADS, SIZE)), jnp.ones((1, 80, KV_HEADS, SIZE))
    cache = LayerCache(*2 * [jnp.ones((1, window or 128, KV_HEADS, SIZE))])
    assert np.isfinite(chunk_attention(q, k, k, cache, jnp.array([start]), jnp.array([0]), window)).all()


def test_memory_does_not_grow_with_the_cache():
    def temporary(slots: int) -> int:
        def new(steps: int, heads: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((1, steps, heads, 64), jnp.float32)

        cache = LayerCache(new(slots, 2), new(slots, 2))
        count = jax.ShapeDtypeStruct((1,), jnp.int32)
        jitted = jax.jit(chunk_attention, static_argnums=6)
        compiled = jitted.lower(new(1024, 4), new(1024, 2), new(1024, 2), cache, count, count, None).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(65536) < 1.1 * temporary(8192) < 2**26
