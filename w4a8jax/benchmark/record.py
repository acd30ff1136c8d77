"""What a benchmark measured, as a JSON file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar, Self

from pallas_kernels.errors import W4A8Error

from . import floor, timing

CUBLAS_FP8 = ("jax fp8", "torch fp8 rowwise, fast", "torch fp8 rowwise")


@dataclasses.dataclass
class Record:
    """A benchmark's rows, with where and how they were measured.

    Attributes:
        about: date, device, versions, command, copy_TB_s: bytes read and written in a copy, TB/s.
        rows: one for each kernel at each point, with K, N, M, kernel, date, config. A measured one has us (median),
            us_min, us_quartiles, launches, kernels (names of what ran), error (relative, from float64 of the same
            operands), same_twice (the same bits in two runs), operand_bytes; and, once `derive` has run, tflops, gbps
            (of the kernel's own operands), floor_us and fraction_of_floor (the W4A8 floor's). One that failed has
            failed, a message.
    """

    # What tells rows apart, and the command that measures them.
    KEY: ClassVar[tuple[str, ...]] = ("K", "N", "M", "kernel")
    COMMAND: ClassVar[str] = "bench gemm"

    about: dict[str, Any]
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @classmethod
    def begin(cls, about: dict[str, Any], previous: str | Path | None = None) -> Self:
        """The record in a file, if it is there, else a new one with the copy rate measured.

        Args:
            about: of this run: replaces what the file says.
            previous: the file.

        Raises:
            W4A8Error: the file cannot be read, or is of another device.
        """
        if previous is None or not Path(previous).expanduser().exists():
            return cls(about | {"copy_TB_s": timing.copy_rate() / 1e12})
        record = cls.read(previous)
        if record.about.get("device") != about["device"]:
            raise W4A8Error(f"{previous}: was measured on {record.about.get('device')}, this is {about['device']}")
        record.about |= about
        return record

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Reads a file that `write` wrote.

        Raises:
            W4A8Error: it cannot be read, or is no such file.
        """
        path = Path(path).expanduser()
        try:
            record = json.loads(path.read_text())
        except OSError as e:
            raise W4A8Error(f"{path}: cannot be read: {e.strerror or e}") from e
        except ValueError as e:
            raise W4A8Error(f"{path}: is not JSON: {e}") from e
        rows = record.pop("rows", None) if isinstance(record, dict) else None
        if not isinstance(rows, list) or not isinstance(record.get("copy_TB_s"), (int, float)):
            raise W4A8Error(f"{path}: is no record of `w4a8jax {cls.COMMAND}`: expected rows and copy_TB_s")
        for i, row in enumerate(rows):
            if not isinstance(row, dict) or not set(cls.KEY) <= set(row):
                raise W4A8Error(f"{path}: row {i}: expected {', '.join(cls.KEY[:-1])} and {cls.KEY[-1]}")
            if "failed" not in row and not isinstance(row.get("us"), (int, float)):
                raise W4A8Error(f"{path}: row {i}: expected us, a number, or failed")
        return cls(record, rows)

    def write(self, path: str | Path) -> None:
        """Writes the record, whole or not at all.

        Raises:
            W4A8Error: it cannot be written.
        """
        self.derive()
        path = Path(path).expanduser()
        temporary = path.with_name(path.name + ".partial")
        head = json.dumps(self.about, indent=1).rstrip("}\n")
        rows = ",\n".join(f"  {json.dumps(row)}" for row in self.rows)
        try:
            temporary.write_text(f'{head},\n "rows": [\n{rows}\n ]\n}}\n')
            temporary.replace(path)
        except OSError as e:
            raise W4A8Error(f"{path}: cannot be written: {e.strerror or e}") from e

    @property
    def measured(self) -> dict[Any, dict[str, Any]]:
        """Rows that did not fail, by their keys."""
        return {self.key_of(row): row for row in self.rows if "failed" not in row}

    @classmethod
    def key_of(cls, row: dict[str, Any]) -> tuple[Any, ...]:
        """What tells a row from others: K, N, M and kernel."""
        return tuple(row[name] for name in cls.KEY)

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row, in place of one of the same kernel and point."""
        self.rows = [r for r in self.rows if self.key_of(r) != self.key_of(row)] + [row]

    def part(self, k: int, n: int, tokens: Collection[int]) -> Self:
        """A record of the rows of a shape with some of the values of M."""
        return type(self)(dict(self.about), [r for r in self.rows if (r["K"], r["N"]) == (k, n) and r["M"] in tokens])

    def update(self, path: str | Path) -> None:
        """Adds the rows of a file that `write` wrote.

        Raises:
            W4A8Error: see `read`.
        """
        for row in self.read(path).rows:
            self.add(row)

    @property
    def device(self) -> floor.Device:
        """What the device was measured to do."""
        rates = [
            floor.flops(row["M"], row["N"], row["K"]) / row["us"] * 1e6
            for row in self.measured.values()
            if row["kernel"] in CUBLAS_FP8
        ]
        return floor.Device(1e12 * self.about["copy_TB_s"], max(rates, default=None))

    def derive(self) -> None:
        """Computes rates and floors of all rows: the floor depends on the best cuBLAS FP8 product of them all."""
        device = self.device
        self.about["cublas_fp8_TFLOP_s"] = None if device.fp8 is None else device.fp8 / 1e12
        for row in self.measured.values():
            m, n, k, us = row["M"], row["N"], row["K"], row["us"]
            least = device.floor_us(m, n, k)
            row["tflops"] = floor.flops(m, n, k) / us / 1e6
            row["gbps"] = row["operand_bytes"] / us / 1e3 if "operand_bytes" in row else None
            row |= {"floor_us": least, "fraction_of_floor": least / us}
