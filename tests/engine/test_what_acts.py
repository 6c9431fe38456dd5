"""Compositions, virtual tokens and adapters that act from a position on: who waits, what is shared, what is refused."""

from dataclasses import replace

import pytest

from serve.engine.acting import Acting
from serve.messages import Abort, Embed, Failed, Finished, SamplingParams, Started, Submit
from tests.engine.bench import LIMITS, A, B, C, EngineBench
from tests.engine.fake_executor import AdapterFile
from tests.engine.toy_model import run_alone

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def _cached(bench: EngineBench, request_id: str) -> int:
    started = bench.events[request_id][0]
    assert isinstance(started, Started)
    return started.num_cached_tokens


def _refusal(bench: EngineBench, request_id: str) -> tuple[str, int, str]:
    end = bench.end(request_id)
    assert isinstance(end, Failed)
    return end.code, end.http_status, end.message


def _submit(**fields: object) -> Submit:
    return replace(Submit("r", [1], SamplingParams(1, 1)), **fields)  # type: ignore[arg-type]


def test_what_is_equal_in_effect_is_one_thing() -> None:
    both = Acting.of(_submit(adapters=((A, 0.5), (B, -1.0))))
    assert both == Acting.of(_submit(adapters=((B, -1.0), (A, 0.5), (C, 0.0))))
    assert both.name != Acting.of(_submit(adapters=((A, -1.0), (B, 0.5)))).name
    assert Acting.of(_submit(adapters=((A, 1.0), (C, 0.0)))) == Acting.of(_submit(adapter_digest=A))
    assert Acting.of(_submit(adapters=((A, 0.0), (B, -0.0)))) == Acting.of(_submit())
    assert Acting.of(_submit(adapters=((A, 0.5),))).name not in (A, None)


def test_a_composition_runs_once_all_its_adapters_are_loaded_and_holds_all_of_them() -> None:
    bench = EngineBench(files={A: AdapterFile(10), B: AdapterFile(10, num_polls=4), C: AdapterFile(10)})
    command = bench.submit("r", PROMPT, adapters=((A, 0.5), (B, 1.5)), max_tokens=6)
    bench.step(3)
    assert bench.engine.stats().num_running == 0 and bench.executor.loaded == {A}
    bench.step(3)
    assert bench.engine.stats().num_adapter_pins == 2 and bench.executor.loaded == {A, B}
    bench.drain()
    assert bench.tokens("r") == run_alone(command, bench.limits).token_ids
    started = bench.events["r"][0]
    # until the last of its loads ended
    assert isinstance(started, Started) and started.adapter_load_s == 5.0
    assert bench.engine.stats().num_adapter_pins == 0


def test_compositions_that_want_each_others_slots_all_end() -> None:
    bench = EngineBench(replace(LIMITS, num_adapter_slots=2))
    pairs = [((A, 0.5), (B, 1.5)), ((B, 1.0), (C, 2.0)), ((C, -1.0), (A, 0.5))]
    sent = [bench.submit(f"r{i}", PROMPT[: 3 + i % 5], adapters=pairs[i % 3], max_tokens=5) for i in range(12)]
    sent += [bench.submit(f"single {i}", PROMPT, (A, B, C)[i % 3], max_tokens=5) for i in range(6)]
    bench.drain(300)
    for command in sent:
        assert bench.tokens(command.request_id) == run_alone(command, bench.limits).token_ids


def test_what_a_composition_has_already_is_not_evicted_for_what_it_still_needs() -> None:
    bench = EngineBench(replace(LIMITS, num_adapter_slots=2))
    for number, digest in enumerate((B, C)):
        bench.submit(f"warm {number}", [1], digest, max_tokens=1)
        bench.drain()
    num_loads = bench.engine.stats().num_adapter_loads_total
    bench.submit("r", PROMPT, adapters=((A, 1.0), (B, 1.0)))
    bench.drain()
    assert bench.engine.stats().num_adapter_loads_total == num_loads + 1


def test_a_composition_that_can_never_fit_is_refused_and_holds_up_nobody() -> None:
    bench = EngineBench(replace(LIMITS, num_adapter_slots=1))
    bench.submit("slots", PROMPT, adapters=((A, 1.0), (B, 1.0)))
    bench.submit("one", PROMPT, adapters=((A, 1.0), (B, 0.0)))
    bench.drain()
    code, status, message = _refusal(bench, "slots")
    assert (code, status) == (
        "adapter_load_failed",
        503,
    ) and "2 adapters; this server has adapter slots for 1" in message
    assert isinstance(bench.end("one"), Finished)
    bench = EngineBench(files={A: AdapterFile(60), B: AdapterFile(50), C: AdapterFile(10)})
    # the sizes are known only once both were loaded
    bench.submit("bytes", PROMPT, adapters=((A, 1.0), (B, 1.0)))
    other = bench.submit("other", PROMPT, C)
    bench.drain(100)
    code, status, message = _refusal(bench, "bytes")
    assert code == "adapter_load_failed" and "take 110 bytes in memory; this server holds at most 100" in message
    assert bench.tokens("other") == run_alone(other, bench.limits).token_ids
    bench.submit("again", PROMPT, adapters=((B, 1.0), (A, 0.5)))
    bench.step()
    assert "110 bytes" in _refusal(bench, "again")[2]


def test_a_failed_load_fails_the_compositions_that_name_it() -> None:
    bench = EngineBench(files={A: AdapterFile(10), B: AdapterFile(10, num_failures=1), C: AdapterFile(10)})
    bench.submit("r", PROMPT, adapters=((A, 1.0), (B, 1.0)))
    bench.submit("cold", PROMPT, adapters=((A, 1.0), (C, 0.5)), cold_start="fail")
    bench.drain()
    assert "the file is damaged" in _refusal(bench, "r")[2]
    assert _refusal(bench, "cold")[0] == "adapter_not_loaded"
    # the hint was taken
    assert {A, C} <= bench.executor.loaded


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"adapter_digest": A, "adapters": ((B, 1.0),)}, "not both"),
        ({"adapters": tuple((f"{i:064x}", 1.0) for i in range(9))}, "9 adapters; the limit is 8"),
        ({"adapters": ((A, 1.0), (A, 0.5))}, "twice"),
        ({"adapters": ((A, 2.5),)}, "weight 2.5; weights lie from -2 to 2"),
        ({"adapters": ((A, float("nan")),)}, "weight nan"),
        ({"num_virtual_tokens": 2}, "no adapter's prompt"),
        ({"adapter_digest": A, "num_virtual_tokens": -1}, "no adapter's prompt"),
        ({"active_from": 0}, "only one adapter"),
        ({"adapter_digest": A, "num_virtual_tokens": 2, "active_from": 0}, "only one adapter without virtual tokens"),
        ({"adapter_digest": A, "active_from": 1}, "from position 1 of a prompt of 1 tokens"),
        ({"adapter_digest": A, "active_from": -1}, "from position -1"),
    ],
)
def test_commands_that_contradict_themselves_are_refused(fields: dict[str, object], words: str) -> None:
    bench = EngineBench()
    bench.engine.handle(_submit(**fields))
    bench.engine.handle(replace(Embed("e", [1]), **fields))  # type: ignore[arg-type]
    bench.step()
    for request_id in ("r", "e"):
        code, status, message = _refusal(bench, request_id)
        assert (code, status) == ("invalid_value", 400) and words in message


def test_compositions_share_prefixes_whatever_their_order_and_no_others() -> None:
    bench = EngineBench()
    for request_id, adapters in (
        ("first", ((A, 0.5), (B, 1.0))),
        ("same", ((B, 1.0), (A, 0.5), (C, 0.0))),
        ("weights", ((A, 1.0), (B, 0.5))),
        ("part", ((A, 0.5),)),
    ):
        bench.submit(request_id, PROMPT, adapters=adapters)
        bench.drain()
    assert [_cached(bench, name) for name in ("first", "same", "weights", "part")] == [0, 8, 0, 0]
    bench.submit("alone", PROMPT, A)
    bench.drain()
    bench.submit("alone, spelled otherwise", PROMPT, adapters=((A, 1.0),))
    bench.drain()
    assert _cached(bench, "alone, spelled otherwise") == 8


def test_virtual_tokens_take_room_and_are_told_to_nobody() -> None:
    bench = EngineBench(replace(LIMITS, max_model_len=16))
    command = bench.submit("r", PROMPT, A, max_tokens=20, num_virtual_tokens=3)
    bench.drain()
    assert bench.tokens("r") == run_alone(command, bench.limits).token_ids and len(bench.tokens("r")) == 3
    assert bench.engine.stats().num_prompt_tokens_total == len(PROMPT)
    assert bench.num_computed("r") == 3 + len(PROMPT) + 2
    bench.submit("again", PROMPT, A, num_virtual_tokens=3, max_tokens=1)
    bench.drain()
    # twelve positions are shared, three of them the adapter's
    assert _cached(bench, "again") == 12 - 3
    bench.submit("long", PROMPT, A, num_virtual_tokens=6, max_tokens=1)
    bench.step()
    code, _, message = _refusal(bench, "long")
    assert code == "context_length_exceeded" and "at most 9, 6 more being its adapter's own prompt" in message


@pytest.mark.parametrize("max_step_tokens", [2, 5, 64])
def test_nothing_is_owed_for_virtual_tokens(max_step_tokens: int) -> None:
    bench = EngineBench(replace(LIMITS, max_step_tokens=max_step_tokens))
    scored = bench.submit(
        "scored", PROMPT, A, num_virtual_tokens=5, sampling=SamplingParams(2, 1, num_prompt_logprobs=0)
    )
    vectors = {
        pooling: bench.embed(f"embedded {pooling}", PROMPT, pooling, A, num_virtual_tokens=5)
        for pooling in ("mean", "last")
    }
    penalised = bench.submit(
        "penalised", PROMPT, A, num_virtual_tokens=5, sampling=SamplingParams(4, 1, presence_penalty=1.0)
    )
    bench.drain()
    started = bench.events["scored"][0]
    assert isinstance(started, Started) and started.prompt_logprobs is not None
    assert started.prompt_logprobs == run_alone(scored, bench.limits).prompt_logprobs
    assert len(started.prompt_logprobs) == len(PROMPT) - 1
    for pooling, command in vectors.items():
        end = bench.end(f"embedded {pooling}")
        assert getattr(end, "vector", None) == run_alone(command, bench.limits).vector
    assert bench.tokens("penalised") == run_alone(penalised, bench.limits).token_ids


def test_blocks_before_the_activation_are_the_bases_in_both_directions() -> None:
    bench = EngineBench()
    bench.submit("late", PROMPT, A, active_from=9)
    bench.drain()
    assert _cached(bench, "late") == 0
    for request_id, digest, active_from in (("base", None, None), ("other late", B, 6), ("earlier", A, 5)):
        bench.submit(request_id, PROMPT, digest, active_from=active_from)
        bench.drain()
    # two whole blocks of four before position 9, one before 6 and before 5
    assert [_cached(bench, name) for name in ("base", "other late", "earlier")] == [8, 4, 4]
    bench.submit("late again", PROMPT, A, active_from=9)
    bench.submit("always", PROMPT, A)
    bench.drain()
    assert _cached(bench, "late again") == 8 and _cached(bench, "always") == 0
    late = bench.submit("its own blocks", [*PROMPT, 1, 2, 3, 4, 5], A, active_from=6)
    bench.drain()
    bench.submit("its own blocks again", [*PROMPT, 1, 2, 3, 4, 5], A, active_from=6)
    bench.submit("one place later", [*PROMPT, 1, 2, 3, 4, 5], A, active_from=7)
    bench.drain()
    assert _cached(bench, "its own blocks again") == 12 and _cached(bench, "one place later") == 4
    assert bench.tokens("its own blocks") == run_alone(late, bench.limits).token_ids


def test_a_row_ends_where_the_adapter_begins_to_act() -> None:
    bench = EngineBench()
    command = bench.submit("r", PROMPT, A, active_from=7, max_tokens=3)
    bench.drain()
    rows = [(row.start, row.num_tokens) for plan in bench.executor.plans for row in plan]
    assert rows == [(0, 7), (7, 3), (10, 1), (11, 1)]
    assert bench.tokens("r") == run_alone(command, bench.limits).token_ids


def test_a_preempted_sequence_is_recomputed_with_what_acted_where() -> None:
    bench = EngineBench(replace(LIMITS, num_kv_blocks=8, max_model_len=32, enable_prefix_cache=False))
    sent = [
        bench.submit("late", PROMPT[:6], A, active_from=5, max_tokens=20),
        bench.submit("prompted", PROMPT[:3], B, num_virtual_tokens=3, max_tokens=20),
        bench.submit("both", PROMPT[:6], adapters=((A, 0.5), (B, -1.0)), max_tokens=20),
    ]
    bench.drain()
    assert bench.engine.stats().num_preemptions_total > 0
    for command in sent:
        assert bench.tokens(command.request_id) == run_alone(command, bench.limits).token_ids


def test_an_aborted_composition_gives_every_adapter_back() -> None:
    bench = EngineBench()
    bench.submit("r", PROMPT, adapters=((A, 0.5), (B, -1.0)), max_tokens=50)
    bench.step(5)
    assert bench.engine.stats().num_adapter_pins == 2
    bench.engine.handle(Abort("r"))
    bench.step(2)
    assert bench.engine.stats().num_adapter_pins == 0
