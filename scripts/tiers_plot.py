"""The picture of `bench_tiers`: gaps between warm tokens by mode, a cold first token by its parts, swaps by rank."""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot
from matplotlib.axes import Axes

_PARTS = ("queue", "fetch", "load", "prefill")


def main() -> None:
    """Draw what `bench_tiers` wrote."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, default=Path(".chorale/bench/tiers.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/tiers.png"))
    args = parser.parse_args()
    report = json.loads(args.report.read_text(encoding="utf-8"))
    mpl.use("Agg")
    figure, (gaps, cold, swaps) = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained")
    _gaps(gaps, report["gaps"])
    _cold(cold, report["cold_first_token_ms"])
    _swaps(swaps, report["swaps"])
    figure.savefig(args.out, dpi=110)


def _gaps(axes: Axes, modes: list[dict[str, float]]) -> None:
    for index, share in enumerate(("p50", "p90", "p99")):
        axes.bar(
            [place + 0.26 * (index - 1) for place in range(len(modes))], [m[share] for m in modes], 0.26, label=share
        )
    axes.set_xticks(range(len(modes)), [str(mode["mode"]).replace(" client", "\nclient") for mode in modes], fontsize=8)
    axes.set_title("gap between tokens of 4 warm streams, ms")
    axes.legend()


def _cold(axes: Axes, parts: dict[str, dict[str, float]]) -> None:
    shares = ("p50", "p90", "p99")
    below = [0.0] * len(shares)
    for part in _PARTS:
        heights = [parts[part][share] for share in shares]
        axes.bar(shares, heights, bottom=below, label=part)
        below = [base + height for base, height in zip(below, heights, strict=True)]
    axes.set_title("a cold request's first token by part, ms")
    axes.legend()


def _swaps(axes: Axes, swaps: list[dict[str, float]]) -> None:
    labels = [f"rank {swap['rank']}\n{swap['host_mib']:g} MiB" for swap in swaps]
    fetches = [swap["fetch_ms"] for swap in swaps]
    axes.bar(labels, fetches, label="disk to host")
    axes.bar(labels, [swap["load_ms"] for swap in swaps], bottom=fetches, label="host to device")
    axes.set_title("one swap, median ms")
    axes.legend()


if __name__ == "__main__":
    main()
