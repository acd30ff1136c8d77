"""The trained student as a checkpoint: the codes that it computed with, and all else as it was."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Array

from models.sharding import Sharding

from ..checkpoints.reader import CheckpointReader
from ..checkpoints.safetensors_format import TensorSpec, natural_key
from ..checkpoints.writer import CheckpointWriter
from .student import Student

RECORD, PICTURE = "distillation.json", "distillation.png"


def write_student(
    student: Student,
    trainable: Mapping[str, Array],
    scales: Mapping[str, Array],
    source: str | Path,
    target: str | Path,
    *,
    record: Mapping[str, Any],
    picture: Path,
    sharding: Sharding | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the checkpoint, one parameter at a time.

    Args:
        student, trainable, scales: what was trained.
        source: the checkpoint that the training began with; tensors that were not trained are its own.
        target: directory to make.
        record: for distillation.json; picture: a file to add.
        sharding: of the student.
        overwrite: replace an existing checkpoint.

    Raises:
        W4A8Error: as `CheckpointWriter`.
    """
    reader = CheckpointReader(source)
    owner = {module: parameter for parameter in student.parameters for stack in parameter.modules for module in stack}

    # Modules of one fused parameter are near one another, but not neighbours, in the order of names.
    @functools.lru_cache(maxsize=4)
    def trained(path: tuple[str | int, ...]) -> dict[str, np.ndarray]:
        parameter = next(p for p in student.parameters if p.path == path)
        return student.tensors(parameter, trainable, scales, sharding)

    def arrays(name: str) -> np.ndarray | None:
        parameter = owner.get(_module(name))
        return None if parameter is None else trained(parameter.path).get(name)

    units = []
    for _, names in groupby(sorted(reader.tensors, key=natural_key), key=_module):
        unit = []
        for name in names:
            info, parameter = reader.info(name), owner.get(_module(name))
            floats = info.dtype != np.int32 and info.dtype != np.int64
            rounded = floats and parameter is not None and student.key(parameter.path) in trainable
            unit.append(TensorSpec(name, np.dtype(ml_dtypes.bfloat16) if rounded else info.dtype, info.shape))
        units.append(tuple(unit))
    sidecars = {str(name): reader.path / name for name in reader.sidecars()}
    with CheckpointWriter(
        target,
        units,
        config=reader.config,
        job={"distilled": reader.identity()},
        sidecars=sidecars | {PICTURE: picture},
        extra={RECORD: record},
        overwrite=overwrite,
    ) as writer:
        for unit_specs in writer.remaining():
            for spec in unit_specs:
                array = arrays(spec.name)
                writer.write(spec.name, reader.read(spec.name) if array is None else array)
        return writer.finish()


def _module(name: str) -> str:
    return name.rpartition(".")[0]
