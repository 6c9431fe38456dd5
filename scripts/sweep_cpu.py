"""How throughput grows over concurrency, adapters, rank, prompt length, registered adapters: tables with fitted laws.

One server per axis, on the model of `bench_cpu.py`, through the load tester. Prints markdown and writes JSON with the
environment. A law is fitted by least squares on the medians and shown with its worst relative error, so a reader sees
how far to believe it. Not a test: nothing here passes or fails.
"""

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import numpy as np

from loadtest.environment import read_environment
from scripts.bench_load import LoadResult, Workload, run_load
from scripts.bench_model import Shape, build_adapters, build_base
from scripts.bench_servers import Server, chorale
from scripts.sweep_registered import stock

PROMPT_TOKENS, OUTPUT_TOKENS, CONCURRENCY = 128, 64, 32
# proving each of dozens of uploads takes 10 s of each, and is another measurement
_UNPROVED = ["--probe", "off"]


@dataclass(frozen=True, slots=True)
class Law:
    """A formula that is linear in its coefficients: `terms` of x add up to `of` a result."""

    text: str
    terms: Callable[[float], list[float]]
    of: Callable[[LoadResult, float], float]
    unit: str


@dataclass(frozen=True, slots=True)
class Point:
    """One measured value of an axis: the results of its repeats."""

    x: int
    results: list[LoadResult]


def seconds_per_token(result: LoadResult, x: float) -> float:
    """Return the time in which one output token comes out of the whole server."""
    return 1.0 / result.tokens_per_s


def step_seconds(result: LoadResult, x: float) -> float:
    """Return the time in which all `x` clients get a token each."""
    return x / result.tokens_per_s


LAWS = {
    "concurrency": Law("time of one token for all = a + b c", lambda x: [1.0, x], step_seconds, "s"),
    "adapters": Law("time per token = a + b d", lambda x: [1.0, x], seconds_per_token, "s"),
    "rank": Law("time per token = a + b r", lambda x: [1.0, x], seconds_per_token, "s"),
    "prompt": Law("TTFT = a + b n + c n^2", lambda x: [1.0, x, x * x], lambda r, x: r.ttft_p50_s, "s"),
    "registered": Law("time per token = a + b n", lambda x: [1.0, x], seconds_per_token, "s"),
}


def main() -> None:
    """Measure the axes that were asked for; write after each."""
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report: dict[str, object] = {"environment": read_environment(sys.argv[1:], "scripts.sweep_cpu")}
    base = args.cache / "bench-base"
    build_base(base, Shape())
    axes: dict[str, object] = {}
    for axis in args.axes:
        points = AXES[axis](args, base)
        coefficients, worst = fit(LAWS[axis], points)
        print(markdown(axis, points, coefficients, worst), flush=True)
        axes[axis] = {
            "points": [asdict(point) for point in points],
            "law": LAWS[axis].text,
            "coefficients": coefficients,
            "worst_relative_error": worst,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report | {"axes": axes}, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--axes", nargs="+", choices=sorted(LAWS), default=list(LAWS))
    parser.add_argument("--cache", type=Path, default=Path(".chorale/bench"))
    parser.add_argument("--out", type=Path, default=Path(".chorale/bench/sweep.json"))
    parser.add_argument("--port", type=int, default=18483)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--prompt", type=int, nargs="+", default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--registered", type=int, nargs="+", default=[8, 100, 1000, 10000])
    return parser.parse_args()


def fit(law: Law, points: Sequence[Point]) -> tuple[list[float], float]:
    """Return the coefficients that fit the medians best, relative to their size, and the worst relative error."""
    xs = [float(point.x) for point in points]
    ys = np.array([statistics.median(law.of(result, point.x) for result in point.results) for point in points])
    terms = np.array([law.terms(x) for x in xs])
    # each row divided by its value: a small step must fit as well as a large one
    coefficients = np.linalg.lstsq(terms / ys[:, None], np.ones(len(ys)), rcond=None)[0]
    errors = np.abs(terms @ coefficients / ys - 1.0)
    return [float(value) for value in coefficients], float(errors.max())


def markdown(axis: str, points: Sequence[Point], coefficients: Sequence[float], worst: float) -> str:
    """Return the axis' table and its law."""
    lines = [f"| {axis} | tokens/s | TTFT p50 s | TPOT p50 ms |", "|---|---|---|---|"]
    for point in points:
        rates = [result.tokens_per_s for result in point.results]
        ttft_s = statistics.median(result.ttft_p50_s for result in point.results)
        tpot_s = statistics.median(result.tpot_p50_s for result in point.results)
        spread = f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"
        lines.append(f"| {point.x} | {spread} | {ttft_s:.2f} | {1000 * tpot_s:.1f} |")
    values = ", ".join(f"{name} = {value:.3g}" for name, value in zip("abc", coefficients, strict=False))
    return "\n".join([*lines, "", f"{LAWS[axis].text}: {values} (worst error {worst:.0%})", ""])


def _over_concurrency(args: argparse.Namespace, base: Path) -> list[Point]:
    options = ["--max-num-seqs", str(max(args.concurrency))]
    with chorale(base, args.cache / "store", args.port, options) as server:
        return [_point(args, server, x, ["bench-base"], x) for x in args.concurrency]


def _over_adapters(args: argparse.Namespace, base: Path) -> list[Point]:
    folders = build_adapters(args.cache / "adapters", Shape(), max(args.adapters))
    with chorale(base, args.cache / "store", args.port, ["--max-num-seqs", "64", *_UNPROVED]) as server:
        names = [_register(server, folder, folder.name) for folder in folders]
        # as many clients at every point: the axis is how many adapters share a step
        clients = max(CONCURRENCY, max(args.adapters))
        return [_point(args, server, x, names[:x] or ["bench-base"], clients) for x in args.adapters]


def _over_rank(args: argparse.Namespace, base: Path) -> list[Point]:
    points = []
    options = ["--max-rank", str(max(args.rank)), *_UNPROVED]
    with chorale(base, args.cache / "store", args.port, options) as server:
        for rank in args.rank:
            folders = build_adapters(args.cache / f"adapters-r{rank}", Shape(), 8, rank=rank)
            names = [_register(server, folder, f"r{rank}-{folder.name}") for folder in folders]
            points.append(_point(args, server, rank, names, CONCURRENCY))
    return points


def _over_prompt(args: argparse.Namespace, base: Path) -> list[Point]:
    with chorale(base, args.cache / "store", args.port, []) as server:
        return [_point(args, server, x, ["bench-base"], 1, prompt=x, output=2) for x in args.prompt]


def _over_registered(args: argparse.Namespace, base: Path) -> list[Point]:
    """One server per number, all at once and asked in turns: a start alone moves a server's figures by percents."""
    busy = build_adapters(args.cache / "adapters", Shape(), 8)
    names = [folder.name for folder in busy]
    found: dict[int, list[LoadResult]] = {x: [] for x in args.registered}
    with ExitStack() as servers:
        running = {}
        for port, x in enumerate(args.registered, args.port):
            store = args.cache / f"store-registered-{x}"
            stock(store, base, "bench-base", busy, x, args.cache)
            running[x] = servers.enter_context(chorale(base, store, port, _UNPROVED))
        for repeat in range(args.repeats):
            for x, server in running.items():
                # the same prompts for all
                found[x].append(
                    _once(server, Workload(names, CONCURRENCY, CONCURRENCY, PROMPT_TOKENS, OUTPUT_TOKENS, repeat))
                )
    return [Point(x, results) for x, results in found.items()]


AXES: dict[str, Callable[[argparse.Namespace, Path], list[Point]]] = {
    "concurrency": _over_concurrency,
    "adapters": _over_adapters,
    "rank": _over_rank,
    "prompt": _over_prompt,
    "registered": _over_registered,
}


def _point(
    args: argparse.Namespace,
    server: Server,
    x: int,
    models: Sequence[str],
    clients: int,
    *,
    prompt: int = PROMPT_TOKENS,
    output: int = OUTPUT_TOKENS,
) -> Point:
    seeds = [1 + 7919 * repeat + x for repeat in range(args.repeats)]
    work = [Workload(list(models), clients, clients, prompt, output, seed) for seed in seeds]
    return Point(x, [_once(server, one) for one in work])


def _once(server: Server, work: Workload) -> LoadResult:
    """Run `work` with every model loaded before."""
    for model in work.models:
        run_load(server.url, Workload([model], 1, 1, 16, 2, seed=0), Shape().vocab)
    return run_load(server.url, work, Shape().vocab)


def _register(server: Server, folder: Path, name: str) -> str:
    """Upload a folder under a name; return the name."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    _upload(server, name, {file: (folder / file).read_bytes() for file in names})
    return name


def _upload(server: Server, name: str, contents: Mapping[str, bytes]) -> None:
    if httpx.get(f"{server.url}/v1/adapters/{name}", timeout=60).status_code == 200:
        return
    files = [("files", (file, content)) for file, content in contents.items()]
    response = httpx.post(f"{server.url}/v1/adapters", data={"name": name}, files=files, timeout=300)
    if response.status_code != 201:
        raise SystemExit(f"the upload of {name} answered {response.status_code}: {response.text[:300]}")


if __name__ == "__main__":
    main()
