"""Is an adapter on the device now? What the engine answers to a request that would rather take the base than wait."""

from dataclasses import replace

import pytest

from serve.adapter_messages import AdapterDone, AskReady
from serve.engine.virtual_tokens import LOAD_PRICE
from serve.messages import Failed, Finished
from tests.engine.bench import LIMITS, A, B, C, EngineBench
from tests.engine.fake_executor import AdapterFile


def _ask(bench: EngineBench, *digests: str, tenant: str = "", weight: float = 1.0) -> AdapterDone | Failed:
    bench.engine.handle(AskReady("q", digests, tenant, weight))
    bench.step()
    (answer,) = bench.events.pop("q")
    assert isinstance(answer, AdapterDone | Failed)
    return answer


def _served_of(bench: EngineBench, tenant: str) -> float:
    return bench.engine._scheduler.live.served.of_tenant(tenant)


def test_a_cold_adapter_is_prefetched_and_then_ready() -> None:
    bench = EngineBench(files={A: AdapterFile(10, num_polls=4)})
    assert _ask(bench, A) == AdapterDone("q", is_pending=True)
    # on its way is not there
    assert _ask(bench, A) == AdapterDone("q", is_pending=True)
    bench.drain()
    assert _ask(bench, A) == AdapterDone("q")
    assert bench.engine.stats().num_adapter_loads_total == 1
    assert bench.executor.plans == [] and bench.engine.stats().num_adapter_pins == 0


def test_a_set_is_ready_when_all_of_it_is() -> None:
    bench = EngineBench()
    bench.submit("warm", [1], A, max_tokens=1)
    bench.drain()
    assert _ask(bench, A, B) == AdapterDone("q", is_pending=True)
    bench.drain()
    assert _ask(bench, B, A) == AdapterDone("q")
    assert bench.executor.loaded == {A, B}


def test_the_prefetch_is_charged_once_to_the_tenant_that_asked() -> None:
    bench = EngineBench(files={A: AdapterFile(10, num_polls=9), B: AdapterFile(10, num_polls=9)})
    for _ in range(3):
        _ask(bench, A, B, tenant="hasty")
    bench.drain()
    _ask(bench, A, tenant="late")
    assert (_served_of(bench, "hasty"), _served_of(bench, "late")) == (2 * LOAD_PRICE, 0)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), 1e9])
def test_a_weight_that_cannot_be_is_refused_before_anything_is_loaded(weight: float) -> None:
    bench = EngineBench()
    answer = _ask(bench, A, weight=weight)
    assert isinstance(answer, Failed) and (answer.code, answer.http_status) == ("invalid_value", 400)
    assert bench.executor.loaded == set()


def test_what_can_never_be_served_is_an_error_and_no_base() -> None:
    bench = EngineBench(replace(LIMITS, num_adapter_slots=1))
    answer = _ask(bench, A, B)
    assert isinstance(answer, Failed) and (answer.code, answer.http_status) == ("adapter_load_failed", 503)
    assert "adapter slots for 1" in answer.message and bench.executor.loaded == set()


def test_a_prefetch_takes_no_room_from_running_requests() -> None:
    bench = EngineBench(replace(LIMITS, num_adapter_slots=1))
    bench.submit("runs", [1, 2], A, max_tokens=20)
    bench.step(3)
    assert _ask(bench, C) == AdapterDone("q", is_pending=True)
    bench.drain()
    assert isinstance(bench.end("runs"), Finished) and bench.executor.loaded == {A}
    assert _ask(bench, C) == AdapterDone("q", is_pending=True)
    bench.drain()
    assert _ask(bench, C) == AdapterDone("q")


def test_a_load_that_fails_is_tried_again_by_the_next_question() -> None:
    bench = EngineBench(files={A: AdapterFile(10, num_failures=1)})
    assert _ask(bench, A) == AdapterDone("q", is_pending=True)
    bench.drain()
    assert _ask(bench, A) == AdapterDone("q", is_pending=True)
    bench.drain()
    assert _ask(bench, A) == AdapterDone("q")
