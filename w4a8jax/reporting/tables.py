"""A `Report` as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..inspection_tables import size
from .record import Report, Row, original_of, spread

_LAYERS = 8  # columns at most

Value = Callable[[Row], float | None]


def markdown(report: Report, picture: str | None) -> str:
    """The whole document.

    Args:
        picture: a file's name, to show it.
    """
    about, found = report.about, report.measured
    parts = [f"# {about['model']}: what quantization costs", _summary(report)]
    if picture is not None and found:
        parts.append(f"![KL, perplexity over size, and errors through the layers]({picture})")
    if found:
        for text in report.texts:
            parts += [f"## {text}", _text_line(found, text), quality(found, text)]
        parts += ["## Sizes, time, memory", _COST, cost(found)]
        parts += ["## Errors by layer", _ERRORS, errors(found)]
        parts += [line for line in [experts(found, report.texts[0])] if line]
    if note := about_draws(found):
        parts.append(note)
    if failed := report.failures:
        parts += ["## Failed", "\n".join(f"- {name}: {message}" for name, message in failed.items())]
    return "\n\n".join(parts) + "\n"


def about_draws(found: dict[str, list[Row]]) -> str | None:
    """What ± stands for, if several draws of calibration data were measured; with their number where it differs."""
    counts = {rows[0]["title"]: len(rows) for rows in found.values() if len(rows) > 1}
    if not counts:
        return None
    if len(numbers := set(counts.values())) == 1:
        return f"± is the standard deviation over {numbers.pop()} draws of calibration data."
    each = "; ".join(f"{title}: {count}" for title, count in counts.items())
    return f"± is the standard deviation over draws of calibration data ({each})."


_COST = (
    "Time to make a checkpoint, and the greatest resident memory of the process until it was made; then those of "
    "loading it beside the original and comparing both on all texts. Each row has a process of its own."
)
_ERRORS = (
    "Of weights: `||w_kernel - w|| / ||w||` over all quantized layers, and the worst of them. Of the residual stream "
    "behind each layer, on the beginning of the first text: `||h - h_bf16|| / ||h_bf16||`, the mean over tokens."
)


def quality(found: dict[str, list[Row]], text: str) -> str:
    """A table of one text."""
    heads = ["", "perplexity", "over bf16's", "KL to bf16, nats", "same first choice, %", "next token right, %"]
    heads.append("of bf16's, %")
    original = original_of(next(iter(found.values())), text)

    def of(*path: str, scale: float = 1) -> Value:
        def value(row: Row) -> float | None:
            item: Any = row["texts"][text]
            for key in path:
                item = item[key]
            return None if item is None else scale * item

        return value

    columns: list[tuple[Value, int]] = [
        (of("model", "perplexity"), 3),
        (of("model", "perplexity", scale=1 / original["perplexity"]), 4),
        (of("kl_mean"), 4),
        (of("top1_agreement", scale=100), 2),
        (of("model", "accuracy", scale=100), 2),
        (of("model", "accuracy", scale=100 / max(original["accuracy"], 1e-12)), 2),
    ]
    return table(heads, ([title(rows), *(cell(rows, *column) for column in columns)] for rows in found.values()))


def cost(found: dict[str, list[Row]]) -> str:
    """Sizes, time and memory."""
    heads = ["", "size, MiB", "bits a weight", "to make, s", "memory, MB", "to evaluate, s", "memory, MB"]
    columns: list[tuple[str, int, float]] = [
        ("nbytes", 2, 2**-20),
        ("bits_per_weight", 3, 1),
        ("make_seconds", 1, 1),
        ("make_peak_bytes", 0, 1e-6),
        ("evaluate_seconds", 0, 1),
        ("evaluate_peak_bytes", 0, 1e-6),
    ]
    if any(row["device_peak_bytes"] is not None for rows in found.values() for row in rows):
        heads.append("on the device, MB")
        columns.append(("device_peak_bytes", 0, 1e-6))

    def of(key: str, scale: float) -> Value:
        return lambda row: None if row[key] is None else scale * row[key]

    return table(
        heads,
        ([title(rows), *(cell(rows, of(key, scale), n) for key, n, scale in columns)] for rows in found.values()),
    )


def errors(found: dict[str, list[Row]]) -> str:
    """Errors of weights, and of the residual stream behind some of the layers."""
    found = {name: rows for name, rows in found.items() if rows[0]["residual_errors"]}
    count = max((len(rows[0]["residual_errors"]) for rows in found.values()), default=0)
    shown = sorted({round((i + 1) * count / min(count, _LAYERS)) - 1 for i in range(min(count, _LAYERS))})

    def behind(layer: int) -> Value:
        return lambda row: row["residual_errors"][layer]

    body = []
    for rows in found.values():
        weights = [cell(rows, lambda row: row["weight_error"], 4), "", ""]
        if rows[0]["layer_errors"]:
            worst = max(rows[0]["layer_errors"], key=rows[0]["layer_errors"].__getitem__)
            weights[1:] = [f"{rows[0]['layer_errors'][worst]:.4f}", worst.removeprefix("model.")]
        body.append([title(rows), *weights, *(cell(rows, behind(layer), 4) for layer in shown)])
    return table(["", "weights", "worst", "of", *(f"behind {layer}" for layer in shown)], body)


def experts(found: dict[str, list[Row]], text: str) -> str:
    """A sentence on each layer with experts: how the text's tokens divide among them; "" if nothing is known of it."""
    known = (row["expert_load"] for rows in found.values() for row in rows if row["expert_load"])
    lines = []
    for load in next(known, []):
        least, most, mean = (f"{100 * load[f'{which}_share']:.0f}" for which in ("min", "max", "mean"))
        which = f"In layer {load['layer']} each expert meets {least} to {most} % of the tokens"
        lines.append(f"{which} ({text}; {mean} % if all were used alike).")
    return " ".join(lines)


def title(rows: list[Row]) -> str:
    """What a row is called."""
    return rows[0]["title"]


def cell(rows: list[Row], value: Value, digits: int) -> str:
    """Mean and, of values that differ, standard deviation; empty if it is not known."""
    values = [v for row in rows if (v := value(row)) is not None]
    if not values:
        return ""
    mean, deviation = spread(values)
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(set(values)) > 1 else "")


def _summary(report: Report) -> str:
    about = report.about
    dates = sorted({row["date"][:10] for row in report.rows})
    places = sorted({f"{row['device']}, {row['cores']} cores" for rows in report.measured.values() for row in rows})
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{about['model_type']}, {about['parameters']:,} parameters, {size(about['nbytes'])}. Measured on "
        f"{' and '.join(places) or 'nothing'}; {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}; {versions}."
    )


def _text_line(found: dict[str, list[Row]], text: str) -> str:
    first = original_of(next(iter(found.values())), text)
    return f"{first['tokens']:,} tokens, {first['bytes']:,} bytes, in windows of {first['context']}."


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, headed by its first line."""
    lines = [heads, ["---"] * len(heads), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in escaped)
