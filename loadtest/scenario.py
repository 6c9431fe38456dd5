"""One scenario: what load is put on the server and what is promised to it, read from a TOML file.

Owns the file's grammar: its tables, `[[sweep]]` (one run per value), `[smoke]` (the same scenario scaled down) and
overrides from the command line. Invariant: a scenario that was read has every value in range and no unknown key, and
`source` is the table it came from, overrides included, so a result file says exactly what was run.
"""

import copy
import itertools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loadtest.arrivals import Arrivals, read_arrivals
from loadtest.churn import Churn, read_churn
from loadtest.errors import InvalidScenario
from loadtest.lengths import MAX_TOKENS, Lengths, read_lengths
from loadtest.metrics import Slo
from loadtest.popularity import Popularity, read_popularity
from loadtest.prompts import RequestShape, read_request_shape
from loadtest.tables import Table

Source = dict[str, object]
# keys of a file that shape the list of runs and are no part of one run
_EXPANDED = ("smoke", "sweep")


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run. `label` tells it from the other runs of its sweep; empty without a sweep."""

    name: str
    label: str
    about: str
    seed: int
    num_requests: int | None
    duration_s: float | None
    arrivals: Arrivals
    prompt: Lengths
    output: Lengths
    # trace lengths are multiplied by this; requests that are then longer than the limits are left out, and counted
    length_scale: float
    max_prompt_tokens: int
    max_output_tokens: int
    adapters: Popularity
    tenants: Popularity | None
    request: RequestShape
    slo: Slo
    churn: Churn | None
    # who is asked once before the clock starts: nobody, the base, or every model of the run
    warm_up: str
    source: Source = field(repr=False)
    swept: tuple[tuple[str, object], ...] = ()

    @property
    def title(self) -> str:
        """Return the name of this run."""
        return f"{self.name} ({self.label})" if self.label else self.name


def load_scenarios(path: Path, overrides: Sequence[str] = (), *, is_smoke: bool = False) -> list[Scenario]:
    """Read a file and return its runs, one per combination of its sweeps' values.

    Args:
        overrides: `table.key=value`, the value as TOML spells it; they win over the file, its sweeps and `[smoke]`.
    Raises:
        InvalidScenario: not TOML, or a value that means nothing; the message names file and key.
    """
    try:
        source: Source = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidScenario(f"{path}: {error}") from error
    smoke = source.pop("smoke", {})
    if not isinstance(smoke, dict):
        raise InvalidScenario(f"{path}: 'smoke' must be a table of dotted keys")
    if is_smoke:
        for key, value in smoke.items():
            _put(source, str(key), value, str(path))
        source["about"] = f"{source.get('about', '')} (scaled down)".strip()
    for override in overrides:
        key, value = parse_override(override)
        _put(source, key, value, "--set")
        # the sweep's values would win over it
        if isinstance(axes := source.get("sweep"), list):
            source["sweep"] = [axis for axis in axes if not (isinstance(axis, dict) and axis.get("field") == key)]
    return [read_scenario(one, path.name, swept) for one, swept in _expand(source, str(path))]


def parse_override(text: str) -> tuple[str, object]:
    """Split `table.key=value`."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InvalidScenario(f"--set {text!r}: must be KEY=VALUE, for example arrivals.rate=8")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise InvalidScenario(f"--set {text!r}: the value must be spelled as in TOML, text in quotes") from error


def read_scenario(source: Source, where: str, swept: tuple[tuple[str, object], ...] = ()) -> Scenario:
    """Read one run from its table."""
    table = Table(where, source)
    lengths, slo = table.table("lengths"), table.table("slo")
    scenario = Scenario(
        name=table.text("name"),
        label=", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in swept),
        about=table.text("about", ""),
        seed=table.whole("seed", 0),
        num_requests=table.whole("num_requests", low=1, high=1_000_000) if table.has("num_requests") else None,
        duration_s=table.optional("duration_s", low=1e-3),
        arrivals=read_arrivals(table.table("arrivals")),
        prompt=read_lengths(lengths.table("prompt")),
        output=read_lengths(lengths.table("output")),
        length_scale=lengths.number("scale", 1.0, low=1e-6, high=1e3),
        max_prompt_tokens=lengths.whole("max_prompt", MAX_TOKENS, low=1, high=MAX_TOKENS),
        max_output_tokens=lengths.whole("max_output", MAX_TOKENS, low=1, high=MAX_TOKENS),
        adapters=read_popularity(table.table("adapters")),
        tenants=read_popularity(table.table("tenants")) if table.has("tenants") else None,
        request=read_request_shape(table.table("request")),
        slo=Slo(*(slo.optional(key, low=1e-6) for key in ("ttft_s", "itl_s", "tpot_s", "e2e_s"))),
        churn=read_churn(table.table("churn")) if table.has("churn") else None,
        warm_up=table.text("warm_up", "base", among=("all", "base", "none")),
        source=source,
        swept=swept,
    )
    lengths.close()
    slo.close()
    table.close()
    _check(scenario, where)
    return scenario


def _check(scenario: Scenario, where: str) -> None:
    if not scenario.arrivals.is_open and scenario.num_requests is None:
        raise InvalidScenario(f"{where}: a closed loop needs 'num_requests'; time alone does not end it")
    if scenario.arrivals.kind not in {"trace", "closed"} and scenario.num_requests is scenario.duration_s is None:
        raise InvalidScenario(f"{where}: give 'num_requests', 'duration_s' or both: without them the run has no end")
    is_traced = [law.kind == "trace" for law in (scenario.prompt, scenario.output)]
    if any(is_traced) and not (all(is_traced) and scenario.arrivals.kind == "trace"):
        raise InvalidScenario(
            f"{where}: lengths of kind 'trace' come with arrivals of kind 'trace', for prompt and output together"
        )
    if scenario.churn is not None and scenario.adapters.count == 0:
        raise InvalidScenario(f"{where}: 'churn' changes adapters, and adapters.count is 0")
    if scenario.tenants is not None and scenario.tenants.count == 0:
        raise InvalidScenario(f"{where}: tenants.count must be at least 1")


def _expand(source: Source, where: str) -> list[tuple[Source, tuple[tuple[str, object], ...]]]:
    axes = []
    for sweep in Table(where, {"sweep": source.pop("sweep", [])}).tables("sweep"):
        key = sweep.text("field")
        axes.append([(key, value) for value in sweep.values("values")])
        sweep.close()
    runs = []
    for swept in itertools.product(*axes):
        one = copy.deepcopy(source)
        for key, value in swept:
            _put(one, key, value, f"{where}: sweep")
        runs.append((one, swept))
    return runs


def _put(source: Source, dotted: str, value: object, where: str) -> None:
    *parents, last = dotted.split(".")
    table = source
    for parent in parents:
        below = table.setdefault(parent, {})
        if not isinstance(below, dict):
            raise InvalidScenario(f"{where}: '{dotted}': '{parent}' is no table")
        table = below
    table[last] = value
