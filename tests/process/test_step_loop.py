"""The worker process by itself: whose socket it takes, when it ends, what it survives."""

import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from serve.config import EngineConfig
from serve.engine.ipc import encode_config, encode_frame, event_reader
from serve.engine.launch import _bind
from serve.engine.step_loop import Channel, step_loop
from serve.messages import Command, Event, Finished, Ready, SamplingParams, Shutdown, Stats, Submit, Tokens
from tests.process.fake_engine import END_NOTE


class Worker:
    """A fake-engine worker and the parent's end of its socket."""

    def __init__(self, folder: Path) -> None:
        path = folder / "engine.sock"
        with _bind(path) as listener:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            listener.setblocking(True)
            listener.listen(1)
            listener.settimeout(120.0)
            command = [sys.executable, "-m", "tests.process.fake_engine", "--socket", str(path)]
            self.end_note = folder / "ended"
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), END_NOTE: str(self.end_note)}
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
            assert self.process.stdin is not None
            self.process.stdin.write(encode_config(EngineConfig(Path("models/works"), Path("store"))))
            self.process.stdin.close()
            self.connection, _ = listener.accept()
        self.connection.settimeout(120.0)
        self._reader = event_reader()

    def send(self, *commands: Command) -> None:
        """Send one frame."""
        self.connection.sendall(encode_frame(commands))

    def receive_until(self, is_last: Callable[[Event], bool]) -> list[Event]:
        """Return events up to the read that holds the last one."""
        events: list[Event] = []
        while not any(is_last(event) for event in events):
            data = self.connection.recv(1 << 16)
            assert data, "the worker closed its socket"
            events += self._reader.feed(data)
        return events

    def close(self) -> None:
        """End the worker whatever state it is in."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    """Return a worker that is ready."""
    worker = Worker(tmp_path)
    try:
        worker.receive_until(lambda event: isinstance(event, Ready))
        yield worker
    finally:
        worker.close()


def test_the_worker_ends_when_its_parents_socket_closes(worker: Worker) -> None:
    worker.connection.close()
    assert worker.process.wait(120.0) == 0


def test_the_worker_ends_in_mid_work_when_its_parents_socket_closes(worker: Worker) -> None:
    worker.send(Submit("r", [0], SamplingParams(1 << 20, 0)))
    worker.receive_until(lambda event: isinstance(event, Tokens))
    worker.connection.close()
    assert worker.process.wait(120.0) == 0


def test_the_worker_leaves_on_shutdown(worker: Worker) -> None:
    worker.send(Shutdown())
    assert worker.process.wait(120.0) == 0
    # what the engine holds is given back: no load in its line keeps the process alive
    assert worker.end_note.exists()


@pytest.mark.parametrize("frame", [struct.pack("<I", 1 << 31), struct.pack("<I", 3) + b"abc"], ids=["huge", "garbage"])
def test_the_worker_ends_with_a_status_on_a_broken_frame(worker: Worker, frame: bytes) -> None:
    worker.connection.sendall(frame)
    assert worker.process.wait(120.0) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_worker_leaves_the_terminals_signals_to_its_parent(worker: Worker, number: signal.Signals) -> None:
    worker.process.send_signal(number)
    worker.send(Submit("r", [0], SamplingParams(3, 0)))
    events = worker.receive_until(lambda event: isinstance(event, Finished))
    assert [event.token_ids for event in events if isinstance(event, Tokens)] == [[0], [1], [2]]


def test_an_idle_worker_sends_heartbeats(worker: Worker) -> None:
    # three times 0.5 s were promised; the socket's own time limit is for a loaded machine
    beats = [worker.receive_until(lambda event: isinstance(event, Stats))[-1] for _ in range(3)]
    assert all(isinstance(beat, Stats) and beat.num_running == 0 for beat in beats)


def test_the_gauges_are_zero_in_the_heartbeat_that_follows_the_last_sequence(worker: Worker) -> None:
    worker.send(Submit("r", [0], SamplingParams(20, 0), "digest"))
    events = worker.receive_until(lambda event: isinstance(event, Finished))
    stats = [event for event in events if isinstance(event, Stats)] or worker.receive_until(
        lambda event: isinstance(event, Stats)
    )
    last = stats[-1]
    assert isinstance(last, Stats)
    assert (last.num_running, last.num_kv_blocks_in_use, last.num_adapter_pins) == (0, 0, 0)


PARENT = """
import asyncio, sys
from tests.process.clients import build_client
async def main():
    client = build_client()
    client.start()
    await client.wait_ready()
    print(client.engine_pid, flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""


def test_no_orphan_survives_a_parent_that_is_killed() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=environment)
    try:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
        # a stopped child cannot see its socket close; the kernel's death signal reaches it all the same
        engine.suspend()
    finally:
        parent.kill()
        parent.communicate()
    engine.wait(120.0)


class IdleEngine:
    """An engine without work."""

    def handle(self, command: Command) -> None:
        raise NotImplementedError

    def has_work(self) -> bool:
        return False

    def step(self) -> list[Event]:
        raise NotImplementedError

    def stats(self) -> Stats:
        return Stats(0, 0, 0, 1, 0, 16, 0, [], 0, 0, 0, 0, 0, 0, 0)


def test_an_idle_loop_rests_until_there_is_nothing_left_or_a_command_comes() -> None:
    parent, child = socket.socketpair()
    answers = [True, True, False]

    def rest() -> bool:
        answer = answers.pop(0)
        if not answers:
            parent.sendall(encode_frame([Shutdown()]))
        return answer

    with parent, child:
        step_loop(IdleEngine(), Channel(child), time.monotonic, rest)
    assert not answers
