"""What a report measured, as a JSON file."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from pallas_kernels.errors import W4A8Error

Row = dict[str, Any]


@dataclasses.dataclass
class Report:
    """Rows of a report, with what they were measured on.

    Attributes:
        about: model (its folder's name), model_type, parameters, nbytes (of its tensors), versions, and job: what all
            rows were measured on, a hash of the model, of the texts by name, max_tokens and context.
        rows: one for each recipe and calibration draw: name, title, seed (of the draw, or None), settings (a hash of
            the recipe and its data), date; of one that failed, `failed`, a message; else texts (by name, as
            `Comparison.to_json` has it), nbytes (of the checkpoint's tensors), bits_per_weight (of its quantized
            layers, scales included), layer_errors (||w_kernel - w|| / ||w|| by quantized layer), weight_error (their
            root mean square, weighted by their sizes), residual_errors (of the first text's beginning),
            make_seconds and make_peak_bytes (of the process until the checkpoint is made; None for one that was
            there), evaluate_seconds, evaluate_peak_bytes, device, cores, device_peak_bytes (of an accelerator),
            fallbacks (layers that GPTQ rounded to nearest), expert_load (of the original alone, on the first text,
            see `expert_load`).
    """

    about: dict[str, Any]
    rows: list[Row] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Reads a file that `write` wrote.

        Raises:
            W4A8Error: it cannot be read, or is no such file.
        """
        path = Path(path).expanduser()
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise W4A8Error(f"{path}: cannot be read: {e.strerror or e}") from e
        except ValueError as e:
            raise W4A8Error(f"{path}: is not JSON: {e}") from e
        rows = record.pop("rows", None) if isinstance(record, dict) else None
        if not isinstance(rows, list) or not isinstance(record.get("job"), dict):
            raise W4A8Error(f"{path}: is no record of `w4a8jax report`: expected rows and job")
        for i, row in enumerate(rows):
            if not isinstance(row, dict) or not {"name", "seed", "settings"} <= set(row):
                raise W4A8Error(f"{path}: row {i}: expected name, seed and settings")
            if "failed" not in row and not isinstance(row.get("texts"), dict):
                raise W4A8Error(f"{path}: row {i}: expected texts, or failed")
        return cls(record, rows)

    def write(self, path: str | Path) -> None:
        """Writes the record, whole or not at all.

        Raises:
            W4A8Error: it cannot be written.
        """
        path = Path(path).expanduser()
        temporary = path.with_name(path.name + ".partial")
        try:
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as e:
            raise W4A8Error(f"{path}: cannot be written: {e.strerror or e}") from e

    def to_json(self) -> str:
        """Everything, as JSON: a row a line."""
        head = json.dumps(self.about, indent=1).removesuffix("\n}")
        rows = ",\n".join(f"  {json.dumps(row)}" for row in self.rows)
        return f'{head},\n "rows": [\n{rows}\n ]\n}}'

    @property
    def texts(self) -> list[str]:
        """Names of the texts."""
        return list(self.about["job"]["texts"])

    @property
    def measured(self) -> dict[str, list[Row]]:
        """Rows that did not fail, by name; several if calibration was drawn several times."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            if "failed" not in row:
                found.setdefault(row["name"], []).append(row)
        return found

    @property
    def failures(self) -> dict[str, str]:
        """Why rows failed, by name."""
        return {row["name"]: row["failed"] for row in self.rows if "failed" in row}

    def add(self, row: Row, order: Callable[[Row], Any]) -> None:
        """Adds a row, in place of one of the same name and draw."""
        key = row["name"], row["seed"]
        self.rows = sorted([r for r in self.rows if (r["name"], r["seed"]) != key] + [row], key=order)

    def to_markdown(self, picture: str | None = None) -> str:
        """Tables: quality on each text, sizes and time, errors by layer; see tables.py."""
        from .tables import markdown

        return markdown(self, picture)

    def plot(self, path: str | Path) -> Path:
        """Draws KL, perplexity over size and errors through the layers into a .png, .svg or .pdf."""
        from .plot import plot

        return plot(self, path)


def original_of(rows: list[Row], text: str) -> dict[str, Any]:
    """The original's evaluation on a text, which every row has."""
    return rows[0]["texts"][text]["original"]


def spread(values: list[float]) -> tuple[float, float]:
    """Mean, and standard deviation (0 of one value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
