"""The eviction study's picture: per workload, the share of requests whose adapter was ready, by policy."""

from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot

from scripts.eviction_simulation import Outcome


def draw(outcomes: dict[str, dict[str, Outcome]], path: Path) -> None:
    """Write the bars as a PNG."""
    mpl.use("Agg")
    figure, axes = pyplot.subplots(figsize=(11, 5), layout="constrained")
    policies = list(next(iter(outcomes.values())))
    width = 0.8 / len(policies)
    for index, policy in enumerate(policies):
        heights = [100 * found[policy].hit_ratio for found in outcomes.values()]
        places = [place + (index - (len(policies) - 1) / 2) * width for place in range(len(outcomes))]
        axes.bar(places, heights, width, label=policy)
    axes.set_xticks(range(len(outcomes)), [name.replace(", ", ",\n").replace(" by ", "\nby ") for name in outcomes])
    axes.set_ylabel("adapter ready on arrival, %")
    axes.set_title("Eviction policies on the adapter tiers' own state machine")
    axes.legend(ncols=len(policies))
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=110)
