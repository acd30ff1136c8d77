"""An `Inspection` as tables in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .inspection import LayerReport, merge

if TYPE_CHECKING:
    from .expert_load import ExpertLoad
    from .inspection import Inspection

_MANY = 64
_WIDE = 110
_FEW_EXPERTS = 24
_BARS = " ▁▂▃▄▅▆▇█"


def render(inspection: Inspection, console: Console | None, details: bool | None) -> None:
    """See `Inspection.render`."""
    console = console or Console()
    layers = list(inspection.layers)
    if details is False or (details is None and len(layers) > _MANY):
        layers = merge(layers)
    console.print(_totals(inspection))
    if inspection.expert_load is not None:
        console.print()
        console.print(_load_table(inspection.expert_load))
    quantized = [layer for layer in layers if layer.codes is not None]
    if quantized:
        console.print()
        console.print(_quantized_table(quantized, console.width))
    console.print()
    console.print(_plain_table([layer for layer in layers if layer.codes is None]))
    if len(layers) < len(inspection.layers):
        note = f"{len(inspection.layers)} modules; one row stands for all that differ in number only (* in the name)"
        console.print(Text(note, "dim"))


def _totals(inspection: Inspection) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    config = dict(inspection.config)
    table.add_row("checkpoint", Text(str(inspection.path)))
    table.add_row("model", Text(str(config.pop("model_type", "unknown"))))
    table.add_row("config", Text(", ".join(f"{key} {value}" for key, value in config.items())))
    table.add_row("scheme", inspection.scheme)
    table.add_row("parameters", f"{inspection.parameters:,}")
    kinds = ", ".join(f"{kind} {size(count)}" for kind, count in inspection.bytes_by_kind.items() if count)
    table.add_row("size", f"{size(inspection.nbytes)}: {kinds}")
    if (experts := inspection.experts) is not None:
        each = f"{experts.parameters:,} parameters, {size(experts.nbytes)} each"
        line = f"{experts.per_layer} in each of {experts.layers} layers, {each}; {size(experts.total_bytes)} in all"
        if experts.active_parameters is not None:
            line += f"; a token meets {experts.top_k} a layer, {experts.active_parameters:,} parameters of the model"
        table.add_row("experts", line)
    bits = f"{inspection.bits_per_weight:.3f} over all"
    if (quantized := inspection.quantized_bits_per_weight) is not None:
        bits += f", {quantized:.3f} over the quantized layers"
    table.add_row("bits/weight", bits)
    table.add_row("other files", Text(", ".join(inspection.sidecars) or "none: no tokenizer, no generation config"))
    return table


def _quantized_table(layers: list[LayerReport], width: int) -> Table:
    schemes = ", ".join(sorted({layer.scheme for layer in layers}))
    wide = width >= _WIDE
    merged = any(layer.count > 1 for layer in layers)
    table = _table(f"Quantized layers, {schemes}", "layer", merged, "N x K", "bits", "codes -8..7", "group scale")
    table.columns[-2].justify = "left"
    table.caption = "group scale: least..greatest"
    if wide:
        table.add_column("channel scale", justify="right", no_wrap=True)
        table.caption += "; channel scale: what lut numerics make of them"
    weak = any(layer.codes.weak_groups for layer in layers if layer.codes is not None)
    if weak:
        table.add_column("weak", justify="right", no_wrap=True)
        table.caption += "; weak: groups that lut numerics round coarsely, being far below their row's greatest"
    for layer in layers:
        codes = layer.codes
        assert codes is not None
        bad = Text(f"{codes.bad_scales} bad scales", "red") if codes.bad_scales else None
        table.add_row(
            *_name(layer, merged),
            "x".join(map(str, layer.shape)),
            f"{layer.bits_per_weight:.2f}",
            sparkline(codes.histogram),
            bad or _range(codes.scale_quantiles[0], codes.scale_quantiles[-1]),
            *([_range(*codes.channel_scale)] if wide else []),
            *([f"{codes.weak_groups / codes.groups:.2%}"] if weak else []),
        )
    return table


def _load_table(layers: tuple[ExpertLoad, ...]) -> Table:
    few = max(len(layer.counts) for layer in layers) <= _FEW_EXPERTS
    title = f"Load of experts, of {layers[0].tokens:,} tokens"
    table = _table(title, "layer", False, "experts", "mean", "least", "most", "unused", *(["by expert"] if few else []))
    table.caption = "share of the tokens that an expert meets"
    for layer in layers:
        shares = [f"{share:.2%}" for share in (layer.mean_share, min(layer.shares), max(layer.shares))]
        unused = Text(str(layer.unused), "red" if layer.unused else "")
        bars = [sparkline(np.array(layer.counts))] if few else []
        table.add_row(f"layers.{layer.layer}", str(len(layer.counts)), *shares, unused, *bars)
    return table


def _plain_table(layers: list[LayerReport]) -> Table:
    merged = any(layer.count > 1 for layer in layers)
    table = _table("Other modules", "module", merged, "shape", "dtype", "size", "rms", "largest")
    for layer in layers:
        values = layer.values
        numbers: list[str | Text] = ["", ""] if values is None else [_number(values.rms), _number(values.largest)]
        if values is not None and values.not_finite:
            numbers[1] = Text(f"{values.not_finite} NaN or Inf", "red")
        table.add_row(
            *_name(layer, merged), "x".join(map(str, layer.shape)), layer.scheme, size(layer.nbytes), *numbers
        )
    return table


def _table(title: str, name: str, merged: bool, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", caption_justify="left", box=SIMPLE_HEAD, show_edge=False
    )
    table.padding = (0, 1, 0, 0)
    table.add_column(name, overflow="fold", min_width=18)
    for column in [*(["n"] if merged else []), *columns]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _range(low: float, high: float) -> str:
    return f"{_number(low)}..{_number(high)}"


def _number(x: float) -> str:
    """ "1.2e-3"."""
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _name(layer: LayerReport, merged: bool) -> list[str | Text]:
    """The name, and in a table of merged reports, how many a row stands for."""
    name: list[str | Text] = [Text(layer.name.removeprefix("model."))]
    return [*name, str(layer.count)] if merged else name


def sparkline(histogram: np.ndarray) -> str:
    """One character a bin; a blank only where there is nothing."""
    top = max(int(histogram.max()), 1)
    return "".join(_BARS[0 if not n else max(1, round(8 * int(n) / top))] for n in histogram)


def size(nbytes: float) -> str:
    """ "3.2 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
