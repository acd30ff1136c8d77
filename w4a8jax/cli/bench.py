"""`w4a8jax bench` and `w4a8jax tune`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Measure the kernels on a Hopper GPU.")

Shapes = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="K,N", help="A weight's inputs and outputs; repeat it. Default: eight of models."),
]
Tokens = Annotated[
    str | None, typer.Option("--tokens", metavar="M,...", help="Numbers of tokens; default: 1,2,4,...,16384.")
]
Kernels = Annotated[
    list[str] | None,
    typer.Option("--kernel", metavar="WORD", help="Only kernels with WORD in their names; repeat it."),
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes",
        min=1,
        help="Processes that compile; they measure one at a time. Default: two for each shape, at most one a core.",
    ),
]


VllmFolder = Annotated[
    str | None,
    typer.Option("--vllm", metavar="DIR", help="Folder with vLLM 0.26's two kernel libraries: measure them too."),
]
Out = Annotated[str | None, typer.Option("--out", metavar="FILE.json", help="Write the record here.")]
Plot = Annotated[str | None, typer.Option("--plot", metavar="FILE.png", help="Draw it here (.png, .svg or .pdf).")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the record in --out: leave out what it has.")]
Summarize = Annotated[
    str | None, typer.Option("--summarize", metavar="FILE.json", help="Measure nothing: print, and draw, this record.")
]


@app.command("gemm")
def gemm(
    shape: Shapes = None,
    tokens: Tokens = None,
    kernel: Kernels = None,
    vllm: VllmFolder = None,
    out: Out = None,
    plot: Plot = None,
    resume: Resume = False,
    summarize: Summarize = None,
    processes: Processes = None,
) -> None:
    """Measure dense products over shapes and numbers of tokens, beside cuBLAS, torch and vLLM.

    Device time, by CUPTI, of our kernels, of cuBLAS through JAX, of torch and
    of a plain Triton kernel if they are installed, and of vLLM's kernels if
    --vllm gives them. Every result is compared with float64 before it is timed.
    The record is written after each point: a run that was stopped goes on with
    --resume.
    """
    from pallas_kernels.errors import W4A8Error

    if plot is not None:
        # Minutes of measurements should not end in a path that cannot be written.
        from ..benchmark.plot import check_name

        check_name(plot)
    if summarize is not None:
        from ..benchmark.record import Record

        _show(Record.read(summarize), plot)
        return
    if resume and out is None:
        raise W4A8Error("--resume: needs --out")
    if out is not None:
        check_folder("--out", out)
    points = parse_shapes(shape), parse_tokens(tokens)
    # Other processes, and torch, allocate on the same device. This is read when JAX first touches it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from ..benchmark import gemm as benchmark
    from ..benchmark import kernels, parts, peers, triton_peer

    benchmark.require_hopper("bench gemm")
    absent = triton_peer.unavailable()
    chosen = kernels.selected(benchmark.kernels_for(vllm), kernel or [], [absent] if absent else [])
    words = [word for x in shape or [] for word in ("--shape", x)]
    words += [word for x in kernel or [] for word in ("--kernel", x)]
    record = benchmark.start(command_line("bench gemm", words, tokens, vllm), out if resume else None)
    if vllm is not None:
        record.about["vllm"] = peers.VLLM
    typer.echo(f"{record.about['device']}: copy {record.about['copy_TB_s']:.2f} TB/s")
    work = points[0] or benchmark.SHAPES, points[1] or benchmark.TOKENS

    def save(record: Any) -> None:
        if out is not None:
            record.write(out)

    if (count := processes or parts.default(work[0])) > 1:
        words = ["bench", "gemm", "--resume", *([] if vllm is None else ["--vllm", vllm])]
        words += [word for name in kernel or [] for word in ("--kernel", name)]
        parts.run(record, words, *work, count, save=save, progress=say)
    else:
        benchmark.run(record, chosen, *work, save=save, progress=say)
    _show(record, plot)
    if out is not None:
        record.write(out)
        typer.echo(f"wrote {out}")


def tune(
    shape: Shapes = None,
    tokens: Tokens = None,
    kernel: Kernels = None,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE.json", help="The table; default: <device>.json in this folder."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out points that the table has.")] = False,
    processes: Processes = None,
    moe: Annotated[
        bool, typer.Option("--moe", help="The grouped kernel instead, for the experts of `bench moe`'s models.")
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="WORD", help="With --moe: only models with WORD in their names; repeat it."),
    ] = None,
    product: Annotated[
        list[str] | None,
        typer.Option("--product", metavar="NAME", help="With --moe: gate_up or down. Default: both."),
    ] = None,
) -> None:
    """Find the fastest configuration of our kernels for shapes and numbers of tokens, on this GPU.

    Measures candidates at each point, after comparing their results with
    float64, and writes the best into a table, after each point; entries that
    the table has for other points stay. W4A8JAX_TUNED=FILE.json makes
    everything use it.
    """
    from pallas_kernels.errors import W4A8Error

    if (moe and shape) or (not moe and (model or product)):
        raise W4A8Error("tune: --shape is for single products, --model and --product are for --moe")
    points = parse_shapes(shape), parse_tokens(tokens)
    if out is not None:
        check_folder("--out", out)
    if moe:
        from .bench_moe import tune_moe

        return tune_moe(model, product, tokens, kernel, out, resume, processes)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from ..benchmark import gemm as benchmark
    from ..benchmark import kernels, parts
    from ..benchmark import tune as tuner

    benchmark.require_hopper("tune")
    path, table = open_table(out)
    chosen = [k for k in kernels.selected(kernels.our_kernels(), kernel or []) if isinstance(k, kernels.OurKernel)]
    work = points[0] or benchmark.SHAPES, points[1] or benchmark.TOKENS
    if (count := processes or parts.default(work[0])) > 1:
        words = ["tune", *(["--resume"] if resume else [])]
        words += [word for name in kernel or [] for word in ("--kernel", name)]
        parts.run(table, words, *work, count, save=lambda t: t.write(path), progress=say)
    else:
        tuner.run(table, chosen, *work, resume=resume, save=lambda t: t.write(path), progress=say)
    typer.echo(f"wrote {path}")


def open_table(out: str | None) -> tuple[Path, Any]:
    """The path of the table to write, and what it holds already.

    Raises:
        W4A8Error: it cannot be read, or is of another device.
    """
    from pallas_kernels import tuning_tables
    from pallas_kernels.errors import W4A8Error

    from ..benchmark import gemm

    device = gemm.describe_run("tune")["device"]
    path = Path(out or f"{tuning_tables.slug(device)}.json").expanduser()
    table = tuning_tables.read(path) if path.exists() else tuning_tables.Table(device)
    if table.device != device:
        raise W4A8Error(f"{path}: is of {table.device or 'no device'}, this is {device}; give another --out")
    return path, table


def parse_shapes(shapes: list[str] | None) -> list[tuple[int, int]]:
    """(K, N) of each "K,N".

    Raises:
        W4A8Error: one is not two multiples of 128.
    """
    from pallas_kernels.errors import W4A8Error

    found = []
    for text in shapes or []:
        numbers = _numbers(text)
        if numbers is None or len(numbers) != 2 or any(x % 128 for x in numbers):
            raise W4A8Error(f"--shape {text}: expected K,N, two multiples of 128, as in 12288,14336")
        found.append((numbers[0], numbers[1]))
    return found


def parse_tokens(text: str | None) -> list[int]:
    """Values of M of "M,M,...".

    Raises:
        W4A8Error: they are not positive integers.
    """
    from pallas_kernels.errors import W4A8Error

    if text is None:
        return []
    numbers = _numbers(text)
    if numbers is None:
        raise W4A8Error(f"--tokens {text}: expected positive integers, as in 1,16,4096")
    return numbers


def _numbers(text: str) -> list[int] | None:
    try:
        numbers = [int(x) for x in text.split(",")]
    except ValueError:
        return None
    return numbers if all(x > 0 for x in numbers) else None


def check_folder(option: str, path: str) -> None:
    """Raises:
    W4A8Error: the folder of a file to be written does not exist.
    """
    from pallas_kernels.errors import W4A8Error

    if not Path(path).expanduser().resolve().parent.is_dir():
        raise W4A8Error(f"{option} {path}: the folder does not exist")


def command_line(name: str, options: list[str], tokens: str | None, vllm: str | None) -> str:
    """The command as a record has it: what was measured, without this machine's paths."""
    words = ["w4a8jax", *name.split(), *(f'"{word}"' if " " in word else word for word in options)]
    words += (["--tokens", tokens] if tokens else []) + (["--vllm", "DIR"] if vllm else [])
    return " ".join(words)


def say(text: str) -> None:
    """Prints a line at once, for the process that waits for it."""
    typer.echo(text)
    sys.stdout.flush()


def _show(record, path: str | None) -> None:  # type: ignore[no-untyped-def]
    from ..benchmark import plot, summary

    summary.render(record)
    if path is not None:
        typer.echo(f"wrote {plot.plot(record, path)}")
