"""`param` names the field that was wrong, also where a rule spans several fields, branches of a union, or grammars."""

import httpx
import pytest

from tests.api.api_server import ApiServer
from tests.api.fake_engine import MAX_MODEL_LEN
from tests.api.fake_store import BASE

NO_ANSWER = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}]}
BAD_SCHEMA = {"type": "no such type"}


def refused_param(answer: httpx.Response) -> str | None:
    """Check that an answer is a 400 and return the field it names."""
    assert answer.status_code == 400, answer.text
    param: str | None = answer.json()["error"]["param"]
    return param


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("stream_options", {"stream": False, "stream_options": {}}),
        ("top_logprobs", {"top_logprobs": 3}),
        ("continue_final_message", {"continue_final_message": True, "add_generation_prompt": True}),
        ("tool_choice", {"tool_choice": 5}),
        ("tool_choice", {"tool_choice": [1]}),
    ],
)
def test_a_rule_about_several_fields_names_the_one_to_change(
    param: str, fields: dict[str, object], api: ApiServer
) -> None:
    assert refused_param(api.chat(**fields)) == param


def test_tokenize_names_the_source_that_is_missing_or_doubled(api: ApiServer) -> None:
    messages = NO_ANSWER["messages"]
    assert refused_param(api.http.post("/tokenize", json={})) == "prompt"
    assert refused_param(api.http.post("/tokenize", json={"prompt": "a", "messages": messages})) == "prompt"
    both = {"messages": messages, "continue_final_message": True, "add_generation_prompt": True}
    assert refused_param(api.http.post("/tokenize", json=both)) == "continue_final_message"


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("structured_outputs", {"structured_outputs": {"regex": "("}}),
        ("structured_outputs", {"structured_outputs": {"json": BAD_SCHEMA}}),
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"schema": BAD_SCHEMA}}}),
        (
            "tools",
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": BAD_SCHEMA}}],
                "tool_choice": "required",
            },
        ),
    ],
)
def test_a_grammar_that_does_not_compile_names_the_field_it_came_from(
    param: str, fields: dict[str, object], api: ApiServer
) -> None:
    assert refused_param(api.chat(**fields)) == param
    if param != "tools":
        assert refused_param(api.complete(**fields)) == param


def test_a_context_error_names_the_prompt_when_no_max_tokens_would_help(api: ApiServer) -> None:
    long, short = "a" * (MAX_MODEL_LEN + 1), "a"
    assert refused_param(api.chat(long, max_tokens=8)) == "messages"
    assert refused_param(api.chat(short, max_tokens=MAX_MODEL_LEN)) == "max_tokens"
    assert refused_param(api.chat(short, max_completion_tokens=MAX_MODEL_LEN)) == "max_completion_tokens"
    assert refused_param(api.complete(long)) == "prompt"
    assert refused_param(api.complete(long, max_tokens=8)) == "prompt"
    assert refused_param(api.complete(short, max_tokens=MAX_MODEL_LEN)) == "max_tokens"
