"""Where spans go: the OpenTelemetry SDK, its exporter over OTLP/HTTP, and the end of both.

Owns the tracer provider, which is this server's own and never the process's global one. Invariants: a request only
appends to a bounded queue that a thread of the SDK sends from, so nobody waits for a collector, and what does not fit
is dropped; `close` ends within `flush_s` whatever the collector does. Imported only where traces are on: the SDK is an
extra.
"""

import logging
import threading
from importlib.metadata import PackageNotFoundError, version

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from starlette.types import Scope

from serve.api.request_log import RequestRecord
from serve.api.request_spans import write_spans

logger = logging.getLogger("chorale.api")

FLUSH_S = 3.0
_TRACES_PATH = "/v1/traces"


class Tracing:
    """Makes each ended request a trace; a `RequestObserver`."""

    def __init__(
        self, processor: SpanProcessor, exporter: SpanExporter | None = None, *, flush_s: float = FLUSH_S
    ) -> None:
        self._exporter = exporter
        self._flush_s = flush_s
        # `close` does it: at the interpreter's end nobody bounds it
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("chorale")

    @classmethod
    def to_collector(cls, endpoint: str, *, flush_s: float = FLUSH_S) -> "Tracing":
        """Send over OTLP/HTTP to a collector's base URL, as OTEL_EXPORTER_OTLP_ENDPOINT has it.

        What else the SDK reads from OTEL_... (headers, certificates, sampler, queue) holds too.
        """
        url = endpoint.rstrip("/")
        url = url if url.endswith(_TRACES_PATH) else url + _TRACES_PATH
        exporter = OTLPSpanExporter(endpoint=url)
        return cls(BatchSpanProcessor(exporter), exporter, flush_s=flush_s)

    def ended(self, record: RequestRecord, scope: Scope) -> None:
        """Make the spans of a request that has ended, whatever way."""
        write_spans(self._tracer, record, scope)

    def close(self) -> None:
        """Send what is left, within `flush_s`; blocks."""
        # the SDK's own end waits up to half a minute for a collector that does not answer
        thread = threading.Thread(target=self._provider.shutdown, name="flush-traces", daemon=True)
        thread.start()
        thread.join(self._flush_s)
        if thread.is_alive():
            if self._exporter is not None:
                # it tries no more
                self._exporter.shutdown()
            logger.warning(
                "traces: the collector did not take the last spans within %g s; they are lost", self._flush_s
            )


def _resource() -> Resource:
    try:
        release = version("chorale")
    # run from a checkout that was never installed
    except PackageNotFoundError:
        release = "0.0.0"
    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win
    ours = Resource({SERVICE_NAME: "chorale", SERVICE_VERSION: release})
    return Resource.create().merge(ours).merge(OTELResourceDetector().detect())
