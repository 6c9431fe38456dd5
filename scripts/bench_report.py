"""What the CPU benchmark says of its cells: a table with medians and spreads, and ratios within one repeat.

Owns arithmetic and text. Invariant: a ratio is formed only between cells of the same repeat, which ran minutes apart on
the same machine; what is shown of several repeats is the median with the least and the greatest.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.bench_load import LoadResult

OURS = "chorale"


@dataclass(frozen=True, slots=True)
class Cell:
    """One measured point of one repeat; `num_adapters` 0 is the base alone. `api_ms`: our API's CPU per engine step."""

    repeat: int
    system: str
    concurrency: int
    num_adapters: int
    result: LoadResult
    api_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds of the base's matrix products alone: a prefill of `prefill_rows`, a decode step per concurrency."""

    prefill_rows: int
    prefill_s: float
    decode_s: dict[int, float]

    def tokens_per_s(self, concurrency: int, prompt: int, output: int) -> float | None:
        """Return the throughput that these products alone would allow."""
        decode_s = self.decode_s.get(concurrency)
        if decode_s is None:
            return None
        return output / (self.prefill_s * prompt / self.prefill_rows + output * decode_s / concurrency)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What `bench_step` found: seconds of a lone prompt without server, decodes over their byte floor by adapters."""

    prompt_s: float
    of_byte_floor: dict[int, float]


def spread(values: Sequence[float], digits: int = 1, unit: str = "") -> str:
    """Return median and range; a dash for nothing."""
    if not values:
        return "-"
    middle = f"{statistics.median(values):.{digits}f}{unit}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(cells: Sequence[Cell]) -> str:
    """Return one line per system, concurrency and number of adapters."""
    lines = [f"{'system':16}{'conc':>5}{'adapters':>9}  {'tokens/s':26}{'retention %':24}{'TTFT p50 s':22}failed"]
    keys = dict.fromkeys((cell.system, cell.concurrency, cell.num_adapters) for cell in cells)
    for system, concurrency, num_adapters in keys:
        own = [c for c in cells if (c.system, c.concurrency, c.num_adapters) == (system, concurrency, num_adapters)]
        kept = ratios(cells, own, lambda cell: (cell.system, cell.concurrency, 0)) if num_adapters else []
        lines.append(
            f"{system:16}{concurrency:5}{num_adapters:9}  {spread([c.result.tokens_per_s for c in own]):26}"
            f"{spread([100 * ratio for ratio in kept], 0):24}{spread([c.result.ttft_p50_s for c in own], 2):22}"
            f"{sum(c.result.num_failed for c in own)}"
        )
    return "\n".join(lines)


def against_others(cells: Sequence[Cell]) -> list[str]:
    """Return our throughput as multiples of every other system's, cell by cell."""
    lines = []
    others = dict.fromkeys(cell.system for cell in cells if cell.system != OURS)
    for system in others:
        for cell in dict.fromkeys((c.concurrency, c.num_adapters) for c in cells if c.system == system):
            ours = [c for c in cells if (c.system, c.concurrency, c.num_adapters) == (OURS, *cell)]
            found = ratios(cells, ours, lambda c, name=system: (name, c.concurrency, c.num_adapters))  # type: ignore[misc]
            if found:
                what = f"{cell[1]} adapters" if cell[1] else "base"
                lines.append(f"{OURS} / {system}, concurrency {cell[0]}, {what}: {spread(found, 2)}")
    return lines


def of_floor(cells: Sequence[Cell], floors: dict[int, Floor], prompt: int, output: int) -> list[str]:
    """Return the base's share of the pure-GEMM floor measured in the same repeat."""
    lines = []
    for concurrency in dict.fromkeys(cell.concurrency for cell in cells):
        shares = []
        for cell in cells:
            if (cell.system, cell.concurrency, cell.num_adapters) != (OURS, concurrency, 0):
                continue
            floor = floors.get(cell.repeat)
            bound = floor.tokens_per_s(concurrency, prompt, output) if floor is not None else None
            if bound is not None:
                shares.append(100 * cell.result.tokens_per_s / bound)
        if shares:
            lines.append(f"base at concurrency {concurrency}: {spread(shares, 0)} % of the pure-GEMM floor")
    return lines


def of_steps(cells: Sequence[Cell], steps: dict[int, StepTimes]) -> list[str]:
    """Return what the server adds to a lone prompt, and adapters to a decode step, within one repeat."""
    lines = []
    alone = [c for c in cells if (c.system, c.concurrency, c.num_adapters) == (OURS, 1, 0) and c.repeat in steps]
    if alone:
        found = [cell.result.ttft_p50_s / steps[cell.repeat].prompt_s for cell in alone]
        lines.append(f"TTFT p50 at concurrency 1: {spread(found, 2)} times one bare forward of the prompt")
    for count in dict.fromkeys(count for own in steps.values() for count in own.of_byte_floor):
        found = [own.of_byte_floor[count] for own in steps.values() if count in own.of_byte_floor]
        lines.append(f"decode step over {count} adapters: {spread(found, 2)} times the base's step plus their bytes")
    return lines


def host_lines(cells: Sequence[Cell], engine_ms: dict[int, float]) -> list[str]:
    """Return the host's cost per step: the engine's own part, and the API's CPU beside it."""
    lines = []
    for concurrency in dict.fromkeys(cell.concurrency for cell in cells if cell.api_ms is not None):
        api = [c.api_ms for c in cells if c.api_ms is not None and (c.concurrency, c.num_adapters) == (concurrency, 0)]
        if not api or concurrency not in engine_ms:
            continue
        lines.append(
            f"host per step at concurrency {concurrency}: engine {engine_ms[concurrency]:.2f} ms "
            f"(schedule + batch + frame), API {spread(api, 2)} ms of CPU in its own process (read + detokenise + SSE)"
        )
    return lines


def ratios(cells: Sequence[Cell], own: Sequence[Cell], key: Callable[[Cell], tuple[str, int, int]]) -> list[float]:
    """Return each cell's throughput over that of the cell `key` names, of the same repeat."""
    by_key = {(c.repeat, c.system, c.concurrency, c.num_adapters): c.result.tokens_per_s for c in cells}
    found = []
    for cell in own:
        other = by_key.get((cell.repeat, *key(cell)))
        if other:
            found.append(cell.result.tokens_per_s / other)
    return found


def read_saved(path: Path) -> tuple[list[Cell], dict[int, Floor], dict[int, float], dict[int, StepTimes]]:
    """Return cells, floors, PEFT's figures and steps of a result file, so that a later run can go on behind them."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    cells = [Cell(**{**cell, "result": LoadResult(**cell["result"])}) for cell in saved["cells"]]
    floors = {
        int(repeat): Floor(own["prefill_rows"], own["prefill_s"], {int(rows): s for rows, s in own["decode_s"].items()})
        for repeat, own in saved["floors"].items()
    }
    steps = {
        int(repeat): StepTimes(own["prompt_s"], {int(n): ratio for n, ratio in own["of_byte_floor"].items()})
        for repeat, own in saved.get("steps", {}).items()
    }
    return cells, floors, {int(repeat): rate for repeat, rate in saved["peft_tokens_per_s"].items()}, steps
