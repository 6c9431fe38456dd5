"""A worker's hold on its training process: its pipes, its end.

Owns the process from its start to its reaping. Invariant: after `close` the process is gone and reaped, whatever state
it was in; nobody waits for it longer than asked.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from serve.trainer.progress import Signal
from serve.trainer.wire import MAX_LINE_BYTES, BrokenChild, RunRequest

_READ_BYTES = 64 << 10
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


class Child:
    """One training process."""

    def __init__(self, pid: int, commands: int, messages: int) -> None:
        """Take over a started process and the ends of its pipes that are the worker's."""
        self.pid = pid
        self._commands = commands
        self._messages = messages
        self._rest = b""
        self._has_ended = False
        self._status: int | None = None

    def ask(self, wish: Signal) -> None:
        """Tell the loop to pause or to cancel; a process that is gone hears nothing."""
        with suppress(OSError):
            os.write(self._commands, f"{wish}\n".encode())

    def read(self, timeout_s: float) -> list[bytes] | None:
        """Return the lines that came within so many seconds, maybe none; None: the process says nothing any more.

        Raises:
            BrokenChild: a line has no end.
        """
        if self._has_ended:
            return None
        if not select.select([self._messages], [], [], timeout_s)[0]:
            return []
        data = os.read(self._messages, _READ_BYTES)
        if not data:
            self._has_ended = True
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            raise BrokenChild("a line without end")
        return lines

    def wait(self, timeout_s: float) -> int | None:
        """Return how the process ended (negative: by a signal); None if it still runs after so many seconds."""
        deadline = time.monotonic() + timeout_s
        while self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                return None
            else:
                time.sleep(0.005)
        return self._status

    def close(self) -> int:
        """End the process if it still runs, reap it, and return how it ended."""
        status = self.wait(0.0)
        if status is None:
            os.kill(self.pid, signal.SIGKILL)
            _, raw = os.waitpid(self.pid, 0)
            self._status = status = os.waitstatus_to_exitcode(raw)
        for descriptor in (self._commands, self._messages):
            with suppress(OSError):
                os.close(descriptor)
        return status


Launch = Callable[[RunRequest], Child]


def spawn_child(request: RunRequest, environment: Mapping[str, str]) -> Child:
    """Start the training process with nothing of the worker's but its stderr and this environment."""
    commands_read, commands = os.pipe()
    messages, messages_write = os.pipe()
    try:
        arguments = [sys.executable, "-B", "-s", "-P", "-m", "serve.trainer", request.to_json(), str(os.getpid())]
        actions = [(os.POSIX_SPAWN_DUP2, commands_read, 0), (os.POSIX_SPAWN_DUP2, messages_write, 1)]
        # a signal to the worker's group (Ctrl-C) is the worker's to pass on
        pid = os.posix_spawn(sys.executable, arguments, environment, file_actions=actions, setpgroup=0)
    except OSError:
        os.close(commands)
        os.close(messages)
        raise
    finally:
        os.close(commands_read)
        os.close(messages_write)
    return Child(pid, commands, messages)


def child_environment(num_threads: int) -> dict[str, str]:
    """Return the whole environment of a training process."""
    threads = str(num_threads)
    return {
        "PYTHONPATH": os.pathsep.join([str(_PACKAGE_ROOT), str(_PACKAGE_ROOT / "kernels")]),
        "PYTHONUTF8": "1",
        "PATH": os.defpath,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        # a thread that waits must not spin: the server beside it needs the core
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
