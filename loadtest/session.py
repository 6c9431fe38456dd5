"""One run from end to end: names, plan, warm-up, load, changes, verification.

Owns the order of these and what a run leaves behind (`RunResult`). Invariant: a run that cannot be made as its scenario
says is refused before the first request.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from loadtest.adapter_changes import AdapterChanges, Change
from loadtest.client import Client, encode_body
from loadtest.errors import InvalidScenario, ServerRefused
from loadtest.metrics import Summary, summarise
from loadtest.prompts import PromptPlan, check_shape, request_body
from loadtest.runner import Names, Progress, run_plan
from loadtest.samples import ABSENT, Sample
from loadtest.scenario import Scenario
from loadtest.verify import Verdict, verify
from loadtest.workload import Plan, build_plan

_WARM_UP_TOKENS = 2
_WARM_UP_PROMPT = 16


class Display(Protocol):
    """Shows that something goes on: the load of a run, then its verification."""

    def load(self, title: str, progress: Progress) -> AbstractContextManager[None]:
        """Show the load while it lasts."""
        ...

    def steps(self, title: str, count: int) -> AbstractContextManager[Callable[[], None]]:
        """Show `count` steps; the callable is called after each."""
        ...


@dataclass(frozen=True, slots=True)
class Setting:
    """What the command line says about every run."""

    base: str
    adapters: tuple[str, ...]
    # the adapters of the session's own; None: only those that the server has
    changes: AdapterChanges | None = None
    traces: Path | None = None
    vocab: int | None = None
    is_verified: bool = False


@dataclass(slots=True)
class RunResult:
    """A finished run."""

    scenario: Scenario
    plan_digest: str
    num_left_out: int
    samples: list[Sample]
    summary: Summary
    verdict: Verdict | None = None
    changes: list[Change] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Tell whether nothing failed and no answer differed."""
        return not self.summary.failures and not (self.verdict and self.verdict.mismatches)


async def run_scenario(client: Client, scenario: Scenario, setting: Setting, display: Display) -> RunResult:
    """Run one scenario against one server.

    Raises:
        LoadtestError: the plan cannot be made, or the server refuses what setting up needs.
    """
    check_shape(scenario.request, setting.vocab)
    plan = build_plan(scenario, setting.traces)
    names = await _names(scenario, setting)
    await _warm_up(client, scenario, names)
    result = await _run(client, scenario, plan, names, setting, display)
    if setting.is_verified:
        versions = setting.changes.versions if setting.changes is not None else {}
        with display.steps(f"{scenario.title}: alone", len(result.samples)) as advance:
            result.verdict = await verify(client, scenario, plan, result.samples, versions, advance)
    return result


async def _run(
    client: Client, scenario: Scenario, plan: Plan, names: Names, setting: Setting, display: Display
) -> RunResult:
    changes, done = setting.changes, list[Change]()

    async def change() -> None:
        assert changes is not None and scenario.churn is not None, "a plan's changes have a churn and adapters of ours"
        done.extend(await changes.carry_out(plan.changes, scenario.churn.absent_s, client.now_s))

    progress = Progress(len(plan.requests))
    with display.load(scenario.title, progress):
        samples = await run_plan(client, scenario, plan, names, progress, change if plan.changes else None)
    if changes is not None and plan.changes:
        for sample in samples:
            if sample.status == 404 and changes.was_absent(sample.model, sample.sent_s, sample.end_s):
                sample.failure = ABSENT
    return RunResult(
        scenario,
        plan.digest(),
        plan.num_left_out,
        samples,
        summarise(samples, scenario.slo),
        changes=done,
    )


async def _names(scenario: Scenario, setting: Setting) -> Names:
    count = scenario.adapters.count
    if setting.changes is not None:
        return Names(setting.base, await setting.changes.provide(count))
    if scenario.churn is not None:
        raise InvalidScenario(f"{scenario.title}: changes of adapters need --adapter-folder, a PEFT folder to upload")
    if count > len(setting.adapters):
        raise InvalidScenario(
            f"{scenario.title}: needs {count} adapters and the server lists {len(setting.adapters)}; register more, "
            "name them with --adapters, let the tester upload its own with --adapter-folder, or lower the number with "
            "--set adapters.count=..."
        )
    return Names(setting.base, setting.adapters[:count])


async def _warm_up(client: Client, scenario: Scenario, names: Names) -> None:
    """Ask each model once, one after the other; a server that cannot answer one request gets no load."""
    asked: Sequence[str] = {"none": (), "base": (names.base,), "all": (names.base, *names.adapters)}[scenario.warm_up]
    client.start_clock()
    for model in asked:
        body = request_body(scenario.request, model, PromptPlan(-1, 0, _WARM_UP_PROMPT), _WARM_UP_TOKENS)
        sample = Sample(0, model, None, None, _WARM_UP_PROMPT, _WARM_UP_TOKENS, client.now_s())
        await client.send(scenario.request.path, encode_body(body), sample)
        if not sample.is_ok:
            raise ServerRefused(
                f"{client.url}: the first request to {model!r} failed: {sample.failure} {sample.detail}"
            )
    # let the warm-up's connections be seen as free before the load takes them
    await asyncio.sleep(0)
