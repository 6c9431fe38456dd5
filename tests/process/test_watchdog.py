"""The watchdog's judgement under an injected clock."""

from dataclasses import dataclass

import pytest

from serve.config import WatchdogConfig
from serve.engine.watchdog import MAX_FAILED_STARTS, EngineState, Verdict, Watchdog


@dataclass(slots=True)
class FakeClock:
    """Time that moves when told."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


CONFIG = WatchdogConfig(
    heartbeat_timeout_s=10.0, start_timeout_s=600.0, restart_backoff_s=1.0, max_restart_backoff_s=30.0
)


@pytest.fixture
def clock() -> FakeClock:
    """Return a clock that stands still."""
    return FakeClock()


@pytest.fixture
def watchdog(clock: FakeClock) -> Watchdog:
    """Return the watchdog of an engine that serves."""
    watchdog = Watchdog(CONFIG, clock)
    watchdog.spawned()
    watchdog.heard_ready()
    return watchdog


def claims(watchdog: Watchdog) -> tuple[bool, bool]:
    """Return (is_live, is_serving)."""
    return watchdog.is_live, watchdog.is_serving


def pass_time(watchdog: Watchdog, clock: FakeClock, seconds: float) -> Verdict:
    """Let time pass as the parent sees it, a check every quarter second, and return the last verdict."""
    verdict = watchdog.check()
    for _ in range(round(seconds * 4)):
        clock.now += 0.25
        verdict = watchdog.check()
    return verdict


def test_silence_beyond_the_timeout_is_a_hang(watchdog: Watchdog, clock: FakeClock) -> None:
    assert pass_time(watchdog, clock, 10.0) is Verdict.OK
    assert claims(watchdog) == (True, True)
    assert pass_time(watchdog, clock, 0.25) is Verdict.HUNG
    assert claims(watchdog) == (False, False)


def test_any_sign_of_life_resets_the_silence(watchdog: Watchdog, clock: FakeClock) -> None:
    for _ in range(5):
        assert pass_time(watchdog, clock, 9.0) is Verdict.OK
        watchdog.heard()


def test_silence_that_the_parent_itself_slept_through_is_no_hang(watchdog: Watchdog, clock: FakeClock) -> None:
    clock.now += 3600.0
    assert watchdog.check() is Verdict.OK
    assert pass_time(watchdog, clock, 10.25) is Verdict.HUNG


def test_a_start_has_its_own_longer_time(clock: FakeClock) -> None:
    watchdog = Watchdog(CONFIG, clock)
    watchdog.spawned()
    assert watchdog.state is EngineState.STARTING
    assert pass_time(watchdog, clock, 600.0) is Verdict.OK
    assert claims(watchdog) == (True, False)
    assert pass_time(watchdog, clock, 0.25) is Verdict.START_TIMED_OUT
    assert claims(watchdog) == (False, False)


def test_losses_in_a_row_wait_twice_as_long_each_up_to_the_cap(watchdog: Watchdog) -> None:
    waits = [watchdog.lost()]
    for _ in range(100):
        watchdog.spawned()
        watchdog.heard_ready()
        waits.append(watchdog.lost())
    assert waits[:6] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    assert waits[-1] == 30.0


def test_an_engine_that_served_for_a_while_is_restarted_at_once_again(watchdog: Watchdog, clock: FakeClock) -> None:
    for _ in range(5):
        watchdog.lost()
        watchdog.spawned()
        watchdog.heard_ready()
    clock.now += 31.0
    assert watchdog.lost() == 1.0


def test_a_loop_of_failing_starts_is_not_live_until_one_succeeds(watchdog: Watchdog) -> None:
    watchdog.lost()
    for _ in range(MAX_FAILED_STARTS):
        assert watchdog.is_live
        watchdog.spawned()
        watchdog.lost()
    assert not watchdog.is_live
    watchdog.spawned()
    watchdog.heard_ready()
    assert claims(watchdog) == (True, True)
