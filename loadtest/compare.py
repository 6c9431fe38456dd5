"""`--compare a.json b.json`: the same runs of two result files side by side, as ratios.

Owns the matching of runs. Invariant: only runs of the same title and the same plan are compared; what one file lacks or
what had another plan is named, not skipped.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from rich.console import Console
from rich.table import Table

from loadtest.figures import COLUMNS, DASH, read_summary, shown
from loadtest.metrics import Summary
from loadtest.results import Json


@dataclass(frozen=True, slots=True)
class Pair:
    """A run that both files have, under the same plan."""

    title: str
    first: Summary
    second: Summary


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two files have in common, and sentences about what they do not."""

    pairs: list[Pair]
    remarks: list[str]


def compare(first: Json, second: Json) -> Comparison:
    """Match the runs of two result files."""
    left, right = _runs(first), _runs(second)
    pairs, remarks = [], []
    for title in dict.fromkeys([*left, *right]):
        if title not in left or title not in right:
            where = "second" if title in right else "first"
            remarks.append(f"{title}: only in the {where} file")
        elif left[title]["plan"] != right[title]["plan"]:
            remarks.append(
                f"{title}: the plans differ ({left[title]['plan']}, {right[title]['plan']}): another load, not compared"
            )
        else:
            summaries = (cast(Mapping[str, object], runs[title]["summary"]) for runs in (left, right))
            pairs.append(Pair(title, *(read_summary(summary) for summary in summaries)))
    return Comparison(pairs, remarks + _environments(first, second))


def ratio(first: float | None, second: float | None) -> float:
    """Return second / first; NaN where either is no finite number or the first is 0."""
    if first is None or second is None or first == 0 or not (math.isfinite(first) and math.isfinite(second)):
        return math.nan
    return second / first


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print each run's figures: first, second, and second / first."""
    for pair in comparison.pairs:
        table = Table("figure", "first", "second", "second / first", "", title=pair.title, title_justify="left")
        for column in table.columns[1:4]:
            column.justify = "right"
        for figure in COLUMNS:
            first, second = figure.read(pair.first), figure.read(pair.second)
            quotient = ratio(first, second)
            text = DASH if math.isnan(quotient) else f"{quotient:.3f}"
            judged = _judged(first, second, figure.is_more_better)
            table.add_row(figure.heading, shown(first, figure.digits), shown(second, figure.digits), text, judged)
        console.print(table)
    for remark in comparison.remarks:
        console.print(remark, markup=False, highlight=False)


def _judged(first: float | None, second: float | None, is_more_better: bool | None) -> str:
    if is_more_better is None or first is None or second is None or math.isnan(first) or math.isnan(second):
        return ""
    if first == second:
        return "same"
    return "better" if (second > first) == is_more_better else "worse"


def _runs(value: Json) -> dict[str, Mapping[str, object]]:
    runs = cast(list[Mapping[str, object]], value["runs"])
    return {str(run["title"]): run for run in runs}


def _environments(first: Json, second: Json) -> list[str]:
    left, right = (cast(Mapping[str, object], value["environment"]) for value in (first, second))
    keys = ("processor", "cores", "memory_gib", "system", "commit")
    return [
        f"{key}: {left.get(key, DASH)} in the first, {right.get(key, DASH)} in the second file"
        for key in keys
        if left.get(key) != right.get(key)
    ]
