"""The side stream: small adapter kernels beside the base GEMM, in an order that a CUDA graph can capture.

Owns the fork and the join of one stream; launches nothing itself. Invariant: what is launched inside `fork` starts
after everything issued on the main stream before it, and what is issued on the main stream after `join` starts after
all of it. Tensors that forked work reads or writes must live until the `join`: the allocator frees by the main stream.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch


class SideStream(Protocol):
    """A place to launch work that runs beside the main stream."""

    def fork(self) -> AbstractContextManager[None]:
        """Launch the body's kernels beside the main stream, after all that was issued there so far."""
        ...

    def join(self) -> None:
        """Let the main stream wait for what was forked since the last join; nothing when nothing was."""
        ...


class InlineSide:
    """No stream: forked work runs where it is issued. For the CPU and for Triton's interpreter."""

    def fork(self) -> AbstractContextManager[None]:
        """Run the body in place."""
        return nullcontext()

    def join(self) -> None:
        """Nothing to wait for."""


class CudaSide:
    """One CUDA stream beside whichever stream is current at the fork.

    Notes: capture-safe: the fork pulls the side stream into a running capture and the join ends it there, so every fork
    inside a capture needs its join inside the same capture. One thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # re-recorded at every fork and join: a wait takes the newest record, so two events serve all layers
        self._forked = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._joined = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._has_work = False

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Launch the body's kernels on the side stream."""
        self._forked.record(torch.cuda.current_stream(self._device))
        self._stream.wait_event(self._forked)
        # also when the body raises: the side stream is then part of a capture and must be joined
        self._has_work = True
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Let the current stream wait for the side stream."""
        # without a fork there is nothing to wait for, and in a capture an older event would be foreign to it
        if not self._has_work:
            return
        self._has_work = False
        self._joined.record(self._stream)
        torch.cuda.current_stream(self._device).wait_event(self._joined)
