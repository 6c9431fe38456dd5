"""The plan of one run: every request and every change, known before the first one is sent.

Owns the drawing of plans. Invariants: the same scenario gives the same plan on every machine (`digest`); arrivals,
lengths, adapters and tenants come from generators of their own, so that changing one leaves the others as they were.
"""

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from loadtest.arrivals import draw_times
from loadtest.churn import PlannedChange, plan_changes
from loadtest.errors import InvalidScenario
from loadtest.popularity import Popularity, draw_adapters
from loadtest.prompts import PromptPlan
from loadtest.scenario import Scenario
from loadtest.traces import BLOCK_TOKENS, TraceRow, read_trace


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request.

    at_s: seconds after the start at which it is due; None in a closed loop, where it is due when a client is free.
    adapter: rank of its adapter, None for the base. tenant: who sends it, None where nobody in particular does.
    """

    index: int
    at_s: float | None
    adapter: int | None
    tenant: int | None
    prompt: PromptPlan
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A run's requests in the order they are due, and its changes; `num_left_out` were longer than the limits."""

    requests: list[PlannedRequest]
    changes: list[PlannedChange]
    num_left_out: int = 0

    def digest(self) -> str:
        """Return a hash of the whole plan: equal digests mean the same load."""
        rows = [asdict(request) for request in self.requests], [asdict(change) for change in self.changes]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()[:16]


def build_plan(scenario: Scenario, traces: Path | None = None) -> Plan:
    """Draw a scenario's plan.

    Args:
        traces: folder of recorded traffic, for scenarios that replay it.
    Raises:
        InvalidTrace, InvalidScenario: the trace is not there, or nothing is left to send.
    """
    if scenario.arrivals.kind == "trace":
        rows, num_left_out = _traced_rows(scenario, traces)
    else:
        rows, num_left_out = _drawn_rows(scenario)
    if not rows:
        raise InvalidScenario(
            f"{scenario.title}: the plan holds no request ({num_left_out} are longer than lengths.max_prompt "
            f"{scenario.max_prompt_tokens} or lengths.max_output {scenario.max_output_tokens})"
        )
    adapters, tenants = _draw_who(scenario, len(rows))
    is_open = scenario.arrivals.is_open
    block_tokens = max(1, round(BLOCK_TOKENS * scenario.length_scale))
    requests = [
        PlannedRequest(
            index,
            row.at_s if is_open else None,
            adapters[index],
            tenants[index],
            PromptPlan(scenario.seed, index, row.prompt_tokens, row.blocks, block_tokens if row.blocks else 0),
            row.output_tokens,
        )
        for index, row in enumerate(rows)
    ]
    changes = []
    if scenario.churn is not None:
        changes = plan_changes(scenario.churn, scenario.adapters.count, _generator(scenario, "churn"))
    return Plan(requests, changes, num_left_out)


def _draw_who(scenario: Scenario, count: int) -> tuple[list[int | None], list[int | None]]:
    """Return adapter and tenant of each request; with tenants, each has the adapter of its own number."""
    if scenario.tenants is None:
        return draw_adapters(scenario.adapters, count, _generator(scenario, "adapters")), [None] * count
    tenants = draw_adapters(scenario.tenants, count, _generator(scenario, "tenants"))
    law: Popularity = scenario.adapters
    if law.count == 0:
        return [None] * count, tenants
    return [None if tenant is None else tenant % law.count for tenant in tenants], tenants


def _drawn_rows(scenario: Scenario) -> tuple[list[TraceRow], int]:
    if scenario.arrivals.is_open:
        rng = _generator(scenario, "arrivals")
        times = draw_times(scenario.arrivals, scenario.num_requests, scenario.duration_s, rng)
    else:
        times = [0.0] * (scenario.num_requests or 0)
    prompts, outputs = _generator(scenario, "prompts"), _generator(scenario, "outputs")
    rows = [TraceRow(at_s, scenario.prompt.draw(prompts), scenario.output.draw(outputs)) for at_s in times]
    kept = [row for row in rows if _is_within(scenario, row)]
    return kept, len(rows) - len(kept)


def _traced_rows(scenario: Scenario, traces: Path | None) -> tuple[list[TraceRow], int]:
    law, scale = scenario.arrivals, scenario.length_scale
    recorded = [row for row in read_trace(traces, law.trace) if row.at_s >= law.skip_s]
    kept: list[TraceRow] = []
    num_left_out = 0
    prompts, outputs = _generator(scenario, "prompts"), _generator(scenario, "outputs")
    for row in recorded:
        at_s = (row.at_s - law.skip_s) / law.speed
        is_over = scenario.duration_s is not None and at_s >= scenario.duration_s
        if is_over or len(kept) == scenario.num_requests:
            break
        is_traced = scenario.prompt.kind == "trace"
        prompt = max(1, round(row.prompt_tokens * scale)) if is_traced else scenario.prompt.draw(prompts)
        output = max(1, round(row.output_tokens * scale)) if is_traced else scenario.output.draw(outputs)
        scaled = TraceRow(at_s, prompt, output, row.blocks if is_traced else ())
        if _is_within(scenario, scaled):
            kept.append(scaled)
        else:
            num_left_out += 1
    return kept, num_left_out


def _is_within(scenario: Scenario, row: TraceRow) -> bool:
    return row.prompt_tokens <= scenario.max_prompt_tokens and row.output_tokens <= scenario.max_output_tokens


def _generator(scenario: Scenario, concern: str) -> random.Random:
    return random.Random(f"{scenario.seed}/{concern}")
