"""Questions about adapter memory and the operator's commands on it, their answers, and what became of each adapter.

Owns the open questions, the pins that the engine acknowledged (an engine that starts again is told of them), and the
history that heartbeats told. Event loop only. Invariants: each question ends in one answer or error; what is
remembered of adapters that are gone is bounded.
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from serve.adapter_messages import (
    AdapterDone,
    AdapterMove,
    AskReady,
    EvictAdapter,
    PinAdapter,
    Question,
    UnpinAdapter,
)
from serve.api.request_stream import RETRY_AFTER_S, error_from
from serve.errors import EngineFailed, ServeError, Unavailable
from serve.messages import Command, Failed, Stats

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 10.0
MAX_HISTORIES = 4096


@dataclass(slots=True)
class AdapterHistory:
    """What became of one adapter on this replica since its start."""

    num_loads: int = 0
    # for whatever cause it left the device
    num_evictions: int = 0
    # into host memory
    num_fetches: int = 0
    # of the last load and the last fetch
    load_s: float | None = None
    fetch_s: float | None = None


@dataclass(slots=True)
class _Open:
    """A question that the engine has not answered yet."""

    command: Question
    answer: "asyncio.Future[AdapterDone]"


class AdapterDesk:
    """The operator's side of one engine, across its restarts."""

    def __init__(self, send: Callable[[Command], None], refuse_if_down: Callable[[], None]) -> None:
        """Prepare.

        Args:
            send: hands a command to the engine.
            refuse_if_down: raises a ServeError while the engine takes no commands.
        """
        self._send = send
        self._refuse_if_down = refuse_if_down
        self._questions: dict[str, _Open] = {}
        self._num_asked = 0
        # ordered; a set would forget which pin came first
        self._pins: dict[str, None] = {}
        self._histories: OrderedDict[str, AdapterHistory] = OrderedDict()

    async def pin(self, digest: str) -> None:
        """Load an adapter and keep it in memory; returns once the engine has promised it, before it is loaded.

        Raises:
            Conflict: too many are pinned. Unavailable: it can never be loaded here. ServeError: no engine answers.
        """
        await self._ask(PinAdapter(self._next_id(), digest))

    async def unpin(self, digest: str) -> None:
        """Let an adapter go when its room is needed; raises ServeError if no engine answers."""
        await self._ask(UnpinAdapter(self._next_id(), digest))

    async def evict(self, digest: str) -> AdapterDone:
        """Free an adapter's memory, now or when the last running sequence lets go.

        Raises:
            Conflict: it is pinned. ServeError: no engine answers.
        """
        return await self._ask(EvictAdapter(self._next_id(), digest))

    async def is_ready(self, digests: tuple[str, ...], tenant: str, tenant_weight: float) -> bool:
        """Say whether adapters are on the device, as the engine knows it; a prefetch of those that are not begins.

        Raises:
            Unavailable: they can never be loaded here. ServeError: no engine answers.
        """
        done = await self._ask(AskReady(self._next_id(), digests, tenant, tenant_weight))
        return not done.is_pending

    @property
    def pinned(self) -> tuple[str, ...]:
        """Return what the operator has pinned here, oldest pin first."""
        return tuple(self._pins)

    def is_pinned(self, digest: str) -> bool:
        """Say whether the operator has pinned an adapter here."""
        return digest in self._pins

    def history(self, digest: str) -> AdapterHistory:
        """Return what became of an adapter so far."""
        return self._histories.get(digest, AdapterHistory())

    def forget(self, digest: str) -> None:
        """Note that an adapter is unloaded for good: its pin goes with it."""
        self._pins.pop(digest, None)

    def saw_heartbeat(self, stats: Stats) -> None:
        """Learn what moved."""
        for move in stats.adapter_moves:
            self._record(move)

    def saw(self, event: AdapterDone | Failed) -> bool:
        """Take an event if it answers one of the questions here, also one whose asker has left."""
        question = self._questions.pop(event.request_id, None)
        if question is None:
            return False
        command, answer = question.command, question.answer
        if isinstance(event, Failed):
            self._take_failure(command, error_from(event), answer)
            return True
        if isinstance(command, PinAdapter):
            self._pins[command.digest] = None
        elif isinstance(command, UnpinAdapter):
            self._pins.pop(command.digest, None)
        if not answer.done():
            answer.set_result(event)
        return True

    def engine_started(self) -> None:
        """Ask a new engine for the pins that its predecessor had acknowledged."""
        for digest in self._pins:
            command = PinAdapter(self._next_id(), digest)
            # nobody waits for this answer
            self._questions[command.request_id] = _Open(command, asyncio.get_running_loop().create_future())
            self._questions[command.request_id].answer.cancel()
            self._send(command)

    def engine_lost(self) -> None:
        """End every open question: its engine is gone."""
        questions, self._questions = self._questions, {}
        for question in questions.values():
            if not question.answer.done():
                question.answer.set_exception(EngineFailed("the engine stopped; send the request again"))

    async def _ask(self, command: Question) -> AdapterDone:
        self._refuse_if_down()
        answer: asyncio.Future[AdapterDone] = asyncio.get_running_loop().create_future()
        self._questions[command.request_id] = _Open(command, answer)
        self._send(command)
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(answer, ANSWER_TIMEOUT_S)
        raise Unavailable(
            f"the engine did not answer within {ANSWER_TIMEOUT_S:g} s; it may still do what was asked: see the status",
            retry_after_s=RETRY_AFTER_S,
        )

    def _take_failure(self, command: Question, error: ServeError, answer: "asyncio.Future[AdapterDone]") -> None:
        if not answer.done():
            answer.set_exception(error)
        elif isinstance(command, PinAdapter) and command.digest in self._pins:
            logger.warning("adapter %s is not pinned any more: %s", command.digest, error)
            del self._pins[command.digest]

    def _record(self, move: AdapterMove) -> None:
        history = self._histories.setdefault(move.digest, AdapterHistory())
        self._histories.move_to_end(move.digest)
        if move.tier == "host":
            if move.kind == "load":
                history.num_fetches += 1
                history.fetch_s = move.seconds
        elif move.kind == "load":
            history.num_loads += 1
            history.load_s = move.seconds
        else:
            history.num_evictions += 1
        if len(self._histories) > MAX_HISTORIES:
            self._histories.popitem(last=False)

    def _next_id(self) -> str:
        self._num_asked += 1
        # no request of a client has such an id: theirs hold no space
        return f"operator {self._num_asked}"
