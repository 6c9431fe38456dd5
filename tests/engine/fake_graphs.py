"""The calls of torch.cuda that a capture makes, without a device: which streams there are and what ran on which."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


class FakeStream:
    """One of the streams that torch hands out in turn."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.waits_for: list[str] = []

    def wait_stream(self, other: "FakeStream") -> None:
        self.waits_for.append(other.name)


class FakeGraph:
    """A graph that counts its replays."""

    def __init__(self) -> None:
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1


class FakeGraphs:
    """`num_streams` streams were made; `runs` notes (stream, is it captured, pool) each time that `note` was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_streams = 0
        self.current = FakeStream("main")
        self.pool: object = None
        self.is_capturing = False
        self.runs: list[tuple[str, bool, object]] = []
        fakes = self
        own_stream = FakeStream("torch's own")

        class Capture:
            def __init__(
                self,
                graph: FakeGraph,
                pool: object = None,
                stream: FakeStream | None = None,
                capture_error_mode: str = "global",
            ) -> None:
                assert isinstance(graph, FakeGraph)
                self.capture_stream = stream or own_stream
                self._pool = pool

            def __enter__(self) -> None:
                fakes.is_capturing, fakes.pool = True, self._pool
                self._before, fakes.current = fakes.current, self.capture_stream

            def __exit__(self, *failure: object) -> None:
                fakes.is_capturing, fakes.pool = False, None
                # as torch: the end of a capture that failed raises before the stream is given back
                if failure[0] is not None:
                    raise RuntimeError("operation failed due to a previous error during capture")
                fakes.current = self._before

        monkeypatch.setattr(torch.cuda, "Stream", self._new_stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self._use)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        monkeypatch.setattr(torch.cuda, "graph", Capture)

    def note(self) -> None:
        """Write down where a pass runs."""
        self.runs.append((self.current.name, self.is_capturing, self.pool))

    def _new_stream(self) -> FakeStream:
        self.num_streams += 1
        return FakeStream(f"stream {self.num_streams}")

    @contextmanager
    def _use(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before
