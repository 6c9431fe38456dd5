"""The engine process's life: commands in, one step, events out, a heartbeat in between; torch-free.

Owns the socket's engine side, the heartbeat's rhythm and the order of start-up messages. Decides nothing about
sequences. Invariants: the events of one step leave as one frame; a heartbeat leaves between any two steps that are
`HEARTBEAT_S` apart, so that silence means a step that hangs; the process ends when its parent does.
"""

import ctypes
import faulthandler
import gc
import logging
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from serve.config import EngineConfig
from serve.engine.ipc import FrameError, command_reader, decode_config, encode_frame
from serve.errors import StartError
from serve.messages import Command, Event, Ready, Shutdown, StartFailed, Stats

logger = logging.getLogger(__name__)

# promised is 0.5 s; the rest is slack for a loaded machine
HEARTBEAT_S = 0.4
# under load the counters that /metrics shows are at most this old
BUSY_HEARTBEAT_S = 0.1
# a step that does nothing (only adapter loads are under way) must not spin a core
IDLE_STEP_S = 0.001
IDLE_WAIT_S = 0.002

_READ_BYTES = 1 << 20
_PR_SET_PDEATHSIG = 1


class StepEngine(Protocol):
    """The engine as the loop sees it."""

    def handle(self, command: Command) -> None:
        """Take one command; answers come out of `step`."""
        ...

    def has_work(self) -> bool:
        """Say whether `step` would do anything."""
        ...

    def step(self) -> list[Event]:
        """Run one step and return its events in order."""
        ...

    def stats(self) -> Stats:
        """Return the heartbeat."""
        ...


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine that is ready to step, and what it learnt at start-up."""

    engine: StepEngine
    ready: Ready
    # a piece of work for when there is nothing else to do, within the heartbeat; False: there is none left
    rest: Callable[[], bool] | None = None
    # called once, when the loop has ended: loads that wait must not hold the process up
    close: Callable[[], None] | None = None


BuildEngine = Callable[[EngineConfig], BuiltEngine]


class Channel:
    """The engine's end of the socket: whole messages in and out."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = command_reader()

    def receive(self, timeout_s: float) -> list[Command] | None:
        """Wait up to `timeout_s` for commands; None when the parent has closed its end."""
        if not select.select([self._connection], [], [], timeout_s)[0]:
            return []
        data = self._connection.recv(_READ_BYTES)
        return self._reader.feed(data) if data else None

    def send(self, events: Sequence[Event]) -> None:
        """Send events as one frame; blocks while the parent does not read."""
        self._connection.sendall(encode_frame(events))


def run_worker(socket_path: str, config_json: bytes, build: BuildEngine) -> int:
    """Connect, build the engine, serve until the parent closes or says `Shutdown`; return the exit status."""
    _tie_to_parent()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(socket_path)
        channel = Channel(connection)
        try:
            built = build(decode_config(config_json))
        except Exception as error:
            if not isinstance(error, StartError):
                logger.exception("the engine could not start")
            channel.send([StartFailed(_one_line(error))])
            return 2
        try:
            channel.send([built.ready])
            # torch and the model stay: the collector need not walk through them between steps
            gc.freeze()
            step_loop(built.engine, channel, time.monotonic, built.rest)
        except (BrokenPipeError, ConnectionResetError):
            return 0
        except FrameError:
            logger.exception("the parent sent a broken frame")
            return 1
        except Exception:
            # the wall of the engine process: logged once, and the parent ends every stream and starts anew
            logger.exception("a step was lost; the engine process ends")
            return 1
        finally:
            if built.close is not None:
                built.close()
    return 0


def step_loop(
    engine: StepEngine, channel: Channel, clock: Callable[[], float], rest: Callable[[], bool] | None = None
) -> None:
    """Drain commands, step, send, and rest while there is nothing to do; return on `Shutdown` or without a parent."""
    heartbeat_at = clock()
    was_busy = False
    wait_s = 0.0
    while True:
        commands = channel.receive(wait_s)
        if commands is None or any(isinstance(command, Shutdown) for command in commands):
            return
        for command in commands:
            engine.handle(command)
        is_busy = engine.has_work()
        started_at = clock()
        events = engine.step() if is_busy else []
        now = clock()
        is_busy_after = engine.has_work()
        if now >= heartbeat_at or (was_busy and not is_busy_after):
            events = [*events, engine.stats()]
            heartbeat_at = now + (BUSY_HEARTBEAT_S if is_busy_after else HEARTBEAT_S)
        if events:
            channel.send(events)
        was_busy = is_busy_after
        if not is_busy_after:
            did_rest = rest is not None and rest()
            wait_s = 0.0 if did_rest else max(0.0, heartbeat_at - clock())
        else:
            wait_s = IDLE_WAIT_S if not events and now - started_at < IDLE_STEP_S else 0.0


def _tie_to_parent() -> None:
    """Die with the parent, leave Ctrl-C and SIGTERM to it, and dump all stacks on SIGUSR1."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, StartError) and text else f"{type(error).__name__}: {text}"
