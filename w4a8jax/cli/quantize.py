"""`w4a8jax quantize`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from .common import (
    JsonOption,
    MaskOption,
    MaxLengthOption,
    MaxSamplesOption,
    Numerics,
    PackOption,
    QuietOption,
    Scheme,
    read_calibration,
)


def command(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint directory to quantize, or a Hub name.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Directory to make.")],
    scheme: Annotated[
        Scheme, typer.Option("--scheme", help="w4a8: FP8 activations; w4a16: bf16 activations.")
    ] = "w4a8",
    numerics: Annotated[
        Numerics,
        typer.Option("--numerics", help="The arithmetic that scales are chosen for: vLLM's (lut), or exact products."),
    ] = "lut",
    code_min: Annotated[
        int,
        typer.Option("--code-min", min=-8, max=-7, help="Lowest code: -7 lets the faster kernel run, -8 has one more."),
    ] = -7,
    search: Annotated[
        Literal["full", "fast", "none"],
        typer.Option("--search", help="Effort for the scales; none: the greatest weight over 7 (7.5 with -8)."),
    ] = "full",
    method: Annotated[
        Literal["rtn", "gptq"],
        typer.Option("--method", help="rtn: round to nearest; gptq: make layers' outputs right on calibration data."),
    ] = "rtn",
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration", metavar="FILE", help="For gptq and --equalize: JSON lines of text, tokens or messages."
        ),
    ] = None,
    mask: MaskOption = None,
    pack: PackOption = None,
    max_length: MaxLengthOption = None,
    max_samples: MaxSamplesOption = None,
    act_order: Annotated[
        bool, typer.Option("--act-order", help="gptq: round the columns with the largest inputs first.")
    ] = False,
    equalize: Annotated[
        bool,
        typer.Option("--equalize", help="Scale channels between layers to lose less on calibration data; free to run."),
    ] = False,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore",
            metavar="NAME|re:REGEX",
            help="Leave further modules in bf16; may be repeated. Embeddings, output head and routers always are.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint DST, once the new one is whole.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run of this job stopped.")
    ] = False,
    allow_unservable: Annotated[
        bool, typer.Option("--allow-unservable", help="Write it even if vLLM could not serve it.")
    ] = False,
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", min=1, help="GPUs for which vLLM's shape rules are checked.")
    ] = 1,
    max_shard_mib: Annotated[
        int, typer.Option("--max-shard-mib", min=1, help="Size of the files, and of what an interruption can cost.")
    ] = 1024,
    details: Annotated[bool, typer.Option("--details", help="A row for each layer, not for each kind.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize a checkpoint to INT4 weights, in the format that vLLM loads.

    Tensor by tensor, so that memory stays small whatever the model's size. DST appears only when it is whole; after
    Ctrl-C, go on with --resume.
    """
    import w4a8jax

    data = None
    if calibration is not None:
        data = read_calibration(src, calibration, mask, pack, max_length, max_samples)
    summary = w4a8jax.quantize(
        src,
        dst,
        scheme=scheme,
        numerics=numerics,
        code_min=code_min,
        ignore=tuple(ignore or ()),
        search=search,
        method=method,
        calibration=data,
        act_order=act_order,
        equalize=equalize,
        overwrite=overwrite,
        resume=resume,
        allow_unservable=allow_unservable,
        tensor_parallel=tensor_parallel,
        progress=not quiet and not json,
        max_shard_bytes=max_shard_mib * 2**20,
    )
    if json:
        typer.echo(summary.to_json())
        return
    summary.render(details=details)
    typer.echo(f"wrote {summary.target}")
