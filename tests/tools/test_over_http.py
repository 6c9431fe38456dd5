"""Tools and structured output as OpenAI's client sees them, over a socket, with an engine that follows a script."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam, ChatCompletionToolParam

from tests.api.byte_tokenizer import IM_END, write_model_dir
from tests.api.fake_engine import text_ids
from tests.api_guard.whole_api import BASE, WholeApi, whole_api

HERMES = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}<tool_call>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}CALL {{ call.function.arguments.city }}{% endfor %}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
PLAIN = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Weather in Bern?"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


@contextmanager
def served_with(template: str, folder: Path) -> Iterator[tuple[WholeApi, openai.OpenAI]]:
    model_dir = write_model_dir(folder / "model", template=template)
    with whole_api(model_dir, folder / "store") as api:
        assert api.engine.ready is not None
        api.engine.ready = replace(api.engine.ready, max_model_len=4096)
        url = f"http://127.0.0.1:{api.server.port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield api, client


@pytest.fixture(scope="module", name="running")
def _running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WholeApi, openai.OpenAI]]:
    with served_with(HERMES, tmp_path_factory.mktemp("hermes")) as running:
        yield running


@pytest.fixture
def api(running: tuple[WholeApi, openai.OpenAI]) -> WholeApi:
    running[0].engine.reset()
    return running[0]


@pytest.fixture
def client(running: tuple[WholeApi, openai.OpenAI], api: WholeApi) -> openai.OpenAI:
    return running[1]


def write(api: WholeApi, text: str) -> None:
    """Let the engine write this text and end."""
    api.engine.script.write = lambda submit: [*text_ids(text), IM_END]


def prompt(api: WholeApi) -> str:
    return bytes(token for token in api.engine.submits[-1].prompt_token_ids if token < 256).decode()


def ask(client: openai.OpenAI, **fields: object) -> ChatCompletion:
    answer = client.chat.completions.create(model=BASE, messages=ASK, **fields)  # type: ignore[call-overload]
    assert isinstance(answer, ChatCompletion)
    return answer


def test_a_call_is_answered_as_a_call(api: WholeApi, client: openai.OpenAI) -> None:
    write(api, f"Let me look.\n{CALL}")
    choice = ask(client, tools=[WEATHER]).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look."
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.id.startswith("call_")
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Zürich"})
    assert '"get_weather"' in prompt(api) and api.engine.submits[-1].sampling.grammar is None


@pytest.mark.parametrize("tokens_per_event", [1, 3, 1000])
def test_a_streamed_call_is_put_together_by_the_client(
    tokens_per_event: int, api: WholeApi, client: openai.OpenAI
) -> None:
    write(api, f"Well, {CALL}\n{CALL}")
    api.engine.script.tokens_per_event = tokens_per_event
    with client.chat.completions.stream(model=BASE, messages=ASK, tools=[WEATHER]) as stream:
        message = stream.get_final_completion().choices[0]
    assert message.finish_reason == "tool_calls" and message.message.content == "Well,"
    calls = message.message.tool_calls or []
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Zürich"}] * 2
    assert len({call.id for call in calls}) == 2


def test_an_answer_without_a_call_stays_text(api: WholeApi, client: openai.OpenAI) -> None:
    for text in ("It rains.", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', "<tool_call>"):
        write(api, text)
        choice = ask(client, tools=[WEATHER]).choices[0]
        assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("stop", text, None)


def test_a_call_cut_by_the_limit_ends_with_length(api: WholeApi, client: openai.OpenAI) -> None:
    write(api, CALL)
    assert ask(client, tools=[WEATHER], max_tokens=30).choices[0].finish_reason == "length"


def test_required_and_named_tools_are_forced_by_a_grammar_and_none_is_not(api: WholeApi, client: openai.OpenAI) -> None:
    write(api, CALL)
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        ask(client, tools=[WEATHER], tool_choice=choice)
        grammar = api.engine.submits[-1].sampling.grammar
        assert grammar is not None and grammar.kind == "lark" and "get_weather" in grammar.text
    message = ask(client, tools=[WEATHER], tool_choice="none").choices[0].message
    assert message.content == CALL and message.tool_calls is None
    assert api.engine.submits[-1].sampling.grammar is None and "get_weather" not in prompt(api)


def test_the_history_of_calls_reaches_the_template_as_objects(api: WholeApi, client: openai.OpenAI) -> None:
    function = {"name": "get_weather", "arguments": '{"city": "Bern"}'}
    history = [
        *ASK,
        {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12 C"},
    ]
    client.chat.completions.create(model=BASE, messages=history, tools=[WEATHER])  # type: ignore[arg-type]
    assert "CALL Bern" in prompt(api) and "tool\n12 C" in prompt(api)


def test_a_template_without_tools_gets_them_as_text(tmp_path: Path) -> None:
    with served_with(PLAIN, tmp_path) as (api, client):
        write(api, CALL)
        choice = ask(client, tools=[WEATHER]).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert prompt(api).startswith("system\n# Tools") and '"get_weather"' in prompt(api)


def test_a_schema_becomes_a_grammar_and_a_bad_one_never_reaches_the_engine(
    api: WholeApi, client: openai.OpenAI
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    write(api, '{"a": 1}')
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    ask(client, response_format=form)
    grammar = api.engine.submits[-1].sampling.grammar
    assert grammar is not None and json.loads(grammar.text) == schema
    api.engine.submits.clear()
    refused: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://x/y"}}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"type": "integer", "multipleOf": 123456789}},
            }
        },
        {"extra_body": {"structured_outputs": {"regex": "(((("}}},
        {"extra_body": {"structured_outputs": {"grammar": "start: nothing"}}},
        {"extra_body": {"structured_outputs": {"choice": []}}},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "rm"}}},
    ]
    for bad in refused:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, **bad)
        assert caught.value.type == "invalid_request_error"
    assert api.engine.submits == []
