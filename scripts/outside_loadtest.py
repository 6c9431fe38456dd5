"""`make test-outside-loadtest`: guidellm, inference-perf and wrk against our server, beside our own load tester.

Each tool runs while ours sends a load of the same law and lengths to the same server, so both meet the same machine at
the same time; compared are the medians over the tool's own window, ours counted from the sent moment. Served is a
random model of 50 M parameters: the demo's gaps are so short that what a tool takes of the processor for itself is a
tenth of them. Owns the runs and the table; exit status 0 only if every tool that was found agrees within `--tolerance`.
"""

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer

from loadtest.client import Client
from loadtest.environment import read_environment
from loadtest.runner import Names, Progress, run_plan
from loadtest.samples import Sample
from loadtest.scenario import read_scenario
from loadtest.workload import build_plan
from scripts.bench_cpu import upload
from scripts.bench_model import Shape, build_adapters, build_base
from scripts.bench_servers import chorale
from scripts.loadtest_smoke import DEMO
from scripts.outside_tools import (
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    RATE,
    Target,
    Told,
    guidellm_command,
    inference_perf_command,
    read_guidellm,
    read_inference_perf,
    read_wrk,
    wrk_command,
)

# as `chorale` calls what it serves
BASE = "bench-base"
TOKENIZER = DEMO / "chorale-demo"
# a tool that has not ended by then is stopped
TOOL_TIMEOUT_S = 400.0


@dataclass(frozen=True, slots=True)
class Ours:
    """Our medians over a tool's window, in ms."""

    num_requests: int
    ttft_ms: float
    itl_ms: float
    tpot_ms: float
    e2e_ms: float


@dataclass(frozen=True, slots=True)
class Tool:
    """One outside tool: its program, how to start it, how to read it (its output, begin and end)."""

    name: str
    program: Path | None
    command: Callable[[Path, Target], list[str]]
    read: Callable[[Target, str, float, float], Told]
    models: tuple[str, ...]


def main() -> int:
    """Run every tool that is given, print the table, write JSON."""
    args = _arguments()
    base, adapters = _model(args.cache)
    first, second = (folder.name for folder in adapters)
    tools = [
        Tool("guidellm", args.guidellm, guidellm_command, lambda t, *_: read_guidellm(t), (BASE,)),
        Tool(
            "inference-perf",
            args.inference_perf,
            inference_perf_command,
            lambda t, *_: read_inference_perf(t),
            (first, second),
        ),
        Tool("wrk", args.wrk, wrk_command, lambda _, text, begin, end: read_wrk(text, begin, end), (BASE,)),
    ]
    rows = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        chorale(base, Path(scratch) / "store", args.port, ["--no-prefix-cache"]) as server,
    ):
        for folder in adapters:
            upload(server.url, folder)
        for tool in tools:
            if tool.program is None:
                print(f"{tool.name}: not run; name its program with --{tool.name}", flush=True)
                continue
            folder = Path(scratch) / tool.name
            folder.mkdir()
            target = Target(server.url, BASE, (first, second), TOKENIZER, folder, args.seconds)
            told, ours = asyncio.run(_beside(tool, tool.program, target))
            rows.append((tool.name, told, ours))
            print(_line(*rows[-1]), flush=True)
    report = {"environment": read_environment(sys.argv[1:], "scripts.outside_loadtest"), "tolerance": args.tolerance}
    report["tools"] = [{"tool": name, "told": asdict(told), "ours": asdict(ours)} for name, told, ours in rows]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if rows and all(_worst(told, ours) <= args.tolerance for _, told, ours in rows) else 1


def _model(cache: Path) -> tuple[Path, list[Path]]:
    """Build the base, with a tokenizer that makes text of ids and ids of text, and two adapters."""
    files = ("tokenizer.json", "tokenizer_config.json")
    vocab = Tokenizer.from_file(str(TOKENIZER / files[0])).get_vocab_size()
    shape = Shape(hidden=768, intermediate=3072, num_layers=6, num_heads=12, num_kv_heads=4, vocab=vocab)
    build_base(cache / "base", shape)
    for name in files:
        shutil.copyfile(TOKENIZER / name, cache / "base" / name)
    return cache / "base", build_adapters(cache / "adapters", shape, 2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guidellm", type=Path, help="its program, in an environment of its own")
    parser.add_argument("--inference-perf", type=Path, help="its program; it needs Python 3.12")
    parser.add_argument("--wrk", type=Path, help="its program")
    parser.add_argument("--seconds", type=int, default=60, help="how long each tool sends")
    parser.add_argument("--tolerance", type=float, default=0.10, help="greatest relative difference of TTFT and ITL")
    parser.add_argument("--port", type=int, default=18476)
    parser.add_argument("--cache", type=Path, default=Path(".chorale/outside"), help="where the model is built, once")
    parser.add_argument("--out", type=Path, default=Path(".chorale/loadtest/outside.json"))
    return parser.parse_args()


async def _beside(tool: Tool, program: Path, target: Target) -> tuple[Told, Ours]:
    """Run a tool while our load goes on; return both sides' medians over the tool's window."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    scenario = read_scenario(
        {
            "name": "beside",
            "duration_s": TOOL_TIMEOUT_S + 60,
            "arrivals": {"kind": "poisson", "rate": RATE},
            "lengths": {
                "prompt": {"kind": "fixed", "value": PROMPT_TOKENS},
                "output": {"kind": "fixed", "value": OUTPUT_TOKENS},
            },
            "adapters": {"count": len(tool.models), "popularity": "distinct"},
        },
        "beside",
    )
    async with Client(target.url) as client:
        begin_s = loop.time()
        names, plan = Names(BASE, tool.models), build_plan(scenario)
        ours = asyncio.create_task(run_plan(client, scenario, plan, names, Progress(0), stop=stop))
        try:
            printed, started_s, ended_s = await _run_tool(tool.command(program, target))
        finally:
            stop.set()
            samples = await ours
    told = tool.read(target, printed, started_s, ended_s)
    within = [s for s in samples if told.begin_s <= s.sent_s + begin_s <= told.end_s]
    if failed := [sample for sample in within if not sample.is_ok]:
        raise SystemExit(f"{len(failed)} of our own requests failed: {failed[0].failure} {failed[0].detail}")
    return told, _medians(within)


async def _run_tool(command: Sequence[str]) -> tuple[str, float, float]:
    started_s = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), TOOL_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise SystemExit(f"{command[0]} did not end within {TOOL_TIMEOUT_S:.0f} s") from None
    printed = output.decode(errors="replace")
    if process.returncode != 0:
        raise SystemExit(f"{command[0]} ended with status {process.returncode}:\n{printed[-2000:]}")
    return printed, started_s, time.monotonic()


def _medians(samples: Sequence[Sample]) -> Ours:
    if len(samples) < 10:
        raise SystemExit(f"only {len(samples)} of our requests lie in the tool's window; run longer with --seconds")
    return Ours(
        num_requests=len(samples),
        ttft_ms=1000 * statistics.median(s.ttft_sent_s for s in samples if s.ttft_sent_s is not None),
        itl_ms=1000 * statistics.median(gap for s in samples for gap in s.gaps_s()),
        tpot_ms=1000 * statistics.median(s.tpot_s for s in samples if s.tpot_s is not None),
        e2e_ms=1000 * statistics.median(s.token_at_s[-1] - s.sent_s for s in samples),
    )


def _worst(told: Told, ours: Ours) -> float:
    """Return the greatest relative difference of TTFT, ITL and TPOT; 0 for a tool that measures none of them."""
    pairs = [(told.ttft_ms, ours.ttft_ms), (told.itl_ms, ours.itl_ms), (told.tpot_ms, ours.tpot_ms)]
    return max((abs(theirs - own) / own for theirs, own in pairs if theirs is not None), default=0.0)


def _line(name: str, told: Told, ours: Ours) -> str:
    parts = [f"{name} ({told.num_requests} requests, ours {ours.num_requests} beside it)"]
    for what in ("ttft", "itl", "tpot", "e2e"):
        theirs, own = getattr(told, f"{what}_ms"), getattr(ours, f"{what}_ms")
        if theirs is not None:
            parts.append(f"{what.upper()} p50 {theirs:.1f} ms, ours {own:.1f} ({theirs / own - 1:+.1%})")
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
