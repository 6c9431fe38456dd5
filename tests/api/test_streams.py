"""Server-sent events: order, framing, ends, clients that leave."""

import json
import socket
from collections.abc import Iterator

import httpx
import openai
import pytest

from serve.api import generation
from serve.errors import EngineFailed, QueueFull
from tests.api.api_server import ApiServer, wait_until
from tests.api.byte_tokenizer import IM_END
from tests.api.fake_engine import text_ids
from tests.api.fake_store import BASE

MESSAGES = [{"role": "user", "content": "Hi"}]


def events(answer: httpx.Response) -> list[dict[str, object]]:
    """Return the stream's JSON events; the last line must be [DONE]."""
    lines = [line for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]" and lines.count("data: [DONE]") == 1
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def choices(answer: httpx.Response) -> Iterator[dict[str, object]]:
    """Return the choice of each chunk that has one."""
    for event in events(answer):
        listed = event["choices"]
        assert isinstance(listed, list)
        yield from listed


def text_of(answer: httpx.Response, index: int = 0) -> str:
    """Return the joined text of one choice."""
    pieces = []
    for choice in choices(answer):
        if choice["index"] == index:
            delta = choice.get("delta", choice)
            assert isinstance(delta, dict)
            pieces.append(delta.get("content") or delta.get("text") or "")
    return "".join(pieces)


def test_openai_python_reads_a_stream_with_usage(api: ApiServer, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=BASE,
        messages=[{"role": "user", "content": "Hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello world"
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-2].choices[0].delta.content is None
    assert not chunks[-1].choices and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_headers_keep_proxies_from_buffering(api: ApiServer) -> None:
    answer = api.chat(stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "content-length" not in answer.headers


def test_chunks_have_no_usage_field_unless_asked_for(api: ApiServer) -> None:
    assert all("usage" not in event for event in events(api.chat(stream=True)))
    asked = events(api.chat(stream=True, stream_options={"include_usage": True}))
    assert all(event["usage"] is None for event in asked[:-1]) and asked[-1]["choices"] == []


def test_the_last_delta_is_empty(api: ApiServer) -> None:
    last = list(choices(api.chat(stream=True)))[-1]
    assert last["delta"] == {} and last["finish_reason"] == "stop"


@pytest.mark.parametrize("tokens_per_event", [1, 2, 3, 5])
def test_a_character_is_never_split_over_chunks(api: ApiServer, tokens_per_event: int) -> None:
    text = "aé漢🙂z"
    api.engine.script.write = lambda submit: [*text_ids(text), IM_END]
    api.engine.script.tokens_per_event = tokens_per_event
    answer = api.chat(stream=True)
    assert "\ufffd" not in answer.text and text_of(answer) == text


def test_an_unfinished_character_ends_as_a_replacement(api: ApiServer) -> None:
    api.engine.script.write = lambda submit: [*text_ids("a"), 0xF0, 0x9F, IM_END]
    assert text_of(api.chat(stream=True)) == "a\ufffd"
    assert api.chat().json()["choices"][0]["message"]["content"] == "a\ufffd"


@pytest.mark.parametrize("tokens_per_event", [1, 2, 7])
def test_a_stop_string_over_several_tokens_is_not_shown(api: ApiServer, tokens_per_event: int) -> None:
    api.engine.script.tokens_per_event = tokens_per_event
    for stream in (False, True):
        answer = api.complete(stop=["lo w", "zzz"], stream=stream)
        shown = text_of(answer) if stream else answer.json()["choices"][0]["text"]
        assert shown == "Hel"
    answer = api.complete(stop="lo w", include_stop_str_in_output=True)
    assert answer.json()["choices"][0]["text"] == "Hello w"
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert answer.json()["usage"]["completion_tokens"] == len("Hello w")


def test_a_found_stop_string_aborts_the_sequence_at_once(api: ApiServer) -> None:
    api.engine.script.hold_after = 6
    assert api.complete(stop="llo").json()["choices"][0]["text"] == "He"
    assert api.engine.aborted == [api.engine.submits[0].request_id]


def test_text_before_min_tokens_stops_nothing(api: ApiServer) -> None:
    answer = api.complete(stop="o", min_tokens=5).json()
    assert answer["choices"][0]["text"] == "Hello w"


def test_a_held_back_beginning_is_shown_in_the_end(api: ApiServer) -> None:
    assert text_of(api.complete(stop="world!", stream=True)) == "Hello world"


def test_the_stop_tokens_text_is_shown_only_when_asked_for(api: ApiServer) -> None:
    space = ord(" ")
    assert api.complete(stop_token_ids=[space]).json()["choices"][0]["text"] == "Hello"
    shown = api.complete(stop_token_ids=[space], include_stop_str_in_output=True).json()["choices"][0]["text"]
    assert shown == "Hello "
    with_specials = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    assert api.complete(**with_specials).json()["choices"][0]["text"] == "Hello world<|im_end|>"
    assert api.complete(skip_special_tokens=False).json()["choices"][0]["text"] == "Hello world"


def test_several_choices_interleave_and_each_ends_once(api: ApiServer) -> None:
    api.engine.script.write = lambda submit: [*text_ids(f"to {submit.request_id[-1]}"), IM_END]
    answer = api.chat(stream=True, n=3)
    assert [text_of(answer, index) for index in range(3)] == ["to 0", "to 1", "to 2"]
    ends = [choice["index"] for choice in choices(answer) if choice["finish_reason"]]
    assert sorted(str(index) for index in ends) == ["0", "1", "2"]


def test_token_ids_stream_as_deltas(api: ApiServer) -> None:
    listed = list(choices(api.complete("abc", stream=True, return_token_ids=True, stop="wor")))
    assert listed[0]["prompt_token_ids"] == text_ids("abc")
    assert all("prompt_token_ids" not in choice for choice in listed[1:])
    streamed: list[object] = []
    for choice in listed:
        ids = choice["token_ids"]
        assert isinstance(ids, list)
        streamed += ids
    assert streamed == text_ids("Hello wor")


def test_an_error_before_the_first_token_has_its_own_status(api: ApiServer) -> None:
    api.engine.script.admit_error = QueueFull("full", retry_after_s=3)
    answer = api.chat(stream=True)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "3"


def test_an_error_in_mid_stream_is_one_event_and_then_done(api: ApiServer, client: openai.OpenAI) -> None:
    api.engine.script.error, api.engine.script.error_after = EngineFailed("the engine stopped"), 4
    answer = api.chat(stream=True)
    assert answer.status_code == 200
    last = events(answer)[-1]
    assert last == {
        "error": {"message": "the engine stopped", "type": "server_error", "param": None, "code": "engine_error"}
    }
    with pytest.raises(openai.APIError, match="the engine stopped"):
        list(client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "Hi"}], stream=True))


def test_an_unexpected_error_in_mid_stream_tells_nothing(api: ApiServer, caplog: pytest.LogCaptureFixture) -> None:
    def write(submit: object) -> list[int]:
        raise RuntimeError("secret /path")

    api.engine.script.write = write
    answer = api.chat(stream=True)
    assert "secret" not in answer.text and "internal error" in answer.text
    assert "secret" in caplog.text, "the operator sees it"


def test_silence_is_filled_with_keep_alive_comments(api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "KEEP_ALIVE_S", 0.05)
    api.engine.script.hold_after = 3
    seen = b""
    with api.http.stream("POST", "/v1/completions", json={"model": BASE, "prompt": "Hi", "stream": True}) as answer:
        for piece in answer.iter_raw():
            seen += piece
            if seen.count(b": keep-alive\n\n") >= 2:
                break
    assert seen.startswith(b"data: ")
    wait_until(lambda: api.engine.num_open == 0, "the stream's sequence ends")


@pytest.mark.parametrize("num_chunks", [1, 2, 4])
def test_a_client_that_leaves_a_stream_aborts_its_sequences(api: ApiServer, num_chunks: int) -> None:
    api.engine.script.hold_after = 3
    body = {"model": BASE, "messages": MESSAGES, "stream": True, "n": 3}
    with api.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        for _ in range(num_chunks):
            next(lines)
    wait_until(lambda: api.engine.num_open == 0, "all sequences end")
    assert sorted(api.engine.aborted) == sorted(submit.request_id for submit in api.engine.submits)


def test_a_client_that_leaves_before_its_whole_answer_aborts_it(
    api: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    api.engine.script.hold_after = 2
    body = json.dumps({"model": BASE, "prompt": "Hi"}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", httpx.URL(api.url).port or 0), timeout=120) as client:
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        wait_until(lambda: api.engine.num_open == 1, "the sequence begins")
    wait_until(lambda: api.engine.num_open == 0, "the sequence ends")
    assert len(api.engine.aborted) == 1
    assert not [record for record in caplog.records if record.name == "chorale.api"]
