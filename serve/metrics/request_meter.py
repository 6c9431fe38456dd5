"""The times and counts of single requests: the histograms, and the meter that feeds them.

Owns what is observed per request. Invariant: no histogram has an adapter's name on it.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter

from serve.messages import Embedded, Finished, Started, Tokens
from serve.metrics.adapter_usage import AdapterNames, AdapterUsage
from serve.metrics.histogram import LoopHistogram
from serve.metrics.names import REQUEST_BUCKETS, TOKEN_BUCKETS, TTFT_BUCKETS

_SECONDS = (
    ("ttft", "chorale_time_to_first_token_seconds", TTFT_BUCKETS),
    ("itl", "chorale_inter_token_latency_seconds", TOKEN_BUCKETS),
    ("tpot", "chorale_time_per_output_token_seconds", TOKEN_BUCKETS),
    ("e2e", "chorale_e2e_request_latency_seconds", REQUEST_BUCKETS),
    ("queue", "chorale_request_queue_time_seconds", REQUEST_BUCKETS),
    ("prefill", "chorale_request_prefill_time_seconds", REQUEST_BUCKETS),
    ("decode", "chorale_request_decode_time_seconds", REQUEST_BUCKETS),
)


class RequestInstruments:
    """Where the meters of all requests write to."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float]) -> None:
        self.clock = clock
        # a meter has written since the page was rendered
        self.has_changed = False
        self.usage = AdapterUsage()
        self.names = AdapterNames(clock)
        self.seconds = {
            key: LoopHistogram(name, f"Seconds: {key}.", buckets=buckets, registry=registry)
            for key, name, buckets in _SECONDS
        }
        # of every token
        self.itl = self.seconds["itl"]
        self.finished = Counter(
            "chorale_requests_finished", "Ended sequences by reason.", ["reason"], registry=registry
        )


class RequestMeter:
    """The times of one sequence; `close` may be called more than once, the first reason counts."""

    def __init__(self, instruments: RequestInstruments, adapter_digests: tuple[str, ...]) -> None:
        self._to = instruments
        self._adapter_digests = adapter_digests
        self._opened_at = instruments.clock()
        self._queue_s = 0.0
        self._first_token_at: float | None = None
        self._last_token_at = 0.0
        self._num_tokens = 0
        self._is_closed = False

    def saw(self, event: Started | Tokens | Embedded | Finished) -> None:
        """Take one event of the sequence as it arrives from the engine."""
        self._to.has_changed = True
        if isinstance(event, Tokens):
            self._saw_tokens(len(event.token_ids), self._to.clock())
        elif isinstance(event, Started):
            self._queue_s = event.queue_s
            self._to.seconds["queue"].observe(event.queue_s)
        else:
            self.close(str(event.reason) if isinstance(event, Finished) else "embed")

    def close(self, reason: str) -> None:
        """Count the end: "stop", "length", "error", or "abort" for a reader that left (client gone, stop string)."""
        if self._is_closed:
            return
        self._is_closed = self._to.has_changed = True
        now = self._to.clock()
        self._to.finished.labels(reason).inc()
        self._to.seconds["e2e"].observe(now - self._opened_at)
        if self._first_token_at is not None:
            decode_s = self._last_token_at - self._first_token_at
            self._to.seconds["decode"].observe(decode_s)
            if self._num_tokens > 1:
                self._to.seconds["tpot"].observe(decode_s / (self._num_tokens - 1))
        for digest in self._adapter_digests:
            name = self._to.names.get(digest)
            self._to.usage.add(name, num_requests=1, num_tokens=self._num_tokens)

    def _saw_tokens(self, num_tokens: int, now: float) -> None:
        if self._first_token_at is None:
            self._first_token_at = now
            ttft_s = now - self._opened_at
            self._to.seconds["ttft"].observe(ttft_s)
            self._to.seconds["prefill"].observe(max(0.0, ttft_s - self._queue_s))
        else:
            self._to.itl.observe(now - self._last_token_at)
        self._last_token_at = now
        self._num_tokens += num_tokens
