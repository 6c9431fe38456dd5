"""`python -m tests.campaign --out FOLDER`: a campaign with a progress bar; the report is FOLDER/report.json.

Owns the arguments and what is said. Invariant: status 0 only after a clean campaign; a folder that holds one is left
alone.
"""

import argparse
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.campaign.budgets import budget_options
from tests.campaign.campaign import Report, Scale, as_json, clear, run_campaign
from tests.live_server import REPO_ROOT


def main() -> int:
    """Run one campaign and say what came of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="new folder for the model, the store and the report")
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--changes-every", type=int, default=150, help="a change of a name after so many requests")
    parser.add_argument("--host", type=int, default=64, help="adapters that fit into host memory")
    parser.add_argument("--device", type=int, default=16, help="adapters that fit into device memory")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    scale = Scale(
        num_adapters=options.adapters,
        num_requests=options.requests,
        num_clients=options.clients,
        changes_every=options.changes_every,
        seed=options.seed,
        server_options=budget_options(num_host=options.host, num_device=options.device),
    )
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        tasks = {}

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        report = run_campaign(options.out, scale, on_progress)
    clear(options.out)
    return say(report, options.out / "report.json")


def say(report: Report, path: Path) -> int:
    """Write the report, print its sum, and return the exit status."""
    path.write_text(json.dumps({"environment": environment()} | as_json(report), indent=1) + "\n")
    num_requests = sum(report.outcomes.values())
    print(f"{num_requests} requests in {report.seconds:.0f} s, {report.num_cold} of them cold; {path}")
    for outcome, count in sorted(report.outcomes.items()):
        print(f"  {outcome}: {count}")
    print("  changes:", ", ".join(f"{count} {kind}" for kind, count in sorted(report.changes.items())))
    for complaint in report.complaints[:20]:
        print(f"  COMPLAINT {complaint}")
    print("clean" if not report.complaints else f"NOT CLEAN: {len(report.complaints)} complaints")
    return bool(report.complaints)


def environment() -> dict[str, str | int]:
    """Return on what this ran."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO_ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "python": platform.python_version(),
        "torch": version("torch"),
        "machine": platform.machine(),
        "num_cores": psutil.cpu_count() or 0,
        "memory_bytes": psutil.virtual_memory().total,
        "command": " ".join(sys.argv),
    }


if __name__ == "__main__":
    sys.exit(main())
