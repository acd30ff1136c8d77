"""`w4a8jax inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import JsonOption, Model, QuietOption, progress_bar, step_of


def command(
    model: Model,
    plot: Annotated[
        str | None,
        typer.Option("--plot", metavar="FILE", help="Draw codes, scales and sizes into FILE (.png, .svg or .pdf)."),
    ] = None,
    details: Annotated[
        bool | None,
        typer.Option(
            "--details/--by-kind",
            help="A row for each module, or one for each kind in all layers; default: by kind if there are many.",
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what is in a checkpoint: layers, sizes, bits per weight, codes, scales."""
    import w4a8jax

    with progress_bar(quiet or json) as bar:
        inspection = w4a8jax.inspect(model, progress=step_of(bar, "reading"))
    if plot is not None:
        path = w4a8jax.plot_inspection(inspection, plot)
    if json:
        typer.echo(inspection.to_json())
        return
    inspection.render(details=details)
    if plot is not None:
        typer.echo(f"wrote {path}")
