"""A checkpoint's tokenizer: `tokenizers` reads tokenizer.json, the rest of Hugging Face's files say how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers

from pallas_kernels.errors import W4A8Error

from . import chat_template

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        special_tokens: texts of the special tokens that have a role: "bos_token", "eos_token", "pad_token", ...
        chat_templates: jinja2 sources by name; the usual one is "default".
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ):
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})

    @classmethod
    def from_directory(cls, path: str | Path) -> Self:
        """Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat templates.

        What is put around a text is what tokenizer.json says: as transformers does, `add_bos_token` and `add_eos_token`
        of tokenizer_config.json are ignored.

        Raises:
            W4A8Error: tokenizer.json is missing, or a file cannot be read.
        """
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            others = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (path / name).is_file()]
            advice = "copy the original checkpoint's there"
            if others:
                advice = f"make it from {others[0]} with transformers: AutoTokenizer.from_pretrained, save_pretrained"
            raise W4A8Error(f"{file}: the tokenizer is missing; {advice}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as e:  # what `tokenizers` raises is a bare Exception
            raise W4A8Error(f"{file}: is no tokenizer: {' '.join(str(e).split())}") from None
        # A file may carry the settings of its training, and would then cut or fill what it encodes.
        backend.no_truncation()
        backend.no_padding()
        config = _read_json(path / CONFIG)
        special = _special_tokens(_read_json(path / SPECIAL_TOKENS)) | _special_tokens(config)
        _add_missing(backend, config, special)
        return cls(backend, special_tokens=special, chat_templates=chat_template.read_templates(path, config))

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def bos_token_id(self) -> int | None:
        return self.token_id(self.special_tokens.get("bos_token"))

    @property
    def eos_token_id(self) -> int | None:
        return self.token_id(self.special_tokens.get("eos_token"))

    @property
    def chat_template(self) -> str | None:
        """The default chat template."""
        return self.chat_templates.get("default")

    def token_id(self, token: str | None) -> int | None:
        """The id of one token, None if there is no such token."""
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, by default with the BOS and EOS tokens that the tokenizer puts around it."""
        return self.encode_with_offsets(text, add_special_tokens=add_special_tokens)[0]

    def encode_with_offsets(
        self, text: str, *, add_special_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode`, and each token's place in the text: its first character, and one after its last.

        Tokens put around the text have no place: the two are equal.
        """
        if not isinstance(text, str):
            raise W4A8Error(f"text: expected a string, found {type(text).__name__}")
        # Lone surrogates, of undecodable bytes in a command line, are no text for `tokenizers`.
        text = text.encode("utf-8", "replace").decode("utf-8")
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """A decoder for tokens that come one by one."""
        return TextStream(self, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation; encode it with `add_special_tokens=False`, since it holds them.

        Args:
            messages: dicts with "role" and "content".
            tools: JSON schemas of functions that the model may call.
            add_generation_prompt: ends with the beginning of the model's turn.
            template: the name of one of `chat_templates`, or jinja2 source. By default "tool_use" if there are tools
                and such a template, else "default".
            variables: further names that the template sees, such as `enable_thinking`.

        Raises:
            W4A8Error: there is no template, or it refuses the messages.
        """
        names = {"add_generation_prompt": add_generation_prompt, **self.special_tokens, **variables}
        return chat_template.render(self._template(template, tools is not None), messages, tools=tools, **names)

    def _template(self, template: str | None, tools: bool) -> str:
        if template is not None:
            return self.chat_templates.get(template, template)
        name = "tool_use" if tools and "tool_use" in self.chat_templates else "default"
        if name not in self.chat_templates:
            others = ", ".join(sorted(self.chat_templates))
            advice = f"name one of {others}" if others else "give a prompt instead, or a template"
            raise W4A8Error(f"chat template: the checkpoint has none{' named default' if others else ''}; {advice}")
        return self.chat_templates[name]


class TextStream:
    """Decodes tokens as they come; characters whose bytes are not all there yet are held back."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        # Text of _ids[:_shown] is out. It is decoded again from _context on with what follows, since a decoder may
        # treat a text's beginning differently.
        self._context = self._shown = 0

    def add(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        text = ""
        for token in ids:
            self._ids.append(token)
            text += self._next(final=False)
        return text

    def finish(self) -> str:
        """What was held back; an incomplete character becomes U+FFFD."""
        return self._next(final=True)

    def _next(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._context : self._shown])
        text = self._decode(self._ids[self._context :])
        if len(text) <= len(before) or (text.endswith("\N{REPLACEMENT CHARACTER}") and not final):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The entries "..._token" of a file, texts or `AddedToken`s as dicts."""
    found = {name: _content(value) for name, value in config.items() if name.endswith("_token")}
    return {name: text for name, text in found.items() if text is not None}


def _content(token: Any) -> str | None:
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _add_missing(backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Adds the tokens that only tokenizer_config.json names, at the end, as transformers does."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    missing = []
    for _, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        options = {name: value for name, value in entry.items() if name != "__type"}
        if options["content"] not in known:
            missing.append(tokenizers.AddedToken(options.pop("content"), **options))
    known |= {token.content for token in missing}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    names = list(special.values())
    names += [text for text in map(_content, extra.values() if isinstance(extra, Mapping) else extra) if text]
    missing += [tokenizers.AddedToken(text, special=True) for text in dict.fromkeys(names) if text not in known]
    backend.add_tokens(missing)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise W4A8Error(f"{path}: is no JSON: {' '.join(str(e).split())}") from None
    if not isinstance(found, dict):
        raise W4A8Error(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found
