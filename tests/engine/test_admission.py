"""Admission: refusals at the door, waiting for adapters, siblings, preemption, and nobody passed for ever."""

from dataclasses import replace

import pytest

from serve.messages import (
    Abort,
    Embedded,
    Failed,
    Finished,
    FinishReason,
    LoadAdapter,
    SamplingParams,
    Started,
    UnloadAdapter,
)
from tests.engine.bench import LIMITS, A, B, C, EngineBench
from tests.engine.fake_executor import AdapterFile
from tests.engine.toy_model import run_alone


def _failure(bench: EngineBench, request_id: str) -> tuple[str, int]:
    end = bench.end(request_id)
    assert isinstance(end, Failed)
    return end.code, end.http_status


def test_an_empty_prompt_is_refused() -> None:
    bench = EngineBench()
    bench.submit("r", [])
    bench.step()
    assert _failure(bench, "r") == ("invalid_value", 400)


@pytest.mark.parametrize(("max_model_len", "num_kv_blocks"), [(12, 64), (200, 3)])
def test_a_prompt_that_can_never_fit_is_refused_and_one_token_less_is_served(
    max_model_len: int, num_kv_blocks: int
) -> None:
    bench = EngineBench(replace(LIMITS, max_model_len=max_model_len, num_kv_blocks=num_kv_blocks))
    bench.submit("long", [1] * 12)
    bench.submit("short", [1] * 11)
    bench.drain()
    assert _failure(bench, "long") == ("context_length_exceeded", 400)
    assert "at most 11" in bench.end("long").message  # type: ignore[union-attr]
    assert bench.end("short") == Finished("short", FinishReason.LENGTH)
    assert len(bench.tokens("short")) == 1


def test_limits_of_zero_are_refused_at_start() -> None:
    with pytest.raises(ValueError, match="max_num_seqs is 0"):
        replace(LIMITS, max_num_seqs=0)


def test_a_full_line_refuses_with_429() -> None:
    bench = EngineBench(replace(LIMITS, max_waiting=2))
    for name in ("r0", "r1", "r2"):
        bench.submit(name, [1, 2])
    bench.drain()
    assert _failure(bench, "r2") == ("queue_full", 429)
    assert isinstance(bench.end("r0"), Finished) and isinstance(bench.end("r1"), Finished)


def test_a_failed_load_fails_its_waiting_requests_and_no_others() -> None:
    bench = EngineBench(files={A: AdapterFile(10, num_polls=3, num_failures=1), B: AdapterFile(10)})
    bench.submit("a0", [1, 2], A)
    bench.submit("a1", [1, 3], A)
    bench.submit("b", [1, 2], B)
    bench.drain()
    for name in ("a0", "a1"):
        assert _failure(bench, name) == ("adapter_load_failed", 503)
        assert "the file is damaged" in bench.end(name).message  # type: ignore[union-attr]
    assert isinstance(bench.end("b"), Finished)
    # a new request tries again
    bench.submit("a2", [1, 2], A)
    bench.drain()
    assert isinstance(bench.end("a2"), Finished)


def test_an_adapter_larger_than_the_budget_fails_its_request_at_once_the_second_time() -> None:
    bench = EngineBench(files={A: AdapterFile(101)})
    bench.submit("first", [1], A)
    bench.drain()
    bench.submit("second", [1], A)
    assert _failure(bench, "first") == ("adapter_load_failed", 503)
    bench.step()
    assert _failure(bench, "second") == ("adapter_load_failed", 503)


def test_others_pass_a_request_whose_adapter_is_loading() -> None:
    bench = EngineBench(files={A: AdapterFile(10, num_polls=50)})
    bench.submit("slow", [1, 2], A)
    bench.submit("base", [1, 2])
    bench.step(10)
    assert isinstance(bench.end("base"), Finished)
    assert "slow" not in bench.events
    bench.drain()
    assert isinstance(bench.end("slow"), Finished)


def test_a_step_with_nothing_but_a_load_under_way_returns_at_once_and_keeps_the_work() -> None:
    bench = EngineBench(files={A: AdapterFile(10, num_polls=3)})
    bench.engine.handle(LoadAdapter(A))
    assert bench.engine.has_work()
    bench.step()
    assert bench.engine.has_work() and bench.executor.plans == []
    bench.drain()
    assert bench.engine.stats().adapters[0].tier == "device"


def test_started_splits_the_wait_into_queue_and_load() -> None:
    bench = EngineBench(files={A: AdapterFile(10, num_polls=5), B: AdapterFile(10)})
    bench.submit("cold", [1, 2], A)
    bench.drain()
    bench.submit("warm", [1, 2], A)
    bench.drain()
    cold, warm = bench.events["cold"][0], bench.events["warm"][0]
    assert isinstance(cold, Started) and (cold.adapter_load_s, cold.queue_s) == (6.0, 0.0)
    assert isinstance(warm, Started) and (warm.adapter_load_s, warm.queue_s) == (0.0, 1.0)
    assert [(move.kind, move.seconds) for move in bench.engine.stats().adapter_moves] == [("load", 0.5)]
    assert bench.engine.stats().adapter_moves == []


def test_a_request_that_takes_no_cold_start_fails_and_starts_the_load() -> None:
    bench = EngineBench()
    bench.submit("cold", [1, 2], A, cold_start="fail")
    bench.step(3)
    assert _failure(bench, "cold") == ("adapter_not_loaded", 503)
    bench.submit("warm", [1, 2], A, cold_start="fail")
    bench.drain()
    assert isinstance(bench.end("warm"), Finished)


def test_an_embedding_that_takes_no_cold_start_fails_and_starts_the_load() -> None:
    bench = EngineBench()
    bench.embed("cold", [1, 2], "mean", A, cold_start="fail")
    bench.step(3)
    assert _failure(bench, "cold") == ("adapter_not_loaded", 503)
    bench.embed("warm", [1, 2], "mean", A, cold_start="fail")
    bench.drain()
    assert isinstance(bench.end("warm"), Embedded)


def test_a_request_for_an_adapter_without_room_is_not_passed_for_ever() -> None:
    bench = EngineBench(replace(LIMITS, num_adapter_slots=1, max_num_seqs=2, max_waiting=1000))
    for index in range(4):
        bench.submit(f"a{index}", [index], A, max_tokens=4)
    bench.step(3)
    bench.submit("b", [1, 2], B, max_tokens=1)
    # a stream that never lets the only adapter slot go idle
    num_ended = 0
    for index in range(4, 400):
        bench.submit(f"a{index}", [index % 7], A, max_tokens=4)
        bench.step(1)
        if "b" in bench.events:
            break
        num_ended = sum(1 for events in bench.events.values() if isinstance(events[-1], Finished))
    assert isinstance(bench.end("b"), Finished)
    # MAX_PASSES admissions, then those that ran already
    assert num_ended <= 64 + 4 + 2


def test_two_adapters_that_do_not_fit_together_do_not_push_each_other_out_for_ever() -> None:
    files = {A: AdapterFile(60, num_polls=2), B: AdapterFile(60, num_polls=2), C: AdapterFile(60, num_polls=2)}
    bench = EngineBench(files=files)
    for index in range(12):
        bench.submit(f"r{index}", [index], (A, B, C)[index % 3])
    bench.drain(300)
    assert all(isinstance(events[-1], Finished) for events in bench.events.values())


def test_deleting_an_adapter_does_not_disturb_its_running_and_waiting_requests() -> None:
    bench = EngineBench(replace(LIMITS, max_num_seqs=1))
    sent = [bench.submit(f"r{index}", [1, index], A, max_tokens=6) for index in range(3)]
    bench.step(3)
    bench.engine.handle(UnloadAdapter(A))
    # its file is gone: another load would fail
    bench.files[A].num_failures = 99
    bench.drain()
    for command in sent:
        assert bench.tokens(command.request_id) == run_alone(command, bench.limits).token_ids
    assert bench.engine.stats().adapters == []


def test_siblings_compute_their_prompt_once() -> None:
    bench = EngineBench()
    prompt = list(range(1, 13)) * 3
    for index in range(4):
        bench.submit(f"s{index}", prompt, group_id="g", max_tokens=2)
    bench.drain()
    assert bench.num_computed("s0") == 36 + 1
    for index in (1, 2, 3):
        assert bench.num_computed(f"s{index}") == 4 + 1
        started = bench.events[f"s{index}"][0]
        assert isinstance(started, Started) and started.num_cached_tokens == 32


def test_siblings_go_on_when_the_first_one_is_aborted_in_its_prompt() -> None:
    bench = EngineBench()
    for index in range(3):
        bench.submit(f"s{index}", [1, 2, 3, 4] * 10, group_id="g")
    bench.step()
    bench.engine.handle(Abort("s0"))
    bench.drain()
    assert bench.end("s0") == Finished("s0", FinishReason.ABORTED)
    assert isinstance(bench.end("s1"), Finished) and isinstance(bench.end("s2"), Finished)


def test_siblings_go_on_when_the_first_one_fails_in_its_prompt() -> None:
    bench = EngineBench()
    bench.executor.poisoned_from["s0"] = 20
    for index in range(3):
        bench.submit(f"s{index}", [1, 2, 3, 4] * 10, group_id="g")
    bench.drain()
    assert _failure(bench, "s0") == ("engine_error", 500)
    assert isinstance(bench.end("s1"), Finished) and isinstance(bench.end("s2"), Finished)


def test_siblings_do_not_wait_for_prompt_logprobs_that_each_must_compute() -> None:
    bench = EngineBench()
    params = SamplingParams(max_tokens=1, seed=1, ignore_eos=True, num_prompt_logprobs=0)
    for index in range(2):
        bench.submit(f"s{index}", [1, 2, 3, 4, 5, 6], sampling=params, group_id="g")
    bench.step()
    assert len(bench.executor.plans[0]) == 2


def test_a_lower_priority_number_runs_first() -> None:
    bench = EngineBench(replace(LIMITS, max_num_seqs=1))
    bench.submit("late", [1], priority=5, max_tokens=1)
    bench.submit("soon", [2], priority=1, max_tokens=1)
    bench.drain()
    assert [plan[0].request_id for plan in bench.executor.plans] == ["soon", "late"]
