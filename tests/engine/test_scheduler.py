"""The scheduler: budgets, chunks, preemption, ends, prompt logprobs, embeddings, failures of single rows."""

from dataclasses import replace

import pytest

from serve.messages import (
    Abort,
    Embedded,
    Event,
    Failed,
    Finished,
    FinishReason,
    Grammar,
    SamplingParams,
    Shutdown,
    Started,
    Tokens,
)
from tests.engine.bench import LIMITS, A, B, EngineBench
from tests.engine.fake_executor import AdapterFile
from tests.engine.toy_model import EOS_ID, run_alone, sample_token

pytestmark = pytest.mark.usefixtures("both_modes")
# two steps in flight: see test_two_in_flight
one_at_a_time = pytest.mark.parametrize("both_modes", [False], indirect=True, ids=["sync"])


def _kinds(events: list[Event]) -> list[type]:
    return [type(event) for event in events]


@one_at_a_time
def test_an_abort_frees_everything_within_one_step_and_ends_once() -> None:
    bench = EngineBench()
    bench.submit("r", [1] * 30, A, max_tokens=50)
    bench.step(5)
    bench.engine.handle(Abort("r"))
    bench.engine.handle(Abort("r"))
    stats = bench.engine.stats()
    assert (stats.num_running, stats.num_kv_blocks_in_use, stats.num_adapter_pins) == (0, 0, 0)
    bench.step()
    assert _kinds(bench.events["r"]).count(Finished) == 1
    assert bench.end("r") == Finished("r", FinishReason.ABORTED)
    assert bench.executor.released == {"r": 1}
    assert not bench.engine.has_work()


def test_aborting_an_unknown_request_and_shutting_down_do_nothing() -> None:
    bench = EngineBench()
    bench.engine.handle(Abort("nobody"))
    bench.engine.handle(Shutdown())
    assert not bench.engine.has_work()
    assert bench.engine.step() == []


def test_a_non_finite_row_fails_alone_and_leaves_nothing_in_the_prefix_cache() -> None:
    bench = EngineBench()
    prompt = list(range(1, 13))
    bench.executor.poisoned_from["bad"] = 9
    bench.submit("bad", prompt, A)
    good = bench.submit("good", [3, 2, 1], A)
    bench.drain()
    end = bench.end("bad")
    assert isinstance(end, Failed) and (end.code, end.http_status) == ("engine_error", 500)
    assert bench.tokens("good") == run_alone(good, bench.limits).token_ids
    bench.submit("again", prompt, A)
    bench.drain()
    started = bench.events["again"][0]
    assert isinstance(started, Started) and started.num_cached_tokens == 0


@one_at_a_time
def test_a_long_prompt_is_cut_into_chunks_behind_the_decodes() -> None:
    bench = EngineBench(replace(LIMITS, max_step_tokens=8))
    bench.submit("short", [1, 2], max_tokens=9)
    bench.step()
    bench.submit("long", [1] * 20, max_tokens=2)
    bench.step(3)
    rows = [[(row.request_id, row.num_tokens) for row in plan] for plan in bench.executor.plans]
    assert rows == [
        [("short", 2)],
        [("short", 1), ("long", 7)],
        [("short", 1), ("long", 7)],
        [("short", 1), ("long", 6)],
    ]
    # one Tokens event per sequence and step; none before the prompt is computed
    assert _kinds(bench.events["long"]) == [Started, Tokens]


@one_at_a_time
def test_beside_decodes_all_prompts_together_get_their_own_smaller_budget() -> None:
    bench = EngineBench(replace(LIMITS, max_mixed_prefill_tokens=3))
    sent = [bench.submit("first", [1] * 20, max_tokens=9)]
    bench.step(2)
    sent += [bench.submit("long", [2] * 5, A, max_tokens=2), bench.submit("late", [3] * 4, B, max_tokens=2)]
    bench.drain()
    rows = [[(row.request_id, row.num_tokens) for row in plan] for plan in bench.executor.plans if plan]
    # nobody decodes: a prompt may fill the step
    assert rows[:2] == [[("first", 16)], [("first", 4)]]
    mixed = [[size for name, size in plan if name != "first"] for plan in rows[2:] if ("first", 1) in plan]
    # of the younger ones a row is a chunk of their prompts until its 5 and 4 tokens are done, and then a decode
    assert [sum(sizes) for sizes in mixed if sizes][:4] == [3, 3, 3 + 1, 1]
    for command in sent:
        assert bench.tokens(command.request_id) == run_alone(command, bench.limits).token_ids


@one_at_a_time
def test_beside_decodes_many_prompt_tokens_go_in_larger_pieces_that_shrink() -> None:
    limits = replace(LIMITS, max_mixed_prefill_tokens=2, mixed_prefill_divisor=4, max_step_tokens=16, max_num_seqs=4)
    bench = EngineBench(limits)
    sent = [bench.submit("first", [1] * 3, max_tokens=12)]
    bench.step(2)
    sent += [bench.submit("long", [2] * 20, max_tokens=1), bench.submit("late", [3] * 12, max_tokens=1)]
    # no place is left for this one beside them all: its tokens do not count until there is
    sent += [bench.submit("fourth", [4] * 4, max_tokens=1), bench.submit("none", [5] * 30, max_tokens=1)]
    bench.drain()
    plans = [[(row.request_id, row.num_tokens) for row in plan] for plan in bench.executor.plans if plan]
    mixed = [sum(size for name, size in plan if name != "first") for plan in plans if ("first", 1) in plan]
    prompts = [size for size in mixed if size]
    assert prompts[0] == (20 + 12 + 4) // 4
    assert prompts[1] == (36 - prompts[0]) // 4
    for command in sent:
        assert bench.tokens(command.request_id) == run_alone(command, bench.limits).token_ids


@one_at_a_time
def test_a_prompt_whose_adapter_is_awaited_makes_no_piece_larger() -> None:
    limits = replace(LIMITS, max_mixed_prefill_tokens=2, mixed_prefill_divisor=2)
    bench = EngineBench(limits, {A: AdapterFile(10, num_polls=6)})
    bench.submit("first", [1] * 3, max_tokens=12)
    bench.step(2)
    bench.submit("cold", [2] * 30, A, max_tokens=1)
    bench.step(1)
    bench.submit("late", [3] * 6, max_tokens=1)
    bench.drain()
    pieces = [row.num_tokens for plan in bench.executor.plans for row in plan if row.request_id == "late"]
    assert pieces[0] == 6 // 2


def test_one_prompt_token_at_a_time_beside_decodes_still_ends_every_sequence() -> None:
    bench = EngineBench(replace(LIMITS, max_mixed_prefill_tokens=1, max_num_seqs=4))
    sent = [bench.submit(f"r{index}", [index] * (1 + 5 * index), (None, A, B)[index % 3]) for index in range(6)]
    bench.drain()
    for command in sent:
        assert bench.tokens(command.request_id) == run_alone(command, bench.limits).token_ids


def test_no_step_exceeds_its_token_budget_nor_its_sequences() -> None:
    bench = EngineBench(replace(LIMITS, max_step_tokens=5, max_num_seqs=3))
    for index in range(10):
        bench.submit(f"r{index}", [index] * (1 + 3 * index % 17), max_tokens=5)
    bench.drain()
    assert all(sum(row.num_tokens for row in plan) <= 5 and len(plan) <= 3 for plan in bench.executor.plans)


def test_more_sequences_than_the_budget_has_tokens_all_end() -> None:
    bench = EngineBench(replace(LIMITS, max_step_tokens=2, max_num_seqs=6))
    for index in range(6):
        bench.submit(f"r{index}", [index, 1, 2], max_tokens=3)
    bench.drain()
    assert all(isinstance(bench.end(f"r{index}"), Finished) for index in range(6))


def test_the_newest_sequence_is_preempted_and_its_output_is_the_same() -> None:
    bench = EngineBench(replace(LIMITS, num_kv_blocks=8, max_model_len=32, enable_prefix_cache=False))
    sent = [bench.submit(f"r{index}", [index] * 6, (None, A, B)[index], max_tokens=20) for index in range(3)]
    bench.drain()
    stats = bench.engine.stats()
    assert stats.num_preemptions_total > 0
    for command in sent:
        assert bench.tokens(command.request_id) == run_alone(command, bench.limits).token_ids
        assert _kinds(bench.events[command.request_id]).count(Started) == 1
    # the oldest one is never taken from: each of its tokens is run once
    assert bench.num_computed("r0") == 6 + 19


def test_a_lower_priority_is_preempted_before_a_newer_arrival() -> None:
    bench = EngineBench(replace(LIMITS, num_kv_blocks=6, max_model_len=24, enable_prefix_cache=False))
    bench.submit("minor", [1] * 6, max_tokens=12, priority=3)
    bench.submit("major", [2] * 6, max_tokens=12, priority=0)
    bench.drain()
    assert bench.num_computed("major") == 6 + 11
    assert bench.num_computed("minor") > 6 + 11


def test_a_prefix_is_reused_under_the_same_adapter_only() -> None:
    bench = EngineBench()
    prompt = list(range(1, 14))
    for name, digest in (("base", None), ("a", A), ("base again", None), ("a again", A)):
        bench.submit(name, prompt, digest)
        bench.drain()
    hits = {
        name: events[0].num_cached_tokens for name, events in bench.events.items() if isinstance(events[0], Started)
    }
    assert hits == {"base": 0, "a": 0, "base again": 12, "a again": 12}
    assert bench.engine.stats().num_prefix_hit_tokens_total == 24


def test_a_full_hit_still_runs_the_last_prompt_token() -> None:
    bench = EngineBench()
    for name in ("first", "second"):
        bench.submit(name, [1, 2, 3, 4, 5, 6, 7, 8], max_tokens=1)
        bench.drain()
    assert bench.num_computed("second") == 4


def test_output_blocks_are_reused_by_the_next_turn() -> None:
    bench = EngineBench()
    first = bench.submit("first", [1, 2, 3, 4, 5], max_tokens=8)
    bench.drain()
    history = first.prompt_token_ids + bench.tokens("first")
    bench.submit("second", [*history, 9], max_tokens=1)
    bench.drain()
    started = bench.events["second"][0]
    # 13 tokens known, the last of them never run: three full blocks
    assert isinstance(started, Started) and started.num_cached_tokens == 12


def _first_draw(seed: int, prompt: list[int]) -> int:
    bench = EngineBench()
    bench.submit("probe", prompt, sampling=SamplingParams(max_tokens=1, seed=seed, ignore_eos=True))
    bench.drain()
    return bench.tokens("probe")[0]


def _seed_that_draws(token_id: int) -> int:
    return next(seed for seed in range(1000) if _first_draw(seed, [1, 2]) == token_id)


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (SamplingParams(max_tokens=3, seed=0), FinishReason.STOP),
        (SamplingParams(max_tokens=1, seed=0), FinishReason.STOP),
        (SamplingParams(max_tokens=3, seed=0, ignore_eos=True), FinishReason.LENGTH),
        # a finished grammar can give nothing but the end token
        (SamplingParams(max_tokens=3, seed=0, ignore_eos=True, grammar=Grammar("regex", "a")), FinishReason.STOP),
    ],
)
def test_an_end_token_stops_unless_it_is_ignored(params: SamplingParams, reason: FinishReason) -> None:
    bench = EngineBench()
    seeded = SamplingParams(
        params.max_tokens, _seed_that_draws(EOS_ID), ignore_eos=params.ignore_eos, grammar=params.grammar
    )
    bench.submit("r", [1, 2], sampling=seeded)
    bench.drain()
    stop_token_id = EOS_ID if reason is FinishReason.STOP else None
    assert bench.end("r") == Finished("r", reason, stop_token_id)
    assert bench.tokens("r")[0] == EOS_ID


def test_a_stop_id_ends_only_after_min_tokens() -> None:
    seed = _seed_that_draws(7)
    for min_tokens, num_tokens in ((0, 1), (1, 3)):
        bench = EngineBench()
        params = SamplingParams(3, seed, min_tokens=min_tokens, ignore_eos=True, stop_token_ids=(7,))
        command = bench.submit("r", [1, 2], sampling=params)
        bench.drain()
        assert bench.tokens("r") == run_alone(command, bench.limits).token_ids
        assert len(bench.tokens("r")) == num_tokens


def test_the_model_length_ends_with_reason_length() -> None:
    bench = EngineBench(replace(LIMITS, max_model_len=10))
    bench.submit("r", [1, 2, 3], max_tokens=100)
    bench.drain()
    assert bench.end("r") == Finished("r", FinishReason.LENGTH)
    assert len(bench.tokens("r")) == 7


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_prompt_logprobs_cover_every_position_but_the_first_despite_chunks_and_a_cached_prefix(max_tokens: int) -> None:
    bench = EngineBench(replace(LIMITS, max_step_tokens=7))
    prompt = [(3 * index) % 11 for index in range(30)]
    bench.submit("warm", prompt, A)
    bench.drain()
    params = SamplingParams(max_tokens, seed=1, ignore_eos=True, num_prompt_logprobs=0)
    command = bench.submit("scored", prompt, A, sampling=params)
    bench.drain()
    started = bench.events["scored"][0]
    assert isinstance(started, Started) and started.num_cached_tokens == 0
    assert started.prompt_logprobs == run_alone(command, bench.limits).prompt_logprobs
    assert len(bench.tokens("scored")) == max_tokens
    assert bench.end("scored") == Finished("scored", FinishReason.LENGTH)


def test_scoring_takes_a_prompt_as_long_as_the_model() -> None:
    bench = EngineBench(replace(LIMITS, max_model_len=12))
    bench.submit("r", [1] * 12, sampling=SamplingParams(max_tokens=0, seed=1, num_prompt_logprobs=0))
    bench.drain()
    assert _kinds(bench.events["r"]) == [Started, Finished]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_an_embedding_is_the_same_in_chunks_and_with_a_cached_prefix(pooling: str) -> None:
    bench = EngineBench(replace(LIMITS, max_step_tokens=7))
    prompt = [(5 * index) % 13 for index in range(30)]
    for name in ("first", "second"):
        command = bench.embed(name, prompt, pooling)
        bench.drain()
        vector = run_alone(command, bench.limits).vector
        assert vector is not None
        assert bench.events[name][1:] == [Embedded(name, vector)]


def test_an_embedding_hits_no_prefix_of_another_salt() -> None:
    bench = EngineBench()
    prompt = [(5 * index) % 13 for index in range(30)]
    for name, salt, num_hits in (("first", "acme", 0), ("other", "bob", 0), ("again", "acme", 28)):
        before = bench.engine.stats().num_prefix_hit_tokens_total
        bench.embed(name, prompt, "last", cache_salt=salt)
        bench.drain()
        assert bench.engine.stats().num_prefix_hit_tokens_total - before == num_hits


def test_logprobs_of_output_tokens_are_passed_on() -> None:
    bench = EngineBench()
    bench.submit("r", [1, 2], sampling=SamplingParams(2, seed=1, ignore_eos=True, num_logprobs=0))
    bench.drain()
    tokens = [event for event in bench.events["r"] if isinstance(event, Tokens)]
    assert all(event.logprobs is not None and len(event.logprobs) == 1 for event in tokens)


def test_counters_tell_what_was_done() -> None:
    bench = EngineBench()
    bench.submit("r", [1, 2, 3], A, max_tokens=4)
    bench.drain()
    stats = bench.engine.stats()
    assert (stats.num_prompt_tokens_total, stats.num_generated_tokens_total) == (3, 4)
    assert (stats.num_steps_total, stats.num_adapter_loads_total) == (4, 1)


def test_a_second_request_of_a_live_id_is_a_bug_of_the_caller() -> None:
    bench = EngineBench()
    bench.submit("r", [1])
    with pytest.raises(AssertionError, match="already live"):
        bench.submit("r", [1])


def test_the_toy_sampler_depends_on_every_position() -> None:
    # guards the guard: were it to read the last position alone, the traces would prove little
    draws = {sample_token([kv, 2, 3], 1, 0, allows_eos=True) for kv in range(50)}
    assert len(draws) > 5
