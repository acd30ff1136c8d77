"""`w4a8jax generate`: continue a prompt, or chat."""

from __future__ import annotations

import contextlib
import dataclasses
import json as json_module
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    DTypeOption,
    JsonOption,
    KernelsOption,
    Model,
    NumericsOption,
    QuietOption,
    SchemeOption,
    load_model,
    read_text,
)

if TYPE_CHECKING:
    from ..language_model import GenerationResult, LanguageModel

_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"


def command(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", "-p", metavar="TEXT", help="Text to continue, or with --chat to answer; - reads stdin."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Use the chat template; without --prompt, a conversation in the terminal.")
    ] = False,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System prompt of a chat.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="New tokens at most.")] = 256,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            help="0: the likeliest token. Default: the checkpoint's own, else 0, or 1 with --top-k, --top-p or --seed.",
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Draw from the k likeliest tokens; 0: from all.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Draw from the likeliest tokens that make up this probability.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of the random draws: the same seed gives the same text.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Stop before this text; may be repeated.")
    ] = None,
    scheme: SchemeOption = None,
    numerics: NumericsOption = None,
    kernels: KernelsOption = True,
    dtype: DTypeOption = "bfloat16",
    max_context: Annotated[
        int | None,
        typer.Option(
            "--max-context", min=2, help="Prompt and new tokens together, at most; default: the model's limit."
        ),
    ] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its continuation.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Generate text, shown as it comes: continue a prompt, or chat."""
    from pallas_kernels.errors import W4A8Error

    if prompt is None and not chat:
        raise W4A8Error("generate: give --prompt TEXT (- for stdin) or --chat")
    if system is not None and not chat:
        raise W4A8Error("--system: needs --chat")
    if json and prompt is None:
        raise W4A8Error("--json: needs --prompt")
    if prompt == "-":
        prompt = read_text("-", "--prompt").removesuffix("\n")
    loaded = load_model(model, scheme, numerics, dtype, max_context, kernels)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    options: dict[str, Any] = {
        "max_new_tokens": max_tokens,
        "sampling": _sampling(loaded, {name: value for name, value in given.items() if value is not None}),
        "stop": tuple(stop or ()),
    }
    messages = [{"role": "system", "content": system}] if system is not None else []
    if prompt is None:
        _converse(loaded, messages, options, quiet)
        return
    if echo and not json:
        typer.echo(prompt, nl=False)
    options["stream"] = False if json else _show
    if chat:
        result = loaded.chat([*messages, {"role": "user", "content": prompt}], **options)
    else:
        result = loaded.generate(prompt, **options)
    if json:
        typer.echo(json_module.dumps(dataclasses.asdict(result), indent=2))
        return
    typer.echo()
    if not quiet:
        typer.secho(_statistics(result, drawn=_draws(loaded, options)), err=True, dim=True)


def _converse(model: LanguageModel, messages: list[dict[str, str]], options: dict[str, Any], quiet: bool) -> None:
    """A conversation: lines from stdin, answers to stdout."""
    start = len(messages)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # lines can be edited and recalled
        typer.secho(_HELP, err=True, dim=True)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                typer.echo()
            return
        if line == "/exit":
            return
        if line == "/reset":
            del messages[start:]
        if not line or line == "/reset":
            continue
        pieces: list[str] = []

        def show(piece: str, pieces: list[str] = pieces) -> None:
            pieces.append(piece)
            _show(piece)

        messages.append({"role": "user", "content": line})
        result = None
        try:
            result = model.chat(messages, **options, stream=show)
        except KeyboardInterrupt:
            if not interactive:
                raise
        typer.echo()
        messages.append({"role": "assistant", "content": "".join(pieces)})
        if result is not None and not quiet:
            typer.secho(_statistics(result, drawn=_draws(model, options)), err=True, dim=True)


def _sampling(model: LanguageModel, given: dict[str, Any]) -> Any:
    """The checkpoint's own sampling with what was given on the command line; None for its own alone."""
    if not given:
        return None
    default = model.default_sampling
    if default.temperature == 0:
        given = {"temperature": 1.0, **given}
    return dataclasses.replace(default, **given)


def _draws(model: LanguageModel, options: dict[str, Any]) -> bool:
    """Whether tokens are drawn at random, so that a seed tells how to get them again."""
    return (options["sampling"] or model.default_sampling).temperature > 0


def _show(piece: str) -> None:
    typer.echo(piece, nl=False)
    sys.stdout.flush()


def _statistics(result: GenerationResult, *, drawn: bool) -> str:
    times = result.timings
    compiled = f", after compiling for {times.compile_seconds:.1f} s" if times.compile_seconds >= 0.1 else ""
    speed = f", then {times.tokens_per_second:.1f} tokens/s" if times.tokens_per_second else ""
    seed = f"; seed {result.seed}" if drawn else ""
    return (
        f"[{result.prompt_tokens} + {len(result.tokens)} tokens, {result.finish_reason}; first in {times.ttft:.2f} s"
        f"{speed}{compiled}{seed}]"
    )
