"""A `Report` as a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pallas_kernels.errors import W4A8Error

from ..inspection_tables import size
from ..plots import quiet
from .record import Report, Row, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TEXTS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_LINES = ("#999999", "#56B4E9", "#F0E442", "#E69F00", "#0072B2", "#CC79A7", "#D55E00", "#009E73")
_GRID, _DARK = "#e6e6e6", "#333333"


def plot(report: Report, path: str | Path) -> Path:
    """Draws KL and perplexity of each recipe on each text, with its size, and errors through the layers.

    Args:
        report: has a row that did not fail.
        path: .png, .svg or .pdf.

    Raises:
        W4A8Error: there is nothing to draw, or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path).expanduser()
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise W4A8Error(f"{path}: expected a name that ends in .png, .svg or .pdf")
    found = report.measured
    if not found:
        raise W4A8Error("report: has no row to draw")
    # The original is what others are compared with.
    rows = [rows for name, rows in found.items() if name != "bf16"] or list(found.values())
    height = 1.6 + 0.16 * len(rows) * (1 + len(report.texts))
    figure = Figure(figsize=(14, max(4.0, height)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = (quiet(axis) for axis in figure.subplots(1, 3, width_ratios=(1.3, 1, 1)))
    _bars(left, rows, report.texts, lambda row, text: row["texts"][text]["kl_mean"])
    left.set(title="KL from the original", xlabel="nats a token")
    left.set_yticks(range(len(rows)), [f"{row[0]['title']}\n{size(row[0]['nbytes'])}" for row in rows], fontsize=8)
    _bars(middle, rows, report.texts, _increase)
    middle.set(title="Perplexity over the original's", xlabel="%")
    middle.set_yticks(range(len(rows)), [""] * len(rows))
    left.legend(frameon=False, fontsize=8, loc="best")
    _through_layers(right, rows)
    about = report.about
    figure.suptitle(
        f"{about['model']}: {about['model_type']}, {about['parameters']:,} parameters, {size(about['nbytes'])}",
        fontsize=13, fontweight="bold", color=_DARK,
    )  # fmt: skip
    try:
        figure.savefig(path)
    except OSError as e:
        raise W4A8Error(f"{path}: cannot be written: {e.strerror or e}") from e
    return path


def _increase(row: Row, text: str) -> float:
    found = row["texts"][text]
    return 100 * (found["model"]["perplexity"] / found["original"]["perplexity"] - 1)


def _bars(axis: Axes, rows: list[list[Row]], texts: list[str], value: Callable[[Row, str], float | None]) -> None:
    """A bar for each recipe and text, with the standard deviation over draws of calibration data."""
    thickness = 0.8 / len(texts)
    for i, text in enumerate(texts):
        pairs = [spread([value(row, text) or 0.0 for row in draws]) for draws in rows]
        means, deviations = np.array(pairs).T
        at = np.arange(len(rows)) + (i - (len(texts) - 1) / 2) * thickness
        shown = np.where(deviations > 0, deviations, np.nan)
        colour = _TEXTS[i % len(_TEXTS)]
        axis.barh(at, means, 0.9 * thickness, xerr=shown, color=colour, ecolor=_DARK, label=text)
    axis.invert_yaxis()
    axis.grid(axis="x", color=_GRID, linewidth=0.8)
    axis.grid(axis="y", visible=False)


def _through_layers(axis: Axes, rows: list[list[Row]]) -> None:
    from matplotlib.ticker import MaxNLocator

    for i, draws in enumerate(row for row in rows if row[0]["residual_errors"]):
        errors = 100 * np.mean([row["residual_errors"] for row in draws], axis=0)
        style = "-" if i < len(_LINES) else "--"
        marker = "o" if len(errors) <= 40 else None
        axis.plot(errors, style, color=_LINES[i % len(_LINES)], marker=marker, markersize=4, label=draws[0]["title"])
    axis.set(title="Error of the residual stream", xlabel="behind layer", ylabel="%")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_ylim(bottom=0)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=7, loc="lower right")
