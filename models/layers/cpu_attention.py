"""Causal attention of whole sequences on a CPU: in pieces that its caches hold, and without most of what is masked.

XLA's own computes all scores of a batch, masked or not, and goes over them in memory several times: of sequences of 512
tokens it takes three times as long.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.rounding import round_to

MIN_STEPS = 128  # of a sequence; shorter ones gain nothing
_QUERIES = 256  # of a piece, at least
_PIECES = 4  # at most: each is compiled


def cpu_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    lengths: Int[Array, "B"] | None,
    window: int | None,
) -> Float[Array, "B T N D"]:
    """Attention of sequences to themselves, one sequence at a time; sums in fp32.

    Args:
        q, k, v: rotated.
        lengths: int32 [B], how many of the T tokens are real; outputs of the others are arbitrary, but finite. None:
            all are.
        window: how many tokens a token sees, itself included; None: all.

    Returns:
        [B, T, N, D] in q's dtype.
    """
    steps, window = q.shape[1], window or q.shape[1]
    width = max(_QUERIES, -(-steps // _PIECES))
    lengths = jnp.full(len(q), steps) if lengths is None else lengths

    def sequence(parts: tuple[Array, Array, Array, Array]) -> Float[Array, "T N D"]:
        q, k, v, length = parts
        wide_q, wide_k, wide_v = (jnp.moveaxis(a.astype(jnp.float32), 1, 0) for a in (q, k, v))
        pieces = []
        for first in range(0, steps, width):
            end, keys = min(first + width, steps), slice(max(0, first - window + 1), first + width)
            queries = wide_q[:, first:end]
            pieces.append(_piece(queries, wide_k[:, keys], wide_v[:, keys], end, length, window, v.dtype))
        return jnp.moveaxis(jnp.concatenate(pieces, axis=1), 0, 1).astype(q.dtype)

    return jax.lax.map(sequence, (q, k, v, lengths))


def _piece(
    q: Float[Array, "N Q D"],
    k: Float[Array, "H S D"],
    v: Float[Array, "H S D"],
    end: int,
    length: Int[Array, ""],
    window: int,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "N Q D"]:
    """Queries and all keys that they may see, both up to position `end`, fp32; weights of values rounded to `dtype`."""
    heads, queries, size = q.shape
    query, key = jnp.arange(end - queries, end)[:, None], jnp.arange(end - k.shape[1], end)
    # Padding must have a key to stay finite.
    seen = (key <= query) & (query - key < window) & ((key < length) | (key == query))
    scores = _product(q.reshape(len(k), -1, size) / math.sqrt(size), k, 2).reshape(heads, queries, -1)
    scores = jnp.where(seen, scores, -jnp.inf)
    p = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    weighted = _product(round_to(p, dtype).astype(jnp.float32).reshape(len(k), -1, k.shape[1]), v, 1)
    return weighted.reshape(q.shape) / jnp.sum(p, axis=-1, keepdims=True)


def _product(a: Float[Array, "H M J"], b: Float[Array, "..."], axis: int) -> Float[Array, "H M L"]:
    return jax.lax.dot_general(a, b, (((2,), (axis,)), ((0,), (0,))), precision="highest")
