"""When the parent believes the engine alive, hung or beyond its start time, and how long it waits before a restart.

Pure decisions on an injected clock: no process, no socket, no thread. Invariants: an engine is never called hung for
silence that the parent itself slept through; a loop of failing starts is never given up, only slowed down, and
`is_live` says meanwhile that it is one.
"""

from collections.abc import Callable
from enum import StrEnum

from serve.config import WatchdogConfig

# after so many starts in a row without one `Ready`, /livez asks for a new pod
MAX_FAILED_STARTS = 5


class EngineState(StrEnum):
    """Where the engine process is in its life."""

    DOWN = "down"
    STARTING = "starting"
    SERVING = "serving"


class Verdict(StrEnum):
    """What the parent should do now."""

    OK = "ok"
    START_TIMED_OUT = "start_timed_out"
    HUNG = "hung"


class Watchdog:
    """The parent's view of one engine across its restarts."""

    def __init__(self, config: WatchdogConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._state = EngineState.DOWN
        self._changed_at = clock()
        self._heard_at = clock()
        self._checked_at = clock()
        self._num_failed_starts = 0
        self._num_losses_in_a_row = 0

    @property
    def state(self) -> EngineState:
        """Where the engine is."""
        return self._state

    @property
    def is_live(self) -> bool:
        """Say whether waiting makes sense: False for a silent engine and for one that keeps failing to start."""
        return self._num_failed_starts < MAX_FAILED_STARTS and self._verdict() is Verdict.OK

    @property
    def is_serving(self) -> bool:
        """Say whether the engine has started and speaks."""
        return self._state is EngineState.SERVING and self._verdict() is Verdict.OK

    def spawned(self) -> None:
        """Note that a new engine process starts."""
        self._enter(EngineState.STARTING)

    def heard_ready(self) -> None:
        """Note that the engine has started."""
        self._num_failed_starts = 0
        self._enter(EngineState.SERVING)

    def heard(self) -> None:
        """Note any sign of life."""
        self._heard_at = self._clock()

    def check(self) -> Verdict:
        """Judge the engine; call it at least twice per `heartbeat_timeout_s`."""
        now = self._clock()
        # a parent that was itself suspended has not read the heartbeats that wait in its socket
        if now - self._checked_at > self._config.heartbeat_timeout_s / 2:
            self._heard_at = now
        self._checked_at = now
        return self._verdict()

    def lost(self) -> float:
        """Note that the process is gone and return the seconds to wait before the next start."""
        now = self._clock()
        if self._state is EngineState.STARTING:
            self._num_failed_starts += 1
        was_stable = self._state is EngineState.SERVING and now - self._changed_at > self._config.max_restart_backoff_s
        self._num_losses_in_a_row = 1 if was_stable else self._num_losses_in_a_row + 1
        self._enter(EngineState.DOWN)
        # beyond 2**16 the cap has long won, and the float must not overflow
        doublings = min(self._num_losses_in_a_row - 1, 16)
        return min(self._config.restart_backoff_s * 2.0**doublings, self._config.max_restart_backoff_s)

    def _enter(self, state: EngineState) -> None:
        self._state = state
        self._changed_at = self._heard_at = self._clock()

    def _verdict(self) -> Verdict:
        now = self._clock()
        if self._state is EngineState.STARTING and now - self._changed_at > self._config.start_timeout_s:
            return Verdict.START_TIMED_OUT
        if self._state is EngineState.SERVING and now - self._heard_at > self._config.heartbeat_timeout_s:
            return Verdict.HUNG
        return Verdict.OK
