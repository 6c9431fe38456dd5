"""Fairness: tenants take turns, then their adapters; a flood takes its share and no more, idle time earns no credit."""

from dataclasses import replace

import pytest

from serve.engine import virtual_tokens
from serve.engine.fairness import WaitingLine
from serve.engine.sequence import Sequence
from serve.engine.virtual_tokens import (
    INPUT_PRICE,
    LOAD_PRICE,
    MAX_IDLE_ADAPTERS,
    MAX_IDLE_TENANTS,
    OUTPUT_PRICE,
    Level,
    Payer,
    ServedTokens,
)
from serve.messages import Abort, Embed, Failed, Finished, SamplingParams, Submit
from tests.engine.bench import LIMITS, A, B, C, EngineBench
from tests.engine.fake_executor import AdapterFile


def _seq(
    name: str,
    key: str | None,
    arrival_index: int,
    *,
    priority: int = 0,
    group_id: str = "",
    tenant: str = "",
    weight: float = 1.0,
) -> Sequence:
    command = Submit(
        name,
        [1, 2],
        SamplingParams(max_tokens=1, seed=1),
        key,
        "",
        priority,
        group_id,
        tenant=tenant,
        tenant_weight=weight,
    )
    return Sequence.build(command, arrival_index=arrival_index, now_s=0.0)


def _names(line: WaitingLine, held_groups: set[str] | None = None) -> list[str]:
    """Take everyone out in order of turn, charging each as if it had run."""
    names = []
    for seq in line.turns(held_groups or set()):
        line.remove(seq)
        line._served.charge(seq.payer, num_input=10)
        line.check_invariants()
        names.append(seq.request_id)
    return names


def _line(*seqs: Sequence) -> WaitingLine:
    line = WaitingLine(ServedTokens())
    for seq in seqs:
        line.join(seq)
    return line


def test_keys_take_turns_whatever_their_numbers() -> None:
    line = _line(*(_seq(f"a{index}", A, index) for index in range(6)), _seq("b0", B, 6), _seq("b1", B, 7))
    assert _names(line) == ["a0", "b0", "a1", "b1", "a2", "a3", "a4", "a5"]


def test_a_tenant_gains_nothing_by_many_adapters() -> None:
    many = [_seq(f"m{index}", digest, index, tenant="many") for index, digest in enumerate((A, B, C, None))]
    one = [_seq(f"o{index}", A, 4 + index, tenant="one") for index in range(4)]
    assert _names(_line(*many, *one)) == ["m0", "o0", "m1", "o1", "m2", "o2", "m3", "o3"]


def test_adapters_of_a_tenant_take_turns_within_its_own_share() -> None:
    own = [_seq(f"a{index}", A, index, tenant="t") for index in range(3)] + [_seq("b", B, 3, tenant="t")]
    other = [_seq(f"x{index}", A, 4 + index, tenant="u") for index in range(3)]
    assert _names(_line(*own, *other)) == ["a0", "x0", "b", "x1", "a1", "x2", "a2"]


def test_a_tenant_of_twice_the_weight_is_served_twice_as_much() -> None:
    heavy = [_seq(f"h{index}", A, index, tenant="heavy", weight=2.0) for index in range(4)]
    light = [_seq(f"l{index}", A, 4 + index, tenant="light") for index in range(2)]
    assert _names(_line(*heavy, *light)) == ["h0", "l0", "h1", "h2", "l1", "h3"]


def test_a_key_that_was_idle_returns_level_with_the_least_served_one() -> None:
    line = _line(_seq("a0", A, 0))
    line._served.charge(Payer("", A), num_input=1000)
    line.join(_seq("b0", B, 1))
    assert line._served.of_adapters(Payer("", B)) == 1000
    assert _names(line) == ["a0", "b0"]


def test_a_tenant_that_was_idle_returns_level_with_the_least_served_one() -> None:
    line = _line(_seq("a0", A, 0, tenant="a"), _seq("b0", A, 1, tenant="b"))
    served = line._served
    served.charge(Payer("a", A), num_input=1000)
    served.charge(Payer("b", A), num_input=600)
    line.join(_seq("c0", A, 2, tenant="c"))
    assert (served.of_tenant("c"), served.of_adapters(Payer("c", A))) == (600, 0)
    assert _names(line) == ["b0", "c0", "a0"]


def test_an_empty_line_lifts_to_whoever_left_it_last() -> None:
    line = _line(_seq("a0", A, 0, tenant="a"))
    served = line._served
    assert _names(line) == ["a0"]
    served.charge(Payer("a", A), num_output=1000)
    line.join(_seq("b0", B, 1, tenant="b"))
    assert served.of_tenant("b") == served.of_tenant("a") > 0
    line.join(_seq("a1", B, 2, tenant="a"))
    assert served.of_adapters(Payer("a", B)) == served.of_adapters(Payer("a", A))


def test_priority_comes_before_fairness_and_preempted_before_new() -> None:
    line = _line(_seq("new", A, 0))
    preempted = _seq("preempted", B, 1)
    preempted.queue_s = 0.5
    line.join(preempted)
    line.join(_seq("urgent", B, 2, priority=-1, tenant="other"))
    line._served.charge(Payer("other", B), num_input=50)
    assert _names(line) == ["urgent", "preempted", "new"]


def test_a_sequence_left_in_the_line_holds_up_its_own_queue_only() -> None:
    line = _line(*(_seq(f"r{index}", key, index) for index, key in enumerate((A, A, B))), _seq("r3", A, 3, tenant="t"))
    assert [seq.request_id for seq in line.turns(set())] == ["r0", "r2", "r3"]
    assert len(line) == 4


def test_a_held_group_is_passed_over_and_holds_up_nothing() -> None:
    line = _line(
        *(_seq(f"r{index}", A, index, group_id=group_id) for index, group_id in enumerate(("g", "g", "", "h")))
    )
    assert _names(line, {"g"}) == ["r2", "r3"]
    assert [seq.request_id for seq in line.naming(A)] == ["r0", "r1"]


def test_forgetting_idle_keys_gives_nobody_credit() -> None:
    level: Level[str] = Level(max_idle=10)
    level.join("waits")
    level.charge("waits", 5)
    for number in range(1000):
        level.charge(f"k{number}", number)
    assert len(level) <= 11
    # the most served ones are remembered, the forgotten ones return at no less than they had
    assert all(level[f"k{number}"] >= number for number in range(1000))
    assert level["waits"] == 5


def test_counters_of_tenants_and_of_their_adapters_are_bounded() -> None:
    served = ServedTokens()
    for number in range(3 * MAX_IDLE_TENANTS):
        served.charge(Payer(f"t{number}", A), num_input=number)
    assert len(served._tenants) <= MAX_IDLE_TENANTS
    assert len(served._adapters) <= MAX_IDLE_TENANTS + 1
    for number in range(3 * MAX_IDLE_ADAPTERS):
        payer = Payer("t", f"{number}")
        served.join(payer)
        served.charge(payer, num_input=number)
        served.leave(payer)
    assert len(served._adapters["t"]) <= MAX_IDLE_ADAPTERS


@pytest.mark.parametrize("weight", [0.0, -1.0, 0.009, 101.0, float("nan"), float("inf")])
def test_a_weight_out_of_bounds_is_refused(weight: float) -> None:
    bench = EngineBench()
    bench.engine.handle(Submit("r", [1], SamplingParams(max_tokens=1, seed=1), tenant="t", tenant_weight=weight))
    bench.engine.handle(Embed("e", [1], tenant="t", tenant_weight=weight))
    bench.step()
    for name in ("r", "e"):
        end = bench.end(name)
        assert isinstance(end, Failed) and end.http_status == 400 and str(weight) in end.message, end


def test_a_tenant_name_of_any_length_is_refused() -> None:
    bench = EngineBench()
    bench.engine.handle(Submit("r", [1], SamplingParams(max_tokens=1, seed=1), tenant="t" * 129))
    bench.step()
    end = bench.end("r")
    assert isinstance(end, Failed) and end.code == "invalid_value" and "129" in end.message


def _served_of(bench: EngineBench, tenant: str) -> float:
    return bench.engine._scheduler.live.served.of_tenant(tenant)


def test_the_request_that_caused_a_load_is_charged_for_it_once() -> None:
    bench = EngineBench(replace(LIMITS, enable_prefix_cache=False), {A: AdapterFile(10, num_polls=3)})
    bench.submit("first", [1, 2, 3], A, max_tokens=2, tenant="first")
    bench.submit("second", [1, 2, 3], A, max_tokens=2, tenant="second")
    bench.drain()
    tokens = INPUT_PRICE * 3 + OUTPUT_PRICE * 2
    assert (_served_of(bench, "first"), _served_of(bench, "second")) == (tokens + LOAD_PRICE, tokens)


def test_a_load_is_charged_to_those_who_do_not_wait_for_it() -> None:
    bench = EngineBench(files={A: AdapterFile(10, num_polls=9), B: AdapterFile(10, num_polls=9)})
    bench.submit("gone", [1], A, tenant="gone")
    bench.step()
    bench.engine.handle(Abort("gone"))
    bench.submit("hasty", [1], B, tenant="hasty", cold_start="fail")
    bench.submit("hasty again", [1], B, tenant="hasty", cold_start="fail")
    bench.drain()
    assert (_served_of(bench, "gone"), _served_of(bench, "hasty")) == (LOAD_PRICE, LOAD_PRICE)


def test_two_tenants_whose_adapters_share_one_slot_do_not_evict_each_others_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(virtual_tokens, "LOAD_PRICE", 1000)
    bench = EngineBench(replace(LIMITS, num_adapter_slots=1), {A: AdapterFile(10, 2), B: AdapterFile(10, 2)})
    for index in range(4):
        bench.submit(f"a{index}", [1, 2], A, tenant="a")
        bench.submit(f"b{index}", [1, 2], B, tenant="b")
    bench.drain(200)
    assert all(isinstance(bench.end(f"{name}{index}"), Finished) for name in "ab" for index in range(4))
    assert bench.engine.stats().num_adapter_loads_total <= 8


def test_a_flooding_adapter_does_not_starve_a_modest_one() -> None:
    limits = replace(LIMITS, max_num_seqs=4, max_waiting=1000, enable_prefix_cache=False)
    bench = EngineBench(limits)
    for index in range(300):
        bench.submit(f"flood{index}", [index % 16] * 8, A, max_tokens=8)
    bench.step(40)
    for index in range(10):
        name = f"modest{index}"
        bench.submit(name, [index] * 8, B, max_tokens=8)
        begin = len(bench.executor.plans)
        while name not in bench.events or not isinstance(bench.end(name), Finished):
            bench.step()
        # 9 steps for its own tokens, and at most one flooding sequence's life until a place is free
        assert len(bench.executor.plans) - begin <= 9 + 9 + 2


def test_two_backlogged_adapters_are_served_within_the_bound_of_the_theorem() -> None:
    limits = replace(LIMITS, max_num_seqs=4, max_waiting=1000, enable_prefix_cache=False)
    bench = EngineBench(limits)
    # A sends many long requests, B short ones: by count of requests A would take nearly everything
    for index in range(120):
        bench.submit(f"a{index}", [index % 16] * 16, A, max_tokens=24)
        bench.submit(f"b{index}", [index % 16] * 2, B, max_tokens=3)
    longest_input, most_running_tokens = 16, 4 * (16 + 24)
    bound = 2 * max(INPUT_PRICE * longest_input, OUTPUT_PRICE * most_running_tokens)
    for _ in range(160):
        bench.step()
        assert any(f"b{index}" not in bench.events for index in range(120)), "B is no longer backlogged"
        shares = []
        for key, num_input in (("a", 16), ("b", 2)):
            started = [name for name in bench.events if name.startswith(key)]
            num_output = sum(len(bench.tokens(name)) for name in started)
            shares.append(INPUT_PRICE * num_input * len(started) + OUTPUT_PRICE * num_output)
        assert abs(shares[0] - shares[1]) <= bound
