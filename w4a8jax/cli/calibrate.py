"""`w4a8jax calibrate`: what a file of calibration data gives for a model."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    JsonOption,
    MaskOption,
    MaxLengthOption,
    MaxSamplesOption,
    Model,
    PackOption,
    read_calibration,
)


def command(
    model: Model,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="JSON lines, each with text, tokens, or messages and tools.")
    ],
    mask: MaskOption = None,
    pack: PackOption = None,
    max_length: MaxLengthOption = None,
    max_samples: MaxSamplesOption = None,
    show_mask: Annotated[
        bool, typer.Option("--show-mask", help="Print a trace; what does not count is dimmed, or in ⟦ ⟧ in a file.")
    ] = False,
    line: Annotated[
        int | None, typer.Option("--line", min=1, help="With --show-mask: the trace of this line; default: the first.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="OUT", help="Write tokens and loss_mask of each sample as JSON lines, to reuse."
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check calibration data for a model: how many tokens it has, and which of them count.

    Use it before `quantize --method gptq --calibration FILE`, which reads FILE in the same way.
    """
    from pallas_kernels.errors import W4A8Error

    data = read_calibration(model, file, mask, pack, max_length, max_samples)
    if output is not None:
        with output.open("w", encoding="utf-8") as out:
            for sample in data.samples:
                record = {"tokens": sample.tokens.tolist(), "loss_mask": sample.loss_mask.astype(int).tolist()}
                out.write(json_module.dumps(record) + "\n")
    if show_mask and not json:
        from rich.console import Console

        from ..calibration.show import render_mask
        from ..checkpoints.reader import resolve
        from ..tokenizer import Tokenizer

        chosen = next((s for s in data.samples if line is None or s.line == line), None)
        if chosen is None:
            raise W4A8Error(f"--line {line}: no sample begins there; it is empty, masked out, packed or not read")
        render_mask(chosen, Tokenizer.from_directory(resolve(model)), Console(soft_wrap=True))
    if json:
        counts = {"samples": len(data.samples), "tokens": data.tokens, "counted": data.counted}
        typer.echo(json_module.dumps(counts | {"traces": data.traces, "dropped": data.dropped, "cut": data.cut}))
        return
    typer.echo(data.describe())
