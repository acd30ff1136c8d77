"""Sequences of token ids from the arrays that prepare.py writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from small_model import BOS_ID


class Corpus:
    """The training documents, by part of the corpus."""

    def __init__(self, folder: Path, mix: Mapping[str, float]):
        """`mix`: part -> how often its documents occur in one epoch; a fraction takes that share, drawn anew."""
        self._documents: dict[str, list[np.ndarray]] = {}
        self.mix = dict(mix)
        for part in mix:
            ids = np.load(folder / f"train_{part}.npy")
            self._documents[part] = np.split(ids, np.flatnonzero(ids == BOS_ID)[1:])
        self.tokens = {part: sum(map(len, documents)) for part, documents in self._documents.items()}
        self.epoch_tokens = int(sum(self.tokens[part] * weight for part, weight in mix.items()))

    def epoch(self, rng: np.random.Generator) -> np.ndarray:
        """One epoch's documents in random order, as one flat array."""
        chosen: list[np.ndarray] = []
        for part, documents in self._documents.items():
            whole, rest = divmod(self.mix[part], 1)
            chosen += documents * int(whole)
            drawn = rng.random(len(documents)) < rest
            chosen += [document for document, keep in zip(documents, drawn, strict=True) if keep]
        return np.concatenate([chosen[i] for i in rng.permutation(len(chosen))])


class Stream:
    """Endless batches; the length of sequences may change from one batch to the next."""

    def __init__(self, corpus: Corpus, seed: int):
        self._corpus, self._rng = corpus, np.random.default_rng(seed)
        self._ids = np.empty(0, np.uint16)
        self._position = 0

    def take(self, shape: tuple[int, int, int]) -> np.ndarray:
        """uint16 [steps, B, T + 1]: sequences of T inputs and their targets, one token shared with the next."""
        steps, batch, length = shape
        sequences = np.empty((steps * batch, length + 1), np.uint16)
        for i in range(len(sequences)):
            while self._position + length + 1 > len(self._ids):
                self._ids = np.concatenate([self._ids[self._position :], self._corpus.epoch(self._rng)])
                self._position = 0
            sequences[i] = self._ids[self._position : self._position + length + 1]
            self._position += length
        # Neighbours in the text go to different steps of a chunk, not into one batch.
        return sequences.reshape(batch, steps, length + 1).swapaxes(0, 1)


def windows(ids: np.ndarray, length: int) -> Iterator[tuple[np.ndarray, int]]:
    """Consecutive windows of T + 1 tokens over held-out ids, zero padded, with their number of targets."""
    for start in range(0, len(ids) - 1, length):
        window = ids[start : start + length + 1]
        yield np.pad(window, (0, length + 1 - len(window))), len(window) - 1
