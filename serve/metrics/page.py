"""The metrics page: what feeds it, and its text.

Fed by the engine's heartbeats (`Stats`) and by the life of each request; asks nothing of the engine when scraped.
Rendered at most every `RENDER_S`, with the heartbeat while somebody scrapes, in pieces between which the event loop
does other work: a scrape then finds its page ready, and where nothing changed since, it stays good for longer. Where a
long step keeps the heartbeat back, a scrape has the next page begun and takes the last one, unless that is too old.
Invariants: no label comes from a client unbounded (adapters: the most recent 200 and
`_other`; none on a histogram); counters never fall, also when the engine restarts; gauges are 0 at rest.
"""

import time
from collections.abc import Callable, Iterator

from prometheus_client import Counter, Histogram, disable_created_metrics

from serve.messages import Stats
from serve.metrics.engine_page import EngineCollector
from serve.metrics.engine_view import EngineView
from serve.metrics.exposition import Exposition, OrderedRegistry
from serve.metrics.histogram import LoopHistogram
from serve.metrics.names import STEP_ADAPTER_BUCKETS, TTFT_BUCKETS
from serve.metrics.registry_page import RegistryCollector, RegistryFacts
from serve.metrics.request_meter import RequestInstruments, RequestMeter
from serve.metrics.training_page import TrainingCollector, TrainingSummary
from serve.metrics.vllm_aliases import VllmCollector

RENDER_S = 0.1
# how old a page that was rendered with a heartbeat may be when it is sent; under load they come every 0.1 s
READY_PAGE_S = 0.2
# and how old one may be since which nothing was counted here; what others tell when asked is in it, and the time
QUIET_PAGE_S = 0.5
# of a piece of a page that is rendered ahead: some fifty lines, a tenth of a millisecond
_PIECE_CHARS = 3000
# without a scrape for so long, heartbeats render nothing
SCRAPED_S = 5.0


class Metrics:
    """The registry and everything in it; created once in the composition root. Event loop only."""

    def __init__(
        self,
        *,
        max_adapters: int = 0,
        compat_vllm: bool = True,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
        later: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        """Prepare.

        Args:
            later: has the event loop call something in its next turn; None: every page is rendered at once.
        """
        self._clock = clock
        self._later = later
        self._exposition = Exposition()
        self._rendered = b""
        # the page under way: what is written of it, and what comes next; None: none is
        self._written: list[str] = []
        self._next_pieces: Iterator[str] | None = None
        self._render_at = self._scraped_at = self._prepared_at = float("-inf")
        self._max_age_s = RENDER_S
        self._has_changed = False
        # `_created` would double the series of a page that is read twenty times a second
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = OrderedRegistry()
        self._view = EngineView()
        self._requests = RequestInstruments(registry, clock)
        text = "Seconds of an adapter's load from one tier to another."
        self._load_s = Histogram(
            "chorale_adapter_load_seconds", text, ["source", "target"], buckets=TTFT_BUCKETS, registry=registry
        )
        self._vllm_load_s: LoopHistogram | None = None
        self._step_adapters = LoopHistogram(
            "chorale_step_adapters",
            "Distinct adapters that acted in a step.",
            buckets=STEP_ADAPTER_BUCKETS,
            registry=registry,
        )
        self._rejected = Counter("chorale_requests_rejected", "Refusals by error code.", ["code"], registry=registry)
        self._stand_ins = Counter(
            "chorale_cold_start_base",
            "Requests that the base answered for cold adapters.",
            registry=registry,
        )
        self._restarts = Counter("chorale_engine_restarts", "Engine processes lost.", registry=registry)
        registry.register(EngineCollector(self._view, self._requests.usage))
        self._training = TrainingCollector()
        registry.register(self._training)
        if compat_vllm:
            self._vllm_load_s = LoopHistogram(
                "vllm:lora_adapter_load_seconds", text, buckets=TTFT_BUCKETS, registry=registry
            )
            registry.register(VllmCollector(self._view, self._requests.names, max_adapters, unix_clock))

    def follow_registry(self, facts: Callable[[], RegistryFacts]) -> None:
        """Show what this replica knows of the registry that it shares; called once, if it shares one."""
        self._registry.register(RegistryCollector(facts))

    def name_adapter(self, digest: str, name: str) -> None:
        """Remember under which name an adapter's series appear."""
        self._requests.names.set(digest, name)

    def observe_stats(self, stats: Stats) -> None:
        """Take one heartbeat."""
        self._has_changed = True
        self._view.take(stats)
        for move in stats.adapter_moves:
            if move.kind == "load":
                self._load_s.labels(move.source, move.tier).observe(move.seconds)
                # vLLM's is the way to the device
                if move.tier == "device" and self._vllm_load_s is not None:
                    self._vllm_load_s.observe(move.seconds)
        for num_adapters in stats.step_adapters:
            self._step_adapters.observe(num_adapters)
        now = self._clock()
        if now - self._scraped_at < SCRAPED_S and now - self._render_at >= RENDER_S:
            self._prepare(now)

    def engine_lost(self) -> None:
        """Note that the engine process is gone: nothing runs, nothing is resident."""
        self._has_changed = True
        self._view.stats = None
        self._restarts.inc()

    def observe_training(self, summary: TrainingSummary) -> None:
        """Take what the training jobs do."""
        self._has_changed = True
        self._training.summary = summary

    def count_rejection(self, code: str) -> None:
        """Count a request that was refused before any work; `code` is one of our own error codes."""
        self._has_changed = True
        self._rejected.labels(code).inc()

    def count_stand_in(self) -> None:
        """Count a request that the base answers, as its client asked, because its adapters are not on the device."""
        self._has_changed = True
        self._stand_ins.inc()

    def open_request(self, *adapter_digests: str) -> RequestMeter:
        """Start to measure one sequence; a composition counts for each of its adapters."""
        for digest in adapter_digests:
            self._requests.names.use(digest)
        return RequestMeter(self._requests, adapter_digests)

    def render(self) -> bytes:
        """Return the exposition text, at most `QUIET_PAGE_S` old.

        Where something was counted since, a page older than `READY_PAGE_S` is given once more and renewed behind it.
        """
        self._scraped_at = now = self._clock()
        max_age_s = self._max_age_s if self._has_changed or self._requests.has_changed else QUIET_PAGE_S
        age_s = now - self._render_at
        if age_s >= QUIET_PAGE_S or (age_s >= max_age_s and self._later is None):
            self._render(now, max_age_s=RENDER_S)
        elif age_s >= max_age_s:
            self._prepare(now)
        return self._rendered

    def _render(self, now: float, *, max_age_s: float) -> None:
        self._next_pieces = None
        self._rendered = self._exposition.text(self._registry.collectors)
        self._render_at, self._max_age_s = now, max_age_s
        self._has_changed = self._requests.has_changed = False

    def _prepare(self, now: float) -> None:
        """Render a page before it is asked for."""
        if self._later is None:
            self._render(now, max_age_s=READY_PAGE_S)
        elif self._next_pieces is None:
            self._written.clear()
            self._next_pieces = self._exposition.pieces(self._registry.collectors)
            self._prepared_at = now
            # what is counted from now on may not be on the page
            self._has_changed = self._requests.has_changed = False
            self._later(self._render_piece)

    def _render_piece(self) -> None:
        """Write some more of the page under way; a scrape that could not wait for it has taken its place."""
        pieces, self._next_pieces = self._next_pieces, None
        if pieces is None or self._later is None:
            return
        num_chars = 0
        for piece in pieces:
            self._written.append(piece)
            num_chars += len(piece)
            if num_chars >= _PIECE_CHARS:
                self._next_pieces = pieces
                self._later(self._render_piece)
                return
        self._rendered = "".join(self._written).encode()
        self._render_at, self._max_age_s = self._prepared_at, READY_PAGE_S
