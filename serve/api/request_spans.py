"""A request's record as spans: one server span, and below it queue, adapter.load, prefill and decode.

Owns names, attributes and times of the spans, by OpenTelemetry's conventions for HTTP and for generative AI. Made when
the request has ended, from the engine's own timings, so that tracing costs nothing on the way. Invariants: never a word
of a prompt or an answer, nor an error's message, which may quote one; whatever a client spelled is cut.
Conventions: opentelemetry.io/docs/specs/semconv (http/http-spans, gen-ai/gen-ai-spans). Imported only where traces are
on.
"""

import time
from collections.abc import Iterator
from types import MappingProxyType

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

from serve.api.request_log import QUIET_ROUTES, RequestRecord, shown
from serve.tenants.principal import Principal

Attributes = dict[str, str | bool | int | float | list[str]]

_OPERATIONS = MappingProxyType(
    {
        "/v1/chat/completions": "chat",
        "/v1/completions": "text_completion",
        "/v1/embeddings": "embeddings",
    }
)
_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
_PARENT_HEADERS = ("traceparent", "tracestate")


def write_spans(tracer: Tracer, record: RequestRecord, scope: Scope) -> None:
    """Start and end all spans of a request that has ended now."""
    route = getattr(scope.get("route"), "path", None)
    if route in QUIET_ROUTES and record.status < 400:
        return
    now_s = record.clock()
    # spans carry unix nanoseconds; within a request the monotonic clock alone says how far apart things were
    unix_ns = time.time_ns()

    def at(seconds: float) -> int:
        return unix_ns + round((seconds - now_s) * 1e9)

    attributes = _http_attributes(record, scope, route) | _model_attributes(record, route)
    span = tracer.start_span(
        _span_name(record, attributes),
        context=parent_context(scope),
        kind=SpanKind.SERVER,
        attributes=attributes,
        start_time=at(record.begin_s),
    )
    _set_status(span, record)
    inside = set_span_in_context(span, Context())
    for name, begin_s, end_s, facts in _parts(record):
        tracer.start_span(name, context=inside, attributes=facts, start_time=at(begin_s)).end(at(end_s))
    span.end(at(now_s))


def parent_context(scope: Scope) -> Context:
    """Return the caller's span by W3C Trace Context; a header that is malformed, or there twice, counts as absent."""
    carrier: dict[str, str] = {}
    for wanted in _PARENT_HEADERS:
        values = [value.decode("latin-1") for name, value in scope["headers"] if name == wanted.encode()]
        if wanted == "tracestate" and values:
            carrier[wanted] = ",".join(values)
        elif len(values) == 1:
            carrier[wanted] = values[0]
    return TraceContextTextMapPropagator().extract(carrier, Context())


def _span_name(record: RequestRecord, attributes: Attributes) -> str:
    """Name a span so that there are few names: a model that nobody has is in none."""
    operation = attributes.get("gen_ai.operation.name")
    if operation is not None and record.handed_over_s is not None and record.model is not None:
        return f"{operation} {shown(record.model)}"
    method = str(attributes["http.request.method"])
    return " ".join(
        str(part) for part in (method if method in _METHODS else "HTTP", attributes.get("http.route")) if part
    )


def _http_attributes(record: RequestRecord, scope: Scope, route: str | None) -> Attributes:
    method = str(scope["method"])
    principal: Principal | None = scope["state"].get("principal")
    found: Attributes = {
        "http.request.method": method if method in _METHODS else "_OTHER",
        "chorale.request.id": record.request_id,
        "chorale.request.is_complete": record.has_ended,
    }
    if route is not None:
        found["http.route"] = route
    if record.has_begun:
        found["http.response.status_code"] = record.status
    if principal is not None:
        found["chorale.tenant"] = principal.tenant
    if (error := _error_type(record)) is not None:
        found["error.type"] = error
    return found


def _model_attributes(record: RequestRecord, route: str | None) -> Attributes:
    operation = _OPERATIONS.get(route or "")
    if operation is None:
        return {}
    found: Attributes = {"gen_ai.operation.name": operation, "gen_ai.provider.name": "chorale"}
    if record.model is not None:
        found["gen_ai.request.model"] = shown(record.model)
    # from here on the engine had it
    if record.handed_over_s is None or record.model is None:
        return found
    found["gen_ai.response.model"] = shown(record.model)
    found["gen_ai.usage.input_tokens"] = record.num_prompt_tokens or 0
    found["gen_ai.usage.output_tokens"] = record.num_output_tokens
    found["gen_ai.usage.cache_read.input_tokens"] = record.num_cached_tokens
    if record.finish_reasons:
        found["gen_ai.response.finish_reasons"] = [reason for _, reason in sorted(record.finish_reasons.items())]
    if record.digests:
        found["chorale.adapter.names"] = list(record.adapters)
        found["chorale.adapter.digests"] = [f"sha256:{digest}" for digest in record.digests]
    return found


def _error_type(record: RequestRecord) -> str | None:
    if record.error_code is not None:
        return shown(record.error_code)
    if record.has_begun and record.status >= 400:
        return str(record.status)
    return None if record.has_ended else "client_disconnected"


def _set_status(span: Span, record: RequestRecord) -> None:
    """Mark what we failed at; a refusal (4xx) and a client that left are no failures of the server, as HTTP has it."""
    has_failed = record.error_code is not None if record.status < 400 else record.status >= 500
    if has_failed:
        span.set_status(Status(StatusCode.ERROR, _error_type(record)))


def _parts(record: RequestRecord) -> Iterator[tuple[str, float, float, Attributes]]:
    """Yield name, begin, end and attributes of each child; of several sequences the one that began last speaks."""
    started, begin_s = record.slowest, record.handed_over_s
    if started is None or begin_s is None:
        return
    load_s = begin_s + started.queue_s
    prefill_s = load_s + started.adapter_load_s
    yield "queue", begin_s, load_s, {}
    if record.digests:
        facts: Attributes = {
            "chorale.adapter.digests": [f"sha256:{digest}" for digest in record.digests],
            "chorale.adapter.fetch_s": started.adapter_fetch_s,
            "chorale.adapter.move_s": started.adapter_move_s,
        }
        yield "adapter.load", load_s, prefill_s, facts
    tokens: Attributes = {
        "gen_ai.usage.input_tokens": record.num_prompt_tokens or 0,
        "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
    }
    yield "prefill", prefill_s, prefill_s + started.prefill_s, tokens
    if record.first_token_s is not None and record.last_token_s is not None:
        written: Attributes = {"gen_ai.usage.output_tokens": record.num_output_tokens}
        yield "decode", record.first_token_s, record.last_token_s, written
