"""Calibration data: JSON lines of text, token ids or conversations, each with the tokens that count.

    {"text": "..."}
    {"tokens": [1, 17, 4], "loss_mask": [0, 1, 1]}
    {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}

A `loss_mask` has one number a token, 1 if it counts, and is taken as it is. Without one, what is masked follows from
the parts of a conversation (see masks.py): the tokens that a tokenizer puts around a text are "template" too.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from pallas_kernels.errors import W4A8Error

from ..tokenizer import Tokenizer
from .masks import DEFAULT_MASK, check_mask, conversation_tokens, repeated_prefixes

MAX_LENGTH = 65536
_FORMS = ("text", "tokens", "messages")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A trace.

    Attributes:
        tokens: int32 [T].
        loss_mask: bool [T], True where a token counts.
        line: of the file, from 1; of the first trace in it, if it is packed.
    """

    tokens: Int[np.ndarray, "T"]
    loss_mask: Bool[np.ndarray, "T"]
    line: int


@dataclasses.dataclass(frozen=True)
class CalibrationData:
    """Samples to calibrate on.

    Attributes:
        samples: those with a token that counts.
        name: of the file.
        traces: how many were read; dropped: of them had no token that counts; cut: were longer than allowed.
    """

    samples: tuple[Sample, ...]
    name: str = "calibration"
    traces: int = 0
    dropped: int = 0
    cut: int = 0

    @property
    def tokens(self) -> int:
        """In all samples."""
        return sum(len(sample.tokens) for sample in self.samples)

    @property
    def counted(self) -> int:
        """Tokens that count."""
        return sum(int(sample.loss_mask.sum()) for sample in self.samples)

    def check_context(self, max_context: int) -> None:
        """Raises W4A8Error if a sample is longer than a model's context."""
        longest = max(len(sample.tokens) for sample in self.samples)
        if longest > max_context:
            raise W4A8Error(
                f"{self.name}: has a sample of {longest} tokens, but the model's context is {max_context}; cut it"
            )

    def digest(self) -> str:
        """A hash of tokens and masks."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(np.int64(len(sample.tokens)).tobytes())
            digest.update(sample.tokens.tobytes() + sample.loss_mask.tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """One line."""
        text = f"{len(self.samples)} samples, {self.tokens:,} tokens, {self.counted:,} of which count"
        text += f"; {self.dropped} of {self.traces} traces dropped, nothing of them counts" if self.dropped else ""
        return text + (f"; {self.cut} cut to the length allowed" if self.cut else "")


def read_calibration(
    source: str | Path | Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    max_length: int = MAX_LENGTH,
    mask: Collection[str] = DEFAULT_MASK,
    pack: int | None = None,
    max_samples: int | None = None,
) -> CalibrationData:
    """Reads calibration data.

    Args:
        source: a JSONL file, or the objects of its lines.
        tokenizer: None if all lines have tokens.
        vocab_size: of the model.
        max_length: tokens of a sample; what is longer is cut.
        mask: what does not count: of "system", "tools", "template", "user", "tool_results" the parts of conversations,
            and "prefix", tokens at a trace's beginning that an earlier trace begins with too.
        pack: join traces to samples of this many tokens, the last one shorter. A token then attends to the traces
            before its own.
        max_samples: read no more traces than this many that count.

    Raises:
        W4A8Error: the file is missing or empty, a line (named by its number) is not as above, a loss_mask has another
            length than the tokens, an id is outside the vocabulary, or nothing counts in any sample.
    """
    check_mask(mask)
    for option, value in (("max_length", max_length), ("pack", pack), ("max_samples", max_samples)):
        if value is not None and value < 1:
            raise W4A8Error(f"{option}: expected a positive number, found {value}")
    if pack is not None and pack > max_length:
        raise W4A8Error(f"pack: expected at most {max_length} tokens, found {pack}")
    name = str(source) if isinstance(source, str | Path) else "calibration"
    lines = _read_lines(Path(source).expanduser()) if isinstance(source, str | Path) else enumerate(source, start=1)
    traces: Iterable[tuple[Sample, bool]] = (
        _sample(record, line, f"{name}: line {line}", tokenizer, vocab_size, mask) for line, record in lines
    )
    if "prefix" in mask:
        traces = _mask_prefixes(traces)
    read = dropped = cut = 0
    samples: list[Sample] = []
    for sample, _ in traces:
        read += 1
        if pack is None and len(sample.tokens) > max_length:
            cut += 1
            sample = Sample(sample.tokens[:max_length], sample.loss_mask[:max_length], sample.line)
        if sample.loss_mask.any():
            samples.append(sample)
        else:
            dropped += 1
        if max_samples is not None and len(samples) >= max_samples:
            break
    if not read:
        raise W4A8Error(f"{name}: is empty; give a line of JSON for each trace")
    if not samples:
        raise W4A8Error(
            f"{name}: nothing counts: all tokens of its {read} traces are masked; see calibrate --show-mask"
        )
    if pack is not None:
        samples = [sample for sample in _pack(samples, pack) if sample.loss_mask.any()]
    return CalibrationData(tuple(samples), name, read, dropped, cut)


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except ValueError as e:
                        raise W4A8Error(f"{path}: line {number}: is no JSON: {e}") from None
    except OSError as e:
        raise W4A8Error(f"{path}: cannot be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise W4A8Error(f"{path}: is not UTF-8: {e.reason} at byte {e.start}") from e


def _sample(
    record: Any, line: int, where: str, tokenizer: Tokenizer | None, vocab_size: int, mask: Collection[str]
) -> tuple[Sample, bool]:
    """The sample of a line, and whether the line says itself what counts."""
    if not isinstance(record, Mapping):
        raise W4A8Error(f"{where}: expected a JSON object, found {type(record).__name__}")
    forms = [form for form in _FORMS if record.get(form) is not None]
    if len(forms) != 1:
        raise W4A8Error(f"{where}: expected one of {', '.join(_FORMS)}, found {' and '.join(forms) or 'none'}")
    try:
        ids, kept = _tokens(record, forms[0], tokenizer, mask)
    except W4A8Error as e:
        raise W4A8Error(f"{where}: {e}") from None
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        at = int(np.argmax(outside))
        raise W4A8Error(f"{where}: token {at} has id {ids[at]}, but the model's vocabulary is 0 .. {vocab_size - 1}")
    given = record.get("loss_mask")
    if given is not None:
        kept = _given_mask(given, len(ids), where)
    return Sample(ids.astype(np.int32), kept, line), given is not None


def _tokens(
    record: Mapping[str, Any], form: str, tokenizer: Tokenizer | None, mask: Collection[str]
) -> tuple[Int[np.ndarray, "T"], Bool[np.ndarray, "T"]]:
    value = record[form]
    if form == "tokens":
        if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
            raise W4A8Error(f"tokens: expected a list of ids, found {type(value).__name__}")
        if not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in value):
            raise W4A8Error("tokens: expected integers")
        return np.array([min(max(int(i), -1), 2**62) for i in value], np.int64), np.ones(len(value), bool)
    if tokenizer is None:
        raise W4A8Error(f"{form}: the model has no tokenizer; put its tokenizer.json there, or give tokens")
    if form == "text":
        if not isinstance(value, str):
            raise W4A8Error(f"text: expected a string, found {type(value).__name__}")
        ids = tokenizer.encode(value)
        inner = tokenizer.encode(value, add_special_tokens=False) if "template" in mask else ids
        return np.asarray(ids, np.int64), _inside(ids, inner)
    if not isinstance(value, list) or not value or not all(isinstance(m, Mapping) for m in value):
        raise W4A8Error("messages: expected a list of objects with role and content")
    tools = record.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(t, Mapping) for t in tools)):
        raise W4A8Error("tools: expected a list of objects")
    found, kept = conversation_tokens(tokenizer, value, tools, mask)
    return np.asarray(found, np.int64), kept


def _inside(ids: list[int], inner: list[int]) -> Bool[np.ndarray, "T"]:
    """True for the tokens of a text, False for those that the tokenizer puts around it."""
    lead = next((i for i in range(len(ids) - len(inner) + 1) if ids[i : i + len(inner)] == inner), 0)
    position = np.arange(len(ids))
    return (position >= lead) & (position < lead + len(inner))


def _given_mask(given: Any, length: int, where: str) -> Bool[np.ndarray, "T"]:
    if not isinstance(given, Sequence | np.ndarray) or any(i not in (0, 1) for i in given):
        raise W4A8Error(f"{where}: loss_mask: expected a list of 0 and 1")
    if len(given) != length:
        raise W4A8Error(f"{where}: loss_mask: has {len(given)} entries, but there are {length} tokens")
    return np.asarray(given, bool)


def _mask_prefixes(traces: Iterable[tuple[Sample, bool]]) -> Iterator[tuple[Sample, bool]]:
    """Masks repeated prefixes, except where the line says itself what counts."""
    held = list(traces)
    lengths = repeated_prefixes(sample.tokens for sample, _ in held)
    for (sample, given), length in zip(held, lengths, strict=True):
        kept = sample.loss_mask & (np.arange(len(sample.tokens)) >= (0 if given else length))
        yield dataclasses.replace(sample, loss_mask=kept), given


def _pack(samples: Sequence[Sample], length: int) -> Iterator[Sample]:
    """Joins samples, in order, and cuts them to a length."""
    tokens = np.concatenate([sample.tokens for sample in samples])
    kept = np.concatenate([sample.loss_mask for sample in samples])
    ends = np.cumsum([len(sample.tokens) for sample in samples])
    for start in range(0, len(tokens), length):
        line = samples[int(np.searchsorted(ends, start, side="right"))].line
        yield Sample(tokens[start : start + length], kept[start : start + length], line)
