"""Reads tool calls out of a model's text as it arrives.

Owns the walk through one answer: text, opener, call, closer, text. A call's arguments are passed on as they come once
its name is known. Invariant: the same text gives the same content and calls however it was cut, nothing is evaluated,
and what is no valid call of a known tool comes out as the content that it is.
"""

import json
import secrets
from dataclasses import dataclass, replace

from serve.api.json_scan import JsonScan
from serve.api.tool_families import FRAMINGS, ToolFamily

_WHITESPACE = " \t\r\n"
_ARGUMENTS_KEYS = ("arguments", "parameters")


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
        self._framing = FRAMINGS[family]
        self._tool_names = tool_names
        self._parallel = parallel
        self.num_calls = 0
        # False: a call is passed on only when it is whole
        self.is_eager = True
        # text that may still become part of a call; what it is so far decides where we are
        self._held = ""
        self._place = _TEXT
        self._has_content = False
        self._call: _Call | None = None
        self._deltas: list[Delta] = []

    def feed(self, text: str) -> list[Delta]:
        """Take the next piece of text; return what is certain by now."""
        for char in text:
            self._step(char)
        return self._take()

    def finish(self) -> list[Delta]:
        """Say that no more text comes; return what was held back."""
        lost_separator = self._place == _AFTER or (self._place == _TEXT and self.num_calls and self._held.isspace())
        if not lost_separator and (self._call is None or not self._call.is_announced):
            self._emit(self._held)
        self._held, self._call, self._place = "", None, _END
        return self._take()

    def _take(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def _step(self, char: str) -> None:
        if self._place == _TEXT:
            self._in_text(char)
        elif self._place == _CALL and self._call is not None:
            self._in_call(self._call, char)
        elif self._place == _BEFORE:
            self._before_call(char)
        elif self._place == _AFTER:
            self._after_call(char)

    def _in_text(self, char: str) -> None:
        self._held += char
        opener = self._framing.opener
        if self._held.endswith(opener):
            # white space between text and a call belongs to neither, if it is a call
            text = self._held[: -len(opener)].rstrip(_WHITESPACE)
            self._emit(text)
            self._held, self._place = self._held[len(text) :], _BEFORE
        elif char == "{" and self._framing.may_be_bare and not self._has_content and not self._held[:-1].strip():
            self._begin_call(char)
        else:
            keep = _held_back(self._held, opener)
            self._emit(self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]

    def _before_call(self, char: str) -> None:
        opens_list = self._framing.is_list and char == "[" and self._held.strip(_WHITESPACE) == self._framing.opener
        if char == "{":
            self._held += char
            self._begin_call(char)
        elif char in _WHITESPACE or opens_list:
            self._held += char
        else:
            self._give_up(char)

    def _begin_call(self, char: str) -> None:
        self._call = _Call(self._tool_names)
        self._call.feed(char)
        self._place = _CALL

    def _in_call(self, call: "_Call", char: str) -> None:
        if not call.feed(char) or (call.scan.is_done and not call.is_valid()):
            if call.is_announced:
                # its beginning is already out: only the rest can be told as text
                self._held = ""
            self._give_up(char)
            return
        self._held += char
        if self.is_eager:
            self._pass_on(call, call.new_arguments())
        if not call.scan.is_done:
            return
        if not call.is_announced:
            self._pass_on(call, call.arguments())
        self._call, self._held = None, ""
        self._place = _AFTER if self._parallel else _END

    def _after_call(self, char: str) -> None:
        closer = self._framing.closer
        self._held += char
        rest = self._held.lstrip(_WHITESPACE)
        if closer:
            if rest == closer:
                self._held, self._place = "", _TEXT
            elif rest and not closer.startswith(rest):
                self._replay()
        elif char == "{":
            self._held = char
            self._begin_call(char)
        elif self._framing.is_list and char == "]":
            self._held, self._place = "", _TEXT
        elif char not in (_WHITESPACE + (",]" if self._framing.is_list else ";,")):
            self._replay()

    def _replay(self) -> None:
        """Read held text again as plain text: no closer or further call came."""
        held, self._held, self._place = self._held, "", _TEXT
        for char in held:
            self._step(char)

    def _give_up(self, char: str) -> None:
        """No call after all: what was held is content, and `char` may begin something new."""
        self._emit(self._held)
        self._held, self._call, self._place = "", None, _TEXT
        self._step(char)

    def _pass_on(self, call: "_Call", arguments: str) -> None:
        if not arguments:
            return
        last = self._deltas[-1] if self._deltas else None
        if not call.is_announced:
            call.is_announced = True
            self.num_calls += 1
            self._deltas.append(CallDelta(self.num_calls - 1, call.call_id, call.name, arguments))
        elif isinstance(last, CallDelta):
            # nothing comes between the pieces of one call
            self._deltas[-1] = replace(last, arguments=last.arguments + arguments)
        else:
            self._deltas.append(CallDelta(self.num_calls - 1, None, None, arguments))

    def _emit(self, text: str) -> None:
        if not text:
            return
        self._has_content = True
        last = self._deltas[-1] if self._deltas else None
        if isinstance(last, ContentDelta):
            self._deltas[-1] = ContentDelta(last.text + text)
        else:
            self._deltas.append(ContentDelta(text))


_TEXT, _BEFORE, _CALL, _AFTER, _END = "text", "before", "call", "after", "end"


class _Call:
    """One call's object as it arrives."""

    def __init__(self, tool_names: frozenset[str]) -> None:
        self.call_id = f"call_{secrets.token_hex(12)}"
        self.scan = JsonScan()
        self.is_announced = False
        self._tool_names = tool_names
        self._chars: list[str] = []
        # where the object of the arguments begins and ends, and how much of it is out
        self._begin: int | None = None
        self._end: int | None = None
        self._num_passed = 0

    @property
    def name(self) -> str:
        """The tool's name; "" until it is whole."""
        return self.scan.strings.get("name", "")

    def feed(self, char: str) -> bool:
        """Take one character; False when the text is no JSON object any more."""
        depth = self.scan.depth
        if not self.scan.feed(char):
            return False
        self._chars.append(char)
        is_arguments = self.scan.key in _ARGUMENTS_KEYS and self._end is None
        if is_arguments and char == "{" and (depth, self.scan.depth) == (1, 2):
            self._begin = len(self._chars) - 1
        elif is_arguments and char == "}" and (depth, self.scan.depth) == (2, 1) and self._begin is not None:
            self._end = len(self._chars)
        return True

    def new_arguments(self) -> str:
        """Return the arguments' text that was not passed on yet; "" while the tool is unknown."""
        if self._begin is None or self.name not in self._tool_names:
            return ""
        fragment = "".join(self._chars[self._begin + self._num_passed : self._end])
        self._num_passed += len(fragment)
        return fragment

    def is_valid(self) -> bool:
        """Say whether the whole object is a call of a known tool."""
        return self.name in self._tool_names and self.arguments() != ""

    def arguments(self) -> str:
        """Return the whole object's arguments as JSON text; "" when they are no object."""
        if self._begin is not None:
            return "".join(self._chars[self._begin : self._end])
        key = next((key for key in _ARGUMENTS_KEYS if key in json.loads("".join(self._chars))), None)
        # no arguments at all is a call without any; some models write the object as a string
        return "{}" if key is None else _object_text(self.scan.strings.get(key, ""))


def _object_text(text: str) -> str:
    scan = JsonScan()
    stripped = text.strip(_WHITESPACE)
    is_whole = all(scan.feed(char) for char in stripped) and scan.is_done
    return stripped if is_whole and _is_encodable(stripped) else ""


def _is_encodable(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _held_back(text: str, opener: str) -> int:
    """Return how many characters at the end may belong to what follows: white space and an opener's beginning."""
    longest = min(len(opener) - 1, len(text))
    partial = next((size for size in range(longest, 0, -1) if opener.startswith(text[-size:])), 0)
    head = text[: len(text) - partial]
    return partial + len(head) - len(head.rstrip(_WHITESPACE))


def parse_complete(parser: ToolParser, text: str) -> Answer:
    """Read a whole answer with a fresh parser; a call that is not whole and valid stays content."""
    parser.is_eager = False
    deltas = [*parser.feed(text), *parser.finish()]
    content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    calls = [
        ToolCall(delta.call_id, delta.name, delta.arguments)
        for delta in deltas
        if isinstance(delta, CallDelta) and delta.call_id is not None and delta.name is not None
    ]
    return Answer(content if content or not calls else None, calls)
