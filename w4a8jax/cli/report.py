"""`w4a8jax report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import (
    ContextOption,
    JsonOption,
    KernelsOption,
    MaskOption,
    MaxLengthOption,
    MaxSamplesOption,
    PackOption,
    QuietOption,
    progress_bar,
    read_calibration,
    read_text,
)


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The checkpoint that is not quantized: a directory or a Hub name.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="NAME.md", help="To write; NAME.png and NAME.json come beside it."),
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="[NAME=]FILE",
            help="UTF-8 text to evaluate on; may be repeated. Default: the reference text's test split.",
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            metavar="NAME",
            help="bf16, w4a16-rtn, w4a16-rtn-plain, w4a8-rtn-plain (largest weight / 7), w4a8-rtn, w4a8-rtn-code8 "
            "(codes -8..7), w4a8-exact, w4a8-gptq-plain (plain INT4 objective), w4a8-gptq (kernel-exact), "
            "w4a8-gptq-equalized, w4a8-qad; may be repeated. Default: those for which there is data.",
        ),
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option("--checkpoint", metavar="NAME=DIR", help="A quantized checkpoint of MODEL; may be repeated."),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="For GPTQ: JSON lines, see calibrate. Repeated: runs with each, and reports the spread.",
        ),
    ] = None,
    mask: MaskOption = None,
    pack: PackOption = None,
    max_length: MaxLengthOption = None,
    max_samples: MaxSamplesOption = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Draw so many calibration samples at random.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="So many times, and report the spread.")] = 1,
    distill_data: Annotated[
        str | None, typer.Option("--distill-data", metavar="FILE", help="For w4a8-qad: what to train on, see distill.")
    ] = None,
    distill_from: Annotated[
        str | None,
        typer.Option("--distill-from", metavar="RECIPE", help="Default: w4a8-gptq, or w4a8-rtn without calibration."),
    ] = None,
    distill_steps: Annotated[int, typer.Option("--distill-steps", help="Optimizer updates.")] = 500,
    distill_batch: Annotated[int, typer.Option("--distill-batch", help="Sequences of an update.")] = 8,
    distill_length: Annotated[int, typer.Option("--distill-length", help="Tokens of a sequence.")] = 2048,
    distill_learning_rate: Annotated[float, typer.Option("--distill-learning-rate", help="At its peak.")] = 1e-4,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Use only the first tokens of each text.")
    ] = None,
    context: ContextOption = None,
    kernels: KernelsOption = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing report.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an existing report: measure what it has not.")
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize a model in several ways, and compare what each costs.

    Perplexity, KL to the original, top-1 agreement and accuracy of next tokens on each text; errors by layer; sizes;
    time and peak memory. Each recipe runs in a process of its own. The numbers are written after each recipe: after
    Ctrl-C, go on with --resume. Exit code 1 if a recipe failed.
    """
    import w4a8jax

    texts = None
    if text is not None:
        texts = {name or Path(file).stem: read_text(file, "--text") for name, file in _named(text, "--text")}
    checkpoints = {str(name): folder for name, folder in _named(checkpoint or [], "--checkpoint", needed=True)}
    data = [read_calibration(model, file, mask, pack, max_length, max_samples) for file in calibration or []]
    to_train_on = None
    if distill_data is not None:
        to_train_on = read_calibration(model, distill_data, mask, distill_length, distill_length, None)
    options = w4a8jax.DistillationOptions(
        steps=distill_steps, batch=distill_batch, length=distill_length, learning_rate=distill_learning_rate
    )
    with progress_bar(quiet or json) as bar:
        found = w4a8jax.report(
            model, output, texts=texts, recipes=recipe, checkpoints=checkpoints,
            calibration=data[0] if len(data) == 1 else data or None, seeds=seeds, samples=samples,
            distill_data=to_train_on, distill_from=distill_from, distillation=options,
            max_tokens=max_tokens, context=context, kernels=kernels, overwrite=overwrite, resume=resume, progress=bar,
        )  # fmt: skip
    if json:
        typer.echo(found.to_json())
    else:
        typer.echo(found.to_markdown())
        typer.echo(f"wrote {output}")
    for name, message in found.failures.items():
        typer.secho(f"error: {name}: {message}", fg=typer.colors.RED, err=True)
    if found.failures:
        raise typer.Exit(1)


def _named(values: list[str], option: str, *, needed: bool = False) -> list[tuple[str | None, str]]:
    """NAME=PATH as pairs; without a name it is None, where it is not needed.

    Raises:
        W4A8Error: a name is missing, or given twice.
    """
    from pallas_kernels.errors import W4A8Error

    found: list[tuple[str | None, str]] = []
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or Path(value).exists():
            name, path = "", value
        if needed and not name:
            raise W4A8Error(f"{option} {value}: expected NAME=DIR")
        found.append((name or None, path))
    names = [name or Path(path).stem for name, path in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise W4A8Error(f"{option}: the name {twice[0]} is given twice; write NAME=PATH")
    return found
