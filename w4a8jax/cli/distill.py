"""`w4a8jax distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .common import JsonOption, MaskOption, MaxSamplesOption, QuietOption, progress_bar, read_calibration


def command(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="The bf16 checkpoint, or a Hub name.")],
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="W4A8 checkpoint made from it, where the training begins.")
    ],
    data: Annotated[
        str, typer.Option("--data", metavar="FILE", help="JSON lines of text, tokens or messages; see calibrate.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Directory to make.")],
    validation: Annotated[
        str | None, typer.Option("--validation", metavar="FILE", help="Held-out data of the same kind, to measure on.")
    ] = None,
    mask: MaskOption = None,
    max_samples: MaxSamplesOption = None,
    steps: Annotated[int, typer.Option("--steps", help="Optimizer updates.")] = 500,
    batch: Annotated[int, typer.Option("--batch", help="Sequences of an update.")] = 8,
    length: Annotated[int, typer.Option("--length", help="Tokens of a sequence.")] = 2048,
    pack: Annotated[
        bool, typer.Option("--pack/--no-pack", help="Join traces to sequences of --length, or cut them to it.")
    ] = True,
    accumulate: Annotated[int, typer.Option("--accumulate", help="Parts that a batch is computed in.")] = 1,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Of AdamW, at its peak.")] = 1e-4,
    warmup: Annotated[int, typer.Option("--warmup", help="Steps to the peak; a cosine leads from there to zero.")] = 20,
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="Of AdamW.")] = 0.0,
    scales: Annotated[
        Literal["keep", "refit"],
        typer.Option("--scales", help="keep the student's grid, or refit it in the first half of the training."),
    ] = "keep",
    refit_every: Annotated[int, typer.Option("--refit-every", help="Steps between refits.")] = 50,
    train: Annotated[
        list[str] | None,
        typer.Option(
            "--train",
            metavar="norms|embedding",
            help="Train these too, beside the quantized linears; may be repeated.",
        ),
    ] = None,
    master_dtype: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option("--master-dtype", help="Of the weights that are trained; bfloat16 is rounded stochastically."),
    ] = "float32",
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option("--dtype", help="Of activations.")] = "bfloat16",
    teacher_top_k: Annotated[
        int,
        typer.Option(
            "--teacher-top-k", help="Run the teacher once and keep its K likeliest tokens on disk; 0: in every step."
        ),
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the order of data.")] = 0,
    validate_every: Annotated[int, typer.Option("--validate-every", help="Steps between validations.")] = 100,
    save_every: Annotated[int, typer.Option("--save-every", help="Steps that an interruption can cost.")] = 100,
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", min=1, help="Devices that each layer is divided among.")
    ] = 1,
    data_parallel: Annotated[
        int, typer.Option("--data-parallel", min=1, help="Groups of devices that a batch is divided among.")
    ] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint OUT, once the new one is whole.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last snapshot of an interrupted run of this job.")
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a W4A8 checkpoint to predict what its bf16 original predicts (quantization-aware distillation).

    The student computes as the kernel does, its roundings included. OUT is a checkpoint as STUDENT is, with the loss
    curve in distillation.json and distillation.png; it appears only when it is whole. After Ctrl-C, --resume.
    """
    from ..distillation import DistillationOptions, distill

    options = DistillationOptions(
        steps=steps, batch=batch, length=length, pack=pack, accumulate=accumulate, learning_rate=learning_rate,
        warmup=warmup, weight_decay=weight_decay, scales=scales, refit_every=refit_every, train=tuple(train or ()),  # type: ignore[arg-type]
        master_dtype=master_dtype, dtype=dtype, teacher_top_k=teacher_top_k, seed=seed,
        validate_every=validate_every, save_every=save_every,
    )  # fmt: skip
    mesh = None
    if tensor_parallel * data_parallel > 1:
        import jax

        mesh = jax.make_mesh((data_parallel, tensor_parallel), ("data", "tensor"))
    read = [
        read_calibration(student, file, mask, length if pack else None, length, max_samples)
        for file in (data, *([validation] if validation else []))
    ]
    with progress_bar(quiet or json) as bar:
        record = distill(
            teacher, student, read[0], output, validation=read[1] if validation else None, options=options, mesh=mesh,
            overwrite=overwrite, resume=resume, progress=bar,
        )  # fmt: skip
    if json:
        typer.echo(record.to_json())
        return
    typer.echo(record.describe())
    typer.echo(f"wrote {output}")
