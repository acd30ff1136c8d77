"""A trace as a person reads it, with the part that does not count dimmed."""

from itertools import groupby

from rich.console import Console
from rich.text import Text

from ..tokenizer import Tokenizer
from .data import Sample


def render_mask(sample: Sample, tokenizer: Tokenizer, console: Console) -> None:
    """Prints a sample; masked tokens are dim on a terminal, and stand in ⟦ ⟧ elsewhere."""
    text, marks = Text(), ("", "") if console.is_terminal else ("⟦", "⟧")
    for kept, piece in mask_pieces(sample, tokenizer):
        text.append(piece if kept else f"{marks[0]}{piece}{marks[1]}", style="" if kept else "dim")
    console.print(text, highlight=False)


def mask_pieces(sample: Sample, tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    """The text in pieces, each with whether it counts; a character belongs to the token that completes it."""
    stream = tokenizer.stream(skip_special_tokens=False)
    tokens = [
        (bool(kept), stream.add([token])) for token, kept in zip(sample.tokens.tolist(), sample.loss_mask, strict=True)
    ]
    if tokens and (rest := stream.finish()):
        tokens.append((tokens[-1][0], rest))
    return [(kept, "".join(piece for _, piece in run)) for kept, run in groupby(tokens, key=lambda t: t[0])]
