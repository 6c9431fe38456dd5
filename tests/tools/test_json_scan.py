"""The scanner accepts exactly what the standard parser accepts, and says so at the right character."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.api.json_scan import JsonScan

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
objects = st.dictionaries(st.text(), values, max_size=4)


def accepts(text: str) -> bool:
    scan = JsonScan()
    return all(scan.feed(char) for char in text) and scan.is_done


def is_object(text: str) -> bool:
    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        return isinstance(json.loads(text, parse_constant=refuse), dict)
    except ValueError:
        return False


@settings(max_examples=100, deadline=None)
@given(objects, st.sampled_from([None, 2]), st.booleans())
def test_every_object_is_accepted_at_its_last_character(value: object, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    scan = JsonScan()
    for position, char in enumerate(text):
        assert not scan.is_done
        assert scan.feed(char), text[: position + 1]
    assert scan.is_done and not scan.feed(" ")


@settings(max_examples=200, deadline=None)
@given(objects, st.data())
def test_a_damaged_object_is_judged_as_the_standard_parser_does(value: object, data: st.DataObject) -> None:
    text = json.dumps(value)
    at = data.draw(st.integers(0, len(text) - 1))
    damage = data.draw(st.sampled_from(list('{}[]",:\\/utfnabe019-+. \n\x01é')))
    cut = data.draw(st.integers(0, 1))
    damaged = (text[:at] + damage + text[at + cut :]).strip()
    assert accepts(damaged) == (is_object(damaged) and damaged.startswith("{"))


@pytest.mark.parametrize(
    "text", ['{"a":01}', '{"a":1.}', '{"a":.5}', '{"a":+1}', '{"a":1e}', '{"a":tru}', '{"a":nul1}']
)
def test_bad_scalars_are_refused(text: str) -> None:
    assert not accepts(text)


def test_the_outermost_keys_and_strings_are_read() -> None:
    scan = JsonScan()
    for char in '{"na\\u006de": "get", "a": {"name": "inner"}, "b": [{"name": "deep"}]':
        assert scan.feed(char)
    assert scan.strings == {"name": "get"} and scan.key == "b" and scan.depth == 1


def test_nesting_past_what_clients_can_parse_is_refused() -> None:
    assert accepts('{"a":' * 63 + "{}" + "}" * 63)
    assert not accepts('{"a":' * 64 + "{}" + "}" * 64)
