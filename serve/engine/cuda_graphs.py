"""Captured decode passes: one graph per number of rows and per set of fused sites, and which of them a step replays.

Owns the buckets, the families and the choice; the capture itself is a `Recorder`'s. A family is a mask of fused sites:
none launches no adapter op, all is right for every step of LoRAs, those between only save launches. Bits above tell of
adapters that are more than low rank, and of inputs that are scaled; their graphs are captured when steps first ask for
them. Invariants: nothing is
captured while steps are in flight; a graph reads everything from static memory, so it is right for other rows, more
or fewer adapters and other ranks than there were at its capture.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.gpu.acting_sites import ActingSites
from adapter_kernels.gpu.tables import SITES
from serve.engine.device_forward import StepOutput

logger = logging.getLogger(__name__)

NO_SITES = 0
ALL_SITES = (1 << len(FUSED_SITES)) - 1
# the step's adapters are more than low rank and bias; above it one bit for each site whose input is scaled
FAMILIES = 1 << len(FUSED_SITES)
_SMALL_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_BUCKET_STEP = 32
# each holds some megabytes of device memory: 20 buckets in 2 families at start, and room for what traffic brings
_MAX_GRAPHS = 128
# runs before a capture: compile kernels, let libraries make their plans
_NUM_WARM_UPS = 2


@dataclass(frozen=True, slots=True)
class GraphKey:
    """Rows of the bucket and the mask of `site_mask` (bit i: the i-th key of `FUSED_SITES`, then forms)."""

    bucket: int
    mask: int


def decode_buckets(max_decodes: int) -> tuple[int, ...]:
    """Return the sizes that decode steps are padded to, rising; the last is `max_decodes` itself."""
    sizes = [*_SMALL_BUCKETS, *range(_SMALL_BUCKETS[-1] + _BUCKET_STEP, max_decodes, _BUCKET_STEP)]
    return (*(size for size in sizes if size < max_decodes), max_decodes)


def site_mask(sites: ActingSites) -> int:
    """Return which fused sites and which forms of the kernels occur, in any layer."""
    fused, in_scaled = {name for _, name in sites.fused}, {name for _, name in sites.in_scaled}
    mask = sum(1 << i for i, name in enumerate(FUSED_SITES) if name in fused)
    mask |= FAMILIES if sites.has_families else 0
    return mask | sum(FAMILIES << 1 + i for i, name in enumerate(SITES) if name in in_scaled)


def sites_of_mask(mask: int, num_layers: int) -> ActingSites:
    """Return what a mask stands for, in every layer."""
    fused = [name for i, name in enumerate(FUSED_SITES) if mask >> i & 1]
    in_scaled = [name for i, name in enumerate(SITES) if mask & FAMILIES << 1 + i]
    layers = range(num_layers)
    return ActingSites(
        frozenset((layer, name) for layer in layers for name in fused),
        bool(mask & FAMILIES),
        frozenset((layer, name) for layer in layers for name in in_scaled),
    )


class GraphChoice:
    """Which graph a step takes, and which ones are worth capturing when there is time. Pure."""

    def __init__(self) -> None:
        self._captured: set[GraphKey] = set()
        self._refused: set[GraphKey] = set()
        # in the order of the first step that asked
        self._wanted: dict[GraphKey, None] = {}

    def add(self, key: GraphKey) -> None:
        """Note a graph as captured."""
        self._captured.add(key)
        self._wanted.pop(key, None)

    def choose(self, bucket: int, mask: int) -> GraphKey | None:
        """Return the narrowest captured graph that is right for the step; None: run it without one.

        Between its exact family and the one of all sites nothing is tried: few families keep start and memory small.
        """
        exact = GraphKey(bucket, mask)
        if exact in self._captured:
            return exact
        if exact not in self._refused and len(self._captured) + len(self._wanted) < _MAX_GRAPHS:
            self._wanted.setdefault(exact)
        superset = GraphKey(bucket, mask | ALL_SITES)
        return superset if superset in self._captured else None

    def next_wanted(self) -> GraphKey | None:
        """Return the graph that a step missed first."""
        return next(iter(self._wanted), None)

    def refuse(self, key: GraphKey) -> None:
        """Never want this graph again: it could not be captured."""
        self._refused.add(key)
        self._wanted.pop(key, None)


class Recorded(Protocol):
    """A captured pass."""

    @property
    def output(self) -> StepOutput:
        """What every replay fills."""
        ...

    def replay(self) -> None:
        """Queue the pass on what static memory holds now."""
        ...


class Recorder(Protocol):
    """Captures passes."""

    def record(self, run: Callable[[], StepOutput]) -> Recorded:
        """Capture what `run` launches; `run` is called several times."""
        ...


class DecodeGraphs:
    """The graphs of one engine."""

    def __init__(self, recorder: Recorder, prepare: Callable[[GraphKey], Callable[[], StepOutput]]) -> None:
        """Start without graphs.

        Args:
            prepare: put a step of padding into static memory and return the pass over it.
        """
        self._recorder = recorder
        self._prepare = prepare
        self._choice = GraphChoice()
        self._graphs: dict[GraphKey, Recorded] = {}

    def capture(self, key: GraphKey) -> None:
        """Capture one graph; no step may be in flight."""
        self._graphs[key] = self._recorder.record(self._prepare(key))
        self._choice.add(key)

    def find(self, bucket: int, mask: int) -> Recorded | None:
        """Return the graph for a step, or None when it must run without one."""
        key = self._choice.choose(bucket, mask)
        return None if key is None else self._graphs[key]

    def capture_pending(self) -> bool:
        """Capture the graph that steps missed first; False when none is missing. No step may be in flight."""
        key = self._choice.next_wanted()
        if key is None:
            return False
        try:
            self.capture(key)
        except RuntimeError:
            # most likely no memory: the graph of all sites serves these steps as well, with a few launches more
            logger.exception("the graph of %d rows and site mask %d could not be captured", key.bucket, key.mask)
            self._choice.refuse(key)
        return True


class CudaRecorder:
    """Captures on one stream into one memory pool, which all graphs share: they never run at the same time.

    Notes: one stream for all captures, since the pool's memory belongs to the stream it was taken on. A new one each
    time would share nothing, and torch has 32 of them in turn: some would be the side's or the adapter loader's.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def record(self, run: Callable[[], StepOutput]) -> Recorded:
        """Warm up, then capture."""
        before = torch.cuda.current_stream()
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            for _ in range(_NUM_WARM_UPS):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # the outer context, since torch's own leaves the capture's stream current when the capture fails;
        # thread_local: the adapter loader goes on copying meanwhile
        with (
            torch.cuda.stream(before),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            output = run()
        return CudaRecorded(graph, output)


@dataclass(frozen=True, slots=True)
class CudaRecorded:
    """A captured graph."""

    graph: torch.cuda.CUDAGraph
    output: StepOutput

    def replay(self) -> None:
        """Queue the graph on the current stream."""
        self.graph.replay()


class RerunRecorder:
    """What a graph does, without one: a replay runs the pass again and leaves its results where the first one did.

    For Triton's interpreter: shows that a pass depends on static memory alone.
    """

    def record(self, run: Callable[[], StepOutput]) -> Recorded:
        """Run once."""
        return _Rerun(run, run())


@dataclass(frozen=True, slots=True)
class _Rerun:
    run: Callable[[], StepOutput]
    output: StepOutput

    def replay(self) -> None:
        again = self.run()
        for old, new in ((self.output.hidden, again.hidden), (self.output.logits, again.logits)):
            if old is not None and new is not None and old.data_ptr() != new.data_ptr():
                old.copy_(new)
