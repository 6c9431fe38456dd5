"""Rates, places and quotas of tenants, by the clock of the test."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.config import TenantLimits
from serve.errors import RateLimited, Unavailable
from serve.tenants.gcra import MICROSECONDS_PER_S, Bucket, Rate
from serve.tenants.limits import TenantLimiter

MINUTE_US = 60 * MICROSECONDS_PER_S
BURSTS = st.one_of(st.integers(1, 8), st.integers(1, 10**6))
RATES = st.builds(Rate, st.integers(1, 10**9), st.sampled_from([1, 997, MINUTE_US]), burst=BURSTS)
# microseconds passed, cost as a part of the burst, part of it given back later
PARTS = st.one_of(st.just(1.0), st.floats(0, 1))
ARRIVALS = st.lists(st.tuples(st.one_of(st.just(0), st.integers(0, MINUTE_US)), PARTS, PARTS), max_size=40)


class Clock:
    """Microseconds that stand until they are moved."""

    def __init__(self) -> None:
        self.now_us = 5 * MINUTE_US

    def __call__(self) -> int:
        return self.now_us


def limiter_of(clock: Clock, *, max_tenants: int = 100, **limits: int) -> TenantLimiter:
    return TenantLimiter(TenantLimits(**limits), now_us=clock, max_tenants=max_tenants)


@settings(max_examples=100, deadline=None)
@given(RATES, ARRIVALS)
def test_no_span_admits_more_than_burst_and_rate(rate: Rate, arrivals: list[tuple[int, float, float]]) -> None:
    bucket, now_us = Bucket(rate), 10**15
    admitted: list[tuple[int, int]] = []
    for passed_us, part, _ in arrivals:
        now_us += passed_us
        cost = int(part * rate.burst)
        if bucket.take(cost, now_us) == 0:
            admitted.append((now_us, cost))
    for first, (start_us, _) in enumerate(admitted):
        total = 0
        for end_us, cost in admitted[first:]:
            total += cost
            # in exact integers: total <= burst + amount * t / period
            assert (total - rate.burst) * rate.period_us <= rate.amount * (end_us - start_us)


@settings(max_examples=100, deadline=None)
@given(RATES, ARRIVALS)
def test_giving_back_never_gives_more_than_was_taken(rate: Rate, arrivals: list[tuple[int, float, float]]) -> None:
    bucket, now_us, start_us = Bucket(rate), 10**15, 10**15
    net = 0
    for passed_us, part, back in arrivals:
        now_us += passed_us
        cost = int(part * rate.burst)
        if bucket.take(cost, now_us) == 0:
            used = int(cost * back)
            bucket.correct(used - cost, now_us)
            net += used
        assert (net - rate.burst) * rate.period_us <= rate.amount * (now_us - start_us)
        assert 0 <= bucket.standing(now_us).remaining <= rate.burst


@given(RATES, st.integers(0, 10**6))
def test_the_wait_that_is_told_is_enough_and_not_a_microsecond_too_much(rate: Rate, cost: int) -> None:
    cost, bucket, now_us = min(cost, rate.burst), Bucket(rate), 10**15
    bucket.take(rate.burst, now_us)
    wait_us = bucket.take(cost, now_us)
    if wait_us > 1:
        assert bucket.take(cost, now_us + wait_us - 1) > 0
    if wait_us:
        assert bucket.take(cost, now_us + wait_us) == 0


def test_a_steady_caller_gets_all_of_its_rate() -> None:
    bucket = Bucket(Rate(60, MINUTE_US, burst=60))
    assert all(bucket.take(1, now_us) == 0 for now_us in range(0, 10 * MINUTE_US, MICROSECONDS_PER_S))
    chosen = random.Random(0)
    crowded, now_us, admitted = Bucket(Rate(600, MINUTE_US, burst=10)), 0, 0
    for _ in range(20_000):
        now_us += chosen.randrange(20_000)
        admitted += crowded.take(1, now_us) == 0
    allowed = 10 + 600 * now_us / MINUTE_US
    assert allowed * 0.99 <= admitted <= allowed


def test_a_clock_that_goes_back_gives_nothing_away() -> None:
    bucket = Bucket(Rate(60, MINUTE_US, burst=2))
    assert [bucket.take(1, 10**9) for _ in range(2)] == [0, 0]
    assert bucket.take(1, 0) > 0 and bucket.take(1, 10**9) > 0


def test_the_request_after_the_last_one_is_refused_with_its_wait() -> None:
    clock = Clock()
    limiter = limiter_of(clock, requests_per_minute=2)
    limiter.enter("a")
    limiter.enter("a")
    with pytest.raises(RateLimited, match="2 requests a minute") as caught:
        limiter.enter("a")
    assert caught.value.retry_after_s == 30 and caught.value.code == "rate_limit_exceeded"
    limiter.enter("b")
    clock.now_us += 30 * MICROSECONDS_PER_S
    limiter.enter("a")


def test_a_request_refused_for_its_company_costs_nothing() -> None:
    clock = Clock()
    limiter = limiter_of(clock, requests_per_minute=5, max_concurrent=1)
    limiter.enter("a")
    for _ in range(10):
        with pytest.raises(RateLimited, match="1 at once"):
            limiter.enter("a")
    standing = limiter.standings("a").requests
    assert standing is not None and (standing.limit, standing.remaining) == (5, 4)
    limiter.leave("a")
    limiter.enter("a")


def test_more_tokens_than_a_minute_has_are_refused_for_good() -> None:
    limiter = limiter_of(Clock(), tokens_per_minute=100)
    with pytest.raises(RateLimited, match=r"about 101 tokens.* 100 a minute"):
        limiter.charge("a", 101)
    limiter.charge("a", 100)
    with pytest.raises(RateLimited, match="100 tokens a minute"):
        limiter.charge("a", 1)


def test_what_was_not_used_comes_back_and_what_was_too_much_is_owed() -> None:
    clock = Clock()
    limiter = limiter_of(clock, tokens_per_minute=100)
    limiter.charge("a", 80)
    limiter.settle("a", charged=80, used=30)
    standing = limiter.standings("a").tokens
    assert standing is not None and standing.remaining == 70
    limiter.settle("a", charged=0, used=120)
    owing = limiter.standings("a").tokens
    assert owing is not None and owing.remaining == 0
    clock.now_us += 12 * MICROSECONDS_PER_S
    with pytest.raises(RateLimited):
        limiter.charge("a", 1)
    clock.now_us += 20 * MICROSECONDS_PER_S
    limiter.charge("a", 1)


def test_tenants_at_rest_take_no_memory_and_active_ones_are_bounded() -> None:
    clock = Clock()
    limiter = limiter_of(clock, requests_per_minute=60, max_tenants=10)
    for number in range(10):
        limiter.enter(f"t{number}")
    with pytest.raises(Unavailable, match="10 tenants"):
        limiter.enter("one-more")
    for number in range(9):
        limiter.leave(f"t{number}")
    clock.now_us += MICROSECONDS_PER_S
    limiter.enter("one-more")
    assert limiter.num_remembered == 2
    clock.now_us += MINUTE_US
    limiter.leave("one-more")
    limiter.leave("t9")
    assert limiter.num_remembered == 0


def test_without_limits_everything_passes() -> None:
    limiter = limiter_of(Clock())
    for _ in range(1000):
        limiter.enter("a")
    limiter.charge("a", 10**12)
    limiter.settle("a", charged=10**12, used=0)
    assert limiter.standings("a").requests is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["enter", "leave", "charge", "wait"])), max_size=80))
def test_random_days_keep_the_counts(steps: list[tuple[str, str]]) -> None:
    clock = Clock()
    limiter = limiter_of(clock, requests_per_minute=30, tokens_per_minute=500, max_concurrent=4, max_tenants=3)
    running = dict.fromkeys("abc", 0)
    for tenant, step in steps:
        try:
            if step == "enter":
                limiter.enter(tenant)
                running[tenant] += 1
            elif step == "leave" and running[tenant]:
                limiter.leave(tenant)
                running[tenant] -= 1
            elif step == "charge":
                limiter.charge(tenant, 90)
            elif step == "wait":
                clock.now_us += 7 * MICROSECONDS_PER_S
        except RateLimited:
            assert step in ("enter", "charge")
        assert max(running.values()) <= 4
        limiter.check_invariants()
