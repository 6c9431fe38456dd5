"""Where the budget for prompts is a compromise and no order, it is rounded to whole prompts."""

from dataclasses import replace

import pytest

from serve.engine.limits import EngineLimits
from serve.messages import Submit
from tests.engine.bench import LIMITS, EngineBench
from tests.engine.toy_model import run_alone

# one step in flight: what a step holds follows from the step before
pytestmark = [pytest.mark.usefixtures("both_modes"), pytest.mark.parametrize("both_modes", [False], indirect=True)]
OURS = replace(LIMITS, max_mixed_prefill_tokens=2, mixed_prefill_divisor=4, max_num_seqs=12, num_kv_blocks=200)


def chunks(bench: EngineBench) -> list[list[int]]:
    """Return the sizes of the prompts' rows, step by step, beside the decoding sequence `first`."""
    plans = [{row.request_id: row.num_tokens for row in plan} for plan in bench.executor.plans]
    mixed = [[plan[name] for name in plan if name != "first"] for plan in plans if plan.get("first") == 1]
    return [sizes for sizes in mixed if sizes]


def decoding(limits: EngineLimits) -> EngineBench:
    """Return an engine in which `first` decodes for a long while."""
    bench = EngineBench(limits)
    bench.submit("first", [99] * 3, max_tokens=40)
    bench.step(2)
    return bench


def send(bench: EngineBench, num_prompts: int, length: int) -> list[Submit]:
    return [bench.submit(f"r{index}", [index] * length, max_tokens=1) for index in range(num_prompts)]


def test_a_prompt_that_fits_is_taken_whole_or_waits_for_the_next_step() -> None:
    bench = decoding(replace(OURS, max_step_tokens=64))
    sent = send(bench, 8, 10)
    bench.drain()
    # shares of 80, 60, 40 tokens: 20, 15, 10
    assert chunks(bench)[:3] == [[10, 10], [10, 10], [10]]
    # 30 // 4 is less than a prompt: the first one is cut, and prompts go on
    assert chunks(bench)[3][0] == 7
    for command in sent:
        assert bench.tokens(command.request_id) == run_alone(command, bench.limits).token_ids


def test_less_than_half_of_a_prompt_is_left_for_the_next_step() -> None:
    bench = decoding(replace(OURS, max_step_tokens=64))
    sent = send(bench, 7, 11)
    bench.drain()
    # 77 // 4 = 19: 8 of the second are more than half, 66 - 11 = 55 // 4 = 13: 2 of it are not
    assert chunks(bench)[:2] == [[11, 11], [11]]
    for command in sent:
        assert bench.tokens(command.request_id) == run_alone(command, bench.limits).token_ids


def test_rounding_up_ends_at_the_steps_own_budget() -> None:
    bench = decoding(replace(OURS, max_step_tokens=16))
    send(bench, 8, 10)
    bench.drain()
    # beside the decode 15 tokens would fit, and the second prompt's other half not
    assert chunks(bench)[:4] == [[10]] * 4
    assert all(sum(row.num_tokens for row in plan) <= 16 for plan in bench.executor.plans)


def test_what_the_prefix_cache_has_needs_no_room() -> None:
    bench = decoding(replace(OURS, max_step_tokens=17))
    size = bench.limits.block_size
    prompt = [7] * (3 * size)
    bench.submit("cached", [*prompt, *[8] * size], max_tokens=1)
    while "cached" not in bench.events or len(bench.events["cached"]) < 2:
        bench.step(1)
    before = len(chunks(bench))
    for index in range(4):
        bench.submit(f"r{index}", [*prompt, *[20 + index] * size], max_tokens=1)
    bench.drain()
    assert chunks(bench)[before] == [size] * 4


def test_a_budget_that_was_asked_for_is_kept_and_filled() -> None:
    bench = decoding(replace(OURS, max_mixed_prefill_tokens=15, mixed_prefill_divisor=None, max_step_tokens=64))
    send(bench, 4, 10)
    bench.drain()
    assert [sum(sizes) for sizes in chunks(bench)][:2] == [15, 15]
