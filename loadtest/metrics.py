"""From samples to figures: latencies, throughput, goodput. Pure functions of recorded moments.

Owns the definitions. Invariant: a failed request is a miss, never left out: it counts as infinitely late in every
percentile of TTFT, TPOT and E2E, and never as good. Requests for an adapter that the plan itself had taken away are
the one exception; they are counted apart.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loadtest.samples import ABSENT, Sample

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to be good, in seconds; None: not asked. `itl_s` bounds its longest gap."""

    ttft_s: float | None = None
    itl_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def is_met_by(self, sample: Sample) -> bool:
        """Tell whether a request met every target; an answer of one token has no gaps to be late with."""
        if not sample.is_ok:
            return False
        asked = (
            (self.ttft_s, sample.ttft_s),
            (self.itl_s, max(sample.gaps_s(), default=None)),
            (self.tpot_s, sample.tpot_s),
            (self.e2e_s, sample.e2e_s),
        )
        return all(limit is None or value is None or value <= limit for limit, value in asked)


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution in brief, in seconds; infinite where that share of the requests failed, NaN of nothing."""

    num_values: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One run's figures; rates are per second of `wall_s`, from the first scheduled moment to the last end."""

    num_requests: int
    num_ok: int
    num_absent: int
    failures: dict[str, int]
    wall_s: float
    requests_per_s: float
    output_tokens: int
    output_tokens_per_s: float
    goodput_per_s: float
    # share of the requests that met every target
    attainment: float
    ttft_s: Spread
    ttft_sent_s: Spread
    itl_s: Spread
    tpot_s: Spread
    e2e_s: Spread
    # how late the tester itself sent
    send_lag_s: Spread
    # Jain's index over tenants' good requests divided by their requests: 1 is equal treatment
    tenant_fairness: float | None


def summarise(samples: Sequence[Sample], slo: Slo) -> Summary:
    """Compute every figure of a run."""
    counted = [sample for sample in samples if sample.failure != ABSENT]
    ok = [sample for sample in counted if sample.is_ok]
    begin = min((sample.scheduled_s for sample in samples), default=0.0)
    wall_s = max((sample.end_s for sample in samples), default=0.0) - begin
    good = [sample for sample in ok if slo.is_met_by(sample)]
    tokens = sum(sample.num_output_tokens for sample in ok)
    num_failed = len(counted) - len(ok)
    return Summary(
        num_requests=len(samples),
        num_ok=len(ok),
        num_absent=len(samples) - len(counted),
        failures=dict(Counter(sample.failure for sample in counted if sample.failure is not None)),
        wall_s=wall_s,
        requests_per_s=_rate(len(ok), wall_s),
        output_tokens=tokens,
        output_tokens_per_s=_rate(tokens, wall_s),
        goodput_per_s=_rate(len(good), wall_s),
        attainment=len(good) / len(counted) if counted else math.nan,
        ttft_s=spread((sample.ttft_s for sample in ok), num_failed),
        ttft_sent_s=spread((sample.ttft_sent_s for sample in ok), num_failed),
        itl_s=spread(gap for sample in ok for gap in sample.gaps_s()),
        tpot_s=spread((sample.tpot_s for sample in ok), num_failed),
        e2e_s=spread((sample.e2e_s for sample in ok), num_failed),
        send_lag_s=spread(sample.sent_s - sample.scheduled_s for sample in samples),
        tenant_fairness=_tenant_fairness(counted, slo),
    )


def spread(values: Iterable[float | None], num_missed: int = 0) -> Spread:
    """Return the distribution of the values that are there, with `num_missed` infinite ones beside them."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered and not num_missed:
        return Spread(0, math.nan, math.nan, math.nan, math.nan, math.nan)
    everything = ordered + [math.inf] * num_missed
    # the mean of what came: an infinite mean would say nothing beside the count of failures
    mean = math.fsum(ordered) / len(ordered) if ordered else math.inf
    p50, p90, p99 = (percentile(everything, quantile) for quantile in QUANTILES)
    return Spread(len(everything), mean, p50, p90, p99, everything[-1])


def percentile(ordered: Sequence[float], quantile: float) -> float:
    """Return a quantile of ascending values, interpolated linearly between neighbours; infinite beside an infinite."""
    place = (len(ordered) - 1) * quantile
    below = math.floor(place)
    weight = place - below
    if weight == 0.0 or ordered[below] == ordered[below + 1]:
        return ordered[below]
    return ordered[below] * (1 - weight) + ordered[below + 1] * weight


def jain(values: Sequence[float]) -> float:
    """Return Jain's fairness index: 1 when all are equal, 1/n when one has everything."""
    squares = math.fsum(value * value for value in values)
    return math.fsum(values) ** 2 / (len(values) * squares) if squares else 1.0


def _tenant_fairness(counted: Sequence[Sample], slo: Slo) -> float | None:
    asked = Counter(sample.tenant for sample in counted if sample.tenant is not None)
    if not asked:
        return None
    good = Counter(sample.tenant for sample in counted if slo.is_met_by(sample))
    return jain([good[tenant] / count for tenant, count in asked.items()])


def _rate(count: float, wall_s: float) -> float:
    return count / wall_s if wall_s > 0 else 0.0
