"""What a benchmark's rows say: how near the floor, and how much faster than peers."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .record import Record

ROWWISE_FP8 = "torch fp8 rowwise, fast"
CUTLASS_W4A8 = "vllm cutlass w4a8"
MACHETE = "vllm machete w4a16"

# Command A's weights, (K, N): those whose codes alone take longer than 50 us to read, and those that are smaller.
BIG = ((12288, 73728), (36864, 12288))
SMALL = ((12288, 14336), (12288, 12288))

_RANGES = (("M <= 64", 0, 64), ("65..511", 65, 511), ("512..2047", 512, 2047), ("M >= 2048", 2048, 1 << 62))


@dataclasses.dataclass(frozen=True)
class Measure:
    """Several points' figures in one: their geometric mean, and the least with its point.

    Attributes:
        title: what it is of.
        kernel: which of ours.
        mean: geometric mean; None if there is no point.
        worst: the least.
        where: K, N, M of the least.
        points: how many there are.
    """

    title: str
    kernel: str
    mean: float | None = None
    worst: float | None = None
    where: tuple[int, int, int] | None = None
    points: int = 0


def summarize(record: Record) -> list[Measure]:
    """For each of our kernels: decode as a fraction of the copy rate, and speed as a multiple of the peers'."""
    found = []
    for kernel in ours(record):
        copy = [("big", BIG), ("small", SMALL)]
        found += [
            _measure(
                record, f"decode, M <= 64, {name} shapes: fraction of the copy rate", kernel, _of_copy(record), s, 0, 64
            )
            for name, s in copy
        ]
        found += [
            _ratio(record, "prefill, M >= 2048: speed over rowwise FP8", kernel, ROWWISE_FP8, 2048),
            _ratio(record, "512 <= M < 2048: speed over rowwise FP8", kernel, ROWWISE_FP8, 512, 2047),
            _ratio(record, "all M: speed over vLLM CUTLASS W4A8", kernel, CUTLASS_W4A8),
            _ratio(record, "M >= 256: speed over Machete W4A16", kernel, MACHETE, 256),
        ]
    return found


def ours(record: Record) -> list[str]:
    """Names of our kernels in a record."""
    return [name for name in _kernels(record) if name.startswith("w4a8 ") or name.startswith("w4a16 ")]


def render(record: Record, console: Console | None = None) -> None:
    """Prints the summary, our speed over each other kernel by ranges of M, and what failed."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 150)  # a file or a pipe needs no line breaks
    record.derive()
    about = record.about
    fp8 = about.get("cublas_fp8_TFLOP_s")
    rate = "no cuBLAS FP8 measured" if fp8 is None else f"best cuBLAS FP8 {fp8:.0f} TFLOP/s"
    console.print(f"{about.get('device')}, {about.get('date')}: copy {about['copy_TB_s']:.2f} TB/s, {rate}")
    table = _table("summary", "kernel", "geometric mean", "worst", "at K, N, M", "points")
    for x in summarize(record):
        where = "" if x.where is None else ", ".join(map(str, x.where))
        table.add_row(x.title, x.kernel, _number(x.mean), _number(x.worst), where, str(x.points))
    console.print(table)
    for kernel in ours(record):
        table = _table(f"{kernel}: speed over", *(name for name, _, _ in _RANGES), "worst of all", "at K, N, M")
        for other in _kernels(record):
            if other != kernel:
                cells = [_number(_ratio(record, "", kernel, other, low, high).mean) for _, low, high in _RANGES]
                every = _ratio(record, "", kernel, other)
                where = "" if every.where is None else ", ".join(map(str, every.where))
                table.add_row(other, *cells, _number(every.worst), where)
        console.print(table)
    table = _table("fraction of the floor", *(name for name, _, _ in _RANGES), "worst of all", "at K, N, M")
    for kernel in _kernels(record):
        cells = [_number(_measure(record, "", kernel, _of_floor, None, lo, hi).mean) for _, lo, hi in _RANGES]
        every = _measure(record, "", kernel, _of_floor)
        where = "" if every.where is None else ", ".join(map(str, every.where))
        table.add_row(kernel, *cells, _number(every.worst), where)
    console.print(table)
    for row in record.rows:
        if "failed" in row:
            where = f"K {row['K']} N {row['N']} M {row['M']} {row['kernel']}"
            console.print(f"failed: {where}: {brief(row['failed'])}", markup=False)
        elif row.get("same_twice") is False:
            where = f"K {row['K']} N {row['N']} M {row['M']} {row['kernel']}"
            console.print(f"not the same bits in two runs: {where}", markup=False)


def _ratio(record: Record, title: str, kernel: str, other: str, low: int = 0, high: int = 1 << 62) -> Measure:
    rows = record.measured

    def value(row: dict[str, Any]) -> float | None:
        peer = rows.get((row["K"], row["N"], row["M"], other))
        return None if peer is None else peer["us"] / row["us"]

    return _measure(record, title, kernel, value, None, low, high)


def _measure(
    record: Record,
    title: str,
    kernel: str,
    value: Callable[[dict[str, Any]], float | None],
    shapes: Iterable[tuple[int, int]] | None = None,
    low: int = 0,
    high: int = 1 << 62,
) -> Measure:
    figures = [
        (figure, (k, n, m))
        for (k, n, m, name), row in record.measured.items()
        if name == kernel and low <= m <= high and (shapes is None or (k, n) in shapes)
        if (figure := value(row)) is not None
    ]
    if not figures:
        return Measure(title, kernel)
    worst, where = min(figures)
    return Measure(title, kernel, statistics.geometric_mean(f for f, _ in figures), worst, where, len(figures))


def _of_copy(record: Record) -> Callable[[dict[str, Any]], float]:
    return lambda row: row["gbps"] / (1e3 * record.about["copy_TB_s"])


def _of_floor(row: dict[str, Any]) -> float:
    return row["fraction_of_floor"]


def _kernels(record: Record) -> list[str]:
    return list(dict.fromkeys(row["kernel"] for row in record.rows))


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or column in ("kernel", "at K, N, M") else "right")
    return table


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.3f}"


def brief(message: str) -> str:
    """The beginning of an error's message, which frameworks fill with their own advice; the record has the rest."""
    return message if len(message) <= 160 else f"{message[:160]} ..."
