"""Server-sent events out of a byte stream, and what one event of the OpenAI API says.

Owns framing and reading of events; knows no socket. Invariant: however the bytes are cut into chunks, the same events
come out in the same order.

Source: the WHATWG HTML standard, 9.2 (lines end with LF, CR LF or CR; a blank line ends an event; a leading colon is a
comment).
"""

from dataclasses import dataclass

import orjson

DONE = b"[DONE]"


class EventReader:
    """Collects bytes, gives back the data of the events they complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._ended_on_cr = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the data of every event that ends in `chunk`."""
        if self._ended_on_cr and chunk:
            # a line ends at its CR; an LF behind it belongs to it, also when it comes in another chunk
            chunk = chunk.removeprefix(b"\n")
            self._ended_on_cr = False
        if b"\r" in chunk:
            self._ended_on_cr = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


@dataclass(slots=True)
class Piece:
    """What one event says. `has_token`: it carries text, a tool call or token ids."""

    text: str = ""
    has_token: bool = False
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    fingerprint: str | None = None
    error: str | None = None


def read_piece(data: bytes) -> Piece:
    """Read one event's JSON; what is no such event is an error piece."""
    try:
        value = orjson.loads(data)
        if not isinstance(value, dict):
            raise ValueError("not an object")
        if error := value.get("error"):
            return Piece(error=str(error.get("message", error) if isinstance(error, dict) else error)[:300])
        piece = Piece(fingerprint=value.get("system_fingerprint"))
        if usage := value.get("usage"):
            piece.num_prompt_tokens = int(usage["prompt_tokens"])
            piece.num_output_tokens = int(usage["completion_tokens"])
        for choice in value.get("choices") or ():
            _read_choice(piece, choice)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return Piece(error=f"not an event of the API: {data[:200]!r} ({error})")
    return piece


def _read_choice(piece: Piece, choice: dict[str, object]) -> None:
    delta = choice.get("delta")
    source = delta if isinstance(delta, dict) else choice
    for key in ("text", "content", "reasoning_content", "reasoning"):
        if isinstance(text := source.get(key), str):
            piece.text += text
    token_ids = choice.get("token_ids")
    if isinstance(token_ids, list):
        piece.token_ids += tuple(int(token_id) for token_id in token_ids)
    piece.has_token = piece.has_token or bool(piece.text or piece.token_ids or source.get("tool_calls"))
    if isinstance(reason := choice.get("finish_reason"), str):
        piece.finish_reason = reason
