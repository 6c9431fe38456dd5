"""Traces: what the spans of a request say, whose children they are, and that they hold no word of prompt or answer.

The SDK's own exporter in memory is at the end of the real application; the collector's side is in
`test_trace_export.py`.
"""

import json
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from serve.api.tracing import Tracing
from serve.errors import EngineFailed
from serve.messages import Finished, Started, Submit, Tokens
from tests.api.api_server import ApiServer, wait_until
from tests.api.fake_store import BASE

CANARY = "canary-5d1e"
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARTS = ["queue", "adapter.load", "prefill", "decode"]


class Traced:
    """A server whose traces end in memory."""

    def __init__(self, model_dir: Path) -> None:
        self.exporter = InMemorySpanExporter()
        self.api = ApiServer(model_dir, traces=Tracing(SimpleSpanProcessor(self.exporter)))

    def roots(self) -> list[ReadableSpan]:
        """Return the server spans so far; one is written when its children are."""
        return [span for span in self.exporter.get_finished_spans() if span.kind is SpanKind.SERVER]

    def only(self) -> tuple[ReadableSpan, dict[str, ReadableSpan]]:
        """Wait for the one request's server span, which ends after the last byte; return it and its children."""
        wait_until(lambda: bool(self.roots()), "the request is traced")
        (root,) = self.roots()
        children = [span for span in self.exporter.get_finished_spans() if span is not root]
        assert root.context is not None
        for child in children:
            assert child.parent is not None and child.parent.span_id == root.context.span_id
            assert child.context is not None and child.context.trace_id == root.context.trace_id
        assert len({child.name for child in children}) == len(children)
        return root, {child.name: child for child in children}

    def complete(self, *, headers: list[tuple[str, str]] | None = None, **fields: object) -> httpx.Response:
        body = {"model": BASE, "prompt": "Hello", **fields}
        return self.api.http.post("/v1/completions", json=body, headers=headers)


@pytest.fixture(scope="module")
def running_traced(model_dir: Path) -> Iterator[Traced]:
    traced = Traced(model_dir)
    try:
        yield traced
    finally:
        traced.api.stop()


@pytest.fixture
def traced(running_traced: Traced) -> Iterator[Traced]:
    running_traced.api.engine.reset()
    # the last span of the test before may come after its answer: it comes before this one
    running_traced.api.http.get("/v1/models", headers={"x-request-id": "begin"})
    begun = lambda: any(facts(span)["chorale.request.id"] == "begin" for span in running_traced.roots())  # noqa: E731
    wait_until(begun, "requests are traced")
    running_traced.exporter.clear()
    yield running_traced
    assert running_traced.api.engine.num_open == 0


def facts(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None and span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_is_one_server_span_with_the_conventions_attributes(traced: Traced, stream: bool) -> None:
    traced.api.engine.script.num_cached_tokens = 3
    answer = traced.complete(model="poet", stream=stream, max_tokens=40)
    assert answer.status_code == 200
    root, _ = traced.only()
    assert (root.name, root.parent, root.status.status_code) == ("text_completion poet", None, StatusCode.UNSET)
    assert facts(root) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "chorale",
        "gen_ai.request.model": "poet",
        "gen_ai.response.model": "poet",
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": len("Hello world") + 1,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "gen_ai.response.finish_reasons": ("stop",),
        "chorale.adapter.names": ("poet@2",),
        "chorale.adapter.digests": (answer.headers["x-adapter-digest"],),
        "chorale.request.id": answer.headers["x-request-id"],
        "chorale.request.is_complete": True,
        "chorale.tenant": "local",
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
    }


def test_the_children_take_the_engine_s_own_times_one_after_the_other(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = traced.api.engine.generate

    async def timed(submit: Submit) -> AsyncGenerator[Started | Tokens | Finished, None]:
        async for event in generate(submit):
            yield (
                Started(submit.request_id, 0, 0.5, 0.25, None, 0.125, 0.0625, 0.75)
                if isinstance(event, Started)
                else event
            )

    monkeypatch.setattr(traced.api.engine, "generate", timed)
    assert traced.complete(model="poet").status_code == 200
    root, parts = traced.only()
    assert list(parts) == PARTS
    assert [seconds(parts[name]) for name in PARTS[:3]] == pytest.approx([0.5, 0.25, 0.75], abs=1e-6)
    queue, load, prefill, decode = (parts[name] for name in PARTS)
    assert root.start_time is not None and queue.start_time is not None and root.start_time <= queue.start_time
    assert abs((load.start_time or 0) - (queue.end_time or 0)) < 1000
    assert abs((prefill.start_time or 0) - (load.end_time or 0)) < 1000
    assert 0 <= seconds(decode) <= seconds(root)
    digests = facts(root)["chorale.adapter.digests"]
    assert facts(load) == {
        "chorale.adapter.digests": digests,
        "chorale.adapter.fetch_s": 0.125,
        "chorale.adapter.move_s": 0.0625,
    }
    assert facts(decode) == {"gen_ai.usage.output_tokens": 12}


def test_the_base_loads_no_adapter(traced: Traced) -> None:
    traced.api.chat("Hi")
    root, parts = traced.only()
    assert root.name == f"chat {BASE}" and list(parts) == ["queue", "prefill", "decode"]
    assert not any("adapter" in name for name in facts(root))


def test_of_several_sequences_there_is_one_set_of_children(traced: Traced) -> None:
    assert traced.complete(n=3, temperature=1.0).status_code == 200
    root, parts = traced.only()
    assert facts(root)["gen_ai.response.finish_reasons"] == ("stop",) * 3 and len(parts) == 3


def test_an_embedding_has_its_operation_and_other_routes_none(traced: Traced) -> None:
    assert traced.api.http.post("/v1/embeddings", json={"model": BASE, "input": "Hi"}).status_code == 200
    root, parts = traced.only()
    assert (root.name, parts) == (f"embeddings {BASE}", {})
    traced.exporter.clear()
    assert traced.api.http.get("/v1/models").status_code == 200
    root, parts = traced.only()
    assert (root.name, parts) == ("GET /v1/models", {})
    assert not any(name.startswith("gen_ai.") for name in facts(root))


def test_a_traceparent_is_the_parent(traced: Traced) -> None:
    headers = [("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"), ("tracestate", "vendor=1")]
    assert traced.complete(headers=headers).status_code == 200
    root, parts = traced.only()
    assert root.parent is not None and root.context is not None and len(parts) == 3
    assert f"{root.context.trace_id:032x}" == TRACE_ID and f"{root.parent.span_id:016x}" == PARENT_ID
    assert root.parent.is_remote and root.context.trace_state.get("vendor") == "1"


@pytest.mark.parametrize(
    "sent",
    [
        ["no traceparent"],
        [""],
        [f"00-{'0' * 32}-{PARENT_ID}-01"],
        [f"00-{TRACE_ID}-{'0' * 16}-01"],
        [f"ff-{TRACE_ID}-{PARENT_ID}-01"],
        [f"00-{TRACE_ID}-{PARENT_ID}-01-more"],
        [f"00-{TRACE_ID}-{PARENT_ID}-01"] * 2,
        ["00-" + "4" * 4000],
    ],
    ids=["words", "empty", "zero-trace", "zero-parent", "version-ff", "too-long", "twice", "huge"],
)
def test_a_malformed_traceparent_is_as_none(traced: Traced, sent: list[str]) -> None:
    assert traced.complete(headers=[("traceparent", value) for value in sent]).status_code == 200
    root, _ = traced.only()
    assert root.parent is None and root.context is not None and f"{root.context.trace_id:032x}" != TRACE_ID


def test_what_the_caller_does_not_sample_is_not_written(traced: Traced) -> None:
    assert traced.complete(headers=[("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-00")]).status_code == 200
    # the next one's span comes after it
    assert traced.complete(headers=[("x-request-id", "next")]).status_code == 200
    root, _ = traced.only()
    assert facts(root)["chorale.request.id"] == "next"


def test_a_refusal_names_its_code_and_is_no_failure_of_the_server(traced: Traced) -> None:
    assert traced.complete(model="nobody").status_code == 404
    root, parts = traced.only()
    assert (root.name, root.status.status_code, parts) == ("POST /v1/completions", StatusCode.UNSET, {})
    found = facts(root)
    assert (found["http.response.status_code"], found["error.type"]) == (404, "model_not_found")
    assert found["gen_ai.request.model"] == "nobody" and "gen_ai.response.model" not in found


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_is_an_error_with_its_code_alone(traced: Traced, stream: bool) -> None:
    script = traced.api.engine.script
    script.error_after, script.error = 3, EngineFailed(f"the engine stopped at {CANARY}")
    answer = traced.complete(stream=stream)
    assert answer.status_code == (200 if stream else 500)
    root, parts = traced.only()
    assert (root.status.status_code, root.status.description) == (StatusCode.ERROR, "engine_error")
    found = facts(root)
    assert (found["error.type"], found["http.response.status_code"]) == ("engine_error", answer.status_code)
    assert found["gen_ai.usage.output_tokens"] == 3 and list(parts) == ["queue", "prefill", "decode"]
    assert CANARY not in root.to_json()


def test_a_client_that_leaves_is_told_apart_and_is_no_failure(traced: Traced) -> None:
    traced.api.engine.script.hold_after = 2
    body = {"model": BASE, "prompt": "Hi", "stream": True}
    with traced.api.http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    root, _ = traced.only()
    found = facts(root)
    assert (found["error.type"], found["chorale.request.is_complete"]) == ("client_disconnected", False)
    assert root.status.status_code is StatusCode.UNSET and "gen_ai.response.finish_reasons" not in found


def test_no_word_of_prompt_or_answer_is_in_a_trace(traced: Traced) -> None:
    for stream in (True, False):
        traced.api.chat(CANARY, stream=stream)
        traced.api.complete(CANARY, stream=stream, n=-1)
        traced.api.complete(CANARY, stream=stream, user=CANARY)
    traced.api.http.post("/v1/embeddings", json={"model": BASE, "input": CANARY})
    traced.api.http.post("/tokenize", json={"model": BASE, "prompt": CANARY})
    traced.api.http.get(f"/{CANARY}", params={"prompt": CANARY})
    wait_until(lambda: len(traced.roots()) == 9, "all requests are traced")
    text = json.dumps([span.to_json() for span in traced.exporter.get_finished_spans()])
    assert CANARY not in text and "Hello world" not in text


def test_what_a_client_spelled_is_cut_and_names_no_span(traced: Traced) -> None:
    assert traced.complete(model="x" * 250).status_code == 404
    traced.api.http.request("PROPFIND", "/v1/completions")
    wait_until(lambda: len(traced.roots()) == 2, "both are traced")
    found, spelled = sorted(traced.roots(), key=lambda span: str(facts(span)["http.request.method"]), reverse=True)
    assert spelled.name == "POST /v1/completions"
    assert facts(spelled)["gen_ai.request.model"] == "x" * 200 + "..."
    assert facts(found)["http.request.method"] == "_OTHER" and "PROPFIND" not in found.to_json()


def test_probes_are_not_traced(traced: Traced) -> None:
    for path in ("/livez", "/metrics"):
        traced.api.http.get(path)
    assert traced.api.http.get("/v1/models").status_code == 200
    wait_until(lambda: "GET /v1/models" in [span.name for span in traced.roots()], "the list is traced")
    assert "/livez" not in [facts(span).get("http.route") for span in traced.roots()]
