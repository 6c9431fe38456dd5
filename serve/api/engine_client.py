"""The API's end of the engine: admission, and each request's events from the socket to its reader.

Owns the open streams and what was admitted; the process behind is `EngineSupervisor`'s. Tokenises nothing, knows no
HTTP. Invariants: every stream that was opened ends exactly once, also when the engine dies or hangs; a stream that its
reader leaves early is aborted in the engine; at rest there are no streams and no reservations.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Callable

from serve.adapter_messages import AdapterDone
from serve.api.adapter_desk import AdapterDesk
from serve.api.engine_gateway import SequenceEvent
from serve.api.open_streams import OpenStreams
from serve.api.portions import Portions
from serve.api.request_stream import RETRY_AFTER_S, RequestStream, Take, draining, queue_full, stopped
from serve.config import EngineConfig, LimitsConfig, WatchdogConfig
from serve.engine.launch import WORKER_MODULE
from serve.engine.supervisor import EngineSupervisor
from serve.errors import Conflict, EngineLoading
from serve.messages import (
    Command,
    Embed,
    Embedded,
    Event,
    Failed,
    Finished,
    LoadAdapter,
    Ready,
    Started,
    Stats,
    Submit,
    Tokens,
    UnloadAdapter,
)
from serve.metrics import Metrics


class EngineClient:
    """The gateway (`serve.api.engine_gateway`) to one engine process. All methods: event loop only."""

    def __init__(
        self,
        engine: EngineConfig,
        limits: LimitsConfig,
        watchdog: WatchdogConfig,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
        worker_module: str = WORKER_MODULE,
    ) -> None:
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._streams = OpenStreams(self._send)
        self._reserved: dict[asyncio.Task[object], int] = {}
        self._outbox: list[Command] = []
        self._portions = Portions(self._hand_out)
        self._is_draining = False
        self._stats: Stats | None = None
        self.desk = AdapterDesk(self._send, self._refuse_if_down)
        self._supervisor = EngineSupervisor(
            engine,
            watchdog,
            clock,
            on_events=self._portions.take,
            on_lost=self._lose_engine,
            on_check=self._end_stalled,
            worker_module=worker_module,
        )

    @property
    def stats(self) -> Stats | None:
        """The last heartbeat; None before the first one and while the engine is down."""
        return self._stats

    @property
    def ready(self) -> Ready | None:
        """What the engine learnt at start-up; None until its first start is done."""
        return self._supervisor.ready

    @property
    def is_live(self) -> bool:
        """Say whether the engine's heartbeat is recent, or its start is still within its time."""
        return self._supervisor.is_live

    @property
    def is_ready(self) -> bool:
        """Say whether requests are accepted and the engine makes progress."""
        return self._supervisor.is_serving and not self._is_draining

    @property
    def is_draining(self) -> bool:
        """Say whether the server is on its way down and takes no new sequences."""
        return self._is_draining

    @property
    def num_in_flight(self) -> int:
        """Sequences that were admitted or opened and have not ended."""
        return max(sum(self._reserved.values()), len(self._streams))

    @property
    def engine_pid(self) -> int | None:
        """The engine's process id; None between two lives."""
        return self._supervisor.pid

    def start(self) -> None:
        """Begin to start the engine; requests get `EngineLoading` until it is ready."""
        self._supervisor.start()

    async def wait_ready(self) -> Ready:
        """Wait for the engine's first start.

        Raises:
            StartError: it did not start.
        """
        return await self._supervisor.wait_ready()

    async def drain(self, deadline_s: float) -> None:
        """Refuse new sequences and wait for the open ones, at most `deadline_s`; the rest end with an error."""
        self._is_draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._streams.wait_empty(), deadline_s)
        self._streams.fail_all(draining)

    async def close(self) -> None:
        """End the engine and every stream; idempotent."""
        self._is_draining = True
        await self._supervisor.stop()
        self._streams.fail_all(draining)

    def admit(self, num_sequences: int) -> None:
        """Refuse at once what cannot be taken; called before any tokenising.

        What is admitted counts as in flight until the calling task ends, so that a burst cannot pass while the first
        requests are still being tokenised.

        Raises:
            QueueFull: as many sequences are in flight as the server lets in.
            EngineLoading: the engine starts, or starts again. Unavailable: the server is shutting down.
        """
        self._refuse_if_down()
        self._refuse_if_full(num_sequences)
        task = asyncio.current_task()
        assert task is not None, "admit is called inside a request's task"
        if task not in self._reserved:
            task.add_done_callback(self._reserved.pop)
        self._reserved[task] = self._reserved.get(task, 0) + num_sequences

    async def generate(self, submit: Submit) -> AsyncGenerator[SequenceEvent, None]:
        """Submit one sequence when first iterated, and yield its events in order.

        Raises:
            ServeError: the sequence failed, the queue is full, or the engine is gone.
        Notes: closing the generator (`aclose`, cancellation) sends `Abort` when no terminal event was seen.
        """
        async with contextlib.aclosing(self.follow(submit, math.inf)) as events:
            async for event in events:
                assert event is not None, "nothing is said about endless silence"
                yield event

    async def follow(
        self, submit: Submit, silence_s: float, take: Take | None = None
    ) -> AsyncGenerator[SequenceEvent | None, None]:
        """As `generate`, with None after each `silence_s` without an event; what `take` takes is not yielded."""
        stream = self._open(submit, take)
        try:
            while True:
                event = await stream.read_within(silence_s)
                assert not isinstance(event, Embedded), "a Submit is never answered by Embedded"
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self._streams.close(submit.request_id, stream)

    async def embed(self, embed: Embed) -> list[float]:
        """Run the prompt and return its pooled hidden state.

        Raises:
            ServeError: the request failed, the queue is full, or the engine is gone.
        """
        stream = self._open(embed)
        try:
            event = await stream.read()
            # the engine says when the prompt's first part was computed, as for any sequence
            if isinstance(event, Started):
                event = await stream.read()
            assert isinstance(event, Embedded), "an Embed ends with Embedded or an error"
            return event.vector
        finally:
            self._streams.close(embed.request_id, stream)

    def load_adapter(self, digest: str) -> None:
        """Ask the engine to bring an adapter into memory; returns at once."""
        self._send(LoadAdapter(digest))

    def unload_adapter(self, digest: str) -> None:
        """Ask the engine to forget an adapter once its last pin is gone; returns at once."""
        self.desk.forget(digest)
        self._send(UnloadAdapter(digest))

    def _open(self, request: Submit | Embed, take: Take | None = None) -> RequestStream:
        self._refuse_if_down()
        if len(self._streams) >= self._limits.max_in_flight:
            self._refuse_if_full(1)
        if request.request_id in self._streams:
            raise Conflict(f"request id {request.request_id!r} is in use by a running request; send another one")
        digests = [digest for digest, _ in request.adapters]
        if request.adapter_digest is not None:
            digests.append(request.adapter_digest)
        stream = RequestStream(self._clock, self._metrics.open_request(*digests), take)
        self._streams.add(request.request_id, stream)
        self._send(request)
        return stream

    def _refuse_if_down(self) -> None:
        if self._is_draining:
            raise draining()
        if not self._supervisor.is_serving:
            self._metrics.count_rejection("model_loading")
            raise EngineLoading("the engine is starting; send the request again", retry_after_s=RETRY_AFTER_S)

    def _refuse_if_full(self, num_sequences: int) -> None:
        limit = self._limits.max_in_flight
        if self.num_in_flight + num_sequences > limit:
            self._metrics.count_rejection("queue_full")
            raise queue_full(num_sequences, self.num_in_flight, limit)

    def _send(self, command: Command) -> None:
        """Queue a command; all of one turn of the event loop leave as one frame."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(command)

    def _flush(self) -> None:
        commands, self._outbox = self._outbox, []
        if commands:
            self._supervisor.send(commands)

    def _hand_out(self, event: Event) -> None:
        # nearly all of them
        if isinstance(event, Tokens):
            self._streams.push(event)
        elif isinstance(event, Stats):
            self._stats = event
            self.desk.saw_heartbeat(event)
            self._metrics.observe_stats(event)
        elif isinstance(event, Ready):
            self.desk.engine_started()
        elif isinstance(event, AdapterDone | Failed) and self.desk.saw(event):
            return
        elif isinstance(event, Started | Embedded | Finished | Failed):
            self._streams.push(event)

    def _lose_engine(self) -> None:
        # what it said before it went counts
        self._portions.finish()
        self._outbox.clear()
        self._stats = None
        self.desk.engine_lost()
        self._metrics.engine_lost()
        self._streams.fail_all(draining if self._is_draining else stopped)

    def _end_stalled(self) -> None:
        self._streams.cut_stalled(self._limits.slow_client_timeout_s)
