"""The rows of a benchmark of experts as a picture."""

from __future__ import annotations

from pathlib import Path

from pallas_kernels.errors import W4A8Error

from .moe_record import MoeRecord
from .moe_summary import ours
from .plot import MARKERS, OTHERS, OURS, check_name

_DASHES = {"uniform": "-", "zipf": ":"}


def plot(record: MoeRecord, path: str | Path) -> Path:
    """Draws microseconds over tokens, one panel for each model and product, one line for each kernel and routing.

    The floors are dashed: black where routing is uniform.

    Args:
        record: see `MoeRecord`.
        path: .png, .svg or .pdf.

    Raises:
        W4A8Error: the record has no times, or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = check_name(path)
    record.derive()
    rows = list(record.measured.values())
    panels = list(dict.fromkeys((row["model"], row["product"]) for row in rows))
    if not panels:
        raise W4A8Error(f"{path}: the record has no times to draw")
    mine = ours(record)
    others = [name for name in dict.fromkeys(row["kernel"] for row in rows) if name not in mine]
    colours = {name: OURS[i % len(OURS)] for i, name in enumerate(mine)}
    colours |= {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(max(5.2 * columns, 8), 4.4 * lines + 1), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    handles = {}
    for axis, (model, product) in zip(axes, panels, strict=False):
        here = [row for row in rows if (row["model"], row["product"]) == (model, product)]
        for routing, dashes in _DASHES.items():
            for i, (name, colour) in enumerate(colours.items()):
                points = sorted((r["tokens"], r["us"]) for r in here if (r["kernel"], r["routing"]) == (name, routing))
                if points:
                    style = {"color": colour, "lw": 2.2 if name in mine else 1.1, "marker": MARKERS[i % len(MARKERS)]}
                    label = f"{name}, {routing}"
                    (handles[label],) = axis.plot(*zip(*points, strict=True), ls=dashes, ms=3.5, **style)
            floors = sorted({(r["tokens"], r["floor_us"]) for r in here if r["routing"] == routing})
            if floors:
                colour, label = {"uniform": "black"}.get(routing, "#888888"), f"W4A8 floor, {routing}"
                (handles[label],) = axis.plot(*zip(*floors, strict=True), "--", color=colour, lw=1)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set(title=f"{model}, {product}", xlabel="tokens", ylabel="microseconds")
        axis.grid(color="#e6e6e6", lw=0.6)
        axis.set_axisbelow(True)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"{record.about.get('device')}, copy {record.about['copy_TB_s']:.2f} TB/s", fontsize=12)
    try:
        figure.savefig(path)
    except OSError as e:
        raise W4A8Error(f"{path}: cannot be written: {e.strerror or e}") from e
    return path
