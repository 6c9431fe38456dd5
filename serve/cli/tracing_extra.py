"""The flag that sends traces, and the way to what needs the OpenTelemetry SDK, which is an extra.

Owns the flag, its check, and the message when the SDK is missing. Invariant: importing this, and a server without the
flag, imports neither the SDK nor its exporter.
"""

from typing import Annotated
from urllib.parse import urlsplit

import typer

from serve.api.request_log import RequestObserver
from serve.errors import StartError

OtelEndpoint = Annotated[
    str | None,
    typer.Option(
        "--otel-endpoint",
        envvar=["CHORALE_OTEL_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"],
        help="OpenTelemetry collector that takes a trace of each request over OTLP/HTTP: http://HOST:4318",
    ),
]


def open_traces(endpoint: str | None) -> RequestObserver | None:
    """Return what makes requests traces; None without an endpoint.

    Raises:
        StartError: no base URL of a collector, or the SDK is not installed.
    """
    if endpoint is None:
        return None
    _check(endpoint)
    try:
        from serve.api.tracing import Tracing  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise StartError(
            "--otel-endpoint needs the OpenTelemetry SDK: pip install 'chorale[otel]', or unset CHORALE_OTEL_ENDPOINT "
            "and OTEL_EXPORTER_OTLP_ENDPOINT"
        ) from error
    return Tracing.to_collector(endpoint)


def _check(endpoint: str) -> None:
    try:
        parts = urlsplit(endpoint)
        is_url = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url or not endpoint.isprintable() or " " in endpoint:
        raise StartError(f"--otel-endpoint {ascii(endpoint)[:80]}: give the collector's URL, as http://HOST:4318")
    if parts.username is not None or parts.query or parts.fragment:
        # not shown: it may hold a secret
        raise StartError(
            "--otel-endpoint: the URL must have no user, query or fragment; credentials go into "
            "OTEL_EXPORTER_OTLP_HEADERS"
        )
