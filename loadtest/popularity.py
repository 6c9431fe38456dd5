"""Which adapter a request names: the popularity laws of Punica and S-LoRA, and Zipf's.

Owns the laws as weights over ranks, rank 0 the most popular. Invariant: the draws depend on the law and the generator
handed in only.

Source: distinct, uniform, skewed and identical after Punica (arXiv 2310.18547, section 7): uniform spreads requests
over the square root of their number, skewed makes each model 1.5 times as popular as the next. power after S-LoRA
(arXiv 2311.03285, section 7): rank = floor(n * u^(1/alpha)), u uniform; a smaller alpha is more skewed.
"""

import math
import random
from dataclasses import dataclass
from itertools import accumulate, pairwise

from loadtest.tables import Table

KINDS = ("distinct", "identical", "power", "skewed", "uniform", "zipf")
SKEW = 1.5


@dataclass(frozen=True, slots=True)
class Popularity:
    """One law over `count` adapters; `exponent` is Zipf's s, the factor of skewed or the alpha of power."""

    kind: str
    count: int
    exponent: float = 1.0
    # share of requests that go to the base model alone
    base_share: float = 0.0

    def weights(self, num_requests: int) -> list[float]:
        """Return the probability of each rank.

        Notes: distinct has no probabilities, it takes the adapters in turn; what it comes to is returned.
        """
        ranks = range(self.count)
        if self.kind == "identical":
            raw = [float(rank == 0) for rank in ranks]
        elif self.kind == "uniform":
            used = min(self.count, math.ceil(math.sqrt(num_requests)))
            raw = [float(rank < used) for rank in ranks]
        elif self.kind == "zipf":
            raw = [(rank + 1.0) ** -self.exponent for rank in ranks]
        elif self.kind == "skewed":
            raw = [self.exponent ** -float(rank) for rank in ranks]
        elif self.kind == "power":
            edges = [(rank / self.count) ** self.exponent for rank in range(self.count + 1)]
            raw = [after - before for before, after in pairwise(edges)]
        else:
            raw = [float(rank < num_requests) for rank in ranks]
        total = sum(raw)
        return [weight / total for weight in raw]


def read_popularity(table: Table) -> Popularity:
    """Read a scenario's `[adapters]`; without the table every request goes to the base."""
    count = table.whole("count", 0, high=1_000_000)
    kind = table.text("popularity", "identical", among=KINDS)
    default = {"zipf": 1.0, "skewed": SKEW, "power": 1.0}.get(kind)
    exponent = 1.0
    if default is not None:
        low = 1.0 if kind == "skewed" else 1e-3
        exponent = table.number("exponent", default, low=low, high=100.0)
    base_share = table.number("base_share", 0.0, high=1.0)
    table.close()
    return Popularity(kind, count, exponent, base_share)


def draw_adapters(law: Popularity, num_requests: int, rng: random.Random) -> list[int | None]:
    """Return the rank of each request's adapter; None: the base."""
    if law.count == 0:
        return [None] * num_requests
    if law.kind == "distinct":
        ranks = [index % law.count for index in range(num_requests)]
    else:
        cumulative = list(accumulate(law.weights(num_requests)))
        ranks = rng.choices(range(law.count), cum_weights=cumulative, k=num_requests)
    if law.base_share == 0.0:
        return list(ranks)
    return [None if rng.random() < law.base_share else rank for rank in ranks]
