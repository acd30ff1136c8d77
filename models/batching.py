"""Batches of sequences of different lengths in few shapes: checks, buckets and chunks."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from pallas_kernels import W4A8Error

from .config import DecoderConfig

MIN_BUCKET = 16
# What attention scores may take when XLA materializes them, in bytes.
SCORE_BYTES = 1 << 30


def bucket(length: int, limit: int) -> int:
    """The smallest power of two from 16 that holds `length`, or `limit` if that is smaller."""
    return min(max(MIN_BUCKET, 1 << (length - 1).bit_length()), limit)


def chunk_size(config: DecoderConfig, batch: int, most: int) -> int:
    """Tokens of a sequence to prefill at once: `most`, halved until the first chunk's scores fit their share.

    Later chunks attend to the cache in blocks, see `models.layers.chunk_attention`.
    """
    chunk = most
    while chunk > 2 * MIN_BUCKET and 4 * batch * config.num_heads * chunk**2 > SCORE_BYTES:
        chunk //= 2
    return chunk


def chunks(
    sequences: Sequence[np.ndarray], width: int
) -> Iterator[tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"], bool]]:
    """Cuts sequences into pieces of one width T, padded at the end, and says how many tokens of each are real.

    The third value is true for the first piece, before which caches are empty.
    """
    longest = max(len(s) for s in sequences)
    for start in range(0, longest, width):
        tokens = np.zeros((len(sequences), width), np.int32)
        lengths = np.zeros(len(sequences), np.int32)
        for row, sequence in enumerate(sequences):
            piece = sequence[start : start + width]
            tokens[row, : len(piece)], lengths[row] = piece, len(piece)
        yield tokens, lengths, start == 0


def check_prompts(prompts: Sequence[Sequence[int]] | np.ndarray, config: DecoderConfig, limit: int) -> list[np.ndarray]:
    """The prompts as int32 arrays, bos standing in for an empty one.

    Raises:
        W4A8Error: there are none, one is empty and there is no bos token, one is longer than `limit`, or a token id
            is outside the vocabulary.
    """
    if len(prompts) == 0:
        raise W4A8Error("prompts: expected at least one, found none")
    checked = []
    for row, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise W4A8Error(f"prompt {row}: expected a list of token ids, found {ids.dtype}{list(ids.shape)}")
        if not ids.size:
            if config.bos_token_id is None:
                raise W4A8Error(f"prompt {row}: is empty, and the model has no bos token to begin with; give it text")
            ids = np.array([config.bos_token_id])
        bad = (ids < 0) | (ids >= config.vocab_size)
        if bad.any():
            where = int(np.argmax(bad))
            raise W4A8Error(
                f"prompt {row}: token {where} has id {ids[where]}, but the model's vocabulary is 0 .. "
                f"{config.vocab_size - 1}; tokenizer and model may not belong together"
            )
        if ids.size > limit:
            raise W4A8Error(
                f"prompt {row}: has {ids.size} tokens, but the context of {limit + 1} tokens takes {limit} and one "
                "to generate; shorten it"
            )
        checked.append(ids.astype(np.int32))
    return checked
