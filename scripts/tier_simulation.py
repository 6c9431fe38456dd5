"""`python -m scripts.tier_simulation`: where adapters are found when a request names them, by the size of both tiers.

Plays Zipf workloads through the real state machine (`AdapterTiers` over a `HostTier`) in virtual time, fetches and
loads one at a time each. Nothing is timed, so every machine prints the same. Invariant: as in `eviction_simulation`.
"""

import argparse
import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.eviction_workloads import Workload, churn, zipf
from serve.engine.adapter_tiers import AdapterTiers, Residency
from serve.engine.host_tier import HostTier
from serve.engine.plan import FetchResult, LoadResult

_SEED = 1
_MAX_RUNNING = 256
# (on the device, on the host); 0: no host tier
BUDGETS = ((64, 0), (64, 128), (64, 256), (64, 1024))
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Speeds:
    """A fixed part of each way, seconds, and bytes a second: a disk's, and a copy's to the device."""

    fixed_s: float = 0.002
    fetch_bytes_per_s: float = 2e9
    load_bytes_per_s: float = 10e9


class Machine:
    """Disk and device in virtual time: `AdapterLoader` and, by `host`, `ImageFetcher`."""

    def __init__(self, sizes: dict[str, int], speeds: Speeds, *, has_host: bool) -> None:
        self._sizes = sizes
        self._has_host = has_host
        self._speeds = speeds
        self.now_s = 0.0
        self._free_at_s = {"fetch": 0.0, "load": 0.0}
        self.fetches: deque[tuple[float, str]] = deque()
        self.loads: deque[tuple[float, str, int]] = deque()
        self.read_bytes = 0

    def start_fetch(self, digest: str) -> None:
        """Begin behind the last fetch."""
        self.read_bytes += self._sizes[digest]
        self.fetches.append((self._ends("fetch", digest, self._speeds.fetch_bytes_per_s), digest))

    def start_load(self, digest: str, slot: int) -> None:
        """Begin behind the last load; without a host tier it is the disk that is waited for."""
        speed = self._speeds.load_bytes_per_s if self._has_host else self._speeds.fetch_bytes_per_s
        self.read_bytes += 0 if self._has_host else self._sizes[digest]
        self.loads.append((self._ends("load", digest, speed), digest, slot))

    def drop(self, digest: str, slot: int = 0) -> None:
        """Nothing to free."""

    def poll(self) -> list[FetchResult]:
        """Return the fetches that have ended."""
        ended = []
        while self.fetches and self.fetches[0][0] <= self.now_s:
            _, digest = self.fetches.popleft()
            ended.append(FetchResult(digest, self._sizes[digest], 8, 0.0))
        return ended

    def poll_loads(self) -> Iterator[LoadResult]:
        """Yield the loads that have ended."""
        while self.loads and self.loads[0][0] <= self.now_s:
            _, digest, slot = self.loads.popleft()
            yield LoadResult(digest, slot, self._sizes[digest], 8, 0.0)

    def _ends(self, way: str, digest: str, bytes_per_s: float) -> float:
        begin = max(self.now_s, self._free_at_s[way])
        self._free_at_s[way] = begin + self._speeds.fixed_s + self._sizes[digest] / bytes_per_s
        return self._free_at_s[way]


def simulate(workload: Workload, num_device: int, num_host: int) -> str:
    """Play a workload to its end and return its row of the table."""
    machine = Machine(workload.sizes, Speeds(), has_host=num_host > 0)
    host = HostTier(machine, num_host, 1024 * _GIB) if num_host else None
    tiers = AdapterTiers(machine, num_device, 1024 * _GIB, host=host)
    arrivals, waits = deque(workload.arrivals), list[float]()
    waiting: deque[tuple[float, str, float]] = deque()
    running: list[tuple[float, str]] = []
    while arrivals or waiting or running:
        times = [queue[0][0] for queue in (arrivals, running, machine.loads, machine.fetches) if queue]
        machine.now_s = max(machine.now_s, min(times))
        while running and running[0][0] <= machine.now_s:
            _, adapter = heapq.heappop(running)
            tiers.unpin(adapter)
            tiers.leave(adapter)
        for fetch in machine.poll():
            tiers.finish_fetch(fetch)
        for load in machine.poll_loads():
            tiers.finish_load(load)
        while arrivals and arrivals[0][0] <= machine.now_s:
            tiers.join(arrivals[0][1])
            waiting.append(arrivals.popleft())
        waiting = _admit(tiers, waiting, running, waits, machine.now_s)
    hits, number = tiers.hits, len(workload.arrivals)
    shares = [100 * count / number for count in (hits.num_on_device, hits.num_on_host, hits.num_missed)]
    waits.sort()
    on_host = f"{num_host}" if num_host else "none"
    read = machine.read_bytes / _GIB
    return (
        f"| {workload.name} | {num_device} | {on_host} | {shares[0]:.1f} % | {shares[1]:.1f} % | {shares[2]:.1f} % "
        f"| {read:.0f} | {1000 * sum(waits) / number:.1f} | {1000 * waits[int(0.99 * number)]:.0f} |"
    )


def _admit(
    tiers: AdapterTiers,
    waiting: deque[tuple[float, str, float]],
    running: list[tuple[float, str]],
    waits: list[float],
    now_s: float,
) -> deque[tuple[float, str, float]]:
    tiers.begin_walk()
    kept: deque[tuple[float, str, float]] = deque()
    for arrived_s, adapter, service_s in waiting:
        if tiers.want(adapter) is not Residency.READY or len(running) >= _MAX_RUNNING:
            kept.append((arrived_s, adapter, service_s))
            continue
        tiers.pin(adapter)
        heapq.heappush(running, (now_s + service_s, adapter))
        waits.append(now_s - arrived_s)
    return kept


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=4_000)
    args = parser.parse_args()
    print("| workload | on device | on host | found on device | on host | on disk | GiB read | mean wait ms | p99 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for workload in (*zipf(args.requests, Path(), _SEED), *churn(args.requests, Path(), _SEED)):
        for num_device, num_host in BUDGETS:
            print(simulate(workload, num_device, num_host), flush=True)


if __name__ == "__main__":
    main()
