"""The memory that the server takes beside weights, KV cache and adapters, both processes together, under load.

A page that both processes map counts half in each (PSS), so that the sum counts it once. While 32 clients stream over
8 and then 32 adapters, PSS is read every fifth of a second. Its peak is set against the weights (the tensors of the
file), the KV blocks that were written, and the adapters' images in memory; what is left is the rest: interpreters,
torch, packed copies, activations, buffers. Prints JSON with its environment. Not a test: nothing here passes or fails.
"""

import argparse
import json
import sys
import threading
import time
from pathlib import Path

import httpx

from loadtest.environment import read_environment
from scripts.bench_cpu import upload
from scripts.bench_load import Workload, run_load
from scripts.bench_model import Shape, build_adapters, build_base
from scripts.bench_servers import Server, children, chorale

_SAMPLE_S = 0.2
_CONCURRENCY, _PROMPT_TOKENS, _OUTPUT_TOKENS, _BLOCK_TOKENS = 32, 128, 64, 16
_MIB = 1 << 20


class PeakMemory:
    """The greatest PSS of a server's processes since `start`, by process and together; read by a thread."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.total_bytes = 0
        self.by_process: dict[str, int] = {}

    def __enter__(self) -> "PeakMemory":
        """Begin to read."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Read once more and stop."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            root = self._server.process.pid
            now = {"api": _pss_bytes(root)} | {f"child {pid}": _pss_bytes(pid) for pid in children(root)}
            if sum(now.values()) > self.total_bytes:
                self.total_bytes, self.by_process = sum(now.values()), now
            if self._stop.wait(_SAMPLE_S):
                return


def main() -> None:
    """Measure with each number of adapters, on a server of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".chorale/bench"))
    parser.add_argument("--out", type=Path, default=Path(".chorale/bench/memory.json"))
    parser.add_argument("--port", type=int, default=18493)
    parser.add_argument("--adapters", type=int, nargs="+", default=[8, 32])
    args = parser.parse_args()
    base = args.cache / "bench-base"
    build_base(base, Shape())
    report = {"environment": read_environment(sys.argv[1:], "scripts.bench_memory")}
    print(json.dumps(report["environment"], indent=1))
    runs = []
    for count in args.adapters:
        runs.append(_measure(args, base, count))
        print(json.dumps(runs[-1]), flush=True)
        # a run that is stopped loses only its last part
        args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report | {"runs": runs}, indent=1) + "\n", encoding="utf-8")


def _measure(args: argparse.Namespace, base: Path, num_adapters: int) -> dict[str, object]:
    folders = build_adapters(args.cache / "adapters", Shape(), num_adapters)
    with chorale(base, args.cache / "store", args.port, []) as server:
        for folder in folders:
            upload(server.url, folder)
        models = [folder.name for folder in folders]
        with PeakMemory(server) as peak:
            work = Workload(models, _CONCURRENCY, _CONCURRENCY, _PROMPT_TOKENS, _OUTPUT_TOKENS, seed=num_adapters)
            result = run_load(server.url, work, Shape().vocab)
            time.sleep(2 * _SAMPLE_S)
        images = [_metric(server, f'chorale_adapter_bytes{{tier="{tier}"}}') for tier in ("host", "device")]
    weights = _weight_bytes(base)
    kv = _kv_bytes(_CONCURRENCY)
    rest = peak.total_bytes - weights - kv - sum(images)
    return {
        "adapters": num_adapters,
        "failed": result.num_failed,
        "peak_pss_mib": round(peak.total_bytes / _MIB),
        "by_process_mib": {name: round(value / _MIB) for name, value in peak.by_process.items()},
        "weights_mib": round(weights / _MIB),
        "kv_mib": round(kv / _MIB),
        "adapters_host_device_mib": [round(value / _MIB) for value in images],
        "rest_mib": round(rest / _MIB),
    }


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    # a short-lived child that is gone
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def _weight_bytes(base: Path) -> int:
    with (base / "model.safetensors").open("rb") as file:
        header_bytes = 8 + int.from_bytes(file.read(8), "little")
    return (base / "model.safetensors").stat().st_size - header_bytes


def _kv_bytes(num_sequences: int) -> int:
    """Return what the blocks of all sequences take: none of them shares a prefix, and none is used twice."""
    shape = Shape()
    num_blocks = num_sequences * -(-(_PROMPT_TOKENS + _OUTPUT_TOKENS) // _BLOCK_TOKENS)
    return num_blocks * _BLOCK_TOKENS * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 2


def _metric(server: Server, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))


if __name__ == "__main__":
    main()
