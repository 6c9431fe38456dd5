"""The series of a shared registry: only where one is shared, and nothing guessed."""

from serve.metrics import Metrics
from serve.metrics.registry_page import RegistryFacts


class Clock:
    """Time that moves when told; a page is rendered anew after a while."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 10.0
        return self.now


def series(metrics: Metrics) -> dict[str, float]:
    rows = (line.split(" ") for line in metrics.render().decode().splitlines() if not line.startswith("#"))
    return {row[0]: float(row[-1]) for row in rows if "registry" in row[0] or "redis" in row[0]}


def test_a_server_that_shares_nothing_has_no_series_of_a_registry() -> None:
    assert series(Metrics(clock=Clock())) == {}


def test_what_is_known_is_shown_and_what_is_not_is_absent() -> None:
    facts = [RegistryFacts(change=7, lag=2, seen_s_ago=0.25, is_redis_up=True)]
    metrics = Metrics(clock=Clock())
    metrics.follow_registry(lambda: facts[0])
    assert series(metrics) == {
        "chorale_registry_change": 7,
        "chorale_registry_lag_changes": 2,
        "chorale_registry_seen_seconds": 0.25,
        "chorale_redis_up": 1,
    }
    facts[0] = RegistryFacts(change=8, lag=None, seen_s_ago=1.5, is_redis_up=False)
    assert series(metrics) == {
        "chorale_registry_change": 8,
        "chorale_registry_seen_seconds": 1.5,
        "chorale_redis_up": 0,
    }
