"""What the rows of a benchmark of experts say: how near the copy rate, and how much faster than peers."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .moe_record import MoeRecord
from .summary import brief

CUTLASS_W4A8 = "vllm cutlass w4a8"
MARLIN = "vllm marlin w4a16"
# Those whose few tokens should be bound by reading their experts.
LARGE = ("command-a-plus", "mixtral-8x7b")
_RANGES = (("tokens <= 64", 0, 64), ("65..1024", 65, 1024), ("more", 1025, 1 << 62))


@dataclasses.dataclass(frozen=True)
class Measure:
    """Several points' figures in one: their geometric mean, and the least with its point.

    Attributes:
        title: what it is of.
        kernel: which of ours.
        mean: geometric mean; None if there is no point.
        worst: the least.
        where: model, product, tokens and routing of the least.
        points: how many there are.
        bounds: floor and aim, of the mean or of the worst.
    """

    title: str
    kernel: str
    mean: float | None = None
    worst: float | None = None
    where: str = ""
    points: int = 0
    bounds: str = ""


# The lines of a summary: what they are of, a row's figure, given the copy rate in GB/s, which rows, floor and aim.
_LINES: tuple[
    tuple[str, Callable[[dict[str, Any], float], float | None], Callable[[dict[str, Any]], bool], str], ...
] = (
    (
        "tokens <= 64, Command A+ and Mixtral: fraction of the copy rate",
        lambda row, copy: row["gbps"] / copy,
        lambda row: row["model"] in LARGE and row["tokens"] <= 64,
        "0.55 / 0.75",
    ),
    (
        "all: speed over vLLM CUTLASS W4A8",
        lambda row, copy: row["ratios"].get(CUTLASS_W4A8),
        lambda row: True,
        "mean 1.1 / 1.3, worst 0.95 / 1",
    ),
    (
        "tokens >= 256: speed over Marlin W4A16",
        lambda row, copy: row["ratios"].get(MARLIN),
        lambda row: row["tokens"] >= 256,
        "1.5 / 2",
    ),
)
_PARTS = (("products", ("gate_up", "down")), ("whole MLP", ("mlp",)))


def summarize(record: MoeRecord) -> list[Measure]:
    """For each of our kernels: decode as a fraction of the copy rate, and speed as a multiple of the peers'."""
    record.derive()
    copy = 1e3 * record.about["copy_TB_s"]
    found = []
    for kernel, (part, products), (title, value, keep, bounds) in itertools.product(ours(record), _PARTS, _LINES):
        rows = [
            (figure, row)
            for row in record.measured.values()
            if row["kernel"] == kernel and row["product"] in products and keep(row)
            if (figure := value(row, copy)) is not None
        ]
        found.append(_measure(f"{part}, {title}", kernel, rows, bounds))
    return [x for x in found if x.points]


def ours(record: MoeRecord) -> list[str]:
    """Names of our kernels in a record."""
    return [name for name in _kernels(record) if name.startswith("grouped ")]


def render(record: MoeRecord, console: Console | None = None) -> None:
    """Prints the summary, our speed over each other kernel and the fraction of the floor by model, and what failed."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 170)  # a file or a pipe needs no line breaks
    record.derive()
    about = record.about
    fp8 = about.get("cublas_fp8_TFLOP_s")
    rate = "no cuBLAS FP8 measured" if fp8 is None else f"cuBLAS FP8 {fp8:.0f} TFLOP/s"
    console.print(f"{about.get('device')}, {about.get('date')}: copy {about['copy_TB_s']:.2f} TB/s, {rate}")
    table = _table("summary", "kernel", "geometric mean", "worst", "at", "points", "floor / aim")
    for x in summarize(record):
        table.add_row(x.title, x.kernel, _number(x.mean), _number(x.worst), x.where, str(x.points), x.bounds)
    console.print(table)
    names = [name for name, _, _ in _RANGES]
    groups = list(dict.fromkeys((row["model"], row["product"]) for row in record.measured.values()))
    for kernel in ours(record):
        table = _table(f"{kernel}: speed over", "model", "product", *names, "worst", "at")
        for other in _kernels(record):
            for model, product in groups if other != kernel else []:
                _add(table, record, (other, model, product), kernel, _ratio(other), model, product)
        if table.row_count:
            console.print(table)
    table = _table("fraction of the floor", "model", "product", *names, "worst", "at")
    for kernel in _kernels(record):
        for model, product in groups:
            _add(table, record, (kernel, model, product), kernel, lambda row: row["fraction"], model, product)
    console.print(table)
    for row in record.rows:
        where = f"{row['model']} {row['product']} tokens {row['tokens']} {row['routing']} {row['kernel']}"
        if "failed" in row:
            console.print(f"failed: {where}: {brief(row['failed'])}", markup=False)
        elif row.get("same_twice") is False:
            console.print(f"not the same bits in two runs: {where}", markup=False)


def _add(
    table: Table,
    record: MoeRecord,
    head: tuple[str, ...],
    kernel: str,
    value: Callable[[dict[str, Any]], float | None],
    model: str,
    product: str,
) -> None:
    """A line of a table, if it has a figure."""

    def of(low: int, high: int) -> Measure:
        rows = [
            (figure, row)
            for row in record.measured.values()
            if (row["kernel"], row["model"], row["product"]) == (kernel, model, product)
            and low <= row["tokens"] <= high
            if (figure := value(row)) is not None
        ]
        return _measure("", kernel, rows)

    every = of(0, 1 << 62)
    if every.points:
        cells = [_number(of(low, high).mean) for _, low, high in _RANGES]
        table.add_row(*head, *cells, _number(every.worst), every.where.split(" ", 2)[2])  # without model and product


def _ratio(other: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda row: row["ratios"].get(other)


def _measure(title: str, kernel: str, figures: list[tuple[float, dict[str, Any]]], bounds: str = "") -> Measure:
    if not figures:
        return Measure(title, kernel)
    worst, row = min(figures, key=lambda figure: figure[0])
    where = f"{row['model']} {row['product']} {row['tokens']} {row['routing']}"
    return Measure(title, kernel, statistics.geometric_mean(f for f, _ in figures), worst, where, len(figures), bounds)


def _kernels(record: MoeRecord) -> list[str]:
    return list(dict.fromkeys(row["kernel"] for row in record.rows))


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for i, column in enumerate(columns):
        left = i == 0 or column in ("kernel", "at", "model", "product", "floor / aim")
        table.add_column(column, justify="left" if left else "right")
    return table


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.3f}"
