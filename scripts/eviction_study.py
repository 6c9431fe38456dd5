"""`make eviction-study`: which eviction policy keeps the right adapters, by simulation over the real state machine.

Drives `AdapterTiers` with a loader in virtual time: requests arrive, wait for their adapter in order, hold it
for a while and leave. Prints one table, writes JSON and a plot. Nothing is timed, so every machine prints the same.
"""

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path

from scripts.eviction_plot import draw
from scripts.eviction_simulation import Machine, Outcome, simulate
from scripts.eviction_workloads import WORKLOADS, Workload
from serve.engine.eviction import POLICIES

_SEED = 20261121


def main() -> None:
    """Simulate every workload under every policy."""
    args = _arguments()
    machine = Machine()
    workloads = [workload for make in WORKLOADS for workload in make(args.requests, args.traces, _SEED)]
    outcomes = {
        workload.name: {name: simulate(workload, POLICIES[name](), machine) for name in POLICIES}
        for workload in workloads
    }
    text = report(outcomes, workloads, machine)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "eviction.json").write_text(json.dumps(_raw(outcomes, machine), indent=1) + "\n")
    draw(outcomes, args.out / "eviction.png")


def report(outcomes: dict[str, dict[str, Outcome]], workloads: list[Workload], machine: Machine) -> str:
    """Return the page as Markdown: the machine, then per workload hits, bytes loaded and wait by policy."""
    lines = [
        f"Python {platform.python_version()}; {machine.num_slots} adapter slots, {machine.max_bytes >> 20} MiB; a load "
        f"costs {machine.fixed_load_s * 1000:g} ms and {machine.load_bytes_per_s / 1e9:g} GB/s, one at a time.",
        "",
        "| workload | requests | adapters | policy | ready on arrival | GiB loaded | mean wait ms | p99 wait ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for workload in workloads:
        for name, outcome in outcomes[workload.name].items():
            lines.append(
                f"| {workload.name} | {outcome.num_requests} | {workload.num_adapters} | {name} "
                f"| {100 * outcome.hit_ratio:.1f} % | {outcome.loaded_bytes / 2**30:.0f} "
                f"| {1000 * outcome.mean_wait_s:.1f} | {1000 * outcome.p99_wait_s:.1f} |"
            )
    return "\n".join(lines)


def _raw(outcomes: dict[str, dict[str, Outcome]], machine: Machine) -> dict[str, object]:
    return {
        "machine": asdict(machine),
        "outcomes": {
            workload: {policy: asdict(outcome) for policy, outcome in found.items()}
            for workload, found in outcomes.items()
        },
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000, help="requests per workload")
    parser.add_argument("--traces", type=Path, default=Path("../shared/data/traces"), help="folder of the traces")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
