"""One sequence's events as pieces: independent of grouping, with exactly one end."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.api.output import OutputReader, OutputRules, Piece
from serve.errors import EngineFailed
from serve.messages import Finished, FinishReason, Tokens
from serve.text.token_bytes import TokenBytes
from tests.api.byte_tokenizer import IM_END, IM_START
from tests.api.test_detokenizer import BYTE_LEVEL

TOKEN_BYTES = TokenBytes(BYTE_LEVEL)


def read(groups: list[list[int]], rules: OutputRules, reason: FinishReason, stop_id: int | None) -> list[Piece]:
    """Feed token groups and the end; stop at the first piece that ends the sequence."""
    reader = OutputReader(0, rules, TOKEN_BYTES, at_text_start=True)
    pieces = []
    for group in groups:
        pieces.append(reader.read(Tokens("r", group)))
        if pieces[-1].finish_reason is not None:
            return pieces
    return [*pieces, reader.read(Finished("r", reason, stop_id))]


def joined(pieces: list[Piece]) -> tuple[str, list[int], str | None]:
    """Return text, ids and the reason of a whole reading."""
    ids = list(itertools.chain.from_iterable(piece.token_ids for piece in pieces))
    return "".join(piece.text for piece in pieces), ids, pieces[-1].finish_reason


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([97, 98, 0xC3, 0xA9, IM_END, 10]), min_size=1, max_size=12),
    st.lists(st.integers(1, 4), min_size=12, max_size=12),
    st.lists(st.text("abé", min_size=1, max_size=3), max_size=3),
    st.integers(0, 4),
)
def test_grouping_changes_nothing(ids: list[int], sizes: list[int], stops: list[str], min_tokens: int) -> None:
    rules = OutputRules(stop=tuple(stops), stop_token_ids=frozenset({IM_END, 10}), min_tokens=min_tokens)
    groups, rest = [], ids
    for size in sizes:
        groups.append(rest[:size])
        rest = rest[size:]
    stop_id = ids[-1] if ids[-1] in rules.stop_token_ids else None
    reason = FinishReason.LENGTH if stop_id is None else FinishReason.STOP
    one_by_one = read([[token_id] for token_id in ids], rules, reason, stop_id)
    grouped = read([group for group in groups if group], rules, reason, stop_id)
    assert joined(one_by_one) == joined(grouped)
    assert sum(piece.finish_reason is not None for piece in grouped) == 1


def test_a_stop_token_that_did_not_stop_is_text() -> None:
    rules = OutputRules(stop_token_ids=frozenset({10}))
    assert joined(read([[97], [10], [98]], rules, FinishReason.LENGTH, None))[0] == "a\nb"
    assert joined(read([[97], [10]], rules, FinishReason.LENGTH, None))[0] == "a\n"
    assert joined(read([[97], [10]], rules, FinishReason.STOP, 10))[0] == "a"


def test_a_stop_string_completed_by_the_last_text_wins_over_length() -> None:
    rules = OutputRules(stop=("b\n",), stop_token_ids=frozenset({10}))
    assert joined(read([[97, 98], [10]], rules, FinishReason.LENGTH, None)) == ("a", [97, 98, 10], "stop")


def test_single_control_tokens_can_be_shown() -> None:
    rules = OutputRules(shown_token_ids=frozenset({IM_START}))
    assert joined(read([[IM_START, IM_END, 97]], rules, FinishReason.LENGTH, None))[0] == "<|im_start|>a"


def test_an_abort_by_the_engine_is_an_error() -> None:
    with pytest.raises(EngineFailed):
        read([[97]], OutputRules(), FinishReason.ABORTED, None)
