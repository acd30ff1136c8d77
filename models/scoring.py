"""Logits and log probabilities of given tokens, in chunks, so that memory does not grow with their number times V."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .batching import MIN_BUCKET, bucket, check_prompts, chunk_size, chunks
from .decoder import Decoder
from .functional import Structure, split
from .kv_cache import KVCache

# What the logits of one chunk may take, in bytes.
LOGIT_BYTES = 1 << 28


def chunked_logits(
    decoder: Decoder, tokens: Sequence[Sequence[int]] | np.ndarray, *, chunk: int = 2048
) -> Iterator[tuple[int, Float[Array, "B C V"]]]:
    """Logits of sequences, piece by piece.

    Args:
        decoder: the model.
        tokens: ids of each sequence, [B, T] or a list of lists of different lengths.
        chunk: positions a piece has at most, a power of two; fewer where attention scores or logits would be too large.

    Yields:
        The position of a piece's first token, and fp32 logits [B, C, V], which predict the tokens one further on. The
        last piece is shorter; logits past the end of a sequence are arbitrary.

    Raises:
        W4A8Error: a sequence is empty or longer than the context, or a token id is outside the vocabulary.
    """
    sequences = check_prompts(tokens, decoder.config, decoder.config.max_context)
    row_bytes = 4 * len(sequences) * decoder.config.vocab_size
    most = max(MIN_BUCKET, min(chunk, 1 << (max(1, LOGIT_BYTES // row_bytes)).bit_length() - 1))
    structure, leaves, cache, width = _prepare(decoder, sequences, most)
    longest, start = max(len(s) for s in sequences), 0
    for piece, lengths, fresh in chunks(sequences, width):
        logits, cache = _logits(structure, leaves, cache, piece, lengths, fresh=fresh)
        yield start, logits[:, : longest - start]
        start += width


def token_logprobs(
    decoder: Decoder, tokens: Sequence[Sequence[int]] | np.ndarray, *, chunk: int = 2048
) -> Float[np.ndarray, "B T-1"]:
    """The log probability, in nats, of each token given those before it.

    Args:
        decoder, tokens, chunk: as for `chunked_logits`; T is the longest sequence's length.

    Returns:
        fp32 [B, T - 1]: entry t is log p(token t + 1 | tokens 0 .. t); zero past the end of a sequence. The negative
        mean over the entries of real tokens is the log perplexity.

    Raises:
        W4A8Error: as `chunked_logits`.
    """
    sequences = check_prompts(tokens, decoder.config, decoder.config.max_context)
    structure, leaves, cache, width = _prepare(decoder, sequences, chunk)
    row_bytes = 4 * len(sequences) * decoder.config.vocab_size
    block = min(width, 1 << (max(1, LOGIT_BYTES // row_bytes)).bit_length() - 1)
    pieces = []
    following = chunks([s[1:] for s in sequences], width)
    for piece, lengths, fresh in chunks(sequences, width):
        empty = np.zeros_like(piece), np.zeros_like(lengths), fresh
        targets, target_lengths, _ = next(following, empty)
        counted = np.arange(width) < target_lengths[:, None]
        logprobs, cache = _logprobs(structure, leaves, cache, piece, lengths, targets, fresh=fresh, block=block)
        pieces.append(np.where(counted, np.asarray(logprobs), np.float32(0)))
    longest = max(len(s) for s in sequences)
    return np.concatenate(pieces, axis=1)[:, : longest - 1]


def _prepare(
    decoder: Decoder, sequences: Sequence[np.ndarray], most: int
) -> tuple[Structure, list[Array], KVCache | None, int]:
    """The decoder's parts, the width of chunks, and a cache if there is more than one."""
    config, batch = decoder.config, len(sequences)
    slots = bucket(max(len(s) for s in sequences), config.max_context)
    width = min(chunk_size(config, batch, most), slots)
    structure, leaves = split(decoder)
    cache = KVCache.create(config, batch, slots, decoder.dtype, decoder.cache_sharding) if slots > width else None
    return structure, leaves, cache, width


@functools.partial(jax.jit, static_argnames=("structure", "fresh"), donate_argnames=("cache",))
def _logits(
    structure: Structure,
    leaves: list[Array],
    cache: KVCache | None,
    tokens: Int[Array, "B C"],
    lengths: Int[Array, "B"],
    *,
    fresh: bool,
) -> tuple[Float[Array, "B C V"], KVCache | None]:
    return structure.merge(leaves)(tokens, cache, lengths=lengths, fresh=fresh)


@functools.partial(jax.jit, static_argnames=("structure", "fresh", "block"), donate_argnames=("cache",))
def _logprobs(
    structure: Structure,
    leaves: list[Array],
    cache: KVCache | None,
    tokens: Int[Array, "B C"],
    lengths: Int[Array, "B"],
    targets: Int[Array, "B C"],
    *,
    fresh: bool,
    block: int,
) -> tuple[Float[Array, "B C"], KVCache | None]:
    """Log probabilities of targets; logits exist for `block` positions at a time."""
    model = structure.merge(leaves)
    hidden, cache = model.hidden_states(tokens, cache, lengths=lengths, fresh=fresh)
    batch, steps = tokens.shape
    blocks = -(-steps // block)
    pad = blocks * block - steps
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(batch, blocks, block, -1)
    targets = jnp.pad(targets, ((0, 0), (0, pad))).reshape(batch, blocks, block)

    def score(args: tuple[Array, Array]) -> Float[Array, "B block"]:
        states, target = args
        logits = model.logits(states)
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    scores = jax.lax.map(score, (jnp.swapaxes(hidden, 0, 1), jnp.swapaxes(targets, 0, 1)))
    return jnp.swapaxes(scores, 0, 1).reshape(batch, -1)[:, :steps], cache
