"""The result file: every run's figures with environment, scenario and plan, as JSON, and its way back.

Owns the format `chorale-loadtest/1`. Invariant: what JSON has no number for (infinite: too many failed; not a number:
nothing was measured) is written as text, `"inf"` and `"nan"`, so a reader cannot mistake it for a figure.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from loadtest.errors import LoadtestError
from loadtest.session import RunResult

FORMAT = "chorale-loadtest/1"
Json = dict[str, object]


def run_json(result: RunResult) -> Json:
    """Return one run's figures."""
    scenario = result.scenario
    verdict = result.verdict
    return {
        "title": scenario.title,
        "name": scenario.name,
        "label": scenario.label,
        "swept": dict(scenario.swept),
        "plan": result.plan_digest,
        "left_out": result.num_left_out,
        "scenario": scenario.source,
        "summary": asdict(result.summary),
        "verdict": None if verdict is None else asdict(verdict),
        "changes": [asdict(change) for change in result.changes],
    }


def results_json(environment: Json, server: Json, results: Sequence[RunResult]) -> Json:
    """Return the whole file's value."""
    runs = [run_json(result) for result in results]
    return {"format": FORMAT, "environment": environment, "server": server, "runs": runs}


def write_results(path: Path, value: Json) -> None:
    """Write the file."""
    path.write_text(json.dumps(_plain(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_results(path: Path) -> Json:
    """Read a file that `write_results` wrote.

    Raises:
        LoadtestError: not there, not JSON or of another format.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadtestError(f"{path}: {error}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise LoadtestError(f"{path}: is no result file of this tester (format {FORMAT!r} is expected)")
    for run in value["runs"]:
        run["summary"] = _restored(run["summary"])
    return value


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _restored(value: object) -> object:
    if value in ("inf", "nan"):
        return float(str(value))
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    return [_restored(item) for item in value] if isinstance(value, list) else value
