"""What `make gpu-check` found: measures with floor and target, kept per part in a file that a later run goes on from.

Owns the format on disk, the resumption and the table; measures nothing. Invariant: a file always holds whole units (it
is replaced, never appended to), and units found under another commit, device or library version are not reused.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

PARTS = ("kernels", "engine", "grid", "loads")
# exit status of a part that found no GPU
NO_GPU = 3


@dataclass(frozen=True, slots=True)
class Measure:
    """One number: what it is, what physics allow, what was aimed for, and why it missed if it did."""

    name: str
    # None: not a number, which meets nothing
    value: float | None
    # "us", "ms", "%", "error", "count"
    unit: str
    floor: float | None = None
    # at most this much; None: reported, not judged
    target: float | None = None
    p10: float | None = None
    p90: float | None = None
    num_samples: int = 1
    # of a miss: what measuring the variants showed
    cause: str = ""

    @property
    def is_met(self) -> bool | None:
        """Is the target met? None: there is none."""
        return None if self.target is None else self.value is not None and self.value <= self.target


@dataclass(frozen=True, slots=True)
class Unit:
    """One independent piece of a part: resumption goes on after the last whole one."""

    name: str
    run: Callable[[], list[Measure]]


@dataclass(frozen=True, slots=True)
class UnitResult:
    """What one unit found; `error` is None unless it raised."""

    unit: str
    seconds: float
    measures: list[Measure]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class PartResult:
    """One part's file."""

    part: str
    environment: dict[str, str]
    units: list[UnitResult]
    # units that the time did not reach
    not_run: list[str]


def describe_environment(
    device: str, torch_version: str, triton_version: str, driver: str, commit: str
) -> dict[str, str]:
    """Return what two runs must share for their units to be put together."""
    return {
        "device": device,
        "driver": driver,
        "torch": torch_version,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": commit or _git_commit(),
    }


def result_path(folder: Path, part: str) -> Path:
    """Return where a part's file lies."""
    return folder / f"gpu-check-{part}.json"


def read_part(folder: Path, part: str) -> PartResult | None:
    """Read a part's file; None when there is none or it is of another format: it is then measured anew."""
    try:
        read = json.loads(result_path(folder, part).read_text(encoding="utf-8"))
        units = [
            UnitResult(unit["unit"], unit["seconds"], [Measure(**m) for m in unit["measures"]], unit["error"])
            for unit in read["units"]
        ]
        return PartResult(read["part"], read["environment"], units, read["not_run"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_part(folder: Path, result: PartResult) -> None:
    """Replace a part's file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = result_path(folder, result.part)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def run_units(
    part: str,
    units: Iterable[Unit],
    environment: dict[str, str],
    folder: Path,
    *,
    budget_s: float,
    is_fresh: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> PartResult:
    """Run the units that this environment has no result for yet, in order, until the time is used up.

    A unit that raises is a result with an error; the next run tries it again. The file is written after each unit.
    """
    before = None if is_fresh else read_part(folder, part)
    done = before.units if before is not None and before.environment == environment else []
    kept = {result.unit: result for result in done if result.error is None}
    begin, results, not_run = clock(), [], []
    for unit in units:
        if unit.name in kept:
            results.append(kept[unit.name])
            print(f"{part}: {unit.name}: kept from the last run", flush=True)
        elif clock() - begin >= budget_s:
            not_run.append(unit.name)
        else:
            results.append(_run(part, unit, clock))
        write_part(folder, PartResult(part, environment, results, not_run))
    return PartResult(part, environment, results, not_run)


def table(results: Iterable[PartResult]) -> str:
    """Return the lines `measured / floor / target`, then every miss by name with its cause."""
    lines, misses, is_measured = [f"{'':52}{'measured':>12}{'floor':>12}{'target':>12}  met"], [], False
    for result in results:
        is_measured |= bool(result.units)
        lines.append(f"== {result.part} on {result.environment['device']}, commit {result.environment['commit']}")
        for unit in result.units:
            lines += [_row(measure) for measure in unit.measures]
            misses += [f"{m.name}: {_cause(m)}" for m in unit.measures if m.is_met is False]
            if unit.error is not None:
                misses.append(f"{result.part}: {unit.unit}: {unit.error}")
        misses += [f"{result.part}: {name}: not run, the time was up" for name in result.not_run]
    end = ["misses:", *misses] if misses else ["no misses" if is_measured else "nothing was measured"]
    return "\n".join([*lines, "", *end])


def _run(part: str, unit: Unit, clock: Callable[[], float]) -> UnitResult:
    begin = clock()
    try:
        measures, error = unit.run(), None
    # the wall of a unit: the others still run, and the report names this one
    except Exception as failure:
        measures, error = [], " ".join(f"{type(failure).__name__}: {failure}".split())[:400]
    seconds = clock() - begin
    print(f"{part}: {unit.name}: {seconds:.1f} s{'' if error is None else ' FAILED ' + error}", flush=True)
    for measure in measures:
        print(_row(measure), flush=True)
    return UnitResult(unit.name, round(seconds, 3), measures, error)


def _row(measure: Measure) -> str:
    met = {None: "", True: "yes", False: "MISS"}[measure.is_met]
    numbers = "".join(f"{_number(value):>12}" for value in (measure.value, measure.floor, measure.target))
    return f"{measure.name:52}{numbers}  {met:5}{measure.unit}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _cause(measure: Measure) -> str:
    return (
        f"{_number(measure.value)} {measure.unit}, target {_number(measure.target)}; {measure.cause or 'cause unknown'}"
    )


def _git_commit() -> str:
    # results themselves lie in docs: a run must not look like a change of what it measured
    changes = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs"]
    try:
        commit, changed = (
            subprocess.run(command, capture_output=True, text=True).stdout.strip()
            for command in (["git", "rev-parse", "HEAD"], changes)
        )
    except OSError:
        return "unknown"
    return (commit or "unknown") + ("-changed" if changed else "")
