"""Copies into and inside the adapter arena: which stream they run on, and what has to wait for what.

Owns the copy stream and the pinned buffers; knows nothing of adapters. Two orders exist: the main stream's (steps,
moves, table writes) and the copy stream's (uploads). Invariants: an upload starts after the fence it is given; a pinned
buffer is written again only after the copy out of it ended; nothing here allocates device memory after the start.
"""

from collections import deque
from typing import Protocol

import torch
from torch import Tensor

# through which overlapping moves pass: twice the traffic, so moves by more than a quarter of it go straight
_BOUNCE_BYTES = 16 << 20


class Fence(Protocol):
    """A point in a stream."""

    def is_done(self) -> bool:
        """Say whether the device has passed it; never blocks."""
        ...

    def wait(self) -> None:
        """Block the calling thread until the device has passed it."""
        ...


class Copies(Protocol):
    """What the arena asks of a device. `upload` belongs to the loader's thread, the rest to the step's."""

    def pinned(self, num_bytes: int) -> Tensor:
        """Allocate a host buffer, [num_bytes] uint8, that copies may read asynchronously; at start only."""
        ...

    def fence(self) -> Fence:
        """Return the point of the main stream after all that was issued there so far."""
        ...

    def upload(self, source: Tensor, target: Tensor, after: Fence | None) -> Fence:
        """Copy a pinned buffer to the device on the copy stream, not before `after`; return the point behind it."""
        ...

    def move(self, arena: Tensor, source: int, target: int, num_bytes: int) -> None:
        """Slide bytes of `arena` ([*] uint8) down from `source` to `target` on the main stream; they may overlap."""
        ...


class InlineFence:
    """Passed when it is made."""

    def is_done(self) -> bool:
        """Nothing is ever under way."""
        return True

    def wait(self) -> None:
        """Nothing is ever under way."""


class InlineCopies:
    """Copies on the CPU, each done when its call returns.

    Notes: a step on the CPU has ended when the next call of its thread begins, so no order is left to keep.
    """

    def __init__(self) -> None:
        self._bounce = torch.empty(_BOUNCE_BYTES, dtype=torch.uint8)

    def pinned(self, num_bytes: int) -> Tensor:
        """Allocate plain memory."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def fence(self) -> Fence:
        """Return a fence that is passed."""
        return InlineFence()

    def upload(self, source: Tensor, target: Tensor, after: Fence | None) -> Fence:
        """Copy now."""
        target.copy_(source)
        return InlineFence()

    def move(self, arena: Tensor, source: int, target: int, num_bytes: int) -> None:
        """Slide now."""
        slide_down(arena, source, target, num_bytes, self._bounce)


class CudaFence:
    """A recorded event."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def is_done(self) -> bool:
        """Query the event."""
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Sleep until the event is passed."""
        self.event.synchronize()


class CudaCopies:
    """One copy stream beside whichever stream is current on the step's thread.

    Notes: build it, like all that allocates, at start and outside a graph capture, after the memory it will copy to: it
    begins behind whatever fills that. No upload may run during a capture in CUDA's "global" mode, which forbids event
    queries to all threads.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._bounce = torch.empty(_BOUNCE_BYTES, dtype=torch.uint8, device=device)

    def pinned(self, num_bytes: int) -> Tensor:
        """Allocate page-locked memory."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def fence(self) -> Fence:
        """Record an event on the current stream."""
        return self._record(torch.cuda.current_stream(self._device))

    def upload(self, source: Tensor, target: Tensor, after: Fence | None) -> Fence:
        """Copy on the copy stream, behind `after`."""
        if isinstance(after, CudaFence):
            self._stream.wait_event(after.event)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._record(self._stream)

    def move(self, arena: Tensor, source: int, target: int, num_bytes: int) -> None:
        """Slide on the current stream."""
        slide_down(arena, source, target, num_bytes, self._bounce)

    def _record(self, stream: torch.cuda.Stream) -> CudaFence:
        # blocking: a thread that waits sleeps, and leaves its core to the step
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return CudaFence(event)


class PinnedRing:
    """A fixed set of pinned buffers, used in turn. Each is handed out, then given back with the copy that reads it."""

    def __init__(self, copies: Copies, num_buffers: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._free: deque[tuple[Tensor, Fence | None]] = deque(
            (copies.pinned(num_bytes), None) for _ in range(num_buffers)
        )

    @property
    def is_ready(self) -> bool:
        """Say whether `acquire` would return at once."""
        if not self._free:
            return False
        fence = self._free[0][1]
        return fence is None or fence.is_done()

    def acquire(self) -> Tensor:
        """Return the buffer whose copy is oldest, blocking until that ended; give it back with `release`."""
        buffer, fence = self._free.popleft()
        if fence is not None:
            fence.wait()
        return buffer

    def release(self, buffer: Tensor, fence: Fence | None) -> None:
        """Give a buffer back; it is written again only after `fence`."""
        self._free.append((buffer, fence))

    def drain(self) -> None:
        """Block until no copy reads any buffer."""
        for _, fence in self._free:
            if fence is not None:
                fence.wait()


def slide_down(arena: Tensor, source: int, target: int, num_bytes: int, bounce: Tensor) -> None:
    """Move bytes towards the arena's begin on the current stream; source and target may overlap.

    arena[target + i] = arena[source + i] for 0 <= i < num_bytes, lowest first: a write never reaches a byte that is
    still to be read, since it ends at or before the piece just read. Pieces are as long as the distance, or, when that
    is short, as the bounce buffer that they pass through.

    Args:
        arena: [*] uint8. bounce: [*] uint8 on the same device. target <= source.
    """
    assert target <= source, f"bytes slide up, from {source} to {target}"
    distance = source - target
    if distance == 0:
        return
    is_direct = distance >= min(num_bytes, max(1, bounce.numel() // 4))
    piece = distance if is_direct else bounce.numel()
    for begin in range(0, num_bytes, piece):
        length = min(piece, num_bytes - begin)
        read = arena[source + begin : source + begin + length]
        written = arena[target + begin : target + begin + length]
        if is_direct:
            written.copy_(read, non_blocking=True)
        else:
            bounce[:length].copy_(read, non_blocking=True)
            written.copy_(bounce[:length], non_blocking=True)
