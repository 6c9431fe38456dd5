"""Stop strings, found in text that arrives in pieces.

Owns the text that may still turn out to be the beginning of a stop string. Invariant: the released text never holds a
stop string's beginning that a later piece completes, and the result does not depend on how the text was split.
"""

from collections.abc import Sequence


class StopStrings:
    """The matcher of one sequence. After a match it releases nothing more."""

    def __init__(self, strings: Sequence[str], *, include_in_output: bool = False) -> None:
        self._strings = tuple(strings)
        self._include = include_in_output
        self._held = ""
        self.has_matched = False

    def feed(self, text: str) -> str:
        """Take the next piece; return the text that may be shown. Sets `has_matched` at the earliest stop string."""
        if self.has_matched:
            return ""
        if not self._strings:
            return text
        self._held += text
        match = self._first_match()
        if match is not None:
            start, end = match
            self.has_matched = True
            return self._held[: end if self._include else start]
        return self._release(len(self._held) - self._overlap())

    def finish(self) -> str:
        """Return what was held back: no more text comes."""
        return "" if self.has_matched else self._release(len(self._held))

    def _first_match(self) -> tuple[int, int] | None:
        """Return the match that ends first; among those, the longest: what any splitting of the text would find."""
        spans = [(self._held.find(text), text) for text in self._strings]
        found = [(start + len(text), start) for start, text in spans if start >= 0]
        if not found:
            return None
        end, start = min(found)
        return start, end

    def _overlap(self) -> int:
        longest = 0
        for text in self._strings:
            for size in range(min(len(text) - 1, len(self._held)), longest, -1):
                if text.startswith(self._held[-size:]):
                    longest = size
                    break
        return longest

    def _release(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        return text
