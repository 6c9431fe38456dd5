"""What the server holds when nobody asks anything of it: read before and after, and compared.

Owns the readings. Invariant: a reading is taken at rest; what the campaign did not give back shows as a difference.
"""

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from tests.live_server import HEARTBEAT_S, REST_GAUGES, LiveServer

# a Python heap that worked is larger than one that did not; a leak of one adapter's bytes per hundred requests is more
MAX_GROWTH_BYTES = 160 << 20
# pools start their threads on demand; one thread too many per change shows all the same
_MAX_MORE_THREADS = 8
_EMPTY = ("chorale_adapters_resident", "chorale_adapter_bytes", "chorale_adapters_loading")


@dataclass(frozen=True, slots=True)
class Held:
    """Of both processes, and of the store's folder."""

    api_fds: int
    engine_fds: int
    api_threads: int
    engine_threads: int
    num_children: int
    num_staged: int
    api_bytes: int
    engine_bytes: int


def wait_for_rest(server: LiveServer, timeout_s: float, *, is_empty: bool) -> dict[str, float]:
    """Return the metrics once the rest gauges have read 0 for longer than a heartbeat, or as they are after that time.

    Args:
        is_empty: no adapter is in memory either.
    """
    deadline, rest_since = time.monotonic() + timeout_s, time.monotonic()
    while time.monotonic() < deadline:
        series = server.metrics()
        if busy(series, is_empty=is_empty):
            rest_since = time.monotonic()
        elif time.monotonic() - rest_since > HEARTBEAT_S:
            break
        time.sleep(0.1)
    return series


def busy(series: dict[str, float], *, is_empty: bool) -> list[str]:
    """Say in words which gauges are not at rest."""
    prefixes = (*REST_GAUGES, *_EMPTY) if is_empty else REST_GAUGES
    return [f"{name} is {value} at rest" for name, value in series.items() if value and name.startswith(prefixes)]


def held(server: LiveServer, store_dir: Path) -> Held:
    """Return what the server holds now."""
    api = psutil.Process(server.process.pid)
    engine = _engine_of(api)
    return Held(
        api_fds=api.num_fds(),
        engine_fds=engine.num_fds(),
        api_threads=api.num_threads(),
        engine_threads=engine.num_threads(),
        num_children=len(api.children(recursive=True)),
        num_staged=len(list((store_dir / "staging").iterdir())),
        api_bytes=api.memory_info().rss,
        engine_bytes=engine.memory_info().rss,
    )


def settled(server: LiveServer, store_dir: Path, before: Held, timeout_s: float) -> Held:
    """Return what the server holds once that is no more than before, or what it still holds after that time.

    A connection whose client left lingers for a moment; what leaks stays.
    """
    deadline = time.monotonic() + timeout_s
    while (now := held(server, store_dir)) and time.monotonic() < deadline:
        if not _more(before, now):
            break
        time.sleep(0.1)
    return now


def unlogged(log: Path, num_answered: int) -> list[str]:
    """Say what the log lacks: one JSON line for each of so many answered completions, with the version's digest."""
    num_found = 0
    with log.open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("{"):
                entry = json.loads(line)
                is_answer = (entry["route"], entry["status"], entry["is_complete"]) == ("/v1/completions", 200, True)
                num_found += is_answer and len(entry["adapter_digests"]) == len(entry["adapters"])
    return [] if num_found >= num_answered else [f"{num_answered} requests were answered, the log has {num_found}"]


def _swapped(series: dict[str, float], tier: str, direction: str) -> float:
    return series[f'chorale_adapter_swap_bytes_total{{direction="{direction}",tier="{tier}"}}']


def _engine_of(api: psutil.Process, timeout_s: float = 60.0) -> psutil.Process:
    """Return the engine process, planted or not; one that was lost is back after its backoff."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with suppress(psutil.NoSuchProcess):
            for child in api.children():
                if "--socket" in child.cmdline():
                    return child
        time.sleep(0.1)
    raise AssertionError(f"no engine process after {timeout_s} s")


def differences(before: Held, after: Held, series: dict[str, float]) -> list[str]:
    """Say in words what did not come back to its base."""
    found = _more(before, after)
    for tier in ("host", "device"):
        came, went = (_swapped(series, tier, direction) for direction in ("in", "out"))
        if came != went:
            found.append(f"{came} bytes of adapters came into the {tier} tier, {went} went")
    if series["chorale_engine_restarts_total"]:
        found.append(f"the engine was lost {series['chorale_engine_restarts_total']:g} times")
    return found


def _more(before: Held, after: Held) -> list[str]:
    found = []
    for name, now in asdict(after).items():
        base = asdict(before)[name]
        allowed = {"bytes": MAX_GROWTH_BYTES, "threads": _MAX_MORE_THREADS}.get(name.rsplit("_", 1)[1], 0)
        if now > base + allowed:
            found.append(f"{name} was {base} and is {now}")
    return found
