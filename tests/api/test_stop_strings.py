"""Stop strings against a slow definition: look at the whole text after every character."""

from hypothesis import given, settings
from hypothesis import strategies as st

from serve.api.stop_strings import StopStrings

ALPHABET = "abc"


def shown_by_definition(text: str, stops: list[str], *, include: bool) -> str:
    """Cut at the stop string that is complete first; among those that end there, the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end if include else end - max(map(len, complete))]
    return text


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    st.lists(st.text(ALPHABET, max_size=4), max_size=8),
    st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4),
    st.booleans(),
)
def test_any_splitting_shows_what_the_definition_shows(pieces: list[str], stops: list[str], include: bool) -> None:
    matcher = StopStrings(stops, include_in_output=include)
    shown = ""
    expected = shown_by_definition("".join(pieces), stops, include=include)
    for piece in pieces:
        shown += matcher.feed(piece)
        assert expected.startswith(shown), "what was shown is never taken back"
    assert shown + matcher.finish() == expected
    assert matcher.has_matched is any(stop in "".join(pieces) for stop in stops)


def test_only_a_possible_beginning_is_held_back() -> None:
    matcher = StopStrings(["END"])
    assert matcher.feed("The E") == "The "
    assert matcher.feed("g") == "Eg"
    assert matcher.feed("E") == "" and matcher.feed("N") == "" and matcher.feed("D!") == ""
    assert matcher.has_matched and matcher.feed("more") == "" and matcher.finish() == ""


def test_without_stop_strings_nothing_is_held() -> None:
    assert StopStrings([]).feed("abc") == "abc"
