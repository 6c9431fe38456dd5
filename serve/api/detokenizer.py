"""Token ids become text as they arrive.

Owns one sequence's decoding state. Invariants: no piece ever ends in half a UTF-8 character, and the joined pieces do
not depend on how the ids were split. For valid UTF-8 they equal the tokenizer's own decoding; a byte that belongs to
no character becomes one U+FFFD.
"""

from codecs import utf_8_decode
from collections.abc import Iterable

from serve.text.token_bytes import TokenBytes


class Detokenizer:
    """Decodes one sequence; feed it ids in order, then `finish`."""

    def __init__(self, token_bytes: TokenBytes, skipped: frozenset[int], *, at_text_start: bool) -> None:
        """Start a sequence.

        Args:
            skipped: ids that add no text, usually the control tokens.
            at_text_start: only control tokens come before it, so a sentencepiece word's leading space is no text.
        """
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._strip_next = at_text_start and token_bytes.strips_leading_space
        # the beginning of a character
        self._unfinished = b""

    def feed(self, token_ids: Iterable[int]) -> str:
        """Return the text that is certain by now."""
        return self._decode(b"".join([self.bytes_of(token_id) for token_id in token_ids]), is_end=False)

    def feed_one(self, token_id: int) -> str:
        """As `feed`, of one token."""
        return self._decode(b"" if token_id in self._skipped else self._token_bytes[token_id], is_end=False)

    def finish(self) -> str:
        """Return what is left of an unfinished character."""
        return self._decode(b"", is_end=True)

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes that this token adds to the text."""
        return b"" if token_id in self._skipped else self._token_bytes[token_id]

    def _decode(self, data: bytes, *, is_end: bool) -> str:
        if self._unfinished:
            data = self._unfinished + data
        text, num_read = utf_8_decode(data, "replace", is_end)
        self._unfinished = data[num_read:]
        if self._strip_next and text:
            self._strip_next = False
            return text.removeprefix(" ")
        return text
