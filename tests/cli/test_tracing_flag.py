"""`--otel-endpoint`: where it comes from, which URLs it takes, and what is said where the SDK is missing."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve.cli import serve_command
from serve.cli.app import app
from serve.cli.tracing_extra import open_traces
from serve.config import ServeConfig
from serve.errors import StartError
from tests.tiny_model import write_tiny_model

URL = "http://collector:4318"


def test_the_flag_beats_our_variable_and_ours_the_standard_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[ServeConfig] = []
    monkeypatch.setattr(serve_command, "run_server", lambda config, **_: started.append(config))
    monkeypatch.setattr(serve_command, "start_logging", lambda level: None)
    write_tiny_model(tmp_path / "model")
    command = ["serve", "--model", str(tmp_path / "model"), "--store", str(tmp_path / "store")]
    standard = {"OTEL_EXPORTER_OTLP_ENDPOINT": URL, "CHORALE_OTEL_ENDPOINT": ""}
    ours = {**standard, "CHORALE_OTEL_ENDPOINT": "http://ours"}
    off = {"OTEL_EXPORTER_OTLP_ENDPOINT": "", "CHORALE_OTEL_ENDPOINT": ""}
    for flags, environment in (([], off), ([], standard), ([], ours), (["--otel-endpoint", "http://flag"], ours)):
        assert CliRunner().invoke(app, [*command, *flags], env=environment).exit_code == 0
    assert [config.api.otel_endpoint for config in started] == [None, URL, "http://ours", "http://flag"]


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "collector:4318",
        "grpc://collector:4317",
        "http://",
        "http://collector:port",
        "http://collector:0",
        "http://a b",
    ],
)
def test_what_is_no_url_of_a_collector_is_refused_by_name(endpoint: str) -> None:
    with pytest.raises(StartError) as refused:
        open_traces(endpoint)
    assert ascii(endpoint) in str(refused.value) and URL.replace("collector", "HOST") in str(refused.value)


@pytest.mark.parametrize("endpoint", ["http://user:secret@collector", "http://collector?key=secret", "http://c#secret"])
def test_a_url_with_a_secret_is_refused_and_not_shown(endpoint: str) -> None:
    with pytest.raises(StartError, match="OTEL_EXPORTER_OTLP_HEADERS") as refused:
        open_traces(endpoint)
    assert "secret" not in str(refused.value)


def test_without_the_sdk_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "serve.api.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(StartError, match=r"chorale\[otel\]"):
        open_traces(URL)


def test_an_endpoint_opens_traces_that_close_with_nothing_to_send() -> None:
    traces = open_traces(URL)
    assert traces is not None
    traces.close()
