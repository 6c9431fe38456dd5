"""The short way of a token: from the engine's frame to the socket in one call, without waking the stream's task.

Owns when it is taken. The long way, the task that reads the sequence and sends its frames, goes on beside it and does
all the rest: begin, end, errors, silence, slow clients. Invariants: a token goes one way or the other, in the order in
which it came; the short one only while the task waits for the engine and the connection takes bytes at once; what
fails on it fails in the task, as on the long way.
"""

from collections.abc import Callable, Sequence

from serve.api.direct_body import DirectBody
from serve.api.output import OutputReader, Piece
from serve.messages import Finished, Started, Tokens


class Outlet:
    """Where a stream's pieces leave at once, while its answer is open for them. Event loop only."""

    def __init__(self, frames_of: Callable[[Piece], Sequence[bytes]]) -> None:
        self._frames_of = frames_of
        self._body: DirectBody | None = None

    def open(self, body: DirectBody | None) -> None:
        """Begin: the head of the answer is sent, and whoever sends the rest waits for pieces."""
        self._body = body

    def close(self) -> None:
        """End: nothing leaves any more."""
        self._body = None

    @property
    def is_open(self) -> bool:
        """Say whether a piece can leave now."""
        return self._body is not None and self._body.is_open

    def put(self, piece: Piece) -> None:
        """Send what a piece amounts to; only while open."""
        assert self._body is not None, "only an open outlet takes pieces"
        for frame in self._frames_of(piece):
            self._body.write(frame)


class ShortWay:
    """One sequence's choice of the way, in front of its reader."""

    def __init__(self, reader: OutputReader, outlet: Outlet | None, clock: Callable[[], float], end_s: float) -> None:
        """Prepare; from `end_s` on, in seconds of `clock`, every event goes the long way, where the request ends."""
        self._reader = reader
        self._outlet = outlet
        self._clock = clock
        self._end_s = end_s
        # what came of the event that was read here and goes the long way after all: it comes by next
        self._left: Piece | Exception | None = None

    def take(self, event: Tokens) -> bool:
        """Send the piece of an event at once; False if it must go the long way."""
        if self._outlet is None or not self._outlet.is_open or self._clock() >= self._end_s:
            return False
        # the wall between streams: one that fails must not keep the engine's frame from the others
        try:
            piece = self._reader.read(event)
            if piece.finish_reason is None:
                self._outlet.put(piece)
                return True
            self._left = piece
        except Exception as error:
            self._left = error
        return False

    def read(self, event: Started | Tokens | Finished) -> Piece:
        """Return the piece of an event on the long way; raises what failed on the short one."""
        left, self._left = self._left, None
        if isinstance(left, Exception):
            raise left
        return self._reader.read(event) if left is None else left
