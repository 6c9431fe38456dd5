"""Each token id as the exact bytes it stands for, so that text can be built piece by piece without decoding twice.

Owns the reading of the tokenizer's decoder: byte-level BPE, and sentencepiece (metaspace, byte fallback). Invariant:
the joined bytes of a sequence are the bytes of its decoded text, but for a leading space that `strips_leading_space`
names.
"""

import json
import re

from tokenizers import Tokenizer, models

from serve.errors import StartError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_SUPPORTED = "ByteLevel, Metaspace, and sequences of Replace, ByteFallback, Fuse and Strip"


class TokenBytes:
    """Token id -> bytes, looked up once per id."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[int, bytes] = {}
        self._char_bytes: dict[str, int] = {}
        self._replacements: list[tuple[str, str]] = []
        self._has_byte_tokens = False
        self.strips_leading_space = False
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        # a normalised control token is named with the normaliser's leading mark, which is no text
        self._control_texts = {token_id: added[token_id].content for token_id in self.special_ids}
        # without its 150,000 tokens, which as text and as Python's objects took 12 MiB that stayed with the process
        bare = Tokenizer(models.BPE())
        bare.decoder = tokenizer.decoder
        decoder = json.loads(bare.to_str()).get("decoder") or {"type": "none"}
        for step in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
            self._read_step(step)

    def __getitem__(self, token_id: int) -> bytes:
        """Return the token's bytes; an id beyond the vocabulary has none."""
        found = self._cache.get(token_id)
        if found is None:
            token = self._control_texts.get(token_id) or self._tokenizer.id_to_token(token_id)
            found = self._cache[token_id] = b"" if token is None else self._bytes_of(token)
        return found

    def _read_step(self, step: dict[str, object]) -> None:
        match step:
            case {"type": "ByteLevel"}:
                self._char_bytes = byte_level_alphabet()
            case {"type": "Metaspace", "replacement": str(mark)}:
                self._replacements.append((mark, " "))
                self.strips_leading_space = step.get("prepend_scheme", "always") != "never"
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                self._replacements.append((old, new))
            case {"type": "ByteFallback"}:
                self._has_byte_tokens = True
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                self.strips_leading_space = True
            case {"type": "Fuse"} | {"type": "Strip", "start": 0, "stop": 0}:
                pass
            case _:
                raise StartError(f"tokenizer decoder {step.get('type')!r} is not supported; supported: {_SUPPORTED}")

    def _bytes_of(self, token: str) -> bytes:
        if self._has_byte_tokens and (match := _BYTE_TOKEN.match(token)):
            return bytes.fromhex(match[1])
        # added tokens may hold characters outside the byte alphabet: they stand for themselves
        if self._char_bytes and all(char in self._char_bytes for char in token):
            return bytes(self._char_bytes[char] for char in token)
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode("utf-8", "replace")


def byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's mapping of printable characters to bytes.

    Source: openai/gpt-2 src/encoder.py, `bytes_to_unicode` (MIT), inverted.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet
