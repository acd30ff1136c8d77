"""`w4a8jax reference-model`."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="dense, a small cohere2 model, or moe, a cohere2_moe.")
    ] = "dense",
) -> None:
    """Print the directory of a small bf16 model that comes with the package, to try everything on."""
    import w4a8jax

    typer.echo(str(w4a8jax.reference_model(name)))
