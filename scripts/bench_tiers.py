"""`python -m scripts.bench_tiers`: what cold adapters cost the warm ones, and where a cold request's time goes.

Three parts on one server of a 0.5B-shaped random base: gaps between the tokens of warm streams while nothing else runs,
while one client asks warm adapters for single tokens, and while it asks cold ones (`tier_gaps`); how long a swap takes
by rank and size; where adapters were found under Zipf. Owns the order of the measurements and the report. Invariant:
nothing is written down that was not measured by this run.
"""

import argparse
import asyncio
import json
import random
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from loadtest.environment import read_environment
from scripts.bench_model import Shape, build_adapters, build_base
from scripts.bench_servers import Server, children, chorale
from scripts.tier_clients import WARM_OUTPUT_TOKENS, WARM_PROMPT_TOKENS, FirstToken, first_token
from scripts.tier_gaps import Plan, measure, quantile

# images on the host and adapters on the device
NUM_HOST, NUM_DEVICE = 12, 8
# of adapters whose swaps are timed, beside the others' 16
OTHER_RANKS = (8, 64)


@dataclass(frozen=True, slots=True)
class Swap:
    """Loads of one adapter: bytes in each tier, and median milliseconds of each way."""

    rank: int
    host_mib: float
    device_mib: float
    fetch_ms: float
    load_ms: float


def main() -> None:
    """Measure what is asked for and print it as JSON."""
    args = _arguments()
    # the server runs in a session of its own: without this it would outlive a run that is stopped
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    shape = Shape()
    base = args.cache / "bench-base"
    build_base(base, shape)
    folders = build_adapters(args.cache / "adapters", shape, args.adapters)
    others = [build_adapters(args.cache / "adapters", shape, 1, rank)[0] for rank in OTHER_RANKS]
    extra = ["--adapter-device-count", str(NUM_DEVICE), "--adapter-host-count", str(NUM_HOST), "--probe", "off"]
    extra += shlex.split(args.serve_args)
    report: dict[str, object] = {"environment": read_environment(sys.argv[1:], "scripts.bench_tiers")}
    with chorale(base, args.cache / "tiers-store", args.port, extra) as server:
        names = _publish(server.url, folders)
        _publish(server.url, others)
        if "publish" in args.parts:
            return
        if "gaps" in args.parts:
            report |= _gaps(args, server, names)
        if "swaps" in args.parts:
            report["swaps"] = [asdict(each) for each in _swaps(server.url, names, args.repeats)]
        if "hits" in args.parts:
            report["hits"] = asyncio.run(_hits(args.port, server.url, names, args.requests))
    text = json.dumps(report, indent=1)
    print(text)
    args.out.write_text(text + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".chorale/bench"))
    parser.add_argument("--out", type=Path, default=Path(".chorale/bench/tiers.json"))
    parser.add_argument("--port", type=int, default=18491)
    parser.add_argument("--adapters", type=int, default=28)
    parser.add_argument("--warm", type=int, default=4, help="warm streams, each on an adapter of its own")
    parser.add_argument("--rounds", type=int, default=7, help="each with a slice of every mode")
    parser.add_argument("--slice-s", type=float, default=7.0)
    parser.add_argument("--max-foreign", type=float, default=0.04, help="share of all cores that others may take")
    parser.add_argument("--serve-args", default="", help="more flags for the server, in one string")
    parser.add_argument("--repeats", type=int, default=9, help="swaps of each adapter")
    parser.add_argument("--requests", type=int, default=300, help="of the Zipf part")
    parser.add_argument("--parts", nargs="+", default=["gaps", "swaps", "hits"])
    return parser.parse_args()


def _publish(url: str, folders: Sequence[Path]) -> list[str]:
    with httpx.Client(base_url=url, timeout=120) as client:
        known = {card["name"] for card in client.get("/v1/adapters").json()["data"]}
        for folder in folders:
            if folder.name not in known:
                parts = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
                client.post("/v1/adapters", data={"name": folder.name}, files=parts).raise_for_status()
    return [folder.name for folder in folders]


def _gaps(args: argparse.Namespace, server: Server, names: list[str]) -> dict[str, object]:
    pids = [server.process.pid, *children(server.process.pid)]
    plan = Plan(args.port, names, args.warm, args.rounds, args.slice_s, pids, args.max_foreign)
    found = asyncio.run(measure(plan))
    return {
        "warm_streams": args.warm,
        "prompt_tokens": WARM_PROMPT_TOKENS,
        "output_tokens": WARM_OUTPUT_TOKENS,
        "gaps": [asdict(each) for each in found.summary()],
        "rises_percent": found.rises(),
        "foreign_share_of_rounds": found.foreign,
        "disturbed_rounds": found.num_disturbed,
        "cold_first_token_ms": _split(found.cold),
    }


def _split(cold: Sequence[FirstToken]) -> dict[str, dict[str, float]]:
    parts = {name: [each.parts_ms[name] for each in cold] for name in ("queue", "fetch", "load", "prefill")}
    parts["whole answer, as the client saw it"] = [1000 * each.total_s for each in cold]
    return {
        name: {f"p{share}": round(quantile(values, share / 100), 1) for share in (50, 90, 99)}
        for name, values in parts.items()
    }


def _swaps(url: str, names: Sequence[str], repeats: int) -> list[Swap]:
    found = []
    with httpx.Client(base_url=url, timeout=60) as client:
        by_rank: dict[int, str] = {}
        for card in client.get("/v1/adapters").json()["data"]:
            by_rank.setdefault(card["rank"], card["name"])
        for rank, name in sorted(by_rank.items()):
            fetches, loads = list[float](), list[float]()
            num_bytes = (0.0, 0.0)
            for _ in range(repeats):
                client.post(f"/v1/adapters/{name}:evict")
                _wait(client, name, "absent")
                client.post(f"/v1/adapters/{name}:prefetch")
                status = _wait(client, name, "ready")
                fetches.append(1000 * float(status["last_fetch_seconds"]))
                loads.append(1000 * float(status["last_load_seconds"]))
                num_bytes = (float(status["host_bytes"]), float(status["device_bytes"]))
            host, device = (round(number / (1 << 20), 1) for number in num_bytes)
            fetch_ms, load_ms = (round(quantile(values, 0.5), 1) for values in (fetches, loads))
            found.append(Swap(rank, host, device, fetch_ms, load_ms))
    return found


def _wait(client: httpx.Client, name: str, state: str) -> dict[str, str]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status: dict[str, str] = client.get(f"/v1/adapters/{name}/status").json()
        if status["state"] == state:
            return status
        time.sleep(0.02)
    raise RuntimeError(f"{name} is not {state} after a minute")


async def _hits(port: int, url: str, names: list[str], num_requests: int) -> dict[str, float]:
    """Ask for single tokens, adapters drawn by Zipf 1.0, four at a time; tell where they were found."""
    rng = random.Random(1)
    weights = [1 / place for place in range(1, len(names) + 1)]
    chosen, before = rng.choices(names, weights, k=num_requests), _counters(url)
    for first in range(0, num_requests, 4):
        wave = enumerate(chosen[first : first + 4], start=first)
        await asyncio.gather(*(first_token(port, name, seed) for seed, name in wave))
    # the page is at most a heartbeat behind
    await asyncio.sleep(1.0)
    found = {name: value - before[name] for name, value in _counters(url).items()}
    on_device, misses, on_host = found["hits"], found["misses"], found["host_hits"]
    shares = {"device": on_device, "host": on_host, "disk": misses - on_host}
    return {tier: round(count / num_requests, 3) for tier, count in shares.items()} | {"requests": num_requests}


def _counters(url: str) -> dict[str, float]:
    page = httpx.get(f"{url}/metrics", timeout=60).text
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("chorale_adapter_"))
    return {name: float(values[f"chorale_adapter_{name}_total"]) for name in ("hits", "misses", "host_hits")}


if __name__ == "__main__":
    main()
