"""The engine under random traces, and the proof that the checker of those traces sees bugs."""

import logging
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.engine.planted_bugs import PLANTS, Plant
from tests.engine.traces import run_trace

NUM_TRACES = 2000
NUM_LONG_TRACES = 100_000
# each planted bug was seen within 60 traces when this was written; the rest is room for changed traces
MAX_TRACES_PER_BUG = 400


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    # traces lose steps and loads on purpose; each would be logged with its stack
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def _run_traces(seeds: range) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in seeds:
        stats = run_trace(seed)
        seen["preemptions"] += stats.num_preemptions_total
        seen["prefix hits"] += stats.num_prefix_hit_tokens_total
        seen["loads"] += stats.num_adapter_loads_total
        seen["evictions"] += stats.num_adapter_evictions_total
    return seen


def test_every_request_of_every_trace_gets_what_it_gets_alone() -> None:
    seen = _run_traces(range(NUM_TRACES))
    # a checker that met no preemption proves nothing about preemption
    assert min(seen["preemptions"], seen["prefix hits"], seen["loads"], seen["evictions"]) > 100, seen


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_request_of_a_long_run_of_traces_gets_what_it_gets_alone() -> None:
    _run_traces(range(NUM_TRACES, NUM_TRACES + NUM_LONG_TRACES))


@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS.keys())
def test_the_checker_catches_a_planted_bug(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    for seed in range(MAX_TRACES_PER_BUG):
        try:
            run_trace(seed)
        # PlanViolation is no Exception, and a plant may break anything
        except BaseException as finding:
            assert not isinstance(finding, KeyboardInterrupt)
            return
    pytest.fail(f"{MAX_TRACES_PER_BUG} traces did not show the bug")
