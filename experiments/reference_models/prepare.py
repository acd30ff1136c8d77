"""Trains the tokenizer and turns the reference text into token ids, one uint16 array per part.

    python experiments/reference_models/prepare.py --out .data

Writes the tokenizer's files and, as flat arrays of documents `<BOS> text <EOS>`,

    train_library.npy   modules and topics of the train split without the `test` package
    train_tests.npy     the `test` package
    train_chat.npy      questions and answers made from the train split: a docstring's first line asks for the function
                        that carries it, a topic's name asks for its text, so that the chat tokens mean something
    validation.npy, test.npy

and corpus.json with the sizes. The arrays are what train.py needs; nothing else has to be on the machine that trains.
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizer import BOS, CHATBOT, END_OF_TURN, EOS, START_OF_TURN, USER, save_tokenizer, train_tokenizer
from tokenizers import Tokenizer

from w4a8jax.reference import Split, reference_documents

MAX_CONTEXT = 65536
MAX_ANSWER_CHARACTERS = 2500


def documents(part: str) -> Iterator[str]:
    """The texts of one part of the corpus, see the module's docstring."""
    held_out: dict[str, Split] = {"validation": "validation", "test": "test"}
    if part in held_out:
        yield from (text for _, text in reference_documents(held_out[part]))
        return
    for name, text in reference_documents("train"):
        is_test = name.split(".")[0] == "test"
        if part == "train_chat" and not is_test:
            for question, answer in _questions(name, text):
                yield f"{START_OF_TURN}{USER}{question}{END_OF_TURN}{START_OF_TURN}{CHATBOT}{answer}{END_OF_TURN}"
        elif part == ("train_tests" if is_test else "train_library"):
            yield text


def _questions(name: str, text: str) -> Iterator[tuple[str, str]]:
    if ":" in name:
        if len(text) <= MAX_ANSWER_CHARACTERS:
            yield f"Explain `{name.split(':')[1]}`.", text.strip()
        return
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        summary = (ast.get_docstring(node) or "").strip().split("\n")[0]
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        source = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
        if len(summary) >= 12 and len(source) <= MAX_ANSWER_CHARACTERS:
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            yield f"Write the {kind} `{node.name}`. {summary}", source.strip()


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """Documents as one flat uint16 array, each between the BOS and EOS tokens."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    pieces = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        pieces.append(np.asarray([bos, *ids, eos], dtype=np.uint16))
    return np.concatenate(pieces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the arrays and the tokenizer")
    out: Path = parser.parse_args().out

    tokenizer = train_tokenizer()
    save_tokenizer(tokenizer, out, MAX_CONTEXT)
    corpus: dict = {"python": platform.python_version(), "parts": {}}
    for part in ("train_library", "train_tests", "train_chat", "validation", "test"):
        texts = list(documents(part))
        ids = encode(tokenizer, texts)
        np.save(out / f"{part}.npy", ids)
        sizes = {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts), "tokens": len(ids)}
        corpus["parts"][part] = sizes
        print(part, sizes, flush=True)
    (out / "corpus.json").write_text(json.dumps(corpus, indent=2) + "\n")


if __name__ == "__main__":
    main()
