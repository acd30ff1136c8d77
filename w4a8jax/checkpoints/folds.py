"""A checkpoint whose channels are scaled between layers, which leaves what the model computes as it is.

A fold takes the channels between two layers: what produces one (a norm's weight, rows of a projection) is divided by a
scale, what reads it (columns of the next projections) is multiplied. A norm's weight is stored in bf16: it is rounded
first, and the scale is what the rounded weight makes of it.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels.errors import W4A8Error

from .reader import CheckpointReader, read_json

FOLDS = "equalization.json"
STEPS = 8  # of a scale, to an octave


@dataclasses.dataclass(frozen=True)
class Fold:
    """Scales 2^(steps / 8) of the channels between two layers; powers of two where all steps are multiples of 8.

    Attributes:
        steps: int8 [C].
        rows: tensors, [C] or [C, K], whose rows are divided by the scales.
        columns: tensors [N, C * repeat] whose columns are multiplied.
        norm: the rows are a norm's weight.
        repeat: each `block` of channels is read that many times in a row, as the heads of keys and values are.
        block: channels.
    """

    steps: np.ndarray
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    norm: bool = False
    repeat: int = 1
    block: int = 1

    def factors(self, reader: CheckpointReader) -> tuple[np.ndarray, np.ndarray]:
        """What the rows [C] and the columns [C * repeat] of a checkpoint are multiplied by, fp32."""
        scales = np.exp2(self.steps.astype(np.float64) / STEPS).astype(np.float32)
        rows = 1 / scales
        if self.norm and self.steps.any():
            weight = reader.read(self.rows[0]).astype(np.float32)
            stored = (weight * rows).astype(ml_dtypes.bfloat16).astype(np.float32)
            usable = (weight != 0) & (stored != 0)
            rows = np.where(usable, stored / np.where(usable, weight, 1), rows)
            scales = np.where(usable, weight / np.where(usable, stored, 1), scales)
        columns = np.repeat(scales.reshape(-1, self.block), self.repeat, axis=0).reshape(-1)
        return rows.astype(np.float32), columns.astype(np.float32)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        steps = base64.b64encode(self.steps.astype(np.int8).tobytes()).decode()
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | {"steps": steps}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Fold:
        steps = np.frombuffer(base64.b64decode(record["steps"], validate=True), np.int8)
        rows, columns = tuple(record["rows"]), tuple(record["columns"])
        if len(steps) % record["block"]:
            raise ValueError(f"{len(steps)} channels in blocks of {record['block']}")
        return cls(steps, rows, columns, record["norm"], record["repeat"], record["block"])


class FoldedReader(CheckpointReader):
    """A checkpoint seen through folds. Scaled tensors are read in fp32, others as they are.

    Args:
        reader: the checkpoint.
        folds: at most one scales a tensor's rows, and one its columns.

    Raises:
        W4A8Error: a fold names a tensor that the checkpoint lacks, or that has another number of rows or columns.
    """

    def __init__(self, reader: CheckpointReader, folds: Sequence[Fold]):
        self.path, self.config, self.tensors = reader.path, reader.config, reader.tensors
        self._rows: dict[str, np.ndarray] = {}
        self._columns: dict[str, np.ndarray] = {}
        for fold in folds:
            for name, axis, repeat in (*((n, 0, 1) for n in fold.rows), *((n, -1, fold.repeat) for n in fold.columns)):
                if (shape := self.info(name).shape)[axis] != len(fold.steps) * repeat:
                    raise W4A8Error(f"{name}: is {list(shape)}, but a fold scales {len(fold.steps) * repeat} channels")
            rows, columns = fold.factors(reader)
            self._rows |= dict.fromkeys(fold.rows, rows)
            self._columns |= dict.fromkeys(fold.columns, columns)

    def read(self, name: str) -> np.ndarray:
        return self._scaled(name, super().read(name), 0)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._scaled(name, super().read_rows(name, start, stop), start)

    def blocks(self, name: str, max_bytes: int) -> Iterator[np.ndarray]:
        start = 0
        for block in super().blocks(name, max_bytes):
            yield self._scaled(name, block, start)
            start += len(block)

    def _scaled(self, name: str, values: np.ndarray, start: int) -> np.ndarray:
        """Rows from `start` on."""
        if name in self._rows:
            factor = self._rows[name][start : start + len(values)]
            values = values.astype(np.float32) * factor.reshape(-1, *[1] * (values.ndim - 1))
        if name in self._columns:
            values = values.astype(np.float32) * self._columns[name]
        return values


def folds_record(folds: Sequence[Fold]) -> dict[str, Any]:
    """What a checkpoint keeps of its folds, in `FOLDS`."""
    return {"folds": [fold.record() for fold in folds]}


def read_folds(path: Path) -> list[Fold]:
    """The folds of a checkpoint directory, none if it was not equalized.

    Raises:
        W4A8Error: their file is damaged.
    """
    file = path / FOLDS
    if not file.is_file():
        return []
    try:
        return [Fold.from_record(record) for record in read_json(file)["folds"]]
    except (KeyError, TypeError, ValueError) as e:
        raise W4A8Error(f"{file}: is damaged: {type(e).__name__} {e}; quantize again") from e
