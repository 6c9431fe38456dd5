"""Copies: sliding over itself, buffers that wait for the copy out of them, and uploads behind their fence."""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from adapter_kernels.gpu.copies import CudaCopies, Fence, InlineCopies, PinnedRing, slide_down


@pytest.mark.parametrize("bounce_bytes", [1, 3, 8, 64])
@pytest.mark.parametrize("num_bytes", [1, 7, 16, 33])
@pytest.mark.parametrize("distance", [0, 1, 2, 5, 16, 40])
def test_bytes_slide_down_over_themselves(bounce_bytes: int, num_bytes: int, distance: int) -> None:
    arena = torch.arange(100, dtype=torch.uint8)
    target = 10
    slide_down(arena, target + distance, target, num_bytes, torch.empty(bounce_bytes, dtype=torch.uint8))
    expected = list(range(100))
    expected[target : target + num_bytes] = range(target + distance, target + distance + num_bytes)
    assert arena.tolist() == expected


def test_bytes_never_slide_up() -> None:
    with pytest.raises(AssertionError, match="slide up"):
        slide_down(torch.zeros(8, dtype=torch.uint8), 0, 4, 4, torch.zeros(4, dtype=torch.uint8))


class LateFence:
    def __init__(self) -> None:
        self.is_passed = False
        self.num_waits = 0

    def is_done(self) -> bool:
        return self.is_passed

    def wait(self) -> None:
        self.num_waits += 1
        self.is_passed = True


def test_a_ring_hands_a_buffer_out_again_only_after_its_copy() -> None:
    ring = PinnedRing(InlineCopies(), 2, 16)
    first, second = ring.acquire(), ring.acquire()
    late: list[LateFence] = [LateFence(), LateFence()]
    ring.release(first, late[0])
    ring.release(second, late[1])
    is_ready = [ring.is_ready]
    late[0].is_passed = True
    is_ready.append(ring.is_ready)
    assert ring.acquire() is first and late[0].num_waits == 1
    is_ready.append(ring.is_ready)
    assert ring.acquire() is second and late[1].num_waits == 1
    is_ready.append(ring.is_ready)
    ring.release(first, None)
    is_ready.append(ring.is_ready)
    assert is_ready == [False, True, False, False, True]
    assert ring.acquire() is first


def test_a_drained_ring_has_no_copy_under_way() -> None:
    ring = PinnedRing(InlineCopies(), 2, 16)
    fence = LateFence()
    ring.release(ring.acquire(), fence)
    ring.drain()
    assert fence.is_passed


class FakeEvent:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def record(self, stream: "FakeStream") -> None:
        self.log.append(f"{stream.name}: record {self.name}")

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.log.append(f"host: wait for {self.name}")


class FakeStream:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_event(self, event: FakeEvent) -> None:
        self.log.append(f"{self.name}: wait for {event.name}")

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"{self.name}: wait for {other.name}")


def test_an_upload_waits_on_the_copy_stream_for_the_fence_of_the_main_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    events: list[FakeEvent] = []

    def event(blocking: bool) -> FakeEvent:
        assert blocking
        events.append(FakeEvent(log, f"event {len(events)}"))
        return events[-1]

    def enter(stream: FakeStream) -> AbstractContextManager[None]:
        log.append(f"{stream.name}: current")
        return nullcontext()

    main = FakeStream(log, "main")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(log, "copies"))
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", enter)
    copies = CudaCopies(torch.device("cpu"))
    source, target = torch.ones(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)
    dropped: Fence = copies.fence()
    done = copies.upload(source, target, dropped)
    assert not done.is_done() and torch.equal(target, source)
    done.wait()
    assert log == [
        # whatever fills the memory that it will copy to
        "copies: wait for main",
        "main: record event 0",
        "copies: wait for event 0",
        "copies: current",
        "copies: record event 1",
        "host: wait for event 1",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_upload_and_a_move_on_a_device() -> None:
    device = torch.device("cuda", 0)
    copies = CudaCopies(device)
    arena = torch.zeros(1 << 20, dtype=torch.uint8, device=device)
    source = copies.pinned(1 << 19)
    source.copy_(torch.randint(0, 256, (1 << 19,), dtype=torch.uint8))
    copies.upload(source, arena[1 << 19 :], copies.fence()).wait()
    copies.move(arena, 1 << 19, 128, 1 << 19)
    assert torch.equal(arena[128 : 128 + (1 << 19)].cpu(), source)
