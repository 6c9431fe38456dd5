"""One workload through `AdapterTiers` in virtual time.

Owns the clock, the loader (one load at a time, its time by size) and the waiting line; every decision is the tiers'.
Invariant: a request holds its adapter from the moment that it is ready until its service ends, as a running sequence.
"""

import heapq
from collections import deque
from dataclasses import dataclass

from scripts.eviction_workloads import Workload
from serve.engine.adapter_tiers import AdapterTiers, Residency
from serve.engine.eviction import EvictionPolicy
from serve.engine.plan import LoadResult


@dataclass(frozen=True, slots=True)
class Machine:
    """Memory for adapters, how fast they come in, and for how many requests at once there is room."""

    num_slots: int = 64
    max_bytes: int = 6 << 30
    fixed_load_s: float = 0.002
    load_bytes_per_s: float = 4e9
    max_running: int = 256


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a workload: `hit_ratio` counts requests whose adapter was ready when they arrived."""

    num_requests: int
    hit_ratio: float
    num_loads: int
    loaded_bytes: int
    mean_wait_s: float
    p99_wait_s: float


class _Loader:
    """Loads in virtual time, one after the other."""

    def __init__(self, machine: Machine, sizes: dict[str, int]) -> None:
        self._machine = machine
        self._sizes = sizes
        self._free_at_s = 0.0
        self.now_s = 0.0
        self.loaded_bytes = 0
        # (end, digest, slot) in order
        self.loads: deque[tuple[float, str, int]] = deque()

    def start_load(self, digest: str, slot: int) -> None:
        num_bytes = self._sizes[digest]
        begin = max(self.now_s, self._free_at_s)
        self._free_at_s = begin + self._machine.fixed_load_s + num_bytes / self._machine.load_bytes_per_s
        self.loaded_bytes += num_bytes
        self.loads.append((self._free_at_s, digest, slot))

    def drop(self, digest: str, slot: int) -> None:
        """Nothing to free: the bytes are not there."""

    def ended(self) -> LoadResult:
        end, digest, slot = self.loads.popleft()
        return LoadResult(digest, slot, self._sizes[digest], 8, end, None)


def simulate(workload: Workload, policy: EvictionPolicy, machine: Machine) -> Outcome:
    """Play a workload to its end."""
    loader = _Loader(machine, workload.sizes)
    tiers = AdapterTiers(loader, machine.num_slots, machine.max_bytes, policy)
    arrivals = deque(workload.arrivals)
    # (arrived, adapter, service seconds) in order of arrival
    waiting: deque[tuple[float, str, float]] = deque()
    running: list[tuple[float, str]] = []
    waits: list[float] = []
    num_hits = 0
    while arrivals or waiting or running:
        loader.now_s = _next_event(arrivals, running, loader)
        while running and running[0][0] <= loader.now_s:
            tiers.unpin(heapq.heappop(running)[1])
        while loader.loads and loader.loads[0][0] <= loader.now_s:
            tiers.finish_load(loader.ended())
        while arrivals and arrivals[0][0] <= loader.now_s:
            arrival = arrivals.popleft()
            num_hits += tiers.residency(arrival[1]) is Residency.READY
            waiting.append(arrival)
        _admit(tiers, waiting, running, waits, loader.now_s, machine.max_running)
    waits.sort()
    return Outcome(
        num_requests=len(waits),
        hit_ratio=num_hits / len(waits),
        num_loads=tiers.device.num_loads_total,
        loaded_bytes=loader.loaded_bytes,
        mean_wait_s=sum(waits) / len(waits),
        p99_wait_s=waits[int(0.99 * len(waits))],
    )


def _next_event(arrivals: deque[tuple[float, str, float]], running: list[tuple[float, str]], loader: _Loader) -> float:
    times = [queue[0][0] for queue in (arrivals, running, loader.loads) if queue]
    return min(times)


def _admit(
    tiers: AdapterTiers,
    waiting: deque[tuple[float, str, float]],
    running: list[tuple[float, str]],
    waits: list[float],
    now_s: float,
    max_running: int,
) -> None:
    tiers.begin_walk()
    kept = []
    while waiting:
        arrived_s, adapter, service_s = waiting.popleft()
        if tiers.want(adapter) is not Residency.READY or len(running) >= max_running:
            kept.append((arrived_s, adapter, service_s))
            continue
        tiers.pin(adapter)
        heapq.heappush(running, (now_s + service_s, adapter))
        waits.append(now_s - arrived_s)
    waiting.extend(kept)
