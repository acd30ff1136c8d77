"""`w4a8jax verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import ContextOption, JsonOption, Model, NumericsOption, QuietOption, progress_bar, read_text


def command(
    model: Model,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="ORIGINAL", help="The unquantized checkpoint: compare weights and predictions."
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="UTF-8 text to compare predictions on, - for stdin; default: the start of the reference text.",
        ),
    ] = None,
    numerics: NumericsOption = None,
    context: ContextOption = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            min=0,
            help="Only the text's first tokens, 0 for none of it; default: all of FILE, 4096 of the reference text.",
        ),
    ] = None,
    max_perplexity_increase: Annotated[
        float,
        typer.Option(
            "--max-perplexity-increase", min=0.0, help="Fail above this; relative to the original, 0.1 is 10 %."
        ),
    ] = 0.1,
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", min=1, help="GPUs for which vLLM's shape rules are checked.")
    ] = 1,
    details: Annotated[bool, typer.Option("--details", help="Show all problems, and each layer's error.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check that a checkpoint is whole, that vLLM would serve it, and that it agrees with its original.

    Exit code 0 if all is well, 1 if not.
    """
    import w4a8jax

    chosen = None if text is None else read_text(text, "--text")
    with progress_bar(quiet or json) as bar:
        result = w4a8jax.verify(
            model,
            against,
            chosen,
            numerics=numerics,
            context=context,
            max_tokens=max_tokens,
            max_perplexity_increase=max_perplexity_increase,
            tensor_parallel=tensor_parallel,
            progress=bar,
        )
    if json:
        typer.echo(result.to_json())
    else:
        result.render(details=details)
    if not result.ok:
        raise typer.Exit(1)
