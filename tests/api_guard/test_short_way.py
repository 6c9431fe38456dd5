"""A stream's two ways out: byte for byte the same answer, whichever of them a token takes."""

import asyncio
import re
import socket
from collections.abc import Iterator

import orjson
import pytest
from uvicorn.protocols.http.flow_control import FlowControl

from serve.api import sse
from serve.api.chat import ChatReply
from serve.api.completions import CompletionReply
from serve.api.direct_body import DirectBody
from serve.errors import EngineFailed
from tests.api.api_server import wait_until
from tests.api.byte_tokenizer import IM_END
from tests.api.fake_engine import text_ids
from tests.api_guard.whole_api import BASE, WholeApi
from tests.api_guard.wire import HANG_S, read_all

Json = dict[str, object]

CHAT: Json = {"messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
# what no two answers have in common
_OWN = (
    (re.compile(rb'"id":"[a-z]+-[0-9a-f]{32}"'), b'"id":"ID"'),
    (re.compile(rb'"created":\d+'), b'"created":0'),
    (re.compile(rb"call_[0-9a-f]{24}"), b"CALL"),
    (re.compile(rb"x-request-id: \S+\r\n"), b""),
    (re.compile(rb"openai-processing-ms: \d+\r\n"), b""),
    (re.compile(rb"date: [^\r]+\r\n"), b""),
)


class Ways:
    """A server, and the pieces that took the short way."""

    def __init__(self, api: WholeApi, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = api.engine
        self.num_short = 0
        self._port = api.server.port
        self._patch = monkeypatch
        self.watch()

    def watch(self) -> None:
        """Count what is written directly."""
        write = DirectBody.write

        def counted(body: DirectBody, data: bytes) -> None:
            self.num_short += 1
            write(body, data)

        self._patch.setattr(DirectBody, "write", counted)

    def stream(self, path: str, body: Json, *, is_long: bool = False) -> bytes:
        """Return one whole answer as it is on the wire, without what no two have in common."""
        with self._patch.context() as patch:
            if is_long:
                patch.setattr(sse, "direct_body", lambda scope: None)
                # and each chunk is put together from its parts
                for reply in (ChatReply, CompletionReply):
                    patch.setattr(reply, "plain_chunk", lambda self, index: None)
            with self.connect(path, body) as peer:
                answer = read_all(peer)
        for pattern, text in _OWN:
            answer = pattern.sub(text, answer)
        return answer

    def connect(self, path: str, body: Json) -> socket.socket:
        """Ask for a stream, and read nothing of it."""
        data = orjson.dumps({"model": BASE, "stream": True, **body})
        head = [f"POST {path} HTTP/1.1", "Host: t", "Connection: close", "Content-Type: application/json"]
        peer = socket.create_connection(("127.0.0.1", self._port), timeout=HANG_S)
        peer.sendall("\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data)
        return peer


@pytest.fixture
def ways(api: WholeApi, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ways]:
    """Return the clean server; afterwards nothing may be left running."""
    yield Ways(api, monkeypatch)
    wait_until(lambda: api.engine.num_open == 0, "all sequences end")


TEXTS = {
    "plain": "Hello wide world",
    "escapes": 'a "quoted" \\ line\nand\ttab \x01 </script>',
    "wide": "aé漢🙂z",
    "call": 'Look: {"name": "look", "arguments": {"at": "x"}} and more',
    "hermes": '<tool_call>\n{"name": "look", "arguments": {"at": "x"}}\n</tool_call>',
}
FIELDS: dict[str, Json] = {
    "bare": {},
    "usage": {"stream_options": {"include_usage": True}},
    "stop": {"stop": ["o w", "zzz"]},
    "stop-shown": {"stop": "l", "include_stop_str_in_output": True, "min_tokens": 3},
    "ids": {"return_token_ids": True},
    "length": {"max_tokens": 5},
    "specials": {"skip_special_tokens": False, "include_stop_str_in_output": True},
    "two": {"n": 2},
}


@pytest.mark.parametrize("text", sorted(TEXTS))
@pytest.mark.parametrize("fields", sorted(FIELDS))
def test_a_completion_has_the_same_bytes_on_both_ways(ways: Ways, fields: str, text: str) -> None:
    check(ways, "/v1/completions", text, {"prompt": "Hi", "max_tokens": 90, **FIELDS[fields]})


@pytest.mark.parametrize("fields", [{"logprobs": 2}, {"echo": True}, {"logprobs": 1, "echo": True, "stop": "w"}])
def test_a_completion_with_more_than_text_has_too(ways: Ways, fields: Json) -> None:
    check(ways, "/v1/completions", "plain", {"prompt": "Hi", "max_tokens": 90, **fields})


@pytest.mark.parametrize("text", sorted(TEXTS))
@pytest.mark.parametrize("fields", sorted(FIELDS))
def test_a_chat_has_the_same_bytes_on_both_ways(ways: Ways, fields: str, text: str) -> None:
    check(ways, "/v1/chat/completions", text, {**CHAT, "max_tokens": 90, **FIELDS[fields]})


@pytest.mark.parametrize("text", sorted(TEXTS))
@pytest.mark.parametrize(
    "fields", [{"logprobs": True, "top_logprobs": 2}, {"tools": [TOOL]}], ids=["logprobs", "tools"]
)
def test_a_chat_with_more_than_text_has_too(ways: Ways, fields: Json, text: str) -> None:
    check(ways, "/v1/chat/completions", text, {**CHAT, "max_tokens": 90, **fields})


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("fields", ["stop", "ids"])
def test_several_tokens_at_once_have_too(ways: Ways, path: str, fields: str) -> None:
    ways.engine.script.tokens_per_event = 3
    asked: Json = CHAT if "chat" in path else {"prompt": "Hi"}
    check(ways, path, "wide", {**asked, "max_tokens": 90, **FIELDS[fields]})


def check(ways: Ways, path: str, text: str, body: Json) -> None:
    """Ask twice, by either way, and compare the answers' bytes on the wire."""
    ways.engine.script.write = lambda submit: [*text_ids(TEXTS[text]), IM_END]
    short = ways.stream(path, body)
    num_short, ways.num_short = ways.num_short, 0
    assert short == ways.stream(path, body, is_long=True)
    assert b"[DONE]" in short and b"HTTP/1.1 200" in short
    # several choices are merged by a task of their own
    assert ways.num_short == 0 and bool(num_short) == ("n" not in body)


def test_an_error_in_mid_stream_has_the_same_bytes_on_both_ways(ways: Ways) -> None:
    ways.engine.script.error, ways.engine.script.error_after = EngineFailed("the engine stopped"), 4
    short = ways.stream("/v1/chat/completions", CHAT)
    assert ways.num_short == 4
    assert short == ways.stream("/v1/chat/completions", CHAT, is_long=True)
    assert b"the engine stopped" in short and short.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_what_fails_on_the_short_way_is_the_streams_own_error(
    ways: Ways, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(body: DirectBody, data: bytes) -> None:
        raise RuntimeError("secret /path")

    monkeypatch.setattr(DirectBody, "write", fail)
    answer = ways.stream("/v1/chat/completions", CHAT)
    assert b"internal error" in answer and b"secret" not in answer and answer.count(b"[DONE]") == 1
    assert "secret" in caplog.text, "the operator sees it"
    wait_until(lambda: len(ways.engine.aborted) == 1, "its sequence is aborted")


def test_while_the_connection_is_full_tokens_wait_on_the_long_way(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(chr(ord("a") + index % 26) for index in range(300))
    ways.engine.script.write = lambda submit: [*text_ids(text), IM_END]
    body: Json = {"prompt": "Hi", "max_tokens": 400}
    expected = ways.stream("/v1/completions", body, is_long=True)
    write, pauses, waits = DirectBody.write, list[int](), list[FlowControl]()

    def written(body: DirectBody, data: bytes) -> None:
        assert not body._cycle.flow.write_paused, "it was full"
        write(body, data)
        if ways.num_short in (3, 100):
            pauses.append(ways.num_short)
            body._cycle.flow.pause_writing()

    async def drain(flow: FlowControl) -> None:
        waits.append(flow)
        await asyncio.sleep(0.01)
        flow.resume_writing()

    monkeypatch.setattr(DirectBody, "write", written)
    monkeypatch.setattr(FlowControl, "drain", drain)
    assert ways.stream("/v1/completions", body) == expected
    assert pauses == [3, 100] and ways.num_short > 100, "it takes the short way again when there is room"
    assert len(waits) == 2, "each time one token waited for room"


def test_a_client_that_leaves_ends_its_sequence(ways: Ways) -> None:
    ways.engine.script.hold_after = 6
    with ways.connect("/v1/completions", {"prompt": "Hi"}) as peer:
        wait_until(lambda: ways.num_short >= 5, "tokens take the short way")
        peer.recv(1)
    wait_until(lambda: ways.engine.num_open == 0, "its sequence ends")
    assert len(ways.engine.aborted) == 1
