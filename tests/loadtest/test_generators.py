"""What plans are drawn from, against the laws' own distributions: Kolmogorov-Smirnov and chi-square, fixed seeds.

A test that cannot tell a law from its neighbour proves nothing: each statistic is also shown to reject one.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import NormalDist

import pytest

from loadtest.arrivals import Arrivals, draw_times
from loadtest.lengths import Lengths
from loadtest.popularity import Popularity, draw_adapters
from loadtest.prompts import PromptPlan, prompt_ids, read_request_shape
from loadtest.tables import Table

COUNT = 20_000
Cdf = Callable[[float], float]


def ks_distance(values: Sequence[float], cdf: Cdf) -> float:
    """Return the greatest distance between the values' own distribution and a law's, times the root of their number."""
    ordered = sorted(values)
    count = len(ordered)
    steps = ((rank, cdf(value)) for rank, value in enumerate(ordered))
    return math.sqrt(count) * max(max(at - rank / count, (rank + 1) / count - at) for rank, at in steps)


# exceeded by one sample in a thousand of the right law (Kolmogorov's distribution)
KS_LIMIT = 1.95


def chi_square_excess(counts: Sequence[int], weights: Sequence[float]) -> float:
    """Return chi-square in standard normal units (Wilson and Hilferty), cells of under 5 expected put together."""
    total, scale = sum(counts), sum(weights)
    cells: list[list[float]] = [[0.0, 0.0]]
    for count, weight in zip(counts, weights, strict=True):
        if cells[-1][1] >= 5.0:
            cells.append([0.0, 0.0])
        cells[-1][0] += count
        cells[-1][1] += total * weight / scale
    if cells[-1][1] < 5.0 and len(cells) > 1:
        last = cells.pop()
        cells[-1] = [cells[-1][0] + last[0], cells[-1][1] + last[1]]
    statistic = math.fsum((seen - expected) ** 2 / expected for seen, expected in cells)
    degrees = len(cells) - 1
    spread = 2.0 / (9.0 * degrees)
    return float(((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))


CHI_LIMIT = 3.1


def erlang(shape: int, rate: float) -> Cdf:
    """Return the distribution of a sum of `shape` exponential gaps."""
    return lambda x: 1.0 - math.exp(-rate * x) * math.fsum((rate * x) ** k / math.factorial(k) for k in range(shape))


def gaps(law: Arrivals, seed: int = 1) -> list[float]:
    """Draw arrivals and return the times between them."""
    times = draw_times(law, COUNT, None, random.Random(seed))
    return [after - before for before, after in zip([0.0, *times], times, strict=False)]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_poisson_gaps_are_exponential(seed: int) -> None:
    drawn = gaps(Arrivals("poisson", rate=4.0), seed)
    assert ks_distance(drawn, erlang(1, 4.0)) < KS_LIMIT
    assert ks_distance(drawn, erlang(1, 4.3)) > KS_LIMIT


@pytest.mark.parametrize(("cv", "shape"), [(1.0, 1), (0.5, 4), (1 / 3, 9)])
def test_gamma_gaps_have_their_shape(cv: float, shape: int) -> None:
    drawn = gaps(Arrivals("gamma", rate=4.0, cv=cv))
    assert ks_distance(drawn, erlang(shape, 4.0 * shape)) < KS_LIMIT
    assert ks_distance(drawn, erlang(shape + 1, 4.0 * (shape + 1))) > KS_LIMIT


@pytest.mark.parametrize("cv", [2.0, 4.0])
def test_bursty_arrivals_keep_their_rate_and_have_their_variation(cv: float) -> None:
    drawn = gaps(Arrivals("gamma", rate=4.0, cv=cv))
    mean = math.fsum(drawn) / COUNT
    deviation = math.sqrt(math.fsum((gap - mean) ** 2 for gap in drawn) / COUNT)
    assert mean == pytest.approx(0.25, rel=5 * cv / math.sqrt(COUNT))
    assert deviation / mean == pytest.approx(cv, rel=0.12)


def test_arrivals_end_with_the_number_or_the_time_whichever_comes_first() -> None:
    law = Arrivals("poisson", rate=10.0)
    by_number = draw_times(law, 50, None, random.Random(1))
    by_time = draw_times(law, None, 3.0, random.Random(1))
    assert len(by_number) == 50 and by_number == sorted(by_number)
    assert by_time == [time for time in by_number if time < 3.0] and 10 < len(by_time) < 50
    assert draw_times(law, 5, 3.0, random.Random(1)) == by_number[:5]


def test_lengths_follow_their_laws() -> None:
    rng = random.Random(2)
    uniform = Counter(Lengths("uniform", 8, 71).draw(rng) for _ in range(COUNT))
    assert set(uniform) == set(range(8, 72))
    assert chi_square_excess([uniform[length] for length in range(8, 72)], [1.0] * 64) < CHI_LIMIT
    choice = Lengths("choice", 4, 64, values=(4, 16, 64), weights=(1.0, 2.0, 5.0))
    chosen = Counter(choice.draw(rng) for _ in range(COUNT))
    assert chi_square_excess([chosen[value] for value in choice.values], choice.weights) < CHI_LIMIT
    assert chi_square_excess([chosen[value] for value in choice.values], [1.0, 2.0, 5.5]) > CHI_LIMIT
    assert {Lengths("fixed", 7, 7).draw(rng) for _ in range(10)} == {7}


@pytest.mark.parametrize("kind", ["normal", "lognormal"])
def test_bell_shaped_lengths_are_cut_off_not_piled_up_at_their_bounds(kind: str) -> None:
    spread = 20.0 if kind == "normal" else 0.3
    law = Lengths(kind, 60, 160, centre=100.0, spread=spread)
    rng = random.Random(3)
    drawn = Counter(law.draw(rng) for _ in range(COUNT))
    bell = NormalDist(100.0, spread) if kind == "normal" else NormalDist(math.log(100.0), spread)

    def share(length: int) -> float:
        edges = (length - 0.5, length + 0.5) if kind == "normal" else (math.log(length - 0.5), math.log(length + 0.5))
        return bell.cdf(edges[1]) - bell.cdf(edges[0])

    lengths = range(60, 161)
    assert set(drawn) <= set(lengths)
    assert chi_square_excess([drawn[length] for length in lengths], [share(length) for length in lengths]) < CHI_LIMIT


LAWS = {
    "zipf": Popularity("zipf", 50, 1.0),
    "zipf-1.5": Popularity("zipf", 50, 1.5),
    "skewed": Popularity("skewed", 50, 1.5),
    "power": Popularity("power", 50, 0.3),
    "uniform": Popularity("uniform", 500),
}


def expected_share(name: str, rank: int) -> float:
    """Return a rank's weight by the papers' formulas, written down a second time."""
    formulas: dict[str, Callable[[int], float]] = {
        "zipf": lambda i: 1.0 / (i + 1),
        "zipf-1.5": lambda i: 1.0 / (i + 1) ** 1.5,
        "skewed": lambda i: float(1.5 ** (50 - i)),
        "power": lambda i: ((i + 1) / 50) ** 0.3 - (i / 50) ** 0.3,
        "uniform": lambda i: 1.0 if i < math.isqrt(COUNT - 1) + 1 else 0.0,
    }
    return formulas[name](rank)


@pytest.mark.parametrize("name", LAWS)
def test_popularity_follows_its_law(name: str) -> None:
    law = LAWS[name]
    counts = Counter(draw_adapters(law, COUNT, random.Random(4)))
    ranks = range(law.count)
    shares = [expected_share(name, rank) for rank in ranks]
    seen = [counts[rank] for rank in ranks]
    assert sum(seen) == COUNT
    assert all(count == 0 for count, share in zip(seen, shares, strict=True) if share == 0.0)
    within = [place for place, share in enumerate(shares) if share > 0.0]
    assert chi_square_excess([seen[place] for place in within], [shares[place] for place in within]) < CHI_LIMIT
    neighbour = [shares[place] * 1.03**place for place in within]
    assert chi_square_excess([seen[place] for place in within], neighbour) > CHI_LIMIT


def test_distinct_takes_adapters_in_turn_and_identical_takes_one() -> None:
    rng = random.Random(5)
    assert draw_adapters(Popularity("distinct", 4), 10, rng) == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert set(draw_adapters(Popularity("identical", 4), 10, rng)) == {0}
    assert draw_adapters(Popularity("zipf", 0), 3, rng) == [None, None, None]


def test_the_bases_share_is_kept() -> None:
    drawn = draw_adapters(Popularity("zipf", 8, 1.0, base_share=0.25), COUNT, random.Random(6))
    share = sum(rank is None for rank in drawn) / COUNT
    assert share == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / COUNT))


def test_prompts_are_long_as_planned_and_share_only_what_is_planned() -> None:
    shape = read_request_shape(Table("request", {"first_id": 10, "last_id": 40, "prefix_tokens": 6}))
    first, second = (prompt_ids(shape, PromptPlan(1, index, 50)) for index in (0, 1))
    assert len(first) == len(second) == 50 and set(first + second) <= set(range(10, 41))
    assert first[:6] == second[:6] and first[6:] != second[6:]
    assert first == prompt_ids(shape, PromptPlan(1, 0, 50)) != prompt_ids(shape, PromptPlan(2, 0, 50))
    plain = read_request_shape(Table("request", {}))
    left, right = (prompt_ids(plain, PromptPlan(1, i, 70, blocks, 20)) for i, blocks in ((0, (7, 8)), (1, (7, 9))))
    assert left[:20] == right[:20] and left[20:40] != right[20:40]
    # a block that no longer fits is not begun
    assert prompt_ids(plain, PromptPlan(1, 0, 30, (7, 8), 20))[:20] == left[:20]
    counts = Counter(prompt_ids(plain, PromptPlan(1, 0, COUNT)))
    ids = range(16, 256)
    assert set(counts) == set(ids)
    assert chi_square_excess([counts[token_id] for token_id in ids], [1.0] * 240) < CHI_LIMIT
