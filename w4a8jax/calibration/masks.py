"""Which tokens of a trace count: parts of a conversation as its chat template renders them, and repeated prefixes.

A template is a program, so the parts are found by watching what it does:

- A message's content: it is rendered once more with marks around each content. The marks stand inside the content's
  outer white space, so that templates which trim it do the same as without.
- An assistant's turn: what rendering up to it adds to rendering the conversation before it with the generation prompt:
  all that the model itself would write, with tool calls and the token that ends the turn.
- Tool descriptions: what is different without tools.
- The rest is the template's own.
"""

import bisect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Int

from pallas_kernels.errors import W4A8Error

from ..tokenizer import Tokenizer

Kind = Literal["system", "tools", "template", "user", "tool_results", "prefix"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DEFAULT_MASK: tuple[Kind, ...] = ("system", "tools", "template")

Part = Literal["template", "system", "tools", "user", "tool_results", "assistant"]
_PARTS: tuple[Part, ...] = get_args(Part)
_ROLES: dict[str, Part] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "tool": "tool_results",
    "function": "tool_results",
    "ipython": "tool_results",
    "assistant": "assistant",
    "model": "assistant",
    "chatbot": "assistant",
}

# Private-use characters: open, close, and from _FIRST on the number of the content.
_OPEN, _CLOSE, _FIRST = "\ue000", "\ue001", 0xF0000
_MARKED = re.compile(f"{_OPEN}(.)|{_CLOSE}", re.DOTALL)
MIN_PREFIX = 16  # tokens that two traces must share at their beginning to count as repeated


def check_mask(mask: Collection[str]) -> None:
    """Raises W4A8Error if `mask` names a kind that is unknown."""
    for kind in mask:
        if kind not in KINDS:
            raise W4A8Error(f"mask: {kind!r} is unknown; known are {', '.join(KINDS)}")


def conversation_tokens(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    mask: Collection[str],
) -> tuple[list[int], Bool[np.ndarray, "T"]]:
    """The token ids of a conversation, and which count: those with a character in a part that is not masked.

    Raises:
        W4A8Error: the template refuses the messages; a part that is to be masked cannot be told from the template.
    """
    text, parts = conversation_parts(tokenizer, messages, tools, mask)
    kept = np.array([part not in mask for part in _PARTS])[parts]
    ids, offsets = tokenizer.encode_with_offsets(text, add_special_tokens=False)
    before = np.concatenate([[0], np.cumsum(kept)])  # kept characters before each
    spans = np.asarray(offsets, np.int64).reshape(-1, 2)
    # Some tokenizers leave white space out of a token's place: it begins where the one before it ended.
    starts = np.minimum(spans[:, 0], np.concatenate([[0], spans[:-1, 1]]))
    return ids, before[spans[:, 1]] > before[starts]


def conversation_parts(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    mask: Collection[str] = (),
) -> tuple[str, Int[np.ndarray, "C"]]:
    """A conversation's text, and for each character the index of its part in `Part`.

    Raises:
        W4A8Error: as `conversation_tokens` does.
    """
    template = "tool_use" if tools and "tool_use" in tokenizer.chat_templates else None

    def render(some: Sequence[Mapping[str, Any]], with_tools: bool = True, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            some, tools=tools if with_tools else None, template=template, add_generation_prompt=prompt
        )

    text = render(messages)
    parts = np.full(len(text), _PARTS.index("template"), np.int8)
    if tools:
        parts[_difference(text, _attempt(render, messages, False) or text)] = _PARTS.index("tools")
    contents = list(_contents(messages))
    spans = _marked_spans(render, messages, text) or _found_spans(contents, text)
    for index, (number, _) in enumerate(contents):
        part = _part(messages[number])
        if index in spans:
            parts[slice(*spans[index])] = _PARTS.index(part)
        elif part in mask and "template" not in mask:
            raise W4A8Error(
                f"message {number} ({messages[number].get('role')}) is not in the rendered text as it stands, so it "
                'cannot be masked apart from the template; mask "template" too, or give a loss_mask'
            )
    for i, message in enumerate(messages):
        if _part(message) == "assistant":
            before, upto = (_attempt(render, messages[:end], True, end == i) for end in (i, i + 1))
            if before and upto and text.startswith(before) and text.startswith(upto) and len(upto) > len(before):
                parts[len(before) : len(upto.rstrip())] = _PARTS.index("assistant")
    return text, parts


def repeated_prefixes(samples: Iterable[Int[np.ndarray, "T"]]) -> Iterator[int]:
    """For each sample, how many tokens at its beginning an earlier one begins with too; 0 if less than `MIN_PREFIX`."""
    known: list[bytes] = []
    for sample in samples:
        key = np.asarray(sample, ">u4").tobytes()  # big-endian bytes sort as the tokens do
        at = bisect.bisect_left(known, key)
        # The longest common prefix with any is that with a neighbour in sorted order.
        shared = max((_common(key, other) // 4 for other in known[max(at - 1, 0) : at + 1]), default=0)
        known.insert(at, key)
        yield shared if shared >= MIN_PREFIX else 0


def _common(a: bytes, b: bytes) -> int:
    size = min(len(a), len(b))
    differ = np.frombuffer(a, np.uint8, size) != np.frombuffer(b, np.uint8, size)
    return int(np.argmax(differ)) if differ.any() else size


def _part(message: Mapping[str, Any]) -> Part:
    return _ROLES.get(str(message.get("role")), "user")


def _attempt(render: Callable[..., str], *arguments: Any) -> str | None:
    """The text, or None where the template refuses part of a conversation."""
    try:
        return render(*arguments)
    except W4A8Error:
        return None


def _difference(text: str, other: str) -> slice:
    """The part of `text` that is not in `other`, given that the rest is."""
    start = _common(text.encode("utf-32-be", "surrogatepass"), other.encode("utf-32-be", "surrogatepass")) // 4
    rest, other_rest = (t[start:][::-1].encode("utf-32-be", "surrogatepass") for t in (text, other))
    end = _common(rest, other_rest) // 4
    return slice(start, len(text) - end)


def _contents(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str]]:
    """The texts of all messages that are not white space alone, each with the message's number."""
    for i, message in enumerate(messages):
        content = message.get("content")
        for piece in content if isinstance(content, list) else [content]:
            text = piece.get("text") if isinstance(piece, Mapping) else piece
            if isinstance(text, str) and text.strip():
                yield i, text


def _marked_spans(
    render: Callable[..., str], messages: Sequence[Mapping[str, Any]], text: str
) -> dict[int, tuple[int, int]] | None:
    """Where each content stands in `text`; None if marks change what the template does. Some may be missing."""
    numbers = iter(range(0xFFFF))

    def mark(content: Any) -> Any:
        if isinstance(content, list):
            return [mark(piece) for piece in content]
        if isinstance(content, Mapping):
            return {**content, "text": mark(content["text"])} if isinstance(content.get("text"), str) else content
        if not isinstance(content, str) or not content.strip():
            return content
        inner = content.strip()
        at = content.index(inner)
        return f"{content[:at]}{_OPEN}{chr(_FIRST + next(numbers))}{inner}{_CLOSE}{content[at + len(inner) :]}"

    marked = _attempt(render, [{**m, "content": mark(m["content"])} if "content" in m else m for m in messages])
    if marked is None or _OPEN in text or _CLOSE in text or _MARKED.sub("", marked) != text:
        return None
    spans: dict[int, tuple[int, int]] = {}
    opened: tuple[int, int] | None = None
    removed = 0
    for match in _MARKED.finditer(marked):
        at = match.start() - removed
        removed += len(match[0])
        if match[1]:
            opened = ord(match[1]) - _FIRST, at
        elif opened:
            spans[opened[0]] = opened[1], at
            opened = None
    return spans


def _found_spans(contents: Sequence[tuple[int, str]], text: str) -> dict[int, tuple[int, int]]:
    """Where each content stands in `text`, by looking for one after the other."""
    spans, cursor = {}, 0
    for index, (_, content) in enumerate(contents):
        at = text.find(content.strip(), cursor)
        if at >= 0:
            cursor = at + len(content.strip())
            spans[index] = at, cursor
    return spans
