"""Attention of a prompt's next piece to a cache and to itself, in memory that does not grow with the context.

    softmax(q K^T) V,   K = cache, new tokens

A layer that sees all tokens goes over the cache block by block, only as far as it is filled, with a running maximum and
sum of the softmax (Milakov and Gimelshein, 2018, arXiv:1805.02867). A sliding layer takes its queries block by block,
each with the keys of its window.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..kv_cache import LayerCache

# Of the fp32 scores of a block: on CPUs what a core's cache holds, which is three times as fast as 16 MiB; on GPUs, to
# start few kernels.
_CPU_BYTES, _BYTES = 1 << 20, 1 << 28
MIN_BLOCK = 64

# Of B sequences, H key-value heads, G query heads for each and T queries: the largest score [B, H, G, T], the sum of
# exp(score - largest), and of that times the values [B, H, G, T, D]; fp32.
_Softmax = tuple[Array, Array, Array]


def chunk_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    cache: LayerCache,
    start: Int[Array, "B"],
    lengths: Int[Array, "B"],
    window: int | None,
) -> Float[Array, "B T N D"]:
    """Attention of the next T tokens of a sequence to the cache, which does not hold them yet, and to themselves.

    Args:
        q, k, v: of the new tokens, rotated.
        cache: of the tokens before them; a ring if there is a window.
        start: int32 [B], how many those are.
        lengths: int32 [B], how many of the T tokens are real; outputs of the others are arbitrary, but finite.
        window: how many tokens a token sees, itself included; None: all.

    Returns:
        [B, T, N, D] in q's dtype.
    """
    attend = _to_all if window is None else _to_window
    cache = LayerCache(cache.k.astype(k.dtype), cache.v.astype(v.dtype))
    return attend(q, k, v, cache, start, lengths, window or 0)


def _to_all(
    q: Array, k: Array, v: Array, cache: LayerCache, start: Array, lengths: Array, _: int
) -> Float[Array, "B T N D"]:
    batch, steps, heads, size = q.shape
    q = q.reshape(batch, steps, k.shape[2], -1, size)
    column = 4 * batch * heads * steps
    width, own = _block(cache.slots, column), _block(steps, column)
    query, counts = jnp.arange(steps)[:, None], lengths[:, None, None]

    # The last block may overlap the one before it: what that one had does not count again.
    def new(i: Array, state: _Softmax) -> _Softmax:
        first = jnp.minimum(i * own, steps - own)
        keys, values = (jax.lax.dynamic_slice_in_dim(a, first, own, axis=1) for a in (k, v))
        key = first + jnp.arange(own)
        # A query of a sequence of no tokens would see nothing; it must have a key to stay finite.
        seen = (key >= i * own) & (((key <= query) & (key < counts)) | ((key == query) & (counts == 0)))
        return _add(state, q, keys, values, seen)

    def cached(i: Array, state: _Softmax) -> _Softmax:
        first = jnp.minimum(i * width, cache.slots - width)
        keys, values = (jax.lax.dynamic_slice_in_dim(a, first, width, axis=1) for a in (cache.k, cache.v))
        slot = first + jnp.arange(width)
        seen = (slot >= i * width) & (slot < start[:, None])
        return _add(state, q, keys, values, seen[:, None, :])

    shape = (batch, *q.shape[2:4], steps)
    state = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, size)))
    state = jax.lax.fori_loop(0, -(-steps // own), new, state)
    blocks = jnp.max(jnp.minimum(start, cache.slots) + width - 1) // width
    _, total, weighted = jax.lax.fori_loop(0, blocks, cached, state)
    y = weighted / total[..., None]
    return jnp.moveaxis(y, 3, 1).reshape(batch, steps, heads, size).astype(v.dtype)


def _add(
    state: _Softmax,
    q: Float[Array, "B T H G D"],
    k: Float[Array, "B S H D"],
    v: Float[Array, "B S H D"],
    seen: Bool[Array, "B T S"],
) -> _Softmax:
    """Takes S more keys into the softmax."""
    largest, total, weighted = state
    scores = jnp.einsum("bthgd,bshd->bhgts", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    new = jnp.maximum(largest, jnp.max(scores, axis=-1))
    base = jnp.where(jnp.isinf(new), 0, new)  # nothing seen yet
    factor, p = jnp.exp(largest - base), jnp.exp(scores - base[..., None])
    more = jnp.einsum("bhgts,bshd->bhgtd", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return new, total * factor + jnp.sum(p, axis=-1), weighted * factor[..., None] + more


def _to_window(
    q: Array, k: Array, v: Array, cache: LayerCache, start: Array, lengths: Array, window: int
) -> Float[Array, "B T N D"]:
    batch, steps, heads, _ = q.shape
    slots = cache.slots
    slot = (start[:, None] - slots + jnp.arange(slots)) % slots  # of the positions start - slots .. start - 1
    row = jnp.arange(batch)[:, None]
    keys, values = (jnp.concatenate([a[row, slot], b], axis=1) for a, b in ((cache.k, k), (cache.v, v)))
    width = _block(steps, 4 * batch * heads * (slots + MIN_BLOCK))
    if steps % width:
        width = steps

    def block(i: Array) -> Array:
        first, count = i * width, slots + width
        key = start[:, None] - slots + first + jnp.arange(count)
        query = (start[:, None] + first + jnp.arange(width))[:, :, None]
        seen = (key >= 0) & (key < (start + jnp.maximum(lengths, 1))[:, None])
        mask = seen[:, None, :] & (key[:, None, :] <= query) & (query - key[:, None, :] < window)
        # Padding may be a whole window behind the last token; it must have a key to stay finite.
        mask |= key[:, None, :] == query
        some = jax.lax.dynamic_slice_in_dim(q, first, width, axis=1)
        near_k, near_v = (jax.lax.dynamic_slice_in_dim(a, first, count, axis=1) for a in (keys, values))
        return jax.nn.dot_product_attention(some, near_k, near_v, mask=mask[:, None])

    y = jax.lax.map(block, jnp.arange(steps // width))
    return jnp.moveaxis(y, 0, 1).reshape(q.shape)


def _block(count: int, row_bytes: int) -> int:
    """How many of `count` at once: a power of two, so that their scores fit, or all."""
    most = _CPU_BYTES if jax.default_backend() == "cpu" else _BYTES
    block = MIN_BLOCK
    while block < count and 2 * block * row_bytes <= most:
        block *= 2
    return min(block, count)
