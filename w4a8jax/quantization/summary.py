"""What a quantization did, layer by layer."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from typing import Any

from rich.console import Console
from rich.table import Table

OUTPUT_ERRORS = ("output_error", "rtn_output_error")


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """One quantized weight [N, K].

    Attributes:
        name: of the module.
        bits_per_weight: of what is stored, scales included.
        relative_error: ||w_kernel - w|| / ||w||, with the weight as the kernel computes it.
        histogram: how often each code -8..7 occurs.
        output_error: ||(w_kernel - w) x|| / ||w x|| on calibration data, and rtn_output_error: of rounding to nearest;
            None without calibration.
        fallback: why it was rounded to nearest though another method was asked for; "" if it was not.
    """

    name: str
    shape: tuple[int, int]
    bits_per_weight: float
    relative_error: float
    histogram: tuple[int, ...]
    output_error: float | None = None
    rtn_output_error: float | None = None
    fallback: str = ""

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    def to_note(self) -> list[Any]:
        """A compact JSON form, for the writer's journal."""
        note: list[Any] = [self.name, *self.shape, self.bits_per_weight, self.relative_error, list(self.histogram)]
        return [*note, self.output_error, self.rtn_output_error, self.fallback]

    @classmethod
    def from_note(cls, note: list[Any]) -> LayerSummary:
        name, n, k, bits, error, histogram, *more = note
        return cls(name, (n, k), bits, error, tuple(histogram), *more)


@dataclasses.dataclass(frozen=True)
class QuantizationSummary:
    """What `quantize` did.

    Attributes:
        source, target: the two checkpoint directories.
        layers: the quantized weights, in checkpoint order.
        skipped: tensors that were not quantized, and why.
        warnings: what the user should know.
        parameters: of the whole model; source_bytes, target_bytes: its tensors on disk.
        seconds: wall time, "total" and by phase: "read", "quantize", "write", "check"; "calibrate" of
            GPTQ; "equalize".
        method: "rtn" or "gptq"; calibration: a line on the data that it used; calibration_tokens: how many were run.
        equalization: a line on what it did; "" without.
        resumed_shards: shards that an interrupted run had left; their layers' time is not in `seconds`.
    """

    source: str
    target: str
    scheme: str
    numerics: str
    code_min: int
    search: str
    layers: tuple[LayerSummary, ...]
    skipped: dict[str, str]
    warnings: tuple[str, ...]
    parameters: int
    source_bytes: int
    target_bytes: int
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    resumed_shards: int = 0
    method: str = "rtn"
    calibration: str = ""
    calibration_tokens: int = 0
    equalization: str = ""

    @property
    def quantized_parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized layers, scales included."""
        bits = sum(layer.bits_per_weight * layer.parameters for layer in self.layers)
        return bits / max(self.quantized_parameters, 1)

    @property
    def relative_error(self) -> float:
        """Root mean square of the layers' relative errors, weighted by their parameters."""
        total = sum(layer.relative_error**2 * layer.parameters for layer in self.layers)
        return (total / max(self.quantized_parameters, 1)) ** 0.5

    @property
    def output_errors(self) -> tuple[float, float] | None:
        """Root mean squares of the layers' output errors, and of those of rounding to nearest; None if not known."""
        pairs = [(x.output_error, x.rtn_output_error) for x in self.layers]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        if not known:
            return None
        first, second = ((sum(e**2 for e in column) / len(known)) ** 0.5 for column in zip(*known, strict=True))
        return first, second

    def record(self) -> dict[str, Any]:
        """What is stored in the checkpoint: all of it that does not depend on where and how fast it was made."""
        fields = dataclasses.asdict(self)
        for name in ("source", "target", "seconds", "resumed_shards"):
            del fields[name]
        return fields

    def to_json(self) -> str:
        """Everything, as JSON."""
        fields = dataclasses.asdict(self)
        fields["bits_per_weight"], fields["relative_error"] = self.bits_per_weight, self.relative_error
        return json.dumps(fields, indent=2)

    def render(self, console: Console | None = None, *, details: bool = False) -> None:
        """Prints the summary: one row for each kind of layer, or with `details` for each layer."""
        console = console or Console()
        kinds: dict[str, list[LayerSummary]] = defaultdict(list)
        for layer in self.layers:
            kinds[layer.name if details else _kind(layer)].append(layer)
        method = "" if self.method == "rtn" else f" {self.method}"
        table = Table(title=f"{self.scheme}{method} {self.numerics}, codes {self.code_min}..7, search {self.search}")
        table.add_column("layer")
        for title in ("count", "N x K", "bits/weight", "error", "worst"):
            table.add_column(title, justify="right")
        for kind, layers in kinds.items():
            count = sum(layer.parameters for layer in layers)
            error = (sum(x.relative_error**2 * x.parameters for x in layers) / count) ** 0.5
            table.add_row(
                kind,
                str(len(layers)),
                "{} x {}".format(*layers[0].shape),
                f"{sum(x.bits_per_weight * x.parameters for x in layers) / count:.3f}",
                f"{error:.4f}",
                f"{max(x.relative_error for x in layers):.4f}",
            )
        console.print(table)
        if self.equalization:
            console.print(f"equalization: {self.equalization}", markup=False, highlight=False)
        if self.output_errors:
            error, nearest = self.output_errors
            pace = ""
            if self.calibration_tokens and (seconds := self.seconds.get("calibrate")):
                pace = f"; {1000 * seconds / self.calibration_tokens:.2f} ms a token"
            console.print(f"calibration: {self.calibration}{pace}", markup=False, highlight=False)
            console.print(f"error of layers' outputs {error:.4f}, rounded to nearest {nearest:.4f}", highlight=False)
        for layer in self.layers:
            if layer.fallback:
                text = f"warning: {layer.name}: rounded to nearest: {layer.fallback}"
                console.print(text, markup=False, highlight=False)
        for reason, count in Counter(self.skipped.values()).items():
            example = next(name for name, why in self.skipped.items() if why == reason)
            more = f" and {count - 1} more" if count > 1 else ""
            console.print(f"not quantized: {example}{more}: {reason}", markup=False, highlight=False)
        for warning in self.warnings:
            console.print(f"warning: {warning}", markup=False, highlight=False)
        share = self.quantized_parameters / max(self.parameters, 1)
        console.print(
            f"{_size(self.source_bytes)} -> {_size(self.target_bytes)}; {share:.1%} of {self.parameters:,} parameters "
            f"at {self.bits_per_weight:.3f} bits, relative error {self.relative_error:.4f}",
            highlight=False,
        )
        if total := self.seconds.get("total"):
            parts = ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items() if name != "total")
            resumed = f"; {self.resumed_shards} shards were there already" if self.resumed_shards else ""
            console.print(f"{total:.1f} s ({parts}){resumed}", highlight=False)


def _kind(layer: LayerSummary) -> str:
    """The same name for a module of every layer (and expert)."""
    parts = ["*" if part.isdigit() else part for part in layer.name.split(".")]
    return ".".join(parts).removeprefix("model.layers.*.")


def _size(nbytes: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.1f} {unit}" if unit != "B" else f"{nbytes} B"
        nbytes /= 1024  # type: ignore[assignment]
    return f"{nbytes:.2f} GiB"
