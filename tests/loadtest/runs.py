"""Runs of the tester against the synthetic server, in virtual time: what every test of its measuring starts from."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from loadtest.client import Client
from loadtest.runner import Names, Progress, run_plan
from loadtest.samples import Sample
from loadtest.scenario import Scenario, read_scenario
from loadtest.workload import build_plan
from tests.loadtest.synthetic_server import Body, Script, SyntheticServer
from tests.loadtest.virtual_time import VirtualLoop, run_virtually

Source = dict[str, object]


@dataclass(frozen=True, slots=True)
class Ran:
    """What both sides recorded; the server's moments are brought to the tester's zero by `start_s`."""

    samples: list[Sample]
    server: SyntheticServer
    start_s: float
    progress: Progress


def make_scenario(**changes: object) -> Scenario:
    """Return a small scenario; keyword arguments replace its top-level keys."""
    source: Source = {
        "name": "test",
        "seed": 5,
        "num_requests": 20,
        "arrivals": {"kind": "poisson", "rate": 10.0},
        "lengths": {"prompt": {"kind": "fixed", "value": 8}, "output": {"kind": "fixed", "value": 3}},
        "adapters": {"count": 4, "popularity": "distinct"},
    }
    return read_scenario({key: value for key, value in {**source, **changes}.items() if value is not None}, "test")


def run_against(
    folder: Path,
    scenario: Scenario,
    script: Callable[[Body, int], Script],
    *,
    keys: tuple[str, ...] = (),
    stall: tuple[float, float] | None = None,
) -> Ran:
    """Run a scenario against a scripted server; `stall` blocks the tester's own loop: (at, for how long)."""

    async def main() -> Ran:
        server = SyntheticServer(script)
        path = folder / "server.sock"
        names = Names("base", tuple(f"a{index}" for index in range(scenario.adapters.count)))
        plan = build_plan(scenario)
        progress = Progress(len(plan.requests))
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        async with server.listening(path):
            connector = aiohttp.UnixConnector(str(path), limit=0)
            timeout_s = scenario.request.timeout_s
            async with Client("http://synthetic", keys=keys, timeout_s=timeout_s, connector=connector) as client:
                start_s = loop.time()
                if stall is not None:
                    loop.call_later(stall[0], loop.pass_time, stall[1])
                samples = await run_plan(client, scenario, plan, names, progress)
        return Ran(samples, server, start_s, progress)

    return run_virtually(main())
