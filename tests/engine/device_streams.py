"""A device of two streams that runs nothing until it is told: every order a real one may choose, in slow motion.

Owns the queues of the main and the copy stream. Each operation reads its operands when it runs, not when it is issued,
so whoever writes memory too early, on the host or on the other stream, changes what comes out.
"""

import random
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapter_kernels.gpu.copies import Fence, slide_down
from adapter_kernels.gpu.tables import DeviceTables

Operation = Callable[[], None]


class Deadlock(BaseException):
    """Both streams wait for each other, or for something that was never issued."""


class StreamFence:
    """Passed when the stream ran up to it."""

    def __init__(self, streams: "TwoStreams") -> None:
        self._streams = streams
        self.is_passed = False

    def reach(self) -> None:
        self.is_passed = True

    def is_done(self) -> bool:
        return self.is_passed

    def wait(self) -> None:
        while not self.is_passed:
            if not self._streams.run_one():
                raise Deadlock


@dataclass(frozen=True, slots=True)
class _Wait:
    """Stands in a stream until the other passed a fence."""

    fence: StreamFence

    def __call__(self) -> None:
        assert self.fence.is_passed


class TwoStreams:
    """The main stream and the copy stream; `adapter_kernels.gpu.copies.Copies` on them."""

    def __init__(self, seed: int = 0) -> None:
        self.main: deque[Operation] = deque()
        self.copy: deque[Operation] = deque()
        self._rng = random.Random(seed)
        self._bounce = torch.empty(256, dtype=torch.uint8)
        # what ran, by name, for tests that look at the order
        self.log: list[str] = []

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def fence(self) -> Fence:
        return self._record(self.main)

    def upload(self, source: Tensor, target: Tensor, after: Fence | None) -> Fence:
        if after is not None:
            assert isinstance(after, StreamFence)
            self.copy.append(_Wait(after))

        def run() -> None:
            target.copy_(source)
            self.log.append("upload")

        self.copy.append(run)
        return self._record(self.copy)

    def move(self, arena: Tensor, source: int, target: int, num_bytes: int) -> None:
        def run() -> None:
            slide_down(arena, source, target, num_bytes, self._bounce)
            self.log.append("move")

        self.main.append(run)

    def launch(self, name: str, operation: Operation) -> None:
        """Issue an operation on the main stream."""

        def run() -> None:
            operation()
            self.log.append(name)

        self.main.append(run)

    def run_one(self) -> bool:
        """Run the next operation of a stream that can go on, chosen at random; False when none can."""
        streams = [self.main, self.copy]
        self._rng.shuffle(streams)
        return any(self.run_next(stream) for stream in streams)

    def run_next(self, stream: "deque[Operation]") -> bool:
        """Run the next operation of this stream; False when it is empty or waits for the other."""
        if not stream or (isinstance(stream[0], _Wait) and not stream[0].fence.is_passed):
            return False
        stream.popleft()()
        return True

    def run_all(self) -> None:
        """Let the device catch up."""
        while self.run_one():
            pass
        if self.main or self.copy:
            raise Deadlock

    def _record(self, stream: "deque[Operation]") -> StreamFence:
        fence = StreamFence(self)
        stream.append(fence.reach)
        return fence


@dataclass(frozen=True, slots=True)
class StreamTables(DeviceTables):
    """Device tables that change when the main stream comes to it."""

    streams: TwoStreams

    def write(self, slot: int, entries: Tensor) -> None:
        self.streams.launch("write", lambda: DeviceTables.write(self, slot, entries))

    def clear(self, slot: int) -> None:
        self.streams.launch("clear", lambda: DeviceTables.clear(self, slot))


class QueuedLoader(Executor):
    """A loader's thread that runs a job only when it is told, in the caller's thread."""

    def __init__(self) -> None:
        self._jobs: deque[Callable[[], Any]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        self._jobs.append(lambda: fn(*args, **kwargs))
        return Future()

    def run_one(self) -> bool:
        """Run the oldest job; False when there is none."""
        if not self._jobs:
            return False
        self._jobs.popleft()()
        return True

    def run_all(self) -> None:
        while self.run_one():
            pass
