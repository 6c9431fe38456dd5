"""One life of the engine process as its parent sees it: private socket, child, events out, kill.

Owns the Unix socket (0600 in a 0700 folder), the child process and its end; judges nothing (`watchdog`) and knows no
requests. Torch-free. Invariant: when `kill` has returned, the child is reaped and the socket's folder is gone.
"""

import asyncio
import contextlib
import logging
import shutil
import signal
import socket
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from serve.config import EngineConfig
from serve.engine.ipc import FrameError, encode_config, encode_frame, event_reader
from serve.messages import Command, Event, Shutdown

logger = logging.getLogger(__name__)

WORKER_MODULE = "serve.engine.worker"

# how long a child that was asked for its stacks may take to write them
_STACK_DUMP_S = 0.3
_SHUTDOWN_S = 2.0
# what the child sent before it died still lies in the socket
_LAST_EVENTS_S = 1.0
_STDERR = 2
_CODE_ROOT = Path(__file__).resolve().parents[2]


class EngineProcess:
    """The running child and the connection to it."""

    def __init__(self, process: Process, server: asyncio.Server, connection: "_Connection", folder: Path) -> None:
        self._process = process
        self._server = server
        self._connection = connection
        self._folder = folder

    @classmethod
    async def spawn(
        cls, config: EngineConfig, on_events: Callable[[list[Event]], None], *, worker_module: str = WORKER_MODULE
    ) -> "EngineProcess":
        """Listen, start the child and hand it its config; its first event tells whether it started.

        Args:
            config: sent as JSON on the child's stdin; its paths are absolute, the child has another working folder.
            on_events: called on this event loop with the events of one read, in order.
            worker_module: run as `python -m MODULE --socket PATH`; tests pass their own.
        """
        folder = Path(tempfile.mkdtemp(prefix="chorale-"))
        path = folder / "engine.sock"
        # once the child is in, nobody else can connect, and a killed parent leaves no folder behind
        connection = _Connection(on_events, on_open=partial(shutil.rmtree, folder, ignore_errors=True))
        # one peer; any further one talks to a protocol that ignores it
        peers = iter([connection])
        async with contextlib.AsyncExitStack() as undo:
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            loop = asyncio.get_running_loop()
            server = await loop.create_unix_server(lambda: next(peers, asyncio.Protocol()), sock=_bind(path))
            undo.callback(server.close)
            process = await asyncio.create_subprocess_exec(
                *(*_environment(config), sys.executable, "-m", worker_module, "--socket", str(path)),
                stdin=PIPE,
                # stdout carries the ready line and nothing else
                stdout=_STDERR,
                # `-m` looks in the working folder first: it must be ours, not wherever the operator stands
                cwd=_CODE_ROOT,
                # Ctrl-C at a terminal goes to the parent alone, also while the child still imports
                start_new_session=True,
            )
            engine = cls(process, server, connection, folder)
            undo.push_async_callback(engine.kill)
            await engine._hand_over(config)
            undo.pop_all()
        return engine

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def was_disconnected(self) -> bool:
        """Say whether a connection existed and is lost."""
        return self._connection.closed.is_set()

    def send(self, commands: Sequence[Command]) -> None:
        """Queue commands as one frame; nothing happens on a lost connection (the parent learns of that by itself)."""
        self._connection.write(encode_frame(commands))

    async def wait(self) -> int:
        """Wait until the child has ended and its last events are in; return its exit status."""
        status = await self._process.wait()
        if self._connection.is_made:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._connection.closed.wait(), _LAST_EVENTS_S)
        return status

    async def dump_stacks(self) -> None:
        """Ask a child that seems hung to write all its stacks to stderr, and give it a moment."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGUSR1)
                await asyncio.sleep(_STACK_DUMP_S)

    async def shut_down(self) -> None:
        """Ask the child to leave and wait a moment for it."""
        self.send([Shutdown()])
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _SHUTDOWN_S)

    async def kill(self) -> None:
        """End the child if it still runs, reap it and remove the socket."""
        try:
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
            await self._process.wait()
        finally:
            self._connection.close()
            self._server.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _hand_over(self, config: EngineConfig) -> None:
        stdin = self._process.stdin
        assert stdin is not None, "the child was spawned with a stdin pipe"
        # a child that is already dead is found by `wait`
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            stdin.write(encode_config(config))
            await stdin.drain()
        stdin.close()


class _Connection(asyncio.Protocol):
    """The parent's end of the socket."""

    def __init__(self, on_events: Callable[[list[Event]], None], on_open: Callable[[], None]) -> None:
        self._on_events = on_events
        self._on_open = on_open
        self._reader = event_reader()
        self._transport: asyncio.Transport | None = None
        self.closed = asyncio.Event()

    @property
    def is_made(self) -> bool:
        return self._transport is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio's
        self._transport = cast(asyncio.Transport, transport)
        self._on_open()

    def data_received(self, data: bytes) -> None:
        if self.closed.is_set():
            return
        try:
            events = self._reader.feed(data)
        except FrameError:
            logger.exception("the engine sent a broken frame")
            self.close()
            return
        if events:
            self._on_events(events)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()

    def write(self, frame: bytes) -> None:
        if self._transport is not None and not self.closed.is_set():
            self._transport.write(frame)

    def close(self) -> None:
        self.closed.set()
        if self._transport is not None:
            self._transport.abort()


def _environment(config: EngineConfig) -> tuple[str, ...]:
    """Return the command in front of the child's: env(1), where a variable must be set before it imports anything."""
    return ("env", "TRITON_INTERPRET=1") if config.device == "interpreter" else ()


def _bind(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        # before `listen`, so nobody else can ever have connected
        path.chmod(0o600)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener
