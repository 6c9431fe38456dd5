"""Pages that are rendered ahead, piece by piece; and the histogram that every token passes."""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.messages import AdapterState, Tokens
from serve.metrics import Metrics
from serve.metrics.exposition import Exposition, OrderedRegistry
from serve.metrics.histogram import LoopHistogram
from serve.metrics.page import QUIET_PAGE_S, READY_PAGE_S
from tests.process.test_metrics import FakeClock, stats

BOUNDS = (0.01, 0.5, 1.0, 10.0)


class Turns:
    """An event loop that takes its turns when told."""

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], None]] = deque()

    def __call__(self, work: Callable[[], None]) -> None:
        """Keep work for the next turn."""
        self.waiting.append(work)

    def take_one(self) -> bool:
        """Do what waits now; False if nothing does."""
        for _ in range(len(self.waiting)):
            self.waiting.popleft()()
        return bool(self.waiting)

    def take_all(self) -> int:
        """Go on until nothing waits; return the number of turns."""
        num_turns = 1
        while self.take_one():
            num_turns += 1
        return num_turns


@pytest.fixture
def turns() -> Turns:
    """Return a loop that stands still."""
    return Turns()


def scraped(turns: Turns, clock: FakeClock) -> Metrics:
    """Return metrics with many series that were scraped a moment ago."""
    metrics = Metrics(clock=clock, unix_clock=lambda: 5.0, later=turns)
    for index in range(150):
        metrics.name_adapter(f"{index:064d}", f"adapter-{index}")
        metrics.open_request(f"{index:064d}").close("stop")
    metrics.observe_stats(stats(adapters=[AdapterState(f"{index:064d}", "device", 0, 1, 8) for index in range(150)]))
    metrics.render()
    clock.now += 0.1
    return metrics


def test_a_page_in_pieces_is_the_client_librarys(turns: Turns) -> None:
    metrics = scraped(turns, FakeClock())
    metrics.open_request().saw(Tokens("r", [1]))
    metrics.observe_stats(stats(num_running=3))
    before = metrics.render()
    assert turns.take_all() > 3
    assert metrics.render() == generate_latest(metrics._registry) != before


def test_a_scrape_between_two_pieces_gets_the_page_before(turns: Turns) -> None:
    metrics = scraped(turns, FakeClock())
    before = metrics.render()
    metrics.observe_stats(stats(num_running=3))
    while turns.take_one():
        assert metrics.render() is before
    assert b"chorale_requests_running 3.0" in metrics.render()


def test_a_scrape_that_cannot_wait_renders_at_once_and_is_not_overtaken_by_older_pieces(turns: Turns) -> None:
    clock = FakeClock()
    metrics = scraped(turns, clock)
    metrics.observe_stats(stats(num_running=3))
    turns.take_one()
    clock.now += 10.0
    metrics.observe_stats(stats(num_running=4))
    page = metrics.render()
    assert b"chorale_requests_running 4.0" in page
    turns.take_all()
    assert metrics.render() is page


def test_a_late_page_is_given_once_more_and_renewed_behind_it(turns: Turns) -> None:
    clock = FakeClock()
    metrics = scraped(turns, clock)
    # a long step: no heartbeat comes
    metrics.count_rejection("queue_full")
    clock.now = READY_PAGE_S + 0.05
    late = metrics.render()
    assert b"queue_full" not in late
    assert metrics.render() is late
    assert turns.take_all() > 3
    assert b'chorale_requests_rejected_total{code="queue_full"} 1.0' in metrics.render()


@pytest.mark.parametrize("has_begun", [False, True])
def test_no_page_is_older_than_half_a_second(has_begun: bool, turns: Turns) -> None:
    clock = FakeClock()
    metrics = scraped(turns, clock)
    metrics.count_rejection("queue_full")
    if has_begun:
        clock.now = READY_PAGE_S
        metrics.render()
    clock.now = QUIET_PAGE_S
    page = metrics.render()
    assert b'chorale_requests_rejected_total{code="queue_full"} 1.0' in page
    turns.take_all()
    assert metrics.render() is page


def test_what_is_counted_while_a_page_is_written_is_on_the_next_one(turns: Turns) -> None:
    clock = FakeClock()
    metrics = scraped(turns, clock)
    metrics.observe_stats(stats(num_running=3))
    turns.take_one()
    metrics.count_rejection("queue_full")
    turns.take_all()
    clock.now += 0.25
    assert b'chorale_requests_rejected_total{code="queue_full"} 1.0' in metrics.render()


class _Broken(Collector):
    def __init__(self) -> None:
        self.is_broken = False

    def collect(self) -> Iterator[Metric]:
        if self.is_broken:
            raise RuntimeError("no facts")
        yield GaugeMetricFamily("facts", "Facts.", value=1)


def test_a_page_that_fails_on_the_way_does_not_end_those_after_it(turns: Turns) -> None:
    clock, broken = FakeClock(), _Broken()
    metrics = scraped(turns, clock)
    metrics._registry.register(broken)
    broken.is_broken = True
    metrics.observe_stats(stats(num_running=3))
    with pytest.raises(RuntimeError, match="no facts"):
        turns.take_all()
    broken.is_broken = False
    metrics.observe_stats(stats(num_running=4))
    turns.take_all()
    page = metrics.render()
    assert b"chorale_requests_running 4.0" in page and b"facts 1.0" in page


def test_no_piece_is_long() -> None:
    registry = OrderedRegistry()
    labelled = GaugeMetricFamily("g", "Many.", labels=["x"])
    for index in range(1000):
        labelled.add_metric([str(index)], index)

    class Many(Collector):
        def collect(self) -> Iterator[Metric]:
            yield labelled

    registry.register(Many())
    pieces = list(Exposition().pieces(registry.collectors))
    assert max(piece.count("\n") for piece in pieces) <= 52
    assert "".join(pieces).encode() == generate_latest(registry)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.sampled_from(BOUNDS), st.floats(0, 1e12), st.just(0.0)), max_size=20))
def test_the_histogram_is_the_client_librarys(amounts: list[float]) -> None:
    ours, theirs = OrderedRegistry(), CollectorRegistry()
    histogram = LoopHistogram("h_seconds", "Of\nours.", buckets=BOUNDS, registry=ours)
    reference = Histogram("h_seconds", "Of\nours.", buckets=BOUNDS, registry=theirs)
    pages = []
    for amount in [None, *amounts]:
        if amount is not None:
            histogram.observe(amount)
            reference.observe(amount)
        pages.append(histogram.text())
        assert pages[-1].encode() == generate_latest(ours) == generate_latest(theirs)
    assert all(before != after for before, after in pairwise(pages)), "each observation is seen"
