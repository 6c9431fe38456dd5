"""Fairness: a flooding adapter takes its share and no more, and idle time earns no credit."""

from dataclasses import replace

from serve.engine.fairness import INPUT_PRICE, MAX_KEYS, OUTPUT_PRICE, VirtualTokens, WaitingLine
from serve.engine.sequence import Sequence
from serve.messages import Finished, SamplingParams, Submit
from tests.engine.bench import LIMITS, A, B, EngineBench


def _seq(name: str, key: str | None, arrival_index: int, *, priority: int = 0, group_id: str = "") -> Sequence:
    command = Submit(name, [1, 2], SamplingParams(max_tokens=1, seed=1), key, "", priority, group_id)
    return Sequence.build(command, arrival_index=arrival_index, now_s=0.0)


def _names(line: WaitingLine, held_groups: set[str] | None = None) -> list[str]:
    """Take everyone out in order of turn, charging each as if it had run."""
    names = []
    for seq in line.turns(held_groups or set()):
        line.remove(seq)
        line._served.charge(seq.turn_key, num_input=10)
        names.append(seq.request_id)
    return names


def test_keys_take_turns_whatever_their_numbers() -> None:
    line = WaitingLine(VirtualTokens())
    for index in range(6):
        line.join(_seq(f"a{index}", A, index))
    line.join(_seq("b0", B, 6))
    line.join(_seq("b1", B, 7))
    assert _names(line) == ["a0", "b0", "a1", "b1", "a2", "a3", "a4", "a5"]


def test_a_key_that_was_idle_returns_level_with_the_least_served_one() -> None:
    served = VirtualTokens()
    line = WaitingLine(served)
    line.join(_seq("a0", A, 0))
    served.charge(A, num_input=1000)
    line.join(_seq("b0", B, 1))
    assert served[B] == 1000
    assert _names(line) == ["a0", "b0"]


def test_an_empty_line_lifts_to_whoever_left_it_last() -> None:
    served = VirtualTokens()
    line = WaitingLine(served)
    line.join(_seq("a0", A, 0))
    assert _names(line) == ["a0"]
    served.charge(A, num_output=1000)
    line.join(_seq("b0", B, 1))
    assert served[B] == served[A]


def test_priority_comes_before_fairness_and_preempted_before_new() -> None:
    line = WaitingLine(VirtualTokens())
    line.join(_seq("new", A, 0))
    preempted = _seq("preempted", B, 1)
    preempted.queue_s = 0.5
    line.join(preempted)
    line.join(_seq("urgent", B, 2, priority=-1))
    assert _names(line) == ["urgent", "preempted", "new"]


def test_a_sequence_left_in_the_line_holds_up_its_own_queue_only() -> None:
    line = WaitingLine(VirtualTokens())
    for index, key in enumerate((A, A, B)):
        line.join(_seq(f"r{index}", key, index))
    assert [seq.request_id for seq in line.turns(set())] == ["r0", "r2"]
    assert len(line) == 3


def test_a_held_group_is_passed_over_and_holds_up_nothing() -> None:
    line = WaitingLine(VirtualTokens())
    for index, group_id in enumerate(("g", "g", "", "h")):
        line.join(_seq(f"r{index}", A, index, group_id=group_id))
    assert _names(line, {"g"}) == ["r2", "r3"]
    assert [seq.request_id for seq in line.naming(A)] == ["r0", "r1"]


def test_forgetting_idle_keys_gives_nobody_credit() -> None:
    served = VirtualTokens()
    for index in range(MAX_KEYS):
        served.lift(f"key {index}", [])
    served.charge(A, num_input=500)
    served.lift(B, [A])
    assert len(served._tokens) <= 2
    assert served["key 7"] == 500


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
