"""Finds the best configuration of the grouped kernel for models' experts and numbers of tokens, by measuring."""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from pallas_kernels import tuning
from pallas_kernels.dense_gemm import TuningConfig
from pallas_kernels.tuning_tables import Entry, Table

from . import timing
from .moe import Experts
from .moe_kernels import OurExperts
from .moe_points import Point
from .rows import fill, turns
from .tune import before, right, short


def run(
    table: Table,
    kernels: Sequence[OurExperts],
    points: Iterable[Point],
    *,
    resume: bool = False,
    save: Callable[[Table], None] | None = None,
    progress: Callable[[str], None] | None = None,
    measure: Callable[..., timing.Timing] = timing.measure,
) -> Table:
    """Measures `tuning.candidates_grouped`, and what is chosen now; the fastest right one enters the table.

    The time of a configuration is the geometric mean over the routings of a number of tokens.

    Args:
        table: what is known already; its entries for the same rows are replaced.
        kernels: ours, one for each form of the weights.
        points: of single products, those of a model and product beside each other, and routings of the same tokens.
        resume: leave out numbers of rows that are in the table.
        save: called after each number of tokens with the table.
        progress: called with a line of text for each number of tokens, and for each candidate that failed.
        measure: `timing.measure`, or what stands for it.

    Returns:
        The table with the entries that were found.
    """
    tell = progress or (lambda text: None)
    for _, group in itertools.groupby(points, key=lambda point: (point.model, point.product)):
        same = list(group)
        bench = Experts(same, measure)
        for _, of_tokens in itertools.groupby(same, key=lambda point: point.tokens):
            routings = list(of_tokens)
            for kernel in kernels:
                if resume and _entry(kernel, routings[0]).key in table.entries:
                    continue
                entry = _best(bench, kernel, routings, tell)
                if entry is not None:
                    table = table.merged([entry])
                    if save:
                        save(table)
        del bench
        gc.collect()
    return table


def configurations(kernel: OurExperts, point: Point) -> list[TuningConfig]:
    """What to measure: what is chosen now, then the candidates; none twice."""
    ((n, k),) = point.shapes
    found = tuning.candidates_grouped(point.rows, point.model.experts, n, k, kernel.form(point))
    return list(dict.fromkeys([kernel.choose(point, n, k), *found]))


def _best(bench: Experts, kernel: OurExperts, points: Sequence[Point], tell: Callable[[str], None]) -> Entry | None:
    where = f"MoE {points[0].model.name} {points[0].product} tokens {points[0].tokens} {kernel.name}"
    configs = configurations(kernel, points[0])
    times: dict[TuningConfig, list[float]] = {}
    errors: dict[TuningConfig, float] = {}
    functions: dict[TuningConfig, Callable[[Any, Any], Any]] = {}

    def compiled(config: TuningConfig) -> Callable[[Any, Any], Any]:
        if config not in functions:
            kernel.prepare(bench.weights(kernel, points[0]))
            functions[config] = kernel.compiled(points[0], config)
        return functions[config]

    remaining = configs
    for point in points:
        attempts = [(partial(compiled, config), partial(bench.check, kernel, point)) for config in remaining]
        rows: list[dict[str, Any]] = [{} for _ in remaining]
        fill(rows, attempts, partial(bench.time, point), turns(point.flops))
        right_ones = right(remaining, rows, where, tell)
        remaining = [config for _, config, _ in right_ones]
        for us, config, row in right_ones:
            times.setdefault(config, []).append(us)
            errors[config] = max(errors.get(config, 0), row["error"])
    found = [(statistics.geometric_mean(times[config]), config, errors[config]) for config in remaining]
    if not found:
        return None
    us, best, error = min(found, key=lambda item: item[0])
    tell(f"{where}: {us:9.2f} us of {len(found)}, was {before(found, configs[0])}  {short(best)}")
    return _entry(kernel, points[0], best, {"us": round(us, 3), "error": float(f"{error:.3g}")})


def _entry(
    kernel: OurExperts, point: Point, config: TuningConfig | None = None, more: dict[str, Any] | None = None
) -> Entry:
    ((n, k),) = point.shapes
    return Entry(kernel.form(point), n, k, point.rows, config or TuningConfig(8), more or {}, point.model.experts)
