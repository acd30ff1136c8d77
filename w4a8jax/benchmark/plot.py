"""A benchmark's rows as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pallas_kernels.errors import W4A8Error

from . import floor
from .record import Record
from .summary import ours

# Colours that the colour-blind tell apart; ours are the first two.
OURS = ("#D55E00", "#E69F00", "#CC79A7", "#8B4513")
OTHERS = ("#0072B2", "#56B4E9", "#009E73", "#666666", "#999999", "#7E57C2", "#5D8AA8", "#4B5320", "#B0A000")
MARKERS = "osv^D<>pPX*h"


def check_name(path: str | Path) -> Path:
    """The path.

    Raises:
        W4A8Error: its name does not end as a picture's, or its folder does not exist.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise W4A8Error(f"{path}: expected a name that ends in .png, .svg or .pdf")
    if not path.resolve().parent.is_dir():
        raise W4A8Error(f"{path}: the folder does not exist")
    return path


def plot(record: Record, path: str | Path) -> Path:
    """Draws TFLOP/s over M, one panel for each shape, one line for each kernel, the W4A8 roofline dashed.

    Args:
        record: see `record.Record`.
        path: .png, .svg or .pdf.

    Raises:
        W4A8Error: the record has no times, or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = check_name(path)
    record.derive()
    rows = record.measured
    shapes = list(dict.fromkeys((k, n) for k, n, _, _ in rows))
    if not shapes:
        raise W4A8Error(f"{path}: the record has no times to draw")
    mine = ours(record)
    others = [name for name in dict.fromkeys(key[3] for key in rows) if name not in mine]
    styles = {name: (OURS[i % len(OURS)], 2.2) for i, name in enumerate(mine)}
    styles |= {name: (OTHERS[i % len(OTHERS)], 1.1) for i, name in enumerate(others)}
    columns = min(len(shapes), 4 if len(shapes) > 4 else 2)
    lines = -(-len(shapes) // columns)
    figure = Figure(figsize=(max(5.2 * columns, 8), 4.4 * lines + 1), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, (k, n) in zip(axes, shapes, strict=False):
        for i, (name, (colour, width)) in enumerate(styles.items()):
            points = sorted((m, row["tflops"]) for (*s, m, x), row in rows.items() if s == [k, n] and x == name)
            if points:
                marker = MARKERS[i % len(MARKERS)]
                axis.plot(*zip(*points, strict=True), color=colour, lw=width, marker=marker, ms=3.5, label=name)
        tokens = sorted({m for kk, nn, m, _ in rows if (kk, nn) == (k, n)})
        roof = [floor.flops(m, n, k) / record.device.floor_us(m, n, k) / 1e6 for m in tokens]
        axis.plot(tokens, roof, "k--", lw=1, label="W4A8 roofline")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set(title=f"K {k}, N {n}", xlabel="tokens, M", ylabel="TFLOP/s")
        axis.grid(color="#e6e6e6", lw=0.6)
        axis.set_axisbelow(True)
    for axis in axes[len(shapes) :]:
        axis.set_visible(False)
    handles: dict[str, Any] = {}
    for axis in axes[: len(shapes)]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    order = [*[name for name in styles if name in handles], "W4A8 roofline"]
    figure.legend([handles[x] for x in order], order, loc="outside lower center", ncols=min(6, len(order)), fontsize=9)
    figure.suptitle(f"{record.about.get('device')}, copy {record.about['copy_TB_s']:.2f} TB/s", fontsize=12)
    try:
        figure.savefig(path)
    except OSError as e:
        raise W4A8Error(f"{path}: cannot be written: {e.strerror or e}") from e
    return path
