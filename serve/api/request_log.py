"""One JSON line per request: who asked what of which adapter, what came of it, and where its time went.

Owns the record of a request and the line's shape. Invariants: one line per request, whatever way it ends; never a word
of a prompt or an answer; whatever a client spelled is escaped to ASCII and cut, so no line can forge another.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol, cast

import msgspec
from fastapi import Request
from starlette.types import Message, Scope

from adapters_store.store import AdapterRef
from serve.api.output import Piece
from serve.api.target import Target
from serve.messages import Started
from serve.tenants.principal import Principal

logger = logging.getLogger("chorale.request")

_MAX_CHARS = 200
# asked for every few milliseconds, and of no interest unless they fail
QUIET_ROUTES = frozenset({"/livez", "/readyz", "/health", "/metrics"})
# as nginx writes a client that left before its answer
_CLIENT_GONE = 499

Json = dict[str, object]


@dataclass(slots=True)
class RequestRecord:
    """What is known of one request so far; times in seconds of `clock`."""

    request_id: str
    clock: Callable[[], float] = time.monotonic
    begin_s: float = 0.0
    status: int = _CLIENT_GONE
    error_code: str | None = None
    has_begun: bool = False
    has_ended: bool = False
    model: str | None = None
    adapters: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()
    # adapters that were asked for, were cold, and did not act
    stood_in_for: tuple[str, ...] = ()
    num_prompt_tokens: int | None = None
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    finish_reasons: dict[int, str] = field(default_factory=dict)
    # of several sequences the longest
    queue_s: float = 0.0
    load_s: float = 0.0
    # the one whose prompt was computed last, by the engine's own times
    slowest: Started | None = None
    handed_over_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None

    def __post_init__(self) -> None:
        self.begin_s = self.clock()

    def asks(self, model: str) -> None:
        """Note how the client spelled the model, before anybody knows whether there is one."""
        self.model = model

    def runs(self, target: Target, prompts: Sequence[list[int]]) -> None:
        """Note what acts and how long the prompts are; from now on the engine has it."""
        # of a base that stands in, the client's own spelling is noted already
        self.model = self.model if target.stands_in_for else target.model
        self.adapters = _names(target.adapters)
        self.digests = target.digests
        self.stood_in_for = _names(target.stands_in_for)
        self.num_prompt_tokens = sum(map(len, prompts))
        self.handed_over_s = self.clock()

    def saw(self, piece: Piece) -> None:
        """Take one piece of the answer, of which only the times and counts are kept."""
        if piece.started is not None:
            self.queue_s = max(self.queue_s, piece.started.queue_s)
            self.load_s = max(self.load_s, piece.started.adapter_load_s)
            self.num_cached_tokens += piece.started.num_cached_tokens
            if self.slowest is None or _seconds_to_start(piece.started) > _seconds_to_start(self.slowest):
                self.slowest = piece.started
        if piece.token_ids:
            self.last_token_s = self.clock()
            self.first_token_s = self.last_token_s if self.first_token_s is None else self.first_token_s
            self.num_output_tokens += len(piece.token_ids)
        if piece.finish_reason is not None:
            self.finish_reasons[piece.index] = piece.finish_reason

    def sends(self, message: Message) -> None:
        """Take one message of the answer on its way out: its status, the code of a refusal, its end."""
        if message["type"] == "http.response.start":
            self.status, self.has_begun = message["status"], True
        elif message["type"] == "http.response.body":
            if self.status >= 400 and self.error_code is None:
                self.error_code = _code_in(message.get("body", b""))
            self.has_ended = not message.get("more_body", False)

    def fails(self, code: str | None) -> None:
        """Note the error that ended a stream whose headers were out."""
        self.error_code = code

    def write(self, scope: Scope) -> None:
        """Log the line; called once, when nothing more can happen."""
        route = getattr(scope.get("route"), "path", None)
        if route in QUIET_ROUTES and self.status < 400:
            return
        logger.info("%s", json.dumps(self._line(scope, route), ensure_ascii=True, separators=(",", ":")))

    def _line(self, scope: Scope, route: str | None) -> Json:
        principal: Principal | None = scope["state"].get("principal")
        return {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": "request",
            "request_id": self.request_id,
            "method": shown(str(scope["method"])),
            "route": route if route is not None else shown(str(scope["path"])),
            "status": self.status,
            "is_complete": self.has_ended,
            "error_code": self.error_code,
            "tenant": None if principal is None else principal.tenant,
            "key_id": None if principal is None else principal.key_id,
            "model": None if self.model is None else shown(self.model),
            "adapters": list(self.adapters),
            "adapter_digests": list(self.digests),
            "base_stood_in_for": list(self.stood_in_for),
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            "output_tokens": self.num_output_tokens,
            "finish_reasons": [reason for _, reason in sorted(self.finish_reasons.items())],
            "ms": self._milliseconds(),
        }

    def _milliseconds(self) -> dict[str, float]:
        found = {"total": self.clock() - self.begin_s}
        if self.handed_over_s is not None:
            found |= {"prepare": self.handed_over_s - self.begin_s, "queue": self.queue_s, "load": self.load_s}
            if self.first_token_s is not None and self.last_token_s is not None:
                found["first_token"] = self.first_token_s - self.begin_s
                waited_s = self.handed_over_s + self.queue_s + self.load_s
                found["prefill"] = max(0.0, self.first_token_s - waited_s)
                found["decode"] = self.last_token_s - self.first_token_s
        return {name: round(1000 * seconds, 1) for name, seconds in found.items()}


class RequestObserver(Protocol):
    """Who is told of every request that has ended, beside the log."""

    def ended(self, record: RequestRecord, scope: Scope) -> None:
        """Take a request's record; called in the event loop, and must not wait."""
        ...

    def close(self) -> None:
        """Hand on what is left; blocks, for seconds at most."""
        ...


def record_of(request: Request) -> RequestRecord:
    """Return the record that the outermost layer keeps of this request."""
    return cast(RequestRecord, request.state.record)


def _names(refs: Sequence[AdapterRef]) -> tuple[str, ...]:
    return tuple(f"{ref.name}@{ref.version}" for ref in refs)


def shown(text: str) -> str:
    """Cut what a client spelled."""
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}..."


def _seconds_to_start(started: Started) -> float:
    return started.queue_s + started.adapter_load_s + started.prefill_s


def _code_in(body: bytes) -> str | None:
    """Return the code of one of our own error bodies."""
    try:
        code = msgspec.json.decode(body)["error"]["code"]
    except (msgspec.DecodeError, KeyError, TypeError):
        return None
    return code if isinstance(code, str) else None
