"""The side stream: what waits for what, shown on streams that only write down what they are told."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from adapter_kernels.gpu.streams import CudaSide, InlineSide

MAIN, SIDE = "main", "side"


class FakeCuda:
    """The four calls of torch.cuda that a side stream needs; `log` is what a driver would have been told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.current = FakeStream(self, MAIN)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(self, SIDE))
        monkeypatch.setattr(torch.cuda, "Event", lambda: FakeEvent(self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)

    @contextmanager
    def stream(self, stream: "FakeStream") -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def launch(self, name: str) -> None:
        self.log.append(f"{self.current.name}: {name}")


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_event(self, event: "FakeEvent") -> None:
        self.cuda.log.append(f"{self.name}: wait for {event.where}")


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.where = cuda, "nothing"

    def record(self, stream: FakeStream) -> None:
        self.where = f"{stream.name} after {len(self.cuda.log)}"
        self.cuda.log.append(f"{stream.name}: record")


def test_forked_work_waits_for_the_main_stream_and_the_join_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    side = CudaSide(torch.device("cuda", 0))
    cuda.launch("norm")
    with side.fork():
        cuda.launch("shrink")
    cuda.launch("gemm")
    side.join()
    cuda.launch("sink")
    assert cuda.log == [
        "main: norm",
        "main: record",
        "side: wait for main after 1",
        "side: shrink",
        "main: gemm",
        "side: record",
        "main: wait for side after 5",
        "main: sink",
    ]


def test_a_join_without_a_fork_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    side = CudaSide(torch.device("cuda", 0))
    side.join()
    with side.fork():
        pass
    side.join()
    num_operations = len(cuda.log)
    side.join()
    assert len(cuda.log) == num_operations


def test_a_body_that_raises_leaves_the_main_stream_current_and_the_side_joinable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    side = CudaSide(torch.device("cuda", 0))
    with pytest.raises(ValueError, match="launch"), side.fork():
        raise ValueError("launch")
    assert cuda.current.name == MAIN
    side.join()
    assert cuda.log[-1].startswith("main: wait for side")


def test_inline_side_keeps_the_order_of_issue() -> None:
    side, log = InlineSide(), []
    log.append(0)
    with side.fork():
        log.append(1)
    log.append(2)
    side.join()
    assert log == [0, 1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_fork_replays_with_new_inputs() -> None:
    device = torch.device("cuda", 0)
    side = CudaSide(device)
    x = torch.zeros(1 << 20, device=device)
    doubled, out = torch.empty_like(x), torch.empty_like(x)

    def step() -> None:
        with side.fork():
            torch.mul(x, 2.0, out=doubled)
        torch.add(x, 1.0, out=out)
        side.join()
        out.add_(doubled)

    step()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for value in (3.0, 5.0):
        x.fill_(value)
        graph.replay()
        torch.cuda.synchronize(device)
        assert (out == 3 * value + 1).all()
