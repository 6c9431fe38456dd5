"""Scripts written with openai-python run unchanged against the live server.

Owns what that client expects to parse; the wire itself is tested in tests/api. Invariant: no request option of the
client is bent to suit the server.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Annotated, Literal

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel, Field

from tests.live_server import LiveServer

pytestmark = pytest.mark.e2e

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me a story."}]
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bern", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


class Pet(BaseModel):
    """An answer that any model can be held to by a grammar."""

    kind: Literal["cat", "dog"]
    age: Annotated[int, Field(ge=0, le=99)]
    is_loud: bool


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as opened:
        yield opened


@pytest.mark.parametrize("model", ["tiny", "voice"])
def test_chat_answers_with_usage(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8, temperature=0)
    assert answer.object == "chat.completion" and answer.model == model
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_stream_with_usage_spells_the_same_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="voice", messages=MESSAGES, max_tokens=24, temperature=0)
    with client.chat.completions.create(
        model="voice",
        messages=MESSAGES,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize("choice", ["required", "named"])
def test_a_forced_tool_is_called_with_valid_arguments(client: openai.OpenAI, choice: str) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        tools=[WEATHER],
        tool_choice="required" if choice == "required" else {"type": "function", "function": {"name": "get_weather"}},
        max_tokens=200,
        seed=3,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls and calls[0].type == "function" and calls[0].id
    assert calls[0].function.name == "get_weather"
    arguments = json.loads(calls[0].function.arguments)
    assert arguments["city"] in {"Bern", "Oslo"} and 1 <= arguments["days"] <= 9
    assert answer.choices[0].finish_reason == "tool_calls"


def test_a_streamed_tool_call_adds_up(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, tools=[WEATHER], tool_choice="required", max_tokens=200, seed=3
    ) as stream:
        answer = stream.get_final_completion()
    calls = answer.choices[0].message.tool_calls
    assert calls and calls[0].function.name == "get_weather"
    assert set(json.loads(calls[0].function.arguments)) == {"city", "days"}


def test_json_schema_parses_into_a_class(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.parse(
            model="tiny", messages=MESSAGES, response_format=Pet, max_tokens=500, seed=seed
        )
        pet = answer.choices[0].message.parsed
        assert isinstance(pet, Pet), answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "stop"


def test_logprobs_come_with_alternatives(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 4
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        # greedy: the chosen token is the likeliest
        assert token.logprob == token.top_logprobs[0].logprob <= 0.0


def test_completions_take_lists_and_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=["ab", "cd"], max_tokens=3, temperature=0, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.text[:2] for choice in answer.choices] == ["ab", "cd"]


def test_a_seed_repeats_a_sampled_answer(client: openai.OpenAI) -> None:
    texts = [
        [choice.text for choice in client.completions.create(model="tiny", prompt="x", n=3, seed=seed).choices]
        for seed in (5, 5, 6)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 3


def test_embeddings_arrive_as_floats(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="voice", input=["one", "two"])
    assert [len(item.embedding) for item in answer.data] == [64, 64]
    as_floats = client.embeddings.create(model="voice", input=["one", "two"], encoding_format="float")
    assert as_floats.data[0].embedding == pytest.approx(answer.data[0].embedding, rel=1e-6)


def test_models_are_listed_read_and_deleted(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} >= {"tiny", "voice", "spare"}
    card = client.models.retrieve("spare")
    assert card.object == "model" and card.id == "spare"
    deleted = client.models.delete("spare")
    assert deleted.deleted and deleted.id == "spare"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("spare")
    assert "spare" not in {model.id for model in client.models.list()}


def test_errors_arrive_as_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="tiny", messages=MESSAGES, n=10_000)
    assert wrong.value.param == "n" and wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="x" * 5000, max_tokens=1)
    assert long.value.code == "context_length_exceeded"


def test_a_request_id_comes_back(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=MESSAGES, max_tokens=1, extra_headers={"x-request-id": "my-request-1"}
    )
    assert raw.headers["x-request-id"] == "my-request-1"


def test_thirty_two_asynchronous_chats_at_once(server: LiveServer) -> None:
    async def run() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model=["tiny", "voice"][i % 2], messages=MESSAGES, max_tokens=8, temperature=0
                    )
                    for i in range(32)
                )
            )
        return [answer.choices[0].message.content for answer in answers]

    texts = asyncio.run(run())
    assert len(set(texts[0::2])) == 1 and len(set(texts[1::2])) == 1
    assert texts[0] != texts[1]
