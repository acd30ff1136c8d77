"""An `Inspection` as a picture."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pallas_kernels.errors import W4A8Error

from .inspection import Inspection, LayerReport
from .inspection_tables import size
from .weight_statistics import SPREAD_OCTAVES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of projections, in the order of a layer; others take what is left. Colours that the colour-blind tell apart.
_COLOURS = {
    "q_proj": "#0072B2",
    "k_proj": "#56B4E9",
    "v_proj": "#009E73",
    "o_proj": "#F0E442",
    "gate_proj": "#E69F00",
    "up_proj": "#D55E00",
    "down_proj": "#CC79A7",
}
_KINDS = {
    "codes": "#0072B2",
    "scales": "#56B4E9",
    "unquantized linears": "#E69F00",
    "embeddings": "#009E73",
    "norms": "#CC79A7",
    "other": "#999999",
}
_GREY, _DARK, _GRID = "#8a8a8a", "#333333", "#e6e6e6"
_WEAK_OCTAVE = np.log2(3584)


def plot_inspection(inspection: Inspection, path: str | Path) -> Path:
    """Draws an inspection into a file, without a display.

    Of a quantized checkpoint: codes, scales through the layers, how far scales lie below their row's greatest, sizes.
    Of any other: root mean square and greatest magnitude of the weights through the layers, sizes.

    Args:
        inspection: see `inspect`.
        path: .png, .svg or .pdf.

    Raises:
        W4A8Error: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path).expanduser()
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise W4A8Error(f"{path}: expected a name that ends in .png, .svg or .pdf")
    figure = Figure(figsize=(11, 8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = [quiet(axis) for axis in figure.subplots(2, 2).flat]
    quantized = any(layer.codes is not None for layer in inspection.layers)
    if quantized:
        _codes(axes[0], inspection)
        _scales(axes[1], inspection)
        _spread(axes[2], inspection)
    else:
        _through_layers(axes[0], inspection, lambda v: (v.rms,), "root mean square", "Weights: typical size")
        _through_layers(axes[1], inspection, lambda v: (v.largest,), "greatest magnitude", "Weights: greatest")
        _through_layers(
            axes[2],
            inspection,
            lambda v: (v.largest / v.rms if v.rms else 0.0,),
            "greatest / root mean square",
            "Outliers: hard to quantize where high",
        )
    _sizes(axes[3], inspection)
    config = inspection.config
    name = inspection.path.resolve().name
    figure.suptitle(
        f"{name}: {config.get('model_type', 'model')}, {inspection.scheme}, {_count(inspection.parameters)} parameters",
        fontsize=13,
        fontweight="bold",
        color=_DARK,
    )
    try:
        figure.savefig(path)
    except OSError as e:
        raise W4A8Error(f"{path}: cannot be written: {e.strerror or e}") from e
    return path


def _codes(axis: Axes, inspection: Inspection) -> None:
    histogram = inspection.histogram
    codes, share = np.arange(-8, 8), 100 * histogram / histogram.sum()
    axis.bar(codes, share, color=["#56B4E9" if code == -8 else "#0072B2" for code in codes], width=0.85)
    axis.set_xticks(codes)
    axis.set(title="Codes of all quantized layers", xlabel="code", ylabel="share, %")
    probability = histogram[histogram > 0] / histogram.sum()
    entropy = -(probability * np.log2(probability)).sum()
    note = f"entropy {entropy:.2f} of 4 bits" + ("" if histogram[0] else "\ncode -8 is not used")
    axis.text(0.98, 0.95, note, transform=axis.transAxes, ha="right", va="top", fontsize=9, color=_DARK)


def _scales(axis: Axes, inspection: Inspection) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low: dict[int, float] = defaultdict(lambda: np.inf)
    high: dict[int, float] = defaultdict(float)
    for kind, layers in _by_kind(inspection, lambda layer: layer.codes is not None).items():
        depth = sorted(layers)
        quantiles = np.array([np.mean([x.codes.scale_quantiles for x in layers[d]], axis=0) for d in depth])  # type: ignore[union-attr]
        axis.plot(depth, quantiles[:, 3], color=_COLOURS.get(kind), label=kind, **_markers(depth))
        for i, d in enumerate(depth):
            low[d], high[d] = min(low[d], quantiles[i, 1]), max(high[d], quantiles[i, 5])
    depth = sorted(low)
    axis.fill_between(depth, [low[d] for d in depth], [high[d] for d in depth], color=_GREY, alpha=0.15, linewidth=0)
    axis.set_yscale("log")
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom / 1.6, top)  # room for the legend
    few = top / bottom < 1000
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set(title="Group scales: medians, and 1 % to 99 % of all", xlabel="layer", ylabel="scale")
    _finish_layers(axis, "lower left")


def _spread(axis: Axes, inspection: Inspection) -> None:
    codes = [layer.codes for layer in inspection.layers if layer.codes is not None]
    spread = np.sum([c.spread for c in codes], axis=0)
    share = 100 * spread / spread.sum()
    last = max(int(np.flatnonzero(spread).max()), 12)
    octaves = np.arange(last + 1)
    coarse = octaves >= np.ceil(_WEAK_OCTAVE)
    axis.bar(octaves + 0.5, share[: last + 1], color=np.where(coarse, "#D55E00", "#009E73"), width=0.92)
    axis.axvline(_WEAK_OCTAVE, color=_GREY, linestyle="--", linewidth=1)
    axis.text(
        _WEAK_OCTAVE - 0.15,
        0.62,
        "1/3584: lut numerics\nlose precision beyond",
        transform=axis.get_xaxis_transform(),
        rotation=90,
        ha="right",
        va="center",
        fontsize=8,
        color=_DARK,
    )
    positive = share[share > 0]
    axis.set_yscale("log")
    axis.set_ylim(positive.min() / 3, 200)
    axis.set_xlim(0, last + 1)
    axis.set(
        title="How far group scales are below their row's greatest",
        xlabel=f"octaves (the last, {SPREAD_OCTAVES}, holds all beyond)" if last == SPREAD_OCTAVES else "octaves",
        ylabel="share of groups, %",
    )
    weak, groups = sum(c.weak_groups for c in codes), sum(c.groups for c in codes)
    note = f"{weak:,} of {groups:,} groups lose precision"
    axis.text(
        0.98, 0.97, note, transform=axis.transAxes, ha="right", va="top", fontsize=9, color=_DARK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
    )  # fmt: skip


def _through_layers(
    axis: Axes, inspection: Inspection, value: Callable[[Any], tuple[float]], label: str, title: str
) -> None:
    kinds = _by_kind(inspection, lambda x: x.values is not None and x.kind == "unquantized linears")
    for kind, layers in kinds.items():
        depth = sorted(layers)
        mean = [np.mean([value(x.values)[0] for x in layers[d]]) for d in depth]
        axis.plot(depth, mean, color=_COLOURS.get(kind), label=kind, **_markers(depth))
    axis.set(title=title, xlabel="layer", ylabel=label)
    axis.set_ylim(0, 1.3 * axis.get_ylim()[1])  # room for the legend
    _finish_layers(axis, "upper left")


def _sizes(axis: Axes, inspection: Inspection) -> None:
    kinds = [(kind, count) for kind, count in inspection.bytes_by_kind.items() if count]
    unit, divisor = ("GiB", 2**30) if inspection.nbytes >= 2**30 else ("MiB", 2**20)
    names, sizes = [kind for kind, _ in kinds], [count / divisor for _, count in kinds]
    bars = axis.barh(names, sizes, color=[_KINDS[kind] for kind in names], height=0.65)
    labels = [f" {size(count)} ({count / inspection.nbytes:.1%})" for _, count in kinds]
    axis.bar_label(bars, labels, fontsize=9, color=_DARK)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.5 * max(sizes))
    total = f"{size(inspection.nbytes)}, {inspection.bits_per_weight:.2f} bits per weight"
    axis.set(title=f"On disk: {total}", xlabel=unit)
    axis.grid(axis="x", color=_GRID, linewidth=0.8)
    axis.grid(axis="y", visible=False)


def _by_kind(inspection: Inspection, select: Callable[[LayerReport], bool]) -> dict[str, dict[int, list[LayerReport]]]:
    """Selected modules by the last part of their names, then by layer; experts of a layer together."""
    found: dict[str, dict[int, list[LayerReport]]] = defaultdict(lambda: defaultdict(list))
    for layer in inspection.layers:
        match = re.search(r"layers\.(\d+)\..*?(\w+)$", layer.name)
        if match and select(layer):
            found[match[2]][int(match[1])].append(layer)
    rank = {kind: i for i, kind in enumerate(_COLOURS)}
    return dict(sorted(found.items(), key=lambda item: (rank.get(item[0], len(rank)), item[0])))


def _markers(depth: list[int]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4, "linewidth": 1.5} if len(depth) <= 40 else {"linewidth": 1.5}


def _finish_layers(axis: Axes, loc: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, ncols=4, frameon=False, loc=loc)


def quiet(axis: Axes) -> Axes:
    """The house's style: no frame, light horizontal lines."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_GREY)
    axis.tick_params(colors=_DARK, labelsize=9)
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.title.set_fontsize(11)
    axis.title.set_color(_DARK)
    return axis


def _count(number: int) -> str:
    for divisor, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= divisor:
            return f"{number / divisor:.3g}{suffix}"
    return str(number)
