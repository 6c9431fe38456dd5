"""Keeps one engine process alive: first start, watching, restarts with backoff, stop.

Owns the order of those; the judgement is `watchdog`'s and the process `launch`'s. Torch-free. Invariants: `on_lost` is
called exactly once for every process that was spawned, when it can send no more events; a first start that fails is the
operator's to mend (`StartError`) and is not repeated; every later loss is repaired without end.
"""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable

from serve.config import EngineConfig, WatchdogConfig
from serve.engine.launch import WORKER_MODULE, EngineProcess
from serve.engine.watchdog import EngineState, Verdict, Watchdog
from serve.errors import StartError
from serve.messages import Command, Event, Ready, StartFailed

logger = logging.getLogger(__name__)

# how often the heartbeat's age is looked at, at most
_CHECK_S = 0.25
_EXIT_S = 1.0


class EngineSupervisor:
    """The engine across its restarts. All methods: event loop only."""

    def __init__(
        self,
        engine: EngineConfig,
        config: WatchdogConfig,
        clock: Callable[[], float],
        *,
        on_events: Callable[[list[Event]], None],
        on_lost: Callable[[], None],
        on_check: Callable[[], None],
        worker_module: str = WORKER_MODULE,
    ) -> None:
        """Prepare; nothing is started.

        Args:
            on_events: takes the engine's events in order.
            on_lost: told when a process is gone; the engine is not serving any more when it is called.
            on_check: called a few times a second while a process lives, for the owner's own time-outs.
            worker_module: what the child runs; tests pass a fake.
        """
        self._engine = engine
        self._config = config
        self._watchdog = Watchdog(config, clock)
        self._on_events = on_events
        self._on_lost = on_lost
        self._on_check = on_check
        self._worker_module = worker_module
        self._check_s = min(_CHECK_S, config.heartbeat_timeout_s / 4)
        self._process: EngineProcess | None = None
        self._task: asyncio.Task[None] | None = None
        self._first: asyncio.Future[Ready] | None = None
        self._start_error: str | None = None
        self._ready: Ready | None = None
        self._backoff_s = 0.0
        self._is_stopping = False

    @property
    def ready(self) -> Ready | None:
        """What the engine learnt at its last start; None before the first."""
        return self._ready

    @property
    def is_live(self) -> bool:
        """Say whether waiting for this engine makes sense."""
        return self._watchdog.is_live and not self._has_given_up()

    @property
    def is_serving(self) -> bool:
        """Say whether the engine has started and speaks."""
        return self._watchdog.is_serving

    @property
    def pid(self) -> int | None:
        """The engine's process id; None between two lives."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Begin to start the engine; `wait_ready` tells how it went."""
        assert self._task is None, "an engine is supervised once"
        self._first = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._supervise())

    async def wait_ready(self) -> Ready:
        """Wait for the first start.

        Raises:
            StartError: the engine did not start; its own line, or how its process ended.
        """
        assert self._first is not None, "start() comes first"
        return await asyncio.shield(self._first)

    def send(self, commands: list[Command]) -> None:
        """Hand commands to the engine; they are lost with it when it dies."""
        if self._process is not None:
            self._process.send(commands)

    async def stop(self) -> None:
        """End the engine, politely first, and start no other; idempotent."""
        if self._task is None:
            return
        self._is_stopping = True
        if self._process is not None and self._watchdog.state is EngineState.SERVING:
            await self._process.shut_down()
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        if self._first is not None:
            self._first.cancel()

    async def _supervise(self) -> None:
        while True:
            cause = await self._live_once()
            if self._first is not None and not self._first.done():
                self._first.set_exception(StartError(cause))
                # whoever waits gets it; nobody waiting is no reason for a warning
                self._first.exception()
                return
            if self._is_stopping:
                return
            logger.error("the engine is gone: %s; it is started again in %.1f s", cause, self._backoff_s)
            await asyncio.sleep(self._backoff_s)

    async def _live_once(self) -> str:
        """Spawn one process and return why it ended."""
        self._start_error = None
        self._watchdog.spawned()
        try:
            process = await EngineProcess.spawn(self._engine, self._events, worker_module=self._worker_module)
        except OSError as error:
            self._backoff_s = self._watchdog.lost()
            return f"the engine process could not be started: {error}"
        self._process = process
        exited = asyncio.create_task(process.wait())
        try:
            return await self._watch(process, exited)
        finally:
            exited.cancel()
            self._process = None
            await process.kill()
            self._backoff_s = self._watchdog.lost()
            self._on_lost()

    async def _watch(self, process: EngineProcess, exited: asyncio.Task[int]) -> str:
        while True:
            await asyncio.wait({exited}, timeout=self._check_s)
            if process.was_disconnected:
                # its exit status says more, and comes right behind
                await asyncio.wait({exited}, timeout=_EXIT_S)
            if self._start_error is not None:
                return self._start_error
            if exited.done():
                return f"its process {_describe(exited.result())}"
            if process.was_disconnected:
                return "it closed its connection"
            verdict = self._watchdog.check()
            if verdict is Verdict.HUNG:
                await process.dump_stacks()
                return f"no sign of life for {self._config.heartbeat_timeout_s:g} s (heartbeat timeout)"
            if verdict is Verdict.START_TIMED_OUT:
                await process.dump_stacks()
                return f"not ready after {self._config.start_timeout_s:g} s (start timeout)"
            self._on_check()

    def _events(self, events: list[Event]) -> None:
        self._watchdog.heard()
        # how a start went is told once, before all else
        for event in events if self._watchdog.state is EngineState.STARTING else ():
            if isinstance(event, StartFailed):
                self._start_error = event.message
            elif isinstance(event, Ready):
                self._ready = event
                self._watchdog.heard_ready()
                if self._first is not None and not self._first.done():
                    self._first.set_result(event)
        self._on_events(events)

    def _has_given_up(self) -> bool:
        return self._task is not None and self._task.done()


def _describe(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"
