"""The application: its commands, and how errors end it."""

from __future__ import annotations

import errno
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import (
    bench,
    bench_moe,
    calibrate,
    distill,
    evaluate,
    generate,
    inspect,
    quantize,
    reference_model,
    report,
    verify,
)
from .compile_cache import keep_compiled

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class ErrorLines(TyperGroup):
    """Ends in one line on stderr and exit code 1 for what the user can mend, in 130 for Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as e:
            _error("interrupted", *getattr(e, "__notes__", ()))
            raise typer.Exit(INTERRUPTED) from None
        except Exception as e:
            message = describe(e)
            if message is None or ctx.params.get("debug"):
                raise
            _error(f"error: {message}")
            raise typer.Exit(1) from None


def describe(error: Exception) -> str | None:
    """One line for an error that the user can mend; None for what is none of theirs."""
    if isinstance(error, OSError):
        if error.errno == errno.EPIPE:
            return None  # the reader of a pipe has gone
        where = f"{error.filename}: " if error.filename else ""
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        return f"{where}{reason[:1].lower()}{reason[1:]}"
    if isinstance(error, MemoryError):
        return "out of memory"
    from pallas_kernels.errors import W4A8Error  # brings jax along, which --help need not

    if isinstance(error, W4A8Error):
        return " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" in str(error):
        return f"out of device memory: {' '.join(str(error).split())[:200]}"
    return None


def _error(*lines: str) -> None:
    for line in lines:
        typer.secho(line, fg=typer.colors.RED, err=True)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"w4a8jax {version('w4a8jax')}")
        raise typer.Exit


app = typer.Typer(
    name="w4a8jax",
    cls=ErrorLines,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="W4A8JAX_DEBUG", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """W4A8 language models in JAX: INT4 weights, FP8 activations.

    Quantize a bf16 checkpoint, generate text with it, look into it, and verify
    that vLLM would serve it. MODEL and SRC are checkpoint directories, or names
    on the Hugging Face Hub. To try it without any:

    w4a8jax generate $(w4a8jax reference-model) --prompt "def main():"
    """


app.command("quantize")(quantize.command)
app.command("calibrate")(calibrate.command)
app.command("distill")(distill.command)
app.command("generate")(generate.command)
app.command("inspect")(inspect.command)
app.command("verify")(verify.command)
app.command("eval")(evaluate.command)
app.command("report")(report.command)
app.command("reference-model")(reference_model.command)
app.command("tune")(bench.tune)
bench.app.command("moe")(bench_moe.moe)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """The entry point."""
    # A pipe to another program gets UTF-8 whatever the locale, and never an error on a character.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    keep_compiled()
    app()
