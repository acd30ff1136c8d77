"""The small reference models shipped with the package, and the text they were trained and are measured on.

The text is what every Python installation carries: the source of the standard library and the language topics of
`pydoc_data`. Nothing is downloaded and no text is stored: each machine reads it from its own Python. The split is by
top-level module (`json`, `asyncio`, ...), decided by a hash of the module's name, so that

- no module is in two splits, whatever the Python version;
- the held-out splits hold only modules that every Python 3.12 to 3.14 has as source. What some distributions leave
  out (`test`, `idlelib`, `tkinter`, ...) or later versions removed (PEP 594), and the `pydoc_data` topics, which repeat
  one another, go to the train split;
- two patch releases of one Python version give nearly, not exactly, the same text: compare perplexities on one machine.

Generated tables (`encodings`) and files that are not UTF-8 are left out.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from pallas_kernels.errors import W4A8Error

Split = Literal["train", "validation", "test"]

# Held-out shares of the hash range; of the eligible modules these are about 4 % of the text each.
_SPLIT_SALT = "w4a8jax:"
_TEST_SHARE = 0.08
_VALIDATION_SHARE = 0.08

_EXCLUDED = frozenset({"encodings"})
# Not installed everywhere, or not as source; and the topics, which repeat one another.
_OPTIONAL = "test idlelib tkinter turtle turtledemo ensurepip lib2to3 distutils venv curses sqlite3 dbm pydoc_data"
# Removed by PEP 594 and with it.
_REMOVED = (
    "aifc asynchat asyncore cgi cgitb chunk crypt imghdr imp mailcap msilib nntplib pipes smtpd sndhdr sunau "
    "telnetlib uu xdrlib"
)
_TRAIN_ONLY = frozenset(_OPTIONAL.split()) | frozenset(_REMOVED.split())

_MODELS = Path(__file__).resolve().parent / "reference_models"
_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def reference_model(name: str = "dense") -> Path:
    """The folder of a reference model: a Hugging Face checkpoint in bf16, with its tokenizer.

    Args:
        name: "dense", a `cohere2` language model, or "moe", a `cohere2_moe` one with six experts in each of two
            layers, of which a token meets two. Both have 5 million parameters, trained on `reference_text("train")`.

    Raises:
        W4A8Error: no model of this name is known, or its files are missing from the installation.
    """
    known = sorted(path.name for path in _MODELS.iterdir() if path.is_dir()) if _MODELS.is_dir() else []
    if name not in known:
        found = ", ".join(repr(other) for other in known) if known else "none"
        raise W4A8Error(f"reference model {name!r} is not in {_MODELS}: expected one of those installed ({found})")
    path = _MODELS / name
    missing = [file for file in _MODEL_FILES if not (path / file).is_file()]
    if missing:
        raise W4A8Error(f"reference model {name!r}: {path / missing[0]} is missing; reinstall w4a8jax")
    return path


def reference_split(module: str) -> Split | None:
    """The split a top-level module belongs to; None if its text is used in none."""
    if module in _EXCLUDED or (module not in sys.stdlib_module_names and module not in _TRAIN_ONLY):
        return None
    if module in _TRAIN_ONLY:
        return "train"
    digest = hashlib.sha256((_SPLIT_SALT + module).encode()).digest()
    position = int.from_bytes(digest[:4], "big") / 2**32
    if position < _TEST_SHARE:
        return "test"
    if position < _TEST_SHARE + _VALIDATION_SHARE:
        return "validation"
    return "train"


def reference_documents(split: Split) -> Iterator[tuple[str, str]]:
    """The texts of a split as (name, text), one per source file or topic, ordered by name.

    Names are dotted module names ("concurrent.futures.thread"), or "pydoc_data.topics:NAME" for a topic.

    Raises:
        W4A8Error: the split is unknown, or this Python carries no source of its standard library.
    """
    if split not in get_args(Split):
        raise W4A8Error(f"split {split!r} is unknown: expected one of {', '.join(map(repr, get_args(Split)))}")
    root = Path(sysconfig.get_path("stdlib"))
    entries = sorted(root.iterdir()) if root.is_dir() else []
    found = False
    for entry in entries:
        if reference_split(entry.stem if entry.suffix == ".py" else entry.name) != split:
            continue
        if entry.name == "pydoc_data":
            found = True
            topics = importlib.import_module("pydoc_data.topics").topics
            yield from ((f"pydoc_data.topics:{topic}", topics[topic].strip() + "\n") for topic in sorted(topics))
            continue
        for path in [entry] if entry.is_file() else sorted(entry.rglob("*.py")):
            text = _read_source(path)
            if text is not None:
                found = True
                yield _dotted_name(path.relative_to(root)), text
    if not found:
        raise W4A8Error(
            f"no standard library source in {root}: the reference text is read from it; use a Python that has it "
            "as .py files"
        )


def reference_text(split: Split) -> str:
    """The whole text of a split, its documents joined by blank lines; see `reference_documents`."""
    return "\n".join(text for _, text in reference_documents(split))


def _read_source(path: Path) -> str | None:
    """The text with newlines normalized; None if it is not a non-empty UTF-8 text."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return text if text.strip() and "\0" not in text else None


def _dotted_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
