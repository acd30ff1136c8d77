"""Chat templates: jinja2 in a sandbox, with what transformers gives to templates."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pallas_kernels.errors import W4A8Error


def read_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a checkpoint directory by name; the usual one is "default".

    From chat_template.jinja and additional_chat_templates/NAME.jinja, else from chat_template.json, else from
    "chat_template" in tokenizer_config.json: one template, or a list of named ones.

    Args:
        path: the directory.
        config: its tokenizer_config.json.

    Raises:
        W4A8Error: a file cannot be read, or is not as expected.
    """
    single, legacy = path / "chat_template.jinja", path / "chat_template.json"
    files = {"default": single} if single.is_file() else {}
    files |= {f.stem: f for f in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    if files:
        return {name: _read(file) for name, file in files.items()}
    source, found = path / "tokenizer_config.json", config.get("chat_template")
    if legacy.is_file():
        source = legacy
        try:
            found = json.loads(_read(legacy))
        except json.JSONDecodeError as e:
            raise W4A8Error(f"{legacy}: is no JSON: {e}") from None
        if isinstance(found, dict):
            found = found.get("chat_template", found)
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list) and all(isinstance(t, dict) and {"name", "template"} <= t.keys() for t in found):
        found = {t["name"]: t["template"] for t in found}
    if isinstance(found, dict) and all(isinstance(t, str) for t in found.values()):
        return found
    raise W4A8Error(f"{source}: chat_template: expected a template, or a list of named ones")


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation.

    Args:
        template: jinja2 source.
        messages: each with at least "role", and usually "content".
        tools: JSON schemas of functions that the model may call.
        variables: further names that the template sees.

    Raises:
        W4A8Error: the template is not valid, refuses the messages (`raise_exception`), or fails on them.
    """
    try:
        compiled = _compile(template)
    except jinja2.TemplateSyntaxError as e:
        raise W4A8Error(f"chat template: line {e.lineno}: {_one_line(e)}") from None
    seen: dict[str, Any] = {"messages": [_plain(m) for m in messages], "tools": _plain(tools), **_plain(variables)}
    try:
        return compiled.render(seen)
    except jinja2.TemplateError as e:
        raise W4A8Error(f"chat template: {_one_line(e)}") from None
    except Exception as e:  # a template is a program: it may fail in any way
        raise W4A8Error(f"chat template: fails on these messages: {type(e).__name__}: {_one_line(e)}") from None


class _Generation(Extension):
    """Renders what is between `generation` and `endgeneration`, which mark the model's turns for training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """jinja2's own escapes HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _plain(value: Any) -> Any:
    """JSON's types alone: a template, which is downloaded code, must not reach methods of the caller's objects."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise W4A8Error(f"chat template: messages, tools and variables must be JSON, found {type(value).__name__}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise W4A8Error(f"{path}: cannot be read: {_one_line(e)}") from None
