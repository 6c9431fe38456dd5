"""Tool calls are read out of model text in every family, at every cut, and bad ones stay text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.api.tool_families import ToolFamily
from serve.api.tool_parser import Answer, CallDelta, ContentDelta, Delta, ToolParser, parse_complete

NAMES = frozenset({"get_weather", "add"})
LLAMA3, HERMES, MISTRAL = ToolFamily.LLAMA3, ToolFamily.HERMES, ToolFamily.MISTRAL
CALL = '{"name": "get_weather", "arguments": {"city": "Zürich \\"x\\" }{", "n": [1, {"a": null}]}}'
CITY = '{"city": "Zürich \\"x\\" }{", "n": [1, {"a": null}]}'
ADD = '{"name": "add", "parameters": {"a": 1, "b": -2.5e3}}'
SUM = '{"a": 1, "b": -2.5e3}'

# family, text, content, calls
WHOLE: dict[str, tuple[ToolFamily, str, str | None, list[tuple[str, str]]]] = {
    "hermes": (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", None, [("get_weather", CITY)]),
    "hermes, text before": (
        HERMES,
        f"Let me see.\n<tool_call>{CALL}</tool_call>",
        "Let me see.",
        [("get_weather", CITY)],
    ),
    "hermes, two calls": (
        HERMES,
        f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{ADD}\n</tool_call>",
        None,
        [("get_weather", CITY), ("add", SUM)],
    ),
    "hermes, text around": (
        HERMES,
        f"a <tool_call>{ADD}</tool_call> b",
        "a b",
        [("add", SUM)],
    ),
    "hermes, no closer": (HERMES, f"<tool_call>{ADD}", None, [("add", SUM)]),
    "hermes, half a closer": (HERMES, f"<tool_call>{ADD}\n</tool", None, [("add", SUM)]),
    "hermes, opener for closer": (
        HERMES,
        f"<tool_call>{ADD}<tool_call>{ADD}</tool_call>",
        None,
        [("add", SUM), ("add", SUM)],
    ),
    "arguments before the name": (
        HERMES,
        f'<tool_call>{{"arguments": {SUM}, "name": "add"}}</tool_call>',
        None,
        [("add", SUM)],
    ),
    "arguments as a string": (
        HERMES,
        f'<tool_call>{{"name": "add", "arguments": {json.dumps(SUM)}}}</tool_call>',
        None,
        [("add", SUM)],
    ),
    "no arguments": (HERMES, '<tool_call>{"name": "add"}</tool_call>', None, [("add", "{}")]),
    "empty arguments": (HERMES, '<tool_call>{"name": "add", "arguments": {}}</tool_call>', None, [("add", "{}")]),
    "llama": (LLAMA3, ADD, None, [("add", SUM)]),
    "llama, white space first": (LLAMA3, f"\n\n{ADD}\n", None, [("add", SUM)]),
    "llama, opener": (LLAMA3, f"<|python_tag|>{ADD}", None, [("add", SUM)]),
    "llama, text and opener": (LLAMA3, f"Sure: <|python_tag|> {ADD}", "Sure:", [("add", SUM)]),
    "llama, two": (LLAMA3, f"{ADD}; {CALL}", None, [("add", SUM), ("get_weather", CITY)]),
    "mistral": (MISTRAL, f"[TOOL_CALLS][{CALL}]", None, [("get_weather", CITY)]),
    "mistral, two": (MISTRAL, f"[TOOL_CALLS] [{CALL}, {ADD}]", None, [("get_weather", CITY), ("add", SUM)]),
    "mistral, text before": (MISTRAL, f"ok [TOOL_CALLS][{ADD}]", "ok", [("add", SUM)]),
    "mistral, no list": (MISTRAL, f"[TOOL_CALLS]{ADD}", None, [("add", SUM)]),
    # no calls
    "plain text": (HERMES, "  Hello <b>world</b> <tool \n", "  Hello <b>world</b> <tool \n", []),
    "llama answers JSON": (LLAMA3, '{"answer": 42}', '{"answer": 42}', []),
    "llama, JSON in text": (LLAMA3, f"The call is {ADD}", f"The call is {ADD}", []),
    "unknown tool": (
        HERMES,
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        [],
    ),
    "bad JSON": (HERMES, "<tool_call>{name: add}</tool_call>", "<tool_call>{name: add}</tool_call>", []),
    "no JSON": (HERMES, "<tool_call>add(1, 2)</tool_call>", "<tool_call>add(1, 2)</tool_call>", []),
    "arguments that are a list": (
        HERMES,
        '<tool_call>{"name": "add", "arguments": [1]}',
        '<tool_call>{"name": "add", "arguments": [1]}',
        [],
    ),
    "arguments of a broken string": (
        HERMES,
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": \\"\\ud800\\"}"}',
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": \\"\\ud800\\"}"}',
        [],
    ),
    "empty list": (MISTRAL, "[TOOL_CALLS][]", "[TOOL_CALLS][]", []),
    "bad then good": (HERMES, f"<tool_call>oh<tool_call>{ADD}</tool_call>", "<tool_call>oh", [("add", SUM)]),
    "nothing": (HERMES, "", "", []),
}


def stream(family: ToolFamily, pieces: list[str], *, parallel: bool = True) -> list[Delta]:
    parser = ToolParser(family, NAMES, parallel=parallel)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()
    assert parser.num_calls == len({delta.index for delta in deltas if isinstance(delta, CallDelta)})
    return deltas


def joined(deltas: list[Delta]) -> tuple[str, list[tuple[str, str]]]:
    """Put a stream together the way clients do."""
    content = ""
    calls: list[tuple[str, str]] = []
    for delta in deltas:
        if isinstance(delta, ContentDelta):
            content += delta.text
        elif delta.name is not None:
            assert delta.index == len(calls) and delta.call_id is not None and delta.call_id.startswith("call_")
            calls.append((delta.name, delta.arguments))
        else:
            assert delta.index == len(calls) - 1 and delta.call_id is None
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.arguments)
    return content, calls


def read(answer: Answer) -> tuple[str | None, list[tuple[str, str]]]:
    return answer.content, [(call.name, call.arguments) for call in answer.calls]


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_a_whole_answer_is_split_into_content_and_calls(case: str) -> None:
    family, text, content, calls = WHOLE[case]
    assert read(parse_complete(ToolParser(family, NAMES, parallel=True), text)) == (content, calls)


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_a_stream_gives_the_same_at_every_cut(case: str) -> None:
    family, text, content, calls = WHOLE[case]
    expected = (content or "", calls)
    assert joined(stream(family, list(text))) == expected
    for cut in range(len(text) + 1):
        assert joined(stream(family, [text[:cut], text[cut:]])) == expected, (text[:cut], text[cut:])


def test_content_streams_at_once_and_arguments_as_they_come() -> None:
    parser = ToolParser(HERMES, NAMES, parallel=True)
    assert parser.feed("Hello wor") == [ContentDelta("Hello wor")]
    assert parser.feed("ld <tool") == [ContentDelta("ld")]
    assert parser.feed('_call>{"name": "add", "argu') == []
    (first,) = parser.feed('ments": {"a": 1')
    assert isinstance(first, CallDelta) and (first.index, first.name, first.arguments) == (0, "add", '{"a": 1')
    assert parser.feed("2, ") == [CallDelta(0, None, None, "2, ")]
    assert parser.feed('"b": 3}}</tool') == [CallDelta(0, None, None, '"b": 3}')]
    assert parser.feed("_call>") == [] and parser.finish() == []


def test_an_answer_cut_off_in_its_arguments_keeps_what_came() -> None:
    assert joined(stream(HERMES, ['<tool_call>{"name": "add", "arguments": {"a": 1'])) == ("", [("add", '{"a": 1')])
    whole = parse_complete(ToolParser(HERMES, NAMES, parallel=True), '<tool_call>{"name": "add", "arguments": {"a": 1')
    assert whole == Answer('<tool_call>{"name": "add", "arguments": {"a": 1', [])


def test_without_parallel_calls_there_is_at_most_one() -> None:
    text = f"<tool_call>{ADD}</tool_call><tool_call>{ADD}</tool_call>"
    assert joined(stream(HERMES, [text], parallel=False)) == ("", [("add", SUM)])
    assert joined(stream(MISTRAL, [f"[TOOL_CALLS][{ADD}, {ADD}]"], parallel=False)) == ("", [("add", SUM)])


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([LLAMA3, HERMES, MISTRAL]),
    st.lists(
        st.sampled_from(
            [
                *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", ADD, CALL, ADD[:20]),
                *("[", "]", ",", ";", " ", "\n", "text", "{", "}", '"', "\\", "é", "<", "<tool"),
            ]
        ),
        max_size=8,
    ),
    st.data(),
)
def test_any_text_gives_the_same_at_any_cuts(family: ToolFamily, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert joined(stream(family, pieces)) == joined(stream(family, list(text)))
    answer = parse_complete(ToolParser(family, NAMES, parallel=True), text)
    assert all(isinstance(json.loads(call.arguments), dict) and call.name in NAMES for call in answer.calls)
    if not answer.calls:
        assert answer.content == text


@pytest.mark.parametrize("text", ["<tool_call>" * 3_000, "{" * 30_000, "<" * 30_000, '<tool_call>{"a":' + '"' * 30_000])
def test_long_hostile_text_takes_linear_time(text: str) -> None:
    for family in (LLAMA3, HERMES, MISTRAL):
        assert joined(stream(family, [text])) == (text, [])
