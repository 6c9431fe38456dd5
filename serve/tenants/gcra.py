"""One rate limit as the generic cell rate algorithm: a single integer per caller, no timer, no float.

Owns the arithmetic, in microseconds times the rate's amount, where every price is whole and nothing is rounded.
Invariant: over any span of t, what was admitted less what was given back is at most `burst + rate * t`.
"""

from dataclasses import dataclass

MICROSECONDS_PER_S = 1_000_000


@dataclass(frozen=True, slots=True)
class Rate:
    """`amount` units every `period_us`, of which `burst` may come at once."""

    amount: int
    period_us: int
    burst: int

    def __post_init__(self) -> None:
        assert self.amount > 0 and self.period_us > 0 and self.burst > 0, "a rate is positive"


@dataclass(frozen=True, slots=True)
class Standing:
    """What a caller has left: units now, and microseconds until everything is back."""

    limit: int
    remaining: int
    reset_us: int


class Bucket:
    """One caller's account of one rate; the time that it has used up reaches to `_used_until`."""

    __slots__ = ("_rate", "_used_until")

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._used_until = 0

    def take(self, cost: int, now_us: int) -> int:
        """Take `cost` units and return 0; or take nothing and return the microseconds until they would be there.

        A cost above the burst never fits; the caller has to refuse it first.
        """
        rate = self._rate
        assert 0 <= cost <= rate.burst, "a cost above the burst is refused before"
        until = max(self._used_until, now_us * rate.amount) + cost * rate.period_us
        excess = until - now_us * rate.amount - rate.burst * rate.period_us
        if excess > 0:
            return -(-excess // rate.amount)
        self._used_until = until
        return 0

    def correct(self, difference: int, now_us: int) -> None:
        """Charge so many units more than were taken, or give them back if negative; charging may go into debt."""
        if difference > 0:
            self._used_until = max(self._used_until, now_us * self._rate.amount)
        self._used_until += difference * self._rate.period_us

    def fill(self, cost: int, now_us: int) -> None:
        """Charge what was admitted elsewhere, down to nothing left but never into debt."""
        empty = (now_us * self._rate.amount) + self._rate.burst * self._rate.period_us
        used = max(self._used_until, now_us * self._rate.amount) + cost * self._rate.period_us
        self._used_until = max(self._used_until, min(used, empty))

    def standing(self, now_us: int) -> Standing:
        """Return what is left."""
        rate = self._rate
        used = max(0, self._used_until - now_us * rate.amount)
        free = max(0, rate.burst * rate.period_us - used)
        return Standing(rate.burst, free // rate.period_us, -(-used // rate.amount))

    def is_full(self, now_us: int) -> bool:
        """Return whether forgetting this account changes nothing."""
        return self._used_until <= now_us * self._rate.amount
