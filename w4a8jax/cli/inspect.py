"""`w4a8jax inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import ContextOption, JsonOption, Model, QuietOption, progress_bar, read_text, step_of


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
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Run a mixture of experts on this UTF-8 text (- for stdin) and show how its tokens divide among them.",
        ),
    ] = None,
    context: ContextOption = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Use only the text's first tokens.")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what is in a checkpoint: layers, sizes, bits per weight, codes, scales, load of experts."""
    import w4a8jax

    given = None if text is None else read_text(text, "--text")
    with progress_bar(quiet or json) as bar:
        inspection = w4a8jax.inspect(
            model, text=given, context=context, max_tokens=max_tokens, progress=step_of(bar, "reading")
        )
    if plot is not None:
        path = w4a8jax.plot_inspection(inspection, plot)
    if json:
        typer.echo(inspection.to_json())
        return
    inspection.render(details=details)
    if plot is not None:
        typer.echo(f"wrote {path}")
