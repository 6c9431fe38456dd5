"""One JSON line per request: what it says, that it says no word of prompt or answer, and that nobody can forge one."""

import json
import logging
import socket
from collections.abc import Iterator

import pytest

from serve.errors import EngineFailed
from tests.api.api_server import ApiServer, wait_until
from tests.api.fake_store import BASE, digest_of

CANARY = "canary-41c7"
KEYS = {
    *("time", "event", "request_id", "method", "route", "status", "is_complete", "error_code", "tenant", "key_id"),
    *(
        "model",
        "adapters",
        "adapter_digests",
        "base_stood_in_for",
        "prompt_tokens",
        "cached_tokens",
        "output_tokens",
        "finish_reasons",
        "ms",
    ),
}
TIMES = {"total", "prepare", "queue", "load", "first_token", "prefill", "decode"}

Line = dict[str, object]


class Lines:
    """The lines that were logged so far."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def texts(self) -> list[str]:
        return [record.getMessage() for record in self._caplog.records if record.name == "chorale.request"]

    def only(self) -> Line:
        """Wait for the one line of the one request; it is written after the last byte of the answer."""
        wait_until(lambda: bool(self.texts()), "the request is logged")
        (text,) = self.texts()
        line: Line = json.loads(text)
        assert line.keys() == KEYS
        return line


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, api: ApiServer) -> Iterator[Lines]:
    with caplog.at_level(logging.INFO, "chorale.request"):
        found = Lines(caplog)
        # the last line of the test before may come after its answer: it comes before this one
        api.http.get("/v1/models", headers={"x-request-id": "begin"})
        wait_until(lambda: any('"request_id":"begin"' in text for text in found.texts()), "lines are logged")
        caplog.clear()
        yield found


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_line_says_who_asked_what_and_where_the_time_went(api: ApiServer, lines: Lines, is_stream: bool) -> None:
    api.engine.script.num_cached_tokens, api.engine.script.adapter_load_s = 3, 0.25
    answer = api.complete("Hello", model="poet", stream=is_stream, max_tokens=40)
    assert answer.status_code == 200
    line = lines.only()
    assert line["request_id"] == answer.headers["x-request-id"]
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/completions", 200)
    assert (line["is_complete"], line["error_code"], line["finish_reasons"]) == (True, None, ["stop"])
    assert (line["tenant"], line["key_id"], line["model"]) == ("local", "none", "poet")
    assert line["adapter_digests"] == [answer.headers["x-adapter-digest"].removeprefix("sha256:")]
    assert (line["adapters"], line["base_stood_in_for"]) == (["poet@2"], [])
    assert (line["prompt_tokens"], line["cached_tokens"], line["output_tokens"]) == (5, 3, len("Hello world") + 1)
    times = line["ms"]
    assert isinstance(times, dict) and times.keys() == TIMES and times["load"] == 250.0
    assert all(value >= 0 for value in times.values()) and times["total"] >= times["first_token"]


def test_a_base_that_stood_in_is_logged_with_the_adapter_it_stood_in_for(api: ApiServer, lines: Lines) -> None:
    api.engine.cold.add(digest_of("poet", 2))
    assert api.complete("Hello", model="poet", cold_start="base").status_code == 200
    line = lines.only()
    assert (line["model"], line["adapters"], line["adapter_digests"]) == ("poet", [], [])
    assert line["base_stood_in_for"] == ["poet@2"]


def test_a_refusal_is_logged_with_its_code_and_the_model_as_it_was_spelled(api: ApiServer, lines: Lines) -> None:
    assert api.complete(CANARY, model="nobody").status_code == 404
    line = lines.only()
    assert (line["status"], line["error_code"], line["model"]) == (404, "model_not_found", "nobody")
    assert line["adapter_digests"] == [] and line["prompt_tokens"] is None


def test_a_stream_that_fails_is_logged_with_its_error(api: ApiServer, lines: Lines) -> None:
    api.engine.script.error_after, api.engine.script.error = 3, EngineFailed("the engine stopped")
    assert api.complete("Hello", stream=True).status_code == 200
    line = lines.only()
    assert (line["status"], line["error_code"], line["output_tokens"]) == (200, "engine_error", 3)


def test_a_client_that_leaves_is_logged_as_one_whose_answer_is_not_complete(api: ApiServer, lines: Lines) -> None:
    api.engine.script.hold_after = 2
    with api.http.stream("POST", "/v1/completions", json={"model": BASE, "prompt": "Hi", "stream": True}) as answer:
        next(answer.iter_lines())
    line = lines.only()
    assert (line["status"], line["is_complete"], line["finish_reasons"]) == (200, False, [])


def test_no_word_of_prompt_or_answer_is_logged(api: ApiServer, lines: Lines, caplog: pytest.LogCaptureFixture) -> None:
    for stream in (True, False):
        api.chat(CANARY, stream=stream)
        api.complete(CANARY, stream=stream, n=-1)
        api.complete(CANARY, stream=stream, user="somebody")
    api.http.post("/v1/embeddings", json={"model": BASE, "input": CANARY})
    api.http.post("/tokenize", json={"model": BASE, "prompt": CANARY})
    wait_until(lambda: len(lines.texts()) == 8, "all requests are logged")
    assert CANARY not in caplog.text and "Hello world" not in caplog.text


def test_no_spelling_forges_a_line(api: ApiServer, lines: Lines) -> None:
    forged = 'x\r\n{"event":"request","status":200}\x1b[31m\u2028\u0085'
    assert api.complete("Hi", model=forged).status_code == 404
    assert api.http.get("/nowhere%0D%0A%1B%5B31m" + "y" * 3000).status_code == 404
    wait_until(lambda: len(lines.texts()) == 2, "both are logged")
    spelled, path = lines.texts()
    for text in (spelled, path):
        assert text.isascii() and text.isprintable() and len(text) < 1500
    assert json.loads(spelled)["model"] == forged
    assert json.loads(path)["route"].startswith("/nowhere\r\n\x1b[31myyy")


def test_a_request_id_that_the_client_chose_is_the_line_s(api: ApiServer, lines: Lines) -> None:
    body = {"model": BASE, "prompt": "Hi"}
    api.http.post("/v1/completions", json=body, headers={"x-request-id": "trace-7"})
    assert lines.only()["request_id"] == "trace-7"


def test_probes_are_logged_only_when_they_fail(api: ApiServer, lines: Lines) -> None:
    assert api.http.get("/livez").status_code == 200
    api.http.get("/metrics")
    assert api.http.get("/v1/models").status_code == 200
    routes = [json.loads(text)["route"] for text in lines.texts()]
    wait_until(lambda: "/v1/models" in [json.loads(text)["route"] for text in lines.texts()], "the list is logged")
    assert "/livez" not in routes


def test_bytes_that_are_no_request_reach_no_line(api: ApiServer, lines: Lines) -> None:
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as peer:
        peer.sendall(b'{"event":"request"}\r\n\r\n')
        peer.recv(4096)
    assert lines.texts() == []
