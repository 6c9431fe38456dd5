"""Time of a pass over static memory: captured once, replayed with the L2 cache flushed, median of CUDA events.

Owns warm-up, capture and samples; knows no model. Invariant: nothing is allocated or waited for between the two events
of a sample. On the CPU one run by the clock, so that callers can be exercised there; such a time means nothing.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# the first runs compile kernels and pick GEMM algorithms
_NUM_WARM_UPS = 3
# larger than any L2
_FLUSH_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one pass: median and spread of the samples."""

    median_us: float
    p10_us: float
    p90_us: float
    num_samples: int

    @classmethod
    def of(cls, samples_us: list[float]) -> "Timing":
        """Sum up samples."""
        ordered = sorted(samples_us)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[last // 10], ordered[last - last // 10], len(ordered))


@dataclass(frozen=True, slots=True)
class _Replay:
    """A captured pass. The graph knows addresses only: weights, cache and inputs live as long as `run` names them."""

    graph: torch.cuda.CUDAGraph
    run: Callable[[], object]

    def __call__(self) -> None:
        self.graph.replay()


def time_pass(
    run: Callable[[], object], device: torch.device, num_samples: int = 30, *, is_captured: bool = True
) -> Timing:
    """Time `run`, which reads and writes static memory only.

    Args:
        is_captured: as a CUDA graph; else launched one by one, which fits passes whose kernels outlast their launches.
    """
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return Timing.of([1e6 * (time.perf_counter() - begin)])
    launch = capture(run) if is_captured else _warm(run)
    launch()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    pairs = [(_event(), _event()) for _ in range(num_samples)]
    for begin_event, end_event in pairs:
        flush.zero_()
        begin_event.record()
        launch()
        end_event.record()
    torch.cuda.synchronize(device)
    return Timing.of([1e3 * begin_event.elapsed_time(end_event) for begin_event, end_event in pairs])


def capture(run: Callable[[], object]) -> Callable[[], object]:
    """Warm up beside the main stream, then capture; returns the replay, which keeps alive what `run` reads."""
    graph = torch.cuda.CUDAGraph()
    # torch's own capture stream: of new ones there are 32 in turn, and some would be a side stream of the pass
    capturing = torch.cuda.graph(graph)
    stream = capturing.capture_stream
    assert stream is not None, "torch makes its capture stream with the first capture"
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _warm(run)
    with capturing:
        run()
    return _Replay(graph, run)


def _warm(run: Callable[[], object]) -> Callable[[], object]:
    for _ in range(_NUM_WARM_UPS):
        run()
    torch.cuda.synchronize()
    return run


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
