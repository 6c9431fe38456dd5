"""Two steps in flight: chained rows, ends found late, what in-flight rows hold, lost steps, and the same answers."""

import logging
from dataclasses import replace

import pytest

from serve.engine.limits import EngineLimits
from serve.messages import (
    Abort,
    Event,
    Failed,
    Finished,
    FinishReason,
    Grammar,
    SamplingParams,
    Started,
    Submit,
    Tokens,
)
from tests.engine.bench import LIMITS, A, B, C, EngineBench
from tests.engine.fake_executor import AdapterFile
from tests.engine.toy_model import EOS_ID, run_alone

TIGHT = replace(LIMITS, num_kv_blocks=10, block_size=2, max_model_len=20, max_step_tokens=6, num_adapter_slots=1)


@pytest.fixture(autouse=True)
def _two_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineBench, "is_async", True)


def _chained(bench: EngineBench) -> list[tuple[str, int]]:
    return [(row.request_id, row.start) for plan in bench.executor.plans for row in plan if row.is_chained]


def _seed_that_ends_at(index: int, prompt: list[int]) -> int:
    """Find a seed whose output has its first end token at this place."""
    for seed in range(10_000):
        output = run_alone(Submit("r", prompt, SamplingParams(20, seed)), LIMITS).token_ids
        if len(output) == index + 1 and output[-1] == EOS_ID:
            return seed
    raise AssertionError("no such seed")


def test_the_next_step_is_submitted_before_the_last_one_is_collected() -> None:
    bench = EngineBench()
    bench.submit("r", [1, 2, 3], max_tokens=4)
    bench.step()
    # one token is known, and the row that runs it was submitted before that
    assert len(bench.tokens("r")) == 1 and len(bench.executor.plans) == 2
    assert _chained(bench) == [("r", 3)]
    bench.drain()
    assert _chained(bench) == [("r", 3), ("r", 4), ("r", 5)]


@pytest.mark.parametrize("limits", [LIMITS, replace(LIMITS, max_model_len=7)])
def test_no_row_is_wasted_on_an_end_that_is_known_ahead(limits: EngineLimits) -> None:
    bench = EngineBench(limits)
    bench.submit("r", [1, 2, 3], max_tokens=4)
    bench.submit("scored", [1, 2, 3], sampling=SamplingParams(0, seed=1, num_prompt_logprobs=0))
    bench.embed("embedded", [1, 2, 3], "mean")
    bench.drain()
    assert bench.num_computed("r") == 3 + 3
    assert (bench.num_computed("scored"), bench.num_computed("embedded")) == (3, 3)


def test_an_end_found_late_is_sent_once_and_its_extra_row_counts_for_nothing() -> None:
    bench = EngineBench()
    command = bench.submit("r", [1, 2], sampling=SamplingParams(20, _seed_that_ends_at(2, [1, 2])))
    bench.drain()
    assert bench.tokens("r") == run_alone(command, bench.limits).token_ids
    assert bench.end("r") == Finished("r", FinishReason.STOP, EOS_ID)
    assert bench.num_computed("r") == 2 + 2 + 1
    stats = bench.engine.stats()
    assert (stats.num_generated_tokens_total, stats.num_kv_blocks_in_use) == (3, 0)


def test_blocks_and_pin_of_an_aborted_sequence_are_given_back_when_its_rows_are_back() -> None:
    bench = EngineBench()
    bench.submit("r", [1] * 30, A, max_tokens=50)
    bench.step(5)
    bench.engine.handle(Abort("r"))
    stats = bench.engine.stats()
    assert (stats.num_running, stats.num_adapter_pins) == (0, 1) and stats.num_kv_blocks_in_use > 0
    assert bench.engine.has_work() and bench.executor.released == {}
    bench.step()
    stats = bench.engine.stats()
    assert (stats.num_kv_blocks_in_use, stats.num_adapter_pins) == (0, 0)
    assert bench.executor.released == {"r": 1} and not bench.engine.has_work()
    assert bench.end("r") == Finished("r", FinishReason.ABORTED)


def test_a_row_that_comes_back_not_finite_after_the_abort_leaves_no_block_behind() -> None:
    bench = EngineBench(replace(LIMITS, num_kv_blocks=4, max_model_len=16))
    bench.executor.poisoned_from["bad"] = 5
    bench.submit("bad", [1, 2, 3, 4, 5], max_tokens=9)
    # the first bad row is in flight behind the prompt's
    bench.step()
    bench.engine.handle(Abort("bad"))
    # the fake device refuses a table with a block that a non-finite row wrote
    good = bench.submit("good", [7] * 9, max_tokens=5)
    bench.drain()
    assert bench.tokens("good") == run_alone(good, bench.limits).token_ids


def test_a_chained_row_behind_a_non_finite_one_is_ignored() -> None:
    bench = EngineBench()
    bench.executor.poisoned_from["bad"] = 2
    bench.submit("bad", [1, 2, 3], A)
    good = bench.submit("good", [1, 2, 3])
    bench.drain()
    assert [type(event) for event in bench.events["bad"]] == [Failed]
    assert ("bad", 3) in _chained(bench)
    assert bench.tokens("good") == run_alone(good, bench.limits).token_ids
    assert bench.engine.stats().num_kv_blocks_in_use == 0


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(6, 1, ignore_eos=True, grammar=Grammar("regex", "a*")),
        SamplingParams(6, 1, ignore_eos=True, repetition_penalty=1.1),
        SamplingParams(6, 1, ignore_eos=True, presence_penalty=0.5),
        SamplingParams(6, 1, ignore_eos=True, frequency_penalty=-0.5),
    ],
)
@pytest.mark.parametrize("num_others", [0, 2, 7])
def test_a_sequence_that_needs_its_last_token_waits_for_it(params: SamplingParams, num_others: int) -> None:
    bench = EngineBench(replace(LIMITS, max_step_tokens=64))
    waits = bench.submit("waits", [1, 2, 3], sampling=params)
    for index in range(num_others):
        bench.submit(f"r{index}", [index, 1], max_tokens=12)
    bench.drain()
    assert "waits" not in {request_id for request_id, _ in _chained(bench)}
    if params.grammar is None:
        assert bench.tokens("waits") == run_alone(waits, bench.limits).token_ids


def test_few_sequences_wait_with_one_that_needs_its_last_token_and_many_go_ahead() -> None:
    penalised = SamplingParams(6, 1, ignore_eos=True, presence_penalty=0.5)
    steps_until_the_end = []
    for num_others in (3, 16):
        bench = EngineBench(replace(LIMITS, max_num_seqs=32, max_step_tokens=64, num_kv_blocks=400))
        for index in range(num_others):
            bench.submit(f"r{index}", [index % 16, 1], max_tokens=30)
        bench.submit("waits", [1], sampling=penalised)
        while not bench.tokens("waits")[5:]:
            bench.step()
        steps_until_the_end.append(len(bench.executor.plans))
    assert steps_until_the_end[0] < 8 < steps_until_the_end[1]


def test_preemption_waits_for_the_step_in_flight_and_loses_no_token() -> None:
    bench = EngineBench(replace(LIMITS, num_kv_blocks=8, max_model_len=32, enable_prefix_cache=False))
    sent = [bench.submit(f"r{index}", [index] * 6, (None, A, B)[index], max_tokens=20) for index in range(3)]
    bench.drain()
    assert bench.engine.stats().num_preemptions_total > 0
    for command in sent:
        assert bench.tokens(command.request_id) == run_alone(command, bench.limits).token_ids


@pytest.mark.parametrize("loses_at_submit", [False, True])
def test_a_lost_step_and_the_one_behind_it_are_run_again_and_nobody_notices(
    loses_at_submit: bool, caplog: pytest.LogCaptureFixture
) -> None:
    bench = EngineBench()
    bench.executor.loses_at_submit = loses_at_submit
    sent = [bench.submit(f"r{index}", [index, 1], (None, A)[index % 2], max_tokens=12) for index in range(4)]
    for num_lost in (1, 2, 1):
        bench.executor.num_lost_steps = num_lost
        bench.step(3)
    bench.drain()
    for command in sent:
        assert bench.tokens(command.request_id) == run_alone(command, bench.limits).token_ids
    assert ("could not be submitted" if loses_at_submit else "was lost") in caplog.text


def test_an_executor_that_is_not_asynchronous_is_only_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineBench, "is_async", False)
    bench = EngineBench()
    # the fake device refuses `submit` then
    bench.submit("r", [1, 2, 3])
    bench.drain()
    assert _chained(bench) == [] and len(bench.tokens("r")) == 4


def _workload(*, is_async: bool, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Event]]:
    """Run one of everything on a tiny engine, and return what each request was told, without times."""
    monkeypatch.setattr(EngineBench, "is_async", is_async)
    bench = EngineBench(TIGHT, {A: AdapterFile(10), B: AdapterFile(90), C: AdapterFile(10, num_polls=3)})
    bench.executor.poisoned_from["nan"] = 7
    for seed in range(3):
        params = SamplingParams(8, seed, min_tokens=2, stop_token_ids=(5,))
        bench.submit(f"choice {seed}", [1, 2, 3, 4, 5], A, sampling=params, group_id="choices")
        bench.submit(f"base {seed}", [4, 3], sampling=SamplingParams(14, seed, ignore_eos=True, num_logprobs=0))
    bench.submit("nan", [1, 2, 3], B, max_tokens=9)
    bench.step(3)
    bench.submit("penalised", [2, 1], C, sampling=SamplingParams(7, 3, presence_penalty=1.0))
    bench.submit("scored", [5, 6, 7, 8, 9], sampling=SamplingParams(3, 1, num_prompt_logprobs=0))
    bench.embed("mean", [1, 2, 3, 4, 5, 6, 7], "mean")
    bench.submit("aborted", [9, 9], A, max_tokens=15)
    bench.step(6)
    bench.engine.handle(Abort("aborted"))
    bench.drain()
    stats = bench.engine.stats()
    # a workload that meets neither proves little
    assert stats.num_preemptions_total > 0 and stats.num_adapter_evictions_total > 0
    assert isinstance(bench.end("nan"), Failed)
    return {request_id: [_timeless(event) for event in events] for request_id, events in bench.events.items()}


def _timeless(event: Event) -> Event:
    if isinstance(event, Started):
        # what is cached depends on who ran when
        times = {"queue_s": 0.0, "adapter_load_s": 0.0, "adapter_fetch_s": 0.0, "adapter_move_s": 0.0, "prefill_s": 0.0}
        return replace(event, num_cached_tokens=0, **times)  # type: ignore[arg-type]
    return event


def test_every_request_is_told_the_same_with_one_and_with_two_steps_in_flight(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    sync = _workload(is_async=False, monkeypatch=monkeypatch)
    overlapped = _workload(is_async=True, monkeypatch=monkeypatch)
    assert sync.keys() == overlapped.keys()
    for events in (sync, overlapped):
        # how far an aborted one comes is a matter of time
        assert isinstance(events["aborted"].pop(), Finished)
    short, long = sorted((sync.pop("aborted"), overlapped.pop("aborted")), key=len)
    assert long[: len(short)] == short
    assert sync == overlapped
    assert sum(isinstance(event, Tokens) for events in sync.values() for event in events) > 40
