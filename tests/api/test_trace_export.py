"""The collector's side of traces: what arrives over OTLP/HTTP, and that a collector which is gone disturbs nobody."""

import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from serve.api.tracing import Tracing
from tests.api.api_server import ApiServer, wait_until
from tests.live_server import REPO_ROOT

WITHOUT_TRACES = """
import sys
import serve.cli.app, serve.api.app
from serve.cli.tracing_extra import open_traces
assert open_traces(None) is None
names = ("opentelemetry.sdk", "opentelemetry.exporter", "serve.api.tracing", "serve.api.request_spans")
print([name for name in sys.modules if name.startswith(names)])
"""


class Collector(ThreadingHTTPServer):
    """Keeps what was posted to it as (path, message)."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, ExportTraceServiceRequest]] = []
        super().__init__(("127.0.0.1", 0), _Taking)


class _Taking(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert isinstance(self.server, Collector)
        self.server.taken.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def sending_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith(("OtelBatch", "flush-traces"))}


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield collector, f"http://127.0.0.1:{collector.server_address[1]}"
        finally:
            collector.shutdown()
            thread.join()


@pytest.mark.parametrize("suffix", ["", "/", "/v1/traces"])
def test_what_is_left_is_sent_when_the_server_ends(
    model_dir: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # only the end sends
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    with collecting() as (collector, url):
        api = ApiServer(model_dir, traces=Tracing.to_collector(url + suffix, flush_s=60))
        assert api.complete("Hi", model="poet").status_code == 200
        assert not collector.taken
        api.stop()
    ((path, message),) = collector.taken
    assert path == "/v1/traces"
    (resource_spans,) = message.resource_spans
    resource = {entry.key: entry.value.string_value for entry in resource_spans.resource.attributes}
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("chorale", "test")
    names = [span.name for scope_spans in resource_spans.scope_spans for span in scope_spans.spans]
    assert names == ["queue", "adapter.load", "prefill", "decode", "text_completion poet"]


def test_a_service_name_from_the_environment_wins(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "poets")
    with collecting() as (collector, url):
        api = ApiServer(model_dir, traces=Tracing.to_collector(url, flush_s=60))
        api.complete("Hi")
        api.stop()
    attributes = collector.taken[0][1].resource_spans[0].resource.attributes
    assert "poets" in [entry.value.string_value for entry in attributes if entry.key == "service.name"]


def test_a_collector_that_never_answers_disturbs_no_request_and_no_end(
    model_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sending_threads()
    # every span is sent at once, to somebody who takes the connection and says nothing
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "2")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        api = ApiServer(model_dir, traces=Tracing.to_collector(url, flush_s=0.05))
        with caplog.at_level(logging.WARNING, "chorale.api"):
            assert [api.complete("Hi").status_code for _ in range(5)] == [200] * 5
            api.stop()
        assert "the last spans" in caplog.text
    wait_until(lambda: not sending_threads() - before, "nothing is sent any more")


def test_a_server_without_traces_imports_nothing_of_them() -> None:
    command = [sys.executable, "-c", WITHOUT_TRACES]
    path = {"PYTHONPATH": f"{REPO_ROOT}:{REPO_ROOT / 'kernels'}"}
    done = subprocess.run(command, cwd=REPO_ROOT, env=path, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
