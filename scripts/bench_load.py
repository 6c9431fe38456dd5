"""One cell of the CPU benchmark as a run of the load tester: a closed loop over given models, on any server.

Owns the translation from cell to scenario only; sending, measuring and arithmetic are `loadtest`'s. Invariant: every
prompt is random and seeded by the cell, so no prefix is shared between requests or cells, and a cell with a failure has
no throughput that could be mistaken for one.
"""

import asyncio
from dataclasses import dataclass

from loadtest.client import Client
from loadtest.metrics import Slo, summarise
from loadtest.runner import Names, Progress, run_plan
from loadtest.samples import Sample
from loadtest.scenario import read_scenario
from loadtest.workload import build_plan

TIMEOUT_S = 1200


@dataclass(frozen=True, slots=True)
class Workload:
    """`num_requests` requests over `models` in turn."""

    models: list[str]
    concurrency: int
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What one run measured; times in seconds, TTFT from the moment a client was free."""

    tokens_per_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    itl_p50_s: float
    tpot_p50_s: float
    e2e_p50_s: float
    wall_s: float
    num_failed: int


def run_load(url: str, workload: Workload, vocab: int) -> LoadResult:
    """Run a workload to its end."""
    samples = asyncio.run(_run(url, workload, vocab))
    summary = summarise(samples, Slo())
    failed = [sample for sample in samples if not sample.is_ok]
    if failed:
        print(f"failed: {failed[0].model}: {failed[0].failure} {failed[0].detail}", flush=True)
    return LoadResult(
        tokens_per_s=float("nan") if failed else summary.output_tokens_per_s,
        ttft_p50_s=summary.ttft_s.p50,
        ttft_p90_s=summary.ttft_s.p90,
        itl_p50_s=summary.itl_s.p50,
        tpot_p50_s=summary.tpot_s.p50,
        e2e_p50_s=summary.e2e_s.p50,
        wall_s=summary.wall_s,
        num_failed=len(failed),
    )


async def _run(url: str, workload: Workload, vocab: int) -> list[Sample]:
    scenario = read_scenario(
        {
            "name": "bench",
            "seed": workload.seed,
            "num_requests": workload.num_requests,
            "arrivals": {"kind": "closed", "concurrency": workload.concurrency},
            "lengths": {
                "prompt": {"kind": "fixed", "value": workload.prompt_tokens},
                "output": {"kind": "fixed", "value": workload.output_tokens},
            },
            "adapters": {"count": len(workload.models), "popularity": "distinct"},
            "request": {"first_id": 2, "last_id": vocab - 1, "timeout_s": TIMEOUT_S},
        },
        "bench",
    )
    plan = build_plan(scenario)
    async with Client(url, timeout_s=TIMEOUT_S) as client:
        names = Names("", tuple(workload.models))
        return await run_plan(client, scenario, plan, names, Progress(len(plan.requests)))
