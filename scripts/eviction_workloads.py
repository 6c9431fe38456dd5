"""Who asks for which adapter, when, and for how long: the workloads of the eviction study.

Owns the generators; seeded, so a workload is the same every time. Arrivals are (seconds, adapter, service seconds), in
order. The traces tell times, lengths and (Mooncake) which requests share a prefix; which adapter an Azure request names
is not in them and is drawn, which is said in the workload's name.
"""

import csv
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate, islice
from pathlib import Path

Arrival = tuple[float, str, float]

_NUM_ADAPTERS = 2000
# adapters that the conversations of the Mooncake trace are dealt to
_NUM_TENANTS = 400
# requests a second over all adapters, and how long one holds its adapter
_RATE = 6.0
_TOKENS_PER_S = 40.0
# bytes of an adapter of rank 8, 16, 64 on an 8 B model, and how common each is
_SIZES = (40 << 20, 80 << 20, 320 << 20)
_SHARES = (50, 35, 15)
# popularity does not stand still: the ranks are dealt anew after this long
_DRIFT_S = 300.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival, and the size of each adapter in bytes."""

    name: str
    num_adapters: int
    arrivals: tuple[Arrival, ...]
    sizes: dict[str, int]


def zipf(num_requests: int, traces: Path, seed: int) -> Iterator[Workload]:
    """Poisson arrivals, popularity Zipf 0.6, 1.0 and 1.3, and Zipf 1.0 whose order changes every five minutes."""
    for exponent in (0.6, 1.0, 1.3):
        draw = random.Random(seed)
        names = _draw_zipf(draw, exponent, num_requests)
        yield _workload(f"zipf {exponent}", zip(_poisson(draw), names, _services(draw), strict=False), num_requests)
    draw = random.Random(seed)
    times = list(islice(_poisson(draw), num_requests))
    drifting = _drifting(draw, times)
    yield _workload("zipf 1.0, drifting", zip(times, drifting, _services(draw), strict=False), num_requests)


def churn(num_requests: int, traces: Path, seed: int) -> Iterator[Workload]:
    """Zipf 1.0, and every third request walks over adapters that nobody asks for twice soon."""
    draw = random.Random(seed)
    popular = iter(_draw_zipf(draw, 1.0, num_requests))
    scanned = (f"scan{number % _NUM_ADAPTERS}" for number in range(num_requests))
    names = (next(scanned) if number % 3 == 2 else next(popular) for number in range(num_requests))
    yield _workload("zipf 1.0 and a scan", zip(_poisson(draw), names, _services(draw), strict=False), num_requests)


def azure(num_requests: int, traces: Path, seed: int) -> Iterator[Workload]:
    """Arrivals and lengths of Azure's 2023 traces; adapters drawn by a drifting Zipf 1.0."""
    for kind in ("conv", "code"):
        path = traces / "azure-llm-2023" / f"AzureLLMInferenceTrace_{kind}.csv"
        if not path.is_file():
            continue
        with path.open(newline="") as file:
            rows = list(islice(csv.DictReader(file), num_requests))
        begin = datetime.fromisoformat(rows[0]["TIMESTAMP"][:26])
        times = [(datetime.fromisoformat(row["TIMESTAMP"][:26]) - begin).total_seconds() for row in rows]
        services = [int(row["GeneratedTokens"]) / _TOKENS_PER_S for row in rows]
        names = _drifting(random.Random(seed), times)
        yield _workload(f"azure {kind}, adapters drawn", zip(times, names, services, strict=True), num_requests)


def mooncake(num_requests: int, traces: Path, seed: int) -> Iterator[Workload]:
    """Mooncake's conversations: requests that share the first block of their own share an adapter."""
    path = traces / "mooncake" / "conversation_trace.jsonl"
    if not path.is_file():
        return
    with path.open() as file:
        rows = [json.loads(line) for line in islice(file, num_requests)]
    arrivals = [
        (row["timestamp"] / 1000, f"a{row['hash_ids'][:2][-1] % _NUM_TENANTS}", row["output_length"] / _TOKENS_PER_S)
        for row in rows
    ]
    yield _workload("mooncake, adapter by conversation", sorted(arrivals), num_requests)


WORKLOADS: tuple[Callable[[int, Path, int], Iterator[Workload]], ...] = (zipf, churn, azure, mooncake)


def _workload(name: str, arrivals: Iterable[Arrival], num_requests: int) -> Workload:
    kept = tuple(islice(arrivals, num_requests))
    names = sorted({adapter for _, adapter, _ in kept})
    # by name, so that an adapter is as large in every workload
    sizes = {adapter: random.Random(adapter).choices(_SIZES, _SHARES)[0] for adapter in names}
    return Workload(name, len(names), kept, sizes)


def _poisson(draw: random.Random) -> Iterator[float]:
    now = 0.0
    while True:
        now += draw.expovariate(_RATE)
        yield now


def _services(draw: random.Random) -> Iterator[float]:
    while True:
        yield draw.uniform(8, 512) / _TOKENS_PER_S


def _draw_zipf(draw: random.Random, exponent: float, count: int) -> list[str]:
    weights = list(accumulate((rank + 1) ** -exponent for rank in range(_NUM_ADAPTERS)))
    return [f"a{rank}" for rank in draw.choices(range(_NUM_ADAPTERS), cum_weights=weights, k=count)]


def _drifting(draw: random.Random, times: list[float]) -> list[str]:
    """Draw Zipf 1.0 with the ranks dealt anew every `_DRIFT_S` seconds."""
    ranks = [int(name[1:]) for name in _draw_zipf(draw, 1.0, len(times))]
    deals: dict[int, list[int]] = {}
    names = []
    for time, rank in zip(times, ranks, strict=True):
        period = int(time / _DRIFT_S)
        if period not in deals:
            deals[period] = random.Random(period).sample(range(_NUM_ADAPTERS), _NUM_ADAPTERS)
        names.append(f"a{deals[period][rank]}")
    return names
