"""`w4a8jax eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import (
    ContextOption,
    DTypeOption,
    JsonOption,
    KernelsOption,
    Model,
    NumericsOption,
    QuietOption,
    SchemeOption,
    load_model,
    progress_bar,
    read_text,
    step_of,
)


def command(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option(
            "--text", metavar="FILE", help="UTF-8 text, - for stdin; default: the reference text's test split."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="ORIGINAL", help="Another checkpoint to compare with: KL, top-1 agreement."),
    ] = None,
    scheme: SchemeOption = None,
    numerics: NumericsOption = None,
    kernels: KernelsOption = True,
    dtype: DTypeOption = "bfloat16",
    context: ContextOption = None,
    stride: Annotated[
        int | None,
        typer.Option("--stride", min=1, help="Tokens from one window to the next; default: half the context."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Windows computed together; default: as many as are cheap.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Use only the text's first tokens.")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure how well a model predicts a text: perplexity per token, bits per byte.

    Every token is scored once, in windows that overlap: given at least CONTEXT - STRIDE tokens before it.
    """
    import w4a8jax

    chosen = w4a8jax.reference_text("test") if text is None else read_text(text, "--text")
    loaded = load_model(model, scheme, numerics, dtype, kernels=kernels)
    options = {"context": context, "stride": stride, "batch": batch, "max_tokens": max_tokens}
    if against is None:
        with progress_bar(quiet or json) as bar:
            result = w4a8jax.evaluate(loaded, chosen, **options, progress=step_of(bar, "evaluating"))
        if json:
            typer.echo(result.to_json())
            return
        typer.echo(f"perplexity     {result.perplexity:.4f} per token")
        typer.echo(f"bits per byte  {result.bits_per_byte:.4f}")
        typer.echo(_scored(result))
        return
    original = load_model(against, None, numerics, dtype)
    with progress_bar(quiet or json) as bar:
        comparison = w4a8jax.compare(loaded, original, chosen, **options, progress=step_of(bar, "comparing"))
    if json:
        typer.echo(comparison.to_json())
        return
    a, b = comparison.model, comparison.original
    typer.echo(
        f"perplexity        {a.perplexity:.4f}, original {b.perplexity:.4f} ({comparison.perplexity_increase:+.2%})"
    )
    typer.echo(f"bits per byte     {a.bits_per_byte:.4f}, original {b.bits_per_byte:.4f}")
    typer.echo(f"top-1 agreement   {comparison.top1_agreement:.2%}")
    typer.echo(f"KL from original  {comparison.kl_mean:.5f} nats on average, at most {comparison.kl_max:.4f}")
    typer.echo(_scored(a))


def _scored(result) -> str:  # type: ignore[no-untyped-def]
    return f"{result.tokens} tokens, {result.bytes} bytes, in windows of {result.context} every {result.stride}"
