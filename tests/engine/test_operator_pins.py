"""The operator's pins and evictions: what is refused, what waits, what stays."""

from dataclasses import replace

import pytest

from serve.adapter_messages import AdapterDone, EvictAdapter, PinAdapter, UnpinAdapter
from serve.messages import Failed, Finished, UnloadAdapter
from tests.engine.bench import LIMITS, A, B, C, EngineBench
from tests.engine.fake_executor import AdapterFile

TWO_SLOTS = replace(LIMITS, num_adapter_slots=2)


def _ask(bench: EngineBench, command: PinAdapter | UnpinAdapter | EvictAdapter) -> AdapterDone | Failed:
    """Give one command and return its one answer."""
    bench.engine.handle(command)
    bench.step()
    (answer,) = bench.events.pop(command.request_id)
    assert isinstance(answer, AdapterDone | Failed)
    return answer


def _tiers(bench: EngineBench) -> dict[str, str]:
    return {state.digest: state.tier for state in bench.engine.stats().adapters}


def test_the_last_free_slot_cannot_be_pinned() -> None:
    bench = EngineBench(TWO_SLOTS)
    assert isinstance(_ask(bench, PinAdapter("p", A)), AdapterDone)
    refused = _ask(bench, PinAdapter("q", B))
    assert isinstance(refused, Failed) and refused.http_status == 409
    assert "1 adapters are pinned already, the limit is 1: one of 2 adapter slots stays free" in refused.message
    # the same one again is no second pin, and its slot goes to another once it is given back
    assert isinstance(_ask(bench, PinAdapter("p2", A)), AdapterDone)
    assert isinstance(_ask(bench, UnpinAdapter("u", A)), AdapterDone)
    assert isinstance(_ask(bench, PinAdapter("q2", B)), AdapterDone)


def test_one_slot_is_too_few_for_any_pin() -> None:
    bench = EngineBench(replace(LIMITS, num_adapter_slots=1))
    assert isinstance(_ask(bench, PinAdapter("p", A)), Failed)


def test_pins_hold_at_most_half_of_the_bytes() -> None:
    bench = EngineBench(LIMITS, {A: AdapterFile(30), B: AdapterFile(30), C: AdapterFile(51)})
    assert isinstance(_ask(bench, PinAdapter("p", A)), AdapterDone)
    # nobody knows its size yet
    assert isinstance(_ask(bench, PinAdapter("q", B)), AdapterDone)
    bench.drain(20)
    errors = {pin.digest: pin.error or "" for pin in bench.engine.stats().operator_pins}
    assert errors[A] == ""
    assert "30 bytes" in errors[B] and "at most 50" in errors[B]
    assert isinstance(_ask(bench, UnpinAdapter("u", B)), AdapterDone)
    known = _ask(bench, PinAdapter("q2", B))
    assert isinstance(known, Failed) and "half of the adapter bytes" in known.message


def test_a_pinned_adapter_is_loaded_without_a_request_and_stays_while_others_come_and_go() -> None:
    bench = EngineBench(TWO_SLOTS)
    assert _ask(bench, PinAdapter("p", A)) == AdapterDone("p")
    bench.drain(20)
    for number, digest in enumerate((B, C, B, C)):
        bench.submit(f"r{number}", [1, 2, 3], digest)
        bench.drain(50)
        assert _tiers(bench)[A] == "device"
    assert bench.engine.stats().num_adapter_evictions_total == 3


def test_a_pin_without_room_is_carried_out_when_there_is_some_also_at_rest() -> None:
    bench = EngineBench(TWO_SLOTS)
    for request_id, digest in (("r0", A), ("r1", B)):
        bench.submit(request_id, [1, 2, 3], digest, max_tokens=3)
    for _ in range(3):
        bench.step()
    assert _ask(bench, PinAdapter("p", C)) == AdapterDone("p")
    assert C not in _tiers(bench)
    bench.drain(50)
    assert _tiers(bench)[C] == "device"


def test_a_pinned_adapter_that_cannot_be_loaded_says_why_and_is_not_tried_for_ever() -> None:
    bench = EngineBench(TWO_SLOTS, {A: AdapterFile(10, num_failures=1), B: AdapterFile(10), C: AdapterFile(10)})
    _ask(bench, PinAdapter("p", A))
    bench.drain(20)
    (pin,) = bench.engine.stats().operator_pins
    assert pin.error == "the file is damaged" and not bench.engine.has_work()
    # a request that loads it after all makes the pin good
    bench.submit("r", [1, 2, 3], A)
    bench.drain(50)
    (pin,) = bench.engine.stats().operator_pins
    assert pin.error is None and _tiers(bench)[A] == "device"


def test_a_composition_that_no_longer_fits_beside_a_pin_fails_instead_of_waiting_for_ever() -> None:
    bench = EngineBench(TWO_SLOTS)
    bench.submit("hold", [1, 2, 3], A, max_tokens=6)
    # until its load has ended: the end of a load judges the waiting ones, too
    bench.step(3)
    bench.submit("pair", [1, 2, 3], adapters=((A, 0.5), (B, 0.5)))
    assert isinstance(_ask(bench, PinAdapter("p", C)), AdapterDone)
    bench.drain(50)
    (end,) = bench.events["pair"]
    assert isinstance(end, Failed) and end.http_status == 503 and "pinned" in end.message
    assert isinstance(bench.events["hold"][-1], Finished)


def test_an_eviction_reports_the_bytes_it_freed_once() -> None:
    bench = EngineBench()
    bench.submit("r", [1, 2, 3], A)
    bench.drain(50)
    assert _ask(bench, EvictAdapter("e", A)) == AdapterDone("e", 10)
    assert _ask(bench, EvictAdapter("e2", A)) == AdapterDone("e2", 0)
    assert A not in _tiers(bench) and bench.executor.num_bytes_loaded == 0


def test_an_eviction_waits_for_the_last_running_request() -> None:
    bench = EngineBench()
    bench.submit("r", [1, 2, 3], A, max_tokens=6)
    for _ in range(3):
        bench.step()
    assert _ask(bench, EvictAdapter("e", A)) == AdapterDone("e", 0, is_pending=True)
    (state,) = bench.engine.stats().adapters
    assert state.is_leaving and state.num_pins == 1
    bench.drain(50)
    stats = bench.engine.stats()
    assert len(bench.tokens("r")) == 6 and stats.adapters == []
    assert [(move.kind, move.num_bytes) for move in stats.adapter_moves] == [("operator", 10)]


def test_a_pinned_adapter_is_not_evicted_on_command() -> None:
    bench = EngineBench()
    _ask(bench, PinAdapter("p", A))
    bench.drain(20)
    refused = _ask(bench, EvictAdapter("e", A))
    assert isinstance(refused, Failed) and (refused.code, refused.http_status) == ("adapter_in_use", 409)
    assert _tiers(bench)[A] == "device"


def test_deleting_an_adapter_takes_its_pin_away() -> None:
    bench = EngineBench()
    _ask(bench, PinAdapter("p", A))
    bench.drain(20)
    bench.engine.handle(UnloadAdapter(A))
    bench.drain(20)
    stats = bench.engine.stats()
    assert stats.operator_pins == [] and stats.adapters == []


@pytest.mark.parametrize("is_warm", [False, True])
def test_hits_misses_and_adapters_per_step_are_counted(is_warm: bool) -> None:
    bench = EngineBench()
    if is_warm:
        bench.submit("first", [1, 2, 3], A)
        bench.drain(50)
    before = bench.engine.stats()
    bench.submit("r", [1, 2, 3], A)
    bench.submit("s", [1, 2, 3])
    bench.drain(50)
    after = bench.engine.stats()
    assert after.num_adapter_hits_total - before.num_adapter_hits_total == is_warm
    assert after.num_adapter_misses_total - before.num_adapter_misses_total == (not is_warm)
    assert max(after.step_adapters) == 1 and len(after.step_adapters) == after.num_steps_total - before.num_steps_total
