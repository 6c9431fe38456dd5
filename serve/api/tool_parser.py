"""Reads tool calls out of a model's text as it arrives."""

from dataclasses import dataclass

from serve.api.tool_families import ToolFamily


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """Plain text for `delta.content`."""

    text: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of one tool call: the first piece of a call has `call_id` and `name`, the later ones arguments only."""

    index: int
    call_id: str | None
    name: str | None
    arguments: str


Delta = ContentDelta | CallDelta


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One whole call; `arguments` is JSON text."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: text (None when it is all calls) and calls."""

    content: str | None
    calls: list[ToolCall]


class ToolParser:
    """One answer's reader; feed it text in any pieces."""

    def __init__(self, family: ToolFamily, tool_names: frozenset[str], *, parallel: bool) -> None:
        self.num_calls = 0

    def feed(self, text: str) -> list[Delta]:
        """Take the next piece of text; return what is certain by now."""
        return [ContentDelta(text)]

    def finish(self) -> list[Delta]:
        """Say that no more text comes; return what was held back."""
        return []


def parse_complete(parser: ToolParser, text: str) -> Answer:
    """Read a whole answer with a fresh parser; a call that is not whole and valid stays content."""
    return Answer(text, [])
