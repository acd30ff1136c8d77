"""What commands share: options, text input, progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from ..calibration import CalibrationData
    from ..language_model import LanguageModel

Scheme = Literal["w4a8", "w4a16"]
Numerics = Literal["lut", "exact"]
DType = Literal["bfloat16", "float32"]

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Checkpoint directory, quantized or not, or a Hugging Face Hub name.")
]
SchemeOption = Annotated[
    Scheme | None,
    typer.Option(
        "--scheme", help="Run quantized layers so: FP8 activations (w4a8) or bf16 ones (w4a16); default: as stored."
    ),
]
NumericsOption = Annotated[
    Numerics | None,
    typer.Option(
        "--numerics",
        help="lut: the arithmetic of vLLM's W4A8 kernel; exact: without its rounding of scales and products. "
        "Default: lut for w4a8, exact for w4a16.",
    ),
]
KernelsOption = Annotated[
    bool,
    typer.Option(
        "--kernels/--no-kernels",
        help="Run on the kernels for Hopper GPUs, where there is one, or on the reference in jnp.",
    ),
]
DTypeOption = Annotated[DType, typer.Option("--dtype", help="Of activations and of weights that are not quantized.")]
ContextOption = Annotated[
    int | None,
    typer.Option("--context", min=2, help="Tokens of a window; default: 1024, or the model's limit if less."),
]
MaskOption = Annotated[
    list[str] | None,
    typer.Option(
        "--mask",
        metavar="PART",
        help="What does not count in calibration: system, tools, template, user, tool_results, prefix (repeated by "
        "several traces), or none; may be repeated. Default: system, tools and template. A loss_mask in the file "
        "stands above it.",
    ),
]
PackOption = Annotated[
    int | None, typer.Option("--pack", min=1, help="Join calibration traces to samples of this many tokens.")
]
MaxLengthOption = Annotated[
    int | None,
    typer.Option("--max-length", min=1, help="Cut calibration traces to this many tokens; default: 65536, or less."),
]
MaxSamplesOption = Annotated[
    int | None, typer.Option("--max-samples", min=1, help="Use only the first calibration traces.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def load_model(
    path: str,
    scheme: Scheme | None,
    numerics: Numerics | None,
    dtype: DType = "bfloat16",
    max_context: int | None = None,
    kernels: bool = True,
) -> LanguageModel:
    """Loads a model, saying so on a terminal's stderr."""
    import w4a8jax

    with status(f"loading {path}"):
        return w4a8jax.load(
            path, scheme=scheme, numerics=numerics, dtype=dtype, max_context=max_context, kernels=kernels
        )


def read_calibration(
    model: str, file: str, mask: list[str] | None, pack: int | None, max_length: int | None, max_samples: int | None
) -> CalibrationData:
    """The calibration data of a file, for a checkpoint."""
    import w4a8jax
    from w4a8jax.calibration import DEFAULT_MASK

    parts = DEFAULT_MASK if mask is None else [part for part in mask if part != "none"]
    with status(f"reading {file}"):
        return w4a8jax.load_calibration(
            model, file, mask=parts, pack=pack, max_length=max_length, max_samples=max_samples
        )


def read_text(path: str, option: str) -> str:
    """The text of a UTF-8 file, or of stdin for "-".

    Raises:
        W4A8Error: it is missing, not UTF-8 or empty.
    """
    from pallas_kernels.errors import W4A8Error

    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
        text = data.decode("utf-8")
    except OSError as e:
        raise W4A8Error(f"{option} {path}: cannot be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise W4A8Error(f"{option} {path}: is not UTF-8 text: {e.reason} at byte {e.start}") from e
    if not text.strip():
        raise W4A8Error(f"{option} {path}: is empty; give a text")
    return text


@contextmanager
def status(message: str) -> Iterator[None]:
    """A spinner on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(message):
        yield


@contextmanager
def progress_bar(quiet: bool, unit: str = "") -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on stderr for each step: call it with the step's name, what is done and all there is."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:

        def update(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(f"{step} {unit}".strip(), total=total)
            bar.update(tasks[step], completed=done, total=total)

        yield update


def step_of(bar: Callable[[str, int, int], None] | None, name: str) -> Callable[[int, int], None] | None:
    """The bar of one step."""
    return None if bar is None else lambda done, total: bar(name, done, total)
