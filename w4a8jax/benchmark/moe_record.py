"""What a benchmark of experts measured, as a JSON file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self

from .record import Record


@dataclasses.dataclass
class MoeRecord(Record):
    """A record whose rows are of products with experts, or of their whole MLPs.

    Attributes:
        about: as `Record` has it, and cublas_fp8_TFLOP_s, the best rate of cuBLAS in FP8, of which floors are made.
        rows: one for each kernel at each point, with model, product, tokens, routing, kernel, rows, date, config,
            touched (experts that have rows), touched_weight_bytes (theirs, in the kernel's form), bytes (that must move
            in W4A8) and flops. A measured one has us, us_min, us_quartiles, launches, kernels, error and same_twice, as
            `Record` has them; and, once `derive` has run, tflops, gbps (bytes over time), floor_us, fraction (of the
            floor), and ratios (each other kernel's time over this one's).
    """

    KEY: ClassVar[tuple[str, ...]] = ("model", "product", "tokens", "routing", "kernel")
    COMMAND: ClassVar[str] = "bench moe"

    def derive(self) -> None:
        """Computes rates, floors and ratios of all rows."""
        copy, fp8 = 1e12 * self.about["copy_TB_s"], self.about.get("cublas_fp8_TFLOP_s")
        others: dict[tuple[Any, ...], dict[str, float]] = {}
        for (*point, kernel), row in self.measured.items():
            others.setdefault(tuple(point), {})[kernel] = row["us"]
        for (*point, kernel), row in self.measured.items():
            us = row["us"]
            floor_us = 1e6 * max(row["bytes"] / copy, 0.0 if fp8 is None else row["flops"] / (1e12 * fp8))
            row["tflops"], row["gbps"] = row["flops"] / us / 1e6, row["bytes"] / us / 1e3
            row |= {"floor_us": floor_us, "fraction": floor_us / us}
            row["ratios"] = {name: round(t / us, 4) for name, t in others[tuple(point)].items() if name != kernel}

    def only(self, wanted: Callable[[dict[str, Any]], bool]) -> Self:
        """A record of some of the rows."""
        return type(self)(dict(self.about), [row for row in self.rows if wanted(row)])
