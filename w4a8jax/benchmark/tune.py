"""Finds the best configuration of our kernels for each shape and number of tokens, by measuring candidates."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from pallas_kernels import tuning
from pallas_kernels.dense_gemm import TuningConfig
from pallas_kernels.tuning_tables import Entry, Table

from . import floor, timing
from .gemm import Shape
from .kernels import OurKernel
from .rows import fill, turns


def run(
    table: Table,
    kernels: Sequence[OurKernel],
    shapes: Iterable[tuple[int, int]],
    tokens: Sequence[int],
    *,
    resume: bool = False,
    save: Callable[[Table], None] | None = None,
    progress: Callable[[str], None] | None = None,
    measure: Callable[..., timing.Timing] = timing.measure,
) -> Table:
    """Measures `tuning.candidates`, and what is chosen now, at each point; the fastest right one enters the table.

    Args:
        table: what is known already; its entries for the same points are replaced.
        kernels: ours, one for each form of the weights.
        shapes: (K, N).
        tokens: values of M.
        resume: leave out points that are in the table.
        save: called after each point with the table.
        progress: called with a line of text for each point, and for each candidate that failed.
        measure: `timing.measure`, or what stands for it.

    Returns:
        The table with the entries that were found.
    """
    tell = progress or (lambda text: None)
    plan = [
        (k, n, m, kernel, configurations(kernel, m, n, k))
        for k, n in shapes
        for m in tokens
        for kernel in kernels
        if not (resume and (kernel.form(n, k), n, k, m) in table.entries)
    ]
    bench: Shape | None = None
    for k, n, m, kernel, configs in plan:
        if bench is None or (bench.k, bench.n) != (k, n):
            bench = None
            gc.collect()
            bench = Shape(k, n, tokens, measure)
        where = f"K {k:6} N {n:6} M {m:6} {kernel.name}"
        attempts = [(partial(kernel.compiled, m, n, k, config), partial(bench.check, kernel, m)) for config in configs]
        rows: list[dict[str, Any]] = [{} for _ in configs]
        fill(rows, attempts, partial(bench.time, m), turns(floor.flops(m, n, k)))
        found = right(configs, rows, where, tell)
        if not found:
            continue
        us, best, result = min(found, key=lambda item: item[0])
        tell(f"{where}: {us:9.2f} us of {len(found)}, was {before(found, configs[0])}  {short(best)}")
        more = {"us": round(us, 3), "error": float(f"{result['error']:.3g}")}
        table = table.merged([Entry(kernel.form(n, k), n, k, m, best, more)])
        if save:
            save(table)
    return table


def configurations(kernel: OurKernel, m: int, n: int, k: int) -> list[TuningConfig]:
    """What to measure: what is chosen now, then the candidates; none twice."""
    form = kernel.form(n, k)
    return list(dict.fromkeys([tuning.choose(m, n, k, form), *tuning.candidates(m, n, k, form)]))


def right(
    configs: Sequence[TuningConfig], rows: Sequence[dict[str, Any]], where: str, tell: Callable[[str], None]
) -> list[tuple[float, TuningConfig, dict[str, Any]]]:
    """Microseconds, configuration and row of those that could be timed; the others are told of.

    A candidate that cannot be compiled, or is wrong, is not chosen; others may still be.
    """
    for config, row in zip(configs, rows, strict=True):
        if "failed" in row:
            tell(f"{where}: {short(config)} failed: {row['failed'][:160]}")
    return [(row["us"], config, row) for config, row in zip(configs, rows, strict=True) if "failed" not in row]


def before(found: Sequence[tuple[float, TuningConfig, Any]], config: TuningConfig) -> str:
    """The microseconds of a configuration among those that were found, as text."""
    return next((f"{us:.2f}" for us, c, _ in found if c == config), "unknown")


def short(config: TuningConfig) -> str:
    """A configuration in one line."""
    return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(config).items())
