"""The report as ONE HTML file: tables, pictures, environment and scenarios, nothing loaded from anywhere.

Owns `report.html.jinja`'s contents. Invariant: everything is escaped; pictures are data URLs; no script.
"""

import base64
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import jinja2

from loadtest.figures import COLUMNS, MORE_COLUMNS, shown
from loadtest.plots import draw_latencies, draw_over_time, draw_sweep
from loadtest.session import RunResult
from loadtest.table import remarks

_TEMPLATE = Path(__file__).parent / "report.html.jinja"


def write_report(folder: Path, environment: Mapping[str, object], server: object, results: Sequence[RunResult]) -> Path:
    """Write `report.html` and beside it the pictures it holds, as PNG files; return its path."""
    scenarios = []
    for number, (name, group) in enumerate(groupby(results, key=lambda result: result.scenario.name), start=1):
        runs = list(group)
        pictures: list[dict[str, str]] = []
        for caption, png in _pictures(runs):
            file = folder / f"{number:02d}-{_file_name(name)}-{len(pictures) + 1}.png"
            file.write_bytes(png)
            pictures.append({"caption": caption, "data": base64.b64encode(png).decode("ascii")})
        scenarios.append(_scenario(name, runs, pictures))
    page = (
        jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        .from_string(_TEMPLATE.read_text(encoding="utf-8"))
        .render(
            headings=[column.heading for column in COLUMNS],
            more_headings=[column.heading for column in MORE_COLUMNS],
            scenarios=scenarios,
            environment=[(key, _value(value)) for key, value in {**environment, "server": server}.items()],
            when=environment.get("when", ""),
            totals=_totals(results),
        )
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _scenario(name: str, runs: Sequence[RunResult], pictures: Sequence[Mapping[str, str]]) -> dict[str, object]:
    return {
        "name": name,
        "about": runs[0].scenario.about,
        "pictures": pictures,
        "rows": [
            {
                "label": run.scenario.label or run.scenario.name,
                "cells": [column.text(run.summary) for column in COLUMNS],
                "more": [column.text(run.summary) for column in MORE_COLUMNS],
                "is_clean": run.is_clean,
            }
            for run in runs
        ],
        "remarks": [(run.scenario.label, line) for run in runs for line in remarks(run)],
        "slo": _slo(runs[0]),
        "source": _toml(runs[0].scenario.source),
        "plans": ", ".join(run.plan_digest for run in runs),
    }


def _pictures(runs: Sequence[RunResult]) -> list[tuple[str, bytes]]:
    pictures = [("Share of requests by time to first token, and of gaps between tokens", draw_latencies(runs))]
    if (sweep := draw_sweep(runs)) is not None:
        pictures.append((f"Over {runs[0].scenario.swept[0][0]}", sweep))
    last = runs[-1]
    caption = f"{last.scenario.title}: every request when it was due, and tokens over time"
    pictures.append((caption, draw_over_time(last)))
    return pictures


def _totals(results: Sequence[RunResult]) -> list[tuple[str, str]]:
    requests = sum(result.summary.num_requests for result in results)
    failed = sum(sum(result.summary.failures.values()) for result in results)
    totals = [("runs", str(len(results))), ("requests", shown(requests, 0)), ("failed", shown(failed, 0))]
    totals.append(("output tokens", shown(sum(result.summary.output_tokens for result in results), 0)))
    verdicts = [result.verdict for result in results if result.verdict is not None]
    if verdicts:
        totals.append(("answers equal alone", shown(sum(verdict.num_equal for verdict in verdicts), 0)))
        totals.append(("answers that differ", shown(sum(len(verdict.mismatches) for verdict in verdicts), 0)))
    return totals


def _slo(run: RunResult) -> str:
    slo = run.scenario.slo
    asked = (("TTFT", slo.ttft_s), ("longest gap", slo.itl_s), ("TPOT", slo.tpot_s), ("E2E", slo.e2e_s))
    return ", ".join(f"{name} <= {limit:g} s" for name, limit in asked if limit is not None) or "every answer that came"


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _toml(table: Mapping[str, object], prefix: str = "") -> str:
    """Spell a scenario as dotted TOML keys."""
    lines = []
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines.append(_toml(value, f"{prefix}{key}."))
        else:
            lines.append(f"{prefix}{key} = {_literal(value)}")
    return "\n".join(line for line in lines if line)


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return repr(value)


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)[:60]
