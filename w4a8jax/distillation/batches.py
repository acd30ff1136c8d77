"""Batches of calibration samples in an order that follows from the step alone, so that a resume needs no state."""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from pallas_kernels.errors import W4A8Error

from ..calibration.data import CalibrationData


class Batch(NamedTuple):
    """tokens int32 [B, T], padded with zeros; lengths int32 [B]; loss_mask bool [B, T]; rows int [B], of the data."""

    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, "B"]
    loss_mask: Bool[np.ndarray, "B T"]
    rows: Int[np.ndarray, "B"]


class Batches:
    """Samples as rows of one width, in a new random order in each epoch.

    Args:
        data: samples of at most `length` tokens.
        batch: B; length: the greatest T.
        seed: of the order.

    Raises:
        W4A8Error: no token counts that something predicts.
    """

    def __init__(self, data: CalibrationData, batch: int, length: int, seed: int):
        self.samples = [s for s in data.samples if s.loss_mask[1:length].any()]
        if not self.samples:
            raise W4A8Error(f"{data.name}: nothing counts but first tokens, which nothing predicts")
        self.width = min(length, max(len(s.tokens) for s in self.samples))
        self._batch, self._seed = batch, seed

    def __len__(self) -> int:
        return len(self.samples)

    def rows(self, rows: np.ndarray) -> Batch:
        """Given rows; -1 for an empty one."""
        tokens = np.zeros((len(rows), self.width), np.int32)
        mask = np.zeros((len(rows), self.width), bool)
        lengths = np.zeros(len(rows), np.int32)
        for i, row in enumerate(rows):
            if row >= 0:
                sample = self.samples[row]
                n = lengths[i] = min(len(sample.tokens), self.width)
                tokens[i, :n], mask[i, :n] = sample.tokens[:n], sample.loss_mask[:n]
        mask[:, 0] = False
        return Batch(tokens, lengths, mask, np.asarray(rows))

    def at(self, step: int) -> Batch:
        """The batch of a step, from 0."""
        positions = np.arange(step * self._batch, (step + 1) * self._batch)
        epochs, places = np.divmod(positions, len(self))
        return self.rows(np.array([self._order(int(e))[p] for e, p in zip(epochs, places, strict=True)]))

    def in_order(self, batch: int) -> list[Batch]:
        """All rows once, in their order; the last batch is filled with empty rows."""
        rows = np.arange(-(-len(self) // batch) * batch)
        return [self.rows(part) for part in np.where(rows < len(self), rows, -1).reshape(-1, batch)]

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self))
