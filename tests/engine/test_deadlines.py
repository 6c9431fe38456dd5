"""Deadlines: a request whose time is over ends in the very next step, wherever it is, and leaves nothing behind."""

from dataclasses import replace

import pytest

from serve.engine.deadlines import Deadlines
from serve.engine.sequence import Sequence
from serve.messages import Event, Failed, Finished, SamplingParams, Submit
from tests.engine.bench import LIMITS, A, EngineBench
from tests.engine.fake_executor import AdapterFile


def _submit(bench: EngineBench, request_id: str, deadline_s: float | None, prompt: list[int], **fields: object) -> None:
    sampling = SamplingParams(max_tokens=50, seed=1, ignore_eos=True)
    command = replace(Submit(request_id, prompt, sampling, deadline_s=deadline_s), **fields)  # type: ignore[arg-type]
    bench._send(command)


def _failure(bench: EngineBench, request_id: str) -> Failed:
    event: Event = bench.end(request_id)
    assert isinstance(event, Failed), event
    return event


@pytest.mark.usefixtures("both_modes")
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("queue", "while it waited"),
        ("load", "while its adapter was not loaded"),
        ("prefill", "while its prompt was computed"),
        ("decode", "after "),
    ],
)
def test_a_late_request_ends_in_the_step_after_its_deadline_and_names_where_it_was(where: str, message: str) -> None:
    limits = replace(LIMITS, max_num_seqs=1 if where == "queue" else 8, max_step_tokens=4)
    bench = EngineBench(limits, {A: AdapterFile(10, num_polls=100)})
    bench.submit("other", [1, 2], max_tokens=30)
    bench.step()
    prompt = [1] * (60 if where == "prefill" else 3)
    _submit(bench, "late", 5.0, prompt, adapter_digest=A if where == "load" else None)
    # a second per step: taken at 1 s, due at 6 s
    bench.step(4)
    assert not any(isinstance(event, Failed) for event in bench.events.get("late", []))
    bench.step()
    failure = _failure(bench, "late")
    assert (failure.code, failure.http_status) == ("deadline_exceeded", 504)
    assert message in failure.message and "deadline of 5 s" in failure.message
    tokens = bench.tokens("late")
    assert (len(tokens) > 0) == (where == "decode")
    if where == "decode":
        # an asynchronous step may sample one more, which nobody is told of
        assert f"after {len(tokens)} tokens" in failure.message
    bench.drain()
    assert isinstance(bench.end("other"), Finished) and len(bench.tokens("other")) == 30
    stats = bench.engine.stats()
    assert (stats.num_kv_blocks_in_use, stats.num_adapter_pins, stats.num_waiting) == (0, 0, 0)


def test_a_request_that_ends_in_time_is_not_touched_and_its_id_may_come_back() -> None:
    bench = EngineBench()
    _submit(bench, "same", 50.0, [1, 2], sampling=SamplingParams(max_tokens=2, seed=1, ignore_eos=True))
    bench.drain()
    assert isinstance(bench.end("same"), Finished)
    # the first one's deadline passes while the second one, without any, runs under the same id
    _submit(bench, "same", None, [1, 2], sampling=SamplingParams(max_tokens=90, seed=1, ignore_eos=True))
    bench.step(60)
    assert not isinstance(bench.end("same"), Failed)
    bench.drain()
    assert isinstance(bench.end("same"), Finished)


def test_deadlines_of_ended_sequences_are_swept_out() -> None:
    live: dict[str, Sequence] = {}
    deadlines = Deadlines(live)
    for number in range(10_000):
        command = Submit(f"r{number}", [1], SamplingParams(max_tokens=1, seed=1), deadline_s=1e6)
        seq = Sequence.build(command, arrival_index=number, now_s=0.0)
        live[seq.request_id] = seq
        deadlines.add(seq)
        if number % 10:
            del live[seq.request_id]
    assert len(deadlines) < 3_000
    assert len(deadlines.expired(2e6)) == len(live) == 1_000


def test_a_late_request_of_a_pair_leaves_the_other_one_alone() -> None:
    bench = EngineBench()
    _submit(bench, "late", 3.0, [1, 2, 3, 4, 5], group_id="g")
    _submit(bench, "calm", None, [1, 2, 3, 4, 5], group_id="g")
    bench.drain()
    assert _failure(bench, "late").code == "deadline_exceeded"
    assert isinstance(bench.end("calm"), Finished) and len(bench.tokens("calm")) == 50
