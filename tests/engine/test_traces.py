"""The engine under random traces, and the proof that the checker of those traces sees bugs."""

import logging
from collections import Counter
from collections.abc import Iterator

import pytest

from serve.engine import scheduler
from tests.engine.planted_acting_bugs import ACTING_PLANTS
from tests.engine.planted_bugs import PLANTS, Plant
from tests.engine.planted_operator_bugs import OPERATOR_PLANTS
from tests.engine.planted_overlap_bugs import OVERLAP_PLANTS
from tests.engine.traces import run_trace

NUM_TRACES = 2000
NUM_ASYNC_TRACES = 1000
NUM_LONG_TRACES = 100_000
# each planted bug was seen within 260 traces when this was written; the rest is room for changed traces
MAX_TRACES_PER_BUG = 400
BOTH_PLANTS = PLANTS | ACTING_PLANTS
# what the operator does meets no step in flight that others would not
SYNC_PLANTS = BOTH_PLANTS | OPERATOR_PLANTS
ASYNC_PLANTS = BOTH_PLANTS | OVERLAP_PLANTS


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    # traces lose steps and loads on purpose; each would be logged with its stack
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def _run_traces(seeds: range, *, is_async: bool = False) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in seeds:
        stats = run_trace(seed, is_async=is_async)
        seen["preemptions"] += stats.num_preemptions_total
        seen["prefix hits"] += stats.num_prefix_hit_tokens_total
        seen["loads"] += stats.num_adapter_loads_total
        seen["evictions"] += stats.num_adapter_evictions_total
    return seen


@pytest.mark.parametrize(("is_async", "num_traces"), [(False, NUM_TRACES), (True, NUM_ASYNC_TRACES)])
def test_every_request_of_every_trace_gets_what_it_gets_alone(is_async: bool, num_traces: int) -> None:
    seen = _run_traces(range(num_traces), is_async=is_async)
    # a checker that met no preemption proves nothing about preemption
    assert min(seen["preemptions"], seen["prefix hits"], seen["loads"], seen["evictions"]) > 100, seen


def test_traces_end_well_when_penalised_sequences_sit_out_every_second_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # else a handful of sequences always waits for the ones that cannot be chained
    monkeypatch.setattr(scheduler, "MIN_ROWS_PER_SITTING_OUT", 0)
    seen = _run_traces(range(NUM_TRACES, NUM_TRACES + 300), is_async=True)
    assert min(seen["preemptions"], seen["loads"], seen["evictions"]) > 10, seen


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("is_async", [False, True])
def test_every_request_of_a_long_run_of_traces_gets_what_it_gets_alone(is_async: bool) -> None:
    seen = _run_traces(range(NUM_TRACES, NUM_TRACES + NUM_LONG_TRACES), is_async=is_async)
    assert min(seen["preemptions"], seen["prefix hits"], seen["loads"], seen["evictions"]) > 100, seen


@pytest.mark.parametrize("plant", SYNC_PLANTS.values(), ids=SYNC_PLANTS.keys())
def test_the_checker_catches_a_planted_bug(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    _expect_a_finding(plant, monkeypatch, is_async=False)


@pytest.mark.parametrize("plant", ASYNC_PLANTS.values(), ids=ASYNC_PLANTS.keys())
def test_the_checker_catches_a_planted_bug_with_two_steps_in_flight(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    _expect_a_finding(plant, monkeypatch, is_async=True)


def _expect_a_finding(plant: Plant, monkeypatch: pytest.MonkeyPatch, *, is_async: bool) -> None:
    plant(monkeypatch)
    for seed in range(MAX_TRACES_PER_BUG):
        try:
            run_trace(seed, is_async=is_async)
        # PlanViolation is no Exception, and a plant may break anything
        except BaseException as finding:
            assert not isinstance(finding, KeyboardInterrupt)
            return
    pytest.fail(f"{MAX_TRACES_PER_BUG} traces did not show the bug")
