"""One JSON object recognised character by character, strictly, without building it.

Owns the grammar of RFC 8259 and where in it the text is; `tool_parser` decides what the pieces mean. Invariant: what
was accepted so far is the beginning of a valid JSON object (a number is judged at its end), and each character costs
constant time.
"""

import json
import re

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?\Z")
_NUMBER_CHARS = frozenset("+-.0123456789eE")
_LITERALS = ("true", "false", "null")
_WHITESPACE = frozenset(" \t\n\r")
_ESCAPES = frozenset('"\\/bfnrt')
_HEX = frozenset("0123456789abcdefABCDEF")
_MAX_LEXEME = 400
# the standard parser, which clients use, recurses
_MAX_DEPTH = 64


class JsonScan:
    """Feed it an object's characters from its opening brace; `is_done` after the closing one."""

    def __init__(self) -> None:
        # what may come: "value", "first_value", "key", "first_key", "colon", "comma", or a lexeme: "string", "scalar"
        self._expects = "value"
        self._open: list[str] = []
        self._lexeme: list[str] = []
        self._is_key = False
        self._is_escaped = False
        # digits of \\u that are still to come
        self._num_hex = 0
        # the last key of the outermost object, and that object's members that are strings
        self.key = ""
        self.strings: dict[str, str] = {}
        self.is_done = False

    @property
    def depth(self) -> int:
        """Number of open objects and arrays."""
        return len(self._open)

    def feed(self, char: str) -> bool:
        """Take one character; False when it cannot follow, after which the scan must not be used again."""
        if self.is_done:
            return False
        if self._expects == "string":
            return self._in_string(char)
        if self._expects == "scalar":
            if char in _NUMBER_CHARS or char.isalpha():
                self._lexeme.append(char)
                return self._is_scalar_prefix()
            if not self._end_scalar():
                return False
        return char in _WHITESPACE or self._token(char)

    def _token(self, char: str) -> bool:
        match self._expects:
            case "value" | "first_value":
                return self._begin_value(char)
            case "key" | "first_key":
                if char == "}" and self._expects == "first_key":
                    return self._close("{")
                return char == '"' and self._begin_string(is_key=True)
            case "colon":
                self._expects = "value"
                return char == ":"
            case _:
                return self._after_value(char)

    def _begin_value(self, char: str) -> bool:
        if not self._open and char != "{":
            return False
        if char in "{[":
            if self.depth == _MAX_DEPTH:
                return False
            self._open.append(char)
            self._expects = "first_key" if char == "{" else "first_value"
            return True
        if char == "]" and self._expects == "first_value":
            return self._close("[")
        if char == '"':
            return self._begin_string(is_key=False)
        self._expects, self._lexeme = "scalar", [char]
        return self._is_scalar_prefix()

    def _after_value(self, char: str) -> bool:
        if char == ",":
            self._expects = "key" if self._open[-1] == "{" else "value"
            return True
        return (char == "}" and self._close("{")) or (char == "]" and self._close("["))

    def _close(self, opener: str) -> bool:
        if self._open[-1] != opener:
            return False
        self._open.pop()
        self._expects = "comma"
        self.is_done = not self._open
        return True

    def _begin_string(self, *, is_key: bool) -> bool:
        self._expects, self._lexeme, self._is_key = "string", ['"'], is_key
        return True

    def _in_string(self, char: str) -> bool:
        # kept only where its text matters
        if self.depth == 1:
            self._lexeme.append(char)
        if self._num_hex:
            self._num_hex -= 1
            return char in _HEX
        if self._is_escaped:
            self._is_escaped = False
            self._num_hex = 4 if char == "u" else 0
            return char == "u" or char in _ESCAPES
        if char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._end_string()
        return char >= " "

    def _end_string(self) -> None:
        self._expects = "colon" if self._is_key else "comma"
        if self.depth != 1:
            return
        text = json.loads("".join(self._lexeme))
        if self._is_key:
            self.key = text
        else:
            self.strings[self.key] = text

    def _is_scalar_prefix(self) -> bool:
        text = "".join(self._lexeme[:_MAX_LEXEME])
        if text[0].isalpha():
            return any(literal.startswith(text) for literal in _LITERALS)
        return text[0] in "-0123456789" and len(self._lexeme) < _MAX_LEXEME and not text[1:].strip("+-.0123456789eE")

    def _end_scalar(self) -> bool:
        text = "".join(self._lexeme)
        self._expects = "comma"
        return text in _LITERALS or _NUMBER.match(text) is not None
