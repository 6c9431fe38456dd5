"""Tools and structured output as a chat client sees them; the parsers and grammars have tests of their own."""

import json

import openai
import pytest

from tests.api.api_server import ApiServer
from tests.api.byte_tokenizer import IM_END
from tests.api.fake_engine import text_ids
from tests.api.fake_store import BASE

TOOL: dict[str, object] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = 'Let me see. <tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
SCHEMA: dict[str, object] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize("tokens_per_event", [1, 4, 200])
def test_a_call_is_read_streamed_and_whole(api: ApiServer, client: openai.OpenAI, tokens_per_event: int) -> None:
    api.engine.script.write = lambda submit: [*text_ids(CALL), IM_END]
    api.engine.script.tokens_per_event = tokens_per_event
    choice = api.chat(tools=[TOOL]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Köln"}
    assert choice["message"]["content"].strip() == "Let me see."

    content = name = arguments = ""
    reasons: list[str | None] = []
    with client.chat.completions.create(
        model=BASE,
        messages=[{"role": "user", "content": "Hi"}],
        tools=[{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}],
        stream=True,
    ) as stream:
        for chunk in stream:
            delta = chunk.choices[0].delta
            content += delta.content or ""
            reasons.append(chunk.choices[0].finish_reason)
            for piece in delta.tool_calls or []:
                assert piece.index == 0 and piece.function is not None
                name += piece.function.name or ""
                arguments += piece.function.arguments or ""
    assert (content.strip(), name, json.loads(arguments)) == ("Let me see.", "get_weather", {"city": "Köln"})
    assert reasons[-1] == "tool_calls" and not any(reasons[:-1])


def test_tools_reach_the_prompt_and_forbidden_calls_stay_text(api: ApiServer) -> None:
    api.engine.script.write = lambda submit: [*text_ids(CALL), IM_END]
    choice = api.chat(tools=[TOOL], tool_choice="none").json()["choices"][0]
    assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]
    api.chat(tools=[TOOL])
    assert b"get_weather" in bytes(i for i in api.engine.submits[1].prompt_token_ids if i < 256)


def test_a_forced_call_is_a_grammar(api: ApiServer) -> None:
    api.engine.script.write = lambda submit: [*text_ids(CALL.partition(". ")[2]), IM_END]
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        answer = api.chat(tools=[TOOL], tool_choice=choice).json()
        assert answer["choices"][0]["message"]["content"] is None
        assert api.engine.submits[-1].sampling.grammar is not None


def test_a_whole_conversation_with_calls_is_rendered(api: ApiServer) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny<|im_end|>"},
    ]
    answer = api.http.post("/v1/chat/completions", json={"model": BASE, "messages": messages, "tools": [TOOL]})
    assert answer.status_code == 200, answer.text
    prompt = bytes(i for i in api.engine.submits[0].prompt_token_ids if i < 256).decode()
    assert "Köln" in prompt and "sunny<|im_end|>" in prompt


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, "json_schema"),
        ({"structured_outputs": {"regex": "[ab]+"}}, "regex"),
        ({"response_format": {"type": "text"}}, None),
    ],
)
def test_structured_output_reaches_the_engine(api: ApiServer, fields: dict[str, object], kind: str | None) -> None:
    for send in (api.chat, api.complete):
        assert send(**fields).status_code == 200
        grammar = api.engine.submits[-1].sampling.grammar
        assert (grammar.kind if grammar is not None else None) == kind


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "xml"}},
        {"response_format": "json"},
        {"structured_outputs": {"regex": "("}},
        {"tools": [{"type": "function"}]},
        {"tools": [TOOL, TOOL]},
        {"tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
    ],
)
def test_bad_tools_and_forms_are_refused(api: ApiServer, fields: dict[str, object]) -> None:
    answer = api.chat(**fields)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert not api.engine.submits
