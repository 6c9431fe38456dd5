"""The base's chat template: messages become the text the model was trained on.

Owns the jinja environment (immutable sandbox) and its few extra names. The template is the operator's own file; only
the messages are foreign. Invariant: rendering has no side effects and its output is bounded.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serve.errors import InvalidRequest, StartError

Json = dict[str, object]

MAX_RENDERED_CHARS = 16 << 20


class ChatTemplate:
    """One model's template, compiled once. Thread-safe."""

    def __init__(self, source: str, tool_source: str | None, names: Mapping[str, str]) -> None:
        self.source = source
        self._names = dict(names)
        environment = _build_environment()
        try:
            self._template = environment.from_string(source)
            self._tool_template = environment.from_string(tool_source) if tool_source else self._template
        except TemplateSyntaxError as error:
            raise StartError(f"the model's chat template is broken at line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Json], tools: Sequence[Json] | None, *, add_generation_prompt: bool) -> str:
        """Return the chat as text.

        Raises:
            InvalidRequest: the template refuses these messages, or the text would be too long.
        """
        template = self._tool_template if tools else self._template
        pieces: list[str] = []
        size = 0
        try:
            for piece in template.generate(
                messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **self._names
            ):
                size += len(piece)
                if size > MAX_RENDERED_CHARS:
                    raise InvalidRequest(
                        f"the rendered chat exceeds {MAX_RENDERED_CHARS} characters; send less", param="messages"
                    )
                pieces.append(piece)
        except (
            TemplateError,
            SecurityError,
            TypeError,
            ValueError,
            AttributeError,
            LookupError,
            ArithmeticError,
        ) as error:
            reason = str(error) if isinstance(error, TemplateError) else "a field is missing or of another kind"
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {reason[:200]}", param="messages"
            ) from error
        return "".join(pieces)


def read_chat_template(model_dir: Path, config: Mapping[str, object], names: Mapping[str, str]) -> ChatTemplate | None:
    """Read `chat_template.jinja`, else the string or list in `tokenizer_config.json`; None when there is neither."""
    path = model_dir / "chat_template.jinja"
    declared: object = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(declared, str):
        return ChatTemplate(declared, None, names)
    if isinstance(declared, list):
        by_name = {str(entry["name"]): str(entry["template"]) for entry in declared}
        source = by_name.get("default") or next(iter(by_name.values()), None)
        return ChatTemplate(source, by_name.get("tool_use"), names) if source is not None else None
    return None


def _build_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(Extension):
    """Tolerates `{% generation %}`, which training tools use to mark the assistant's tokens."""

    # jinja declares an instance variable, and reads the class's
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Return the tag's body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Dump without jinja's HTML escapes, which models were never trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
