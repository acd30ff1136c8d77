"""The cache: ring slots, positions, and decoding through it against computing everything anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoders import CONFIGS, VOCAB, WINDOW, tiny_decoder

from models.functional import split
from models.kv_cache import KVCache, LayerCache


def _layer(slots: int, batch: int = 1) -> LayerCache:
    return LayerCache(jnp.zeros((batch, slots, 1, 1)), jnp.zeros((batch, slots, 1, 1)))


def _tokens(first: int, count: int, batch: int = 1) -> jnp.ndarray:
    """Values that name their position, one-based."""
    values = jnp.arange(first + 1, first + count + 1, dtype=jnp.float32)
    return jnp.broadcast_to(values[None, :, None, None], (batch, count, 1, 1))


def test_a_ring_keeps_the_last_tokens_in_their_slots():
    layer = _layer(4)
    layer = layer.write(_tokens(0, 3), -_tokens(0, 3), jnp.array([0]), jnp.array([3]))
    np.testing.assert_array_equal(layer.k.ravel(), [1, 2, 3, 0])
    layer = layer.write(_tokens(3, 2), -_tokens(3, 2), jnp.array([3]), jnp.array([2]))
    np.testing.assert_array_equal(layer.k.ravel(), [5, 2, 3, 4])
    np.testing.assert_array_equal(layer.v.ravel(), [-5, -2, -3, -4])
    np.testing.assert_array_equal(layer.positions(jnp.array([5]))[0], [4, 1, 2, 3])


def test_positions_are_negative_where_nothing_was_written():
    np.testing.assert_array_equal(_layer(4).positions(jnp.array([0]))[0] < 0, [True] * 4)
    np.testing.assert_array_equal(_layer(4).positions(jnp.array([2]))[0] < 0, [False, False, True, True])
    np.testing.assert_array_equal(_layer(4).positions(jnp.array([2]))[0][:2], [0, 1])


def test_padding_is_not_written():
    layer = _layer(4, batch=2).write(_tokens(0, 3, 2), _tokens(0, 3, 2), jnp.array([0, 0]), jnp.array([1, 0]))
    np.testing.assert_array_equal(layer.k[:, :, 0, 0], [[1, 0, 0, 0], [0, 0, 0, 0]])


def test_a_write_of_more_than_the_ring_keeps_the_last():
    layer = _layer(4).write(_tokens(0, 11), _tokens(0, 11), jnp.array([0]), jnp.array([10]))
    np.testing.assert_array_equal(layer.k.ravel(), [9, 10, 7, 8])


def test_sliding_layers_have_a_slot_for_each_token_of_the_window():
    config = tiny_decoder("cohere2").config
    cache = KVCache.create(config, 3, 64, jnp.bfloat16)
    assert [layer.slots for layer in cache.layers] == [WINDOW, 64]
    assert cache.layers[0].k.dtype == jnp.bfloat16
    assert [layer.slots for layer in KVCache.create(config, 3, 4).layers] == [4, 4]


@pytest.mark.parametrize("family", CONFIGS)
def test_prefill_chunk_and_decode_give_the_logits_of_the_whole(family):
    model = tiny_decoder(family)
    structure, leaves = split(model)
    decoder = jax.jit(lambda *args, **options: structure.merge(leaves)(*args, **options), static_argnames="fresh")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 40)))
    whole, _ = decoder(tokens)
    lengths = jnp.array([17, 5])  # one longer than the window, one shorter
    cache = KVCache.create(model.config, 2, 48, jnp.float32)
    rows = jnp.arange(2)

    prefill, cache = decoder(tokens[:, :20], cache, lengths=lengths, fresh=True)
    for row, length in enumerate(lengths.tolist()):
        np.testing.assert_allclose(prefill[row, :length], whole[row, :length], rtol=1e-4, atol=1e-4)

    more = jnp.array([4, 12])
    piece = jnp.stack([tokens[row, n : n + 12] for row, n in enumerate(lengths.tolist())])
    chunk, cache = decoder(piece, cache, lengths=more)
    for row, (length, count) in enumerate(zip(lengths.tolist(), more.tolist(), strict=True)):
        np.testing.assert_allclose(chunk[row, :count], whole[row, length : length + count], rtol=1e-4, atol=1e-4)

    for _ in range(12):
        position = cache.length
        logits, cache = decoder(tokens[rows, position][:, None], cache)
        np.testing.assert_allclose(logits[:, 0], whole[rows, position], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(cache.length, [33, 29])
