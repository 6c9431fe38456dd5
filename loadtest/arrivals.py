"""When requests are due: seeded arrivals of an open loop, or a number of clients in a closed one.

Owns the arrival laws. Invariant: an open loop's times come from the plan alone, never from how fast the server answers.
"""

import random
from dataclasses import dataclass

from loadtest.errors import InvalidScenario
from loadtest.tables import Table

KINDS = ("closed", "gamma", "poisson", "trace", "uniform")
_MAX_REQUESTS = 1_000_000


@dataclass(frozen=True, slots=True)
class Arrivals:
    """One law.

    poisson, gamma and uniform: `rate` requests per second in the mean; gamma's gaps have the coefficient of variation
    `cv` (1 is Poisson, more comes in bursts). trace: a recorded day's own times, `speed` times as fast, from second
    `skip_s` on. closed: `concurrency` clients, each sending its next request when its last one ended.
    """

    kind: str
    rate: float = 0.0
    cv: float = 1.0
    concurrency: int = 0
    trace: str = ""
    speed: float = 1.0
    skip_s: float = 0.0

    @property
    def is_open(self) -> bool:
        """Tell whether requests are due at times of their own."""
        return self.kind != "closed"

    def gap(self, rng: random.Random) -> float:
        """Draw the seconds from one arrival to the next."""
        if self.kind == "uniform":
            return 1.0 / self.rate
        if self.kind == "poisson":
            return rng.expovariate(self.rate)
        assert self.kind == "gamma", f"no gaps are drawn for arrivals of kind {self.kind}"
        shape = 1.0 / self.cv**2
        return rng.gammavariate(shape, 1.0 / (shape * self.rate))


def read_arrivals(table: Table) -> Arrivals:
    """Read a scenario's `[arrivals]`."""
    kind = table.text("kind", among=KINDS)
    if kind == "closed":
        law = Arrivals(kind, concurrency=table.whole("concurrency", low=1, high=100_000))
    elif kind == "trace":
        law = Arrivals(
            kind,
            trace=table.text("trace"),
            speed=table.number("speed", 1.0, low=1e-6),
            skip_s=table.number("skip_s", 0.0),
        )
    else:
        cv = table.number("cv", low=1e-3, high=1e3) if kind == "gamma" else 1.0
        law = Arrivals(kind, rate=table.number("rate", low=1e-6, high=1e6), cv=cv)
    table.close()
    return law


def draw_times(law: Arrivals, num_requests: int | None, duration_s: float | None, rng: random.Random) -> list[float]:
    """Return when each request is due, in seconds from the start, ascending.

    Args:
        num_requests, duration_s: whichever ends the plan first; at least one is given.
    """
    if num_requests is None and duration_s is None:
        raise InvalidScenario("give 'num_requests', 'duration_s' or both: without them the plan has no end")
    limit = _MAX_REQUESTS if num_requests is None else num_requests
    times: list[float] = []
    now = 0.0
    while len(times) < limit:
        now += law.gap(rng)
        if duration_s is not None and now >= duration_s:
            break
        # whole microseconds: the last bits of a logarithm differ between processors, a plan must not
        times.append(round(now, 6))
    return times
