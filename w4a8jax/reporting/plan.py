"""What a report has to measure: one unit for each recipe and draw of calibration data, and for each checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.errors import W4A8Error

from ..calibration.data import CalibrationData
from ..calibration.load import load_calibration
from ..checkpoints.reader import CheckpointReader
from ..distillation.options import DistillationOptions
from .recipes import RECIPES, Recipe

Calibration = CalibrationData | str | Path
Draws = list[tuple[int | None, CalibrationData]]


@dataclasses.dataclass(frozen=True)
class Unit:
    """A row to be measured.

    Attributes:
        name, title: of the recipe, or of a checkpoint.
        seed: which draw of calibration data, None if there is one or none.
        settings: a hash of all that makes the row what it is.
        job: for worker.py, without what all rows share.
        data: "calibration" and "distill_data", as far as it needs them.
    """

    name: str
    title: str
    seed: int | None
    settings: str
    job: dict[str, Any]
    data: dict[str, CalibrationData]


def draws(
    reader: CheckpointReader, calibration: Calibration | Sequence[Calibration] | None, seeds: int, samples: int | None
) -> Draws:
    """Calibration data, once or several times, each with its number.

    Raises:
        W4A8Error: it cannot be read; or seeds and samples do not fit it.
    """
    several = None if calibration is None or isinstance(calibration, CalibrationData | str | Path) else calibration
    if seeds > 1 and samples is None:
        raise W4A8Error(f"seeds: to draw {seeds} times, say how many samples; all of them are the same each time")
    if samples is not None and (calibration is None or several is not None):
        raise W4A8Error("samples: are drawn from one set of calibration data; give one")
    if calibration is None:
        return []
    one = [calibration] if isinstance(calibration, CalibrationData | str | Path) else []
    read = [
        data if isinstance(data, CalibrationData) else load_calibration(reader, data)
        for data in (one if several is None else several)
    ]
    if several is not None:
        return [(i if len(read) > 1 else None, data) for i, data in enumerate(read)]
    data = read[0]
    if samples is None:
        return [(None, data)]
    if samples > len(data.samples):
        raise W4A8Error(f"samples: expected at most {len(data.samples)}, which {data.name} has, found {samples}")
    found: Draws = []
    for seed in range(seeds):
        chosen = sorted(random.Random(seed).sample(range(len(data.samples)), samples))
        drawn = tuple(data.samples[i] for i in chosen)
        found.append((seed if seeds > 1 else None, CalibrationData(drawn, data.name, len(drawn))))
    return found


def plan(
    reader: CheckpointReader,
    recipes: Sequence[Recipe],
    checkpoints: Mapping[str, tuple[str | Path, str]],
    drawn: Draws,
    start: str,
    distill_data: Calibration | None,
    options: DistillationOptions,
    kernels: bool,
) -> list[Unit]:
    """All units, in order.

    Args:
        reader: of the model.
        checkpoints: their paths and fingerprints, by name.
        drawn: of `draws`.
        start: the recipe that a distillation begins with.
        distill_data: what it trains on; options: how.
        kernels: whether results run on kernels.

    Raises:
        W4A8Error: the data to distill on cannot be read.
    """
    units = []
    for recipe in recipes:
        job: dict[str, Any] = {"name": recipe.name, "checkpoint": None}
        settings: dict[str, Any] = {"options": recipe.options, "numerics": recipe.numerics, "kernels": kernels}
        chosen: Draws = drawn if recipe.calibrated else [(None, CalibrationData(()))]
        data: dict[str, CalibrationData] = {}
        if recipe.distilled:
            assert distill_data is not None
            data["distill_data"] = _to_train_on(reader, distill_data, options)
            job |= {"start": start, "distillation": dataclasses.asdict(options)}
            settings |= {"start": RECIPES[start].options, "distillation": options.job()}
            settings["distill_data"] = data["distill_data"].digest()
            chosen = [(None, drawn[0][1])] if RECIPES[start].calibrated else chosen
        for seed, calibration in chosen:
            with_data = data | ({"calibration": calibration} if calibration.samples else {})
            whole = settings | ({"calibration": calibration.digest()} if calibration.samples else {})
            units.append(Unit(recipe.name, recipe.title, seed, _hash(whole), job, with_data))
    for name, (path, fingerprint) in checkpoints.items():
        job = {"name": name, "checkpoint": str(path)}
        units.append(Unit(name, name, None, _hash({"checkpoint": fingerprint, "kernels": kernels}), job, {}))
    return units


def _to_train_on(reader: CheckpointReader, data: Calibration, options: DistillationOptions) -> CalibrationData:
    if isinstance(data, CalibrationData):
        return data
    pack = options.length if options.pack else None
    return load_calibration(reader, data, pack=pack, max_length=options.length)


def _hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
